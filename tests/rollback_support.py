"""Back to the former release under steady requests, again and again, and what the callers noticed."""

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
from rollout_support import add_release, release_pair
from serving_support import CARRIERS, ROW, Client, serving, wait_until

from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.release.deployment import clear_release, deploy, rollback
from mlops_workbench.release.rollout_judge import tend_rollout
from mlops_workbench.release.rollouts import start_rollout

CONNECTIONS, PEOPLE = 8, 40  # each of them asks again after a fifth of a second
Heard = tuple[float, float, str, str]  # asked and answered (time.time), by whom, by which release


@dataclass
class Callers:
    """What was heard at a fixed rate of requests, whatever the answers take."""

    heard: list[Heard] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def _ask(port: int, per_second: float, over: Event, told: Connection) -> None:
    """The process of the callers: a timetable for each connection, so that a slow answer delays no other one."""
    found, stop, begun = Callers(), threading.Event(), time.time()

    def ask(place: int) -> None:
        client = Client(port)
        for turn in count():
            number = turn * CONNECTIONS + place
            if stop.wait(max(0.0, begun + number / per_second - time.time())):
                return
            entity, asked = f"F{number % PEOPLE}", time.time()
            row = {**ROW, "hour": number % 24, "carrier": CARRIERS[number % 4], "flight_id": entity}
            try:
                answer = client.post("/predict", {"row": row})
                problem = "" if answer.status == 200 else f"{answer.status}: {answer.body}"
            except Exception as error:  # noqa: BLE001 - every failure of a request is a finding
                problem, client = repr(error), Client(port)
            if problem:
                found.failed.append(problem)
            else:
                found.heard.append((asked, time.time(), entity, answer.body["release"]))

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    over.wait()
    stop.set()
    for thread in threads:
        thread.join()
    found.seconds = time.time() - begun
    told.send(found)


@contextmanager
def asking(port: int, per_second: float) -> Iterator[Callers]:
    """Callers in a process of their own; what they heard is there when the block has ended."""
    context, callers = multiprocessing.get_context("fork"), Callers()
    ours, theirs = context.Pipe(duplex=False)
    over = context.Event()
    child = context.Process(target=_ask, args=(port, per_second, over, theirs))
    child.start()
    try:
        yield callers
    finally:
        over.set()
        found = ours.recv()
        child.join(30)
        callers.heard, callers.failed, callers.seconds = found.heard, found.failed, found.seconds


@dataclass(frozen=True)
class Back:
    """One way back: the release that was left and the one that was gone back to."""

    left: str
    there: str
    looked: float  # time.time at which the look began that found the reason
    decided: float  # as the ledger has it
    until: float = 0.0  # when the next round began


@dataclass
class Figures:
    """What a series of roll-backs showed; times in milliseconds, one a roll-back."""

    what: str
    callers: Callers
    first: list[
        float
    ]  # from the decision to the first answer that the former release gave to one of the other's callers
    last: list[
        float
    ]  # from the decision to the last answer of the release that was left; 0 without
    look: list[float]  # from the beginning of the look to the decision

    def line(self) -> str:
        """One line of the table."""
        p50, p99, worst = (float(np.quantile(self.first, q)) for q in (0.5, 0.99, 1.0))
        asked = len(self.callers.heard) + len(self.callers.failed)
        return (
            f"{self.what:44} {len(self.first):5} {asked:8} {asked / self.callers.seconds:6.0f} {len(self.callers.failed):7}"
            f" {np.median(self.look):8.0f} {p50:8.1f} {p99:8.1f} {worst:8.1f} {max(self.last):8.1f}"
        )


HEAD = f"{'':44} {'times':>5} {'requests':>8} {'/s':>6} {'failed':>7} {'look ms':>8} {'p50 ms':>8} {'p99 ms':>8} {'max ms':>8} {'last ms':>8}"


def decided_at(workspace: Workspace, kind: str) -> float:
    """The moment of the newest decision of a kind."""
    return datetime.fromisoformat(Ledger(workspace.ledger_url).decisions(1, kind)[0].at).timestamp()


def loaded(client: Client, *names: str) -> bool:
    """Whether the server serves just these releases."""
    return {arm["name"] for arm in client.get("/health").body["arms"]} == set(names)


def guard_rail_rounds(workspace: Workspace, client: Client, rounds: int) -> Iterator[Back]:
    """The loop itself sends a release back that has half of the traffic and is slower than its guard rail allows."""
    for _ in range(rounds):
        start_rollout(workspace, "flights-r2", actor="test", shares=(0.5,))
        wait_until(lambda: loaded(client, "flights-r1", "flights-r2"), 20, "half of the traffic")
        kind, end = "wait", time.monotonic() + 60
        while kind == "wait":
            assert time.monotonic() < end, "the guard rail was never felt"
            time.sleep(0.3)
            began = time.time()
            looked = tend_rollout(workspace, actor="controller")
            assert looked is not None
            kind = looked[2].kind
        assert kind == "abort" and looked[2].reason.startswith("guard rail: p99"), looked[2]
        decided = decided_at(workspace, "rollout")
        time.sleep(0.3)
        yield Back("flights-r2", "flights-r1", began, decided, time.time())
        assert tend_rollout(workspace, actor="controller") is None  # it is over: no second word
        clear_release(workspace, "flights-r2", actor="test", reason="the next round")


def champion_rounds(workspace: Workspace, client: Client, rounds: int) -> Iterator[Back]:
    """The serving release goes back as a rule of the monitor asks for it: with its data version, and barred."""
    for _ in range(rounds):
        deploy(workspace, "flights-r2", actor="test")
        wait_until(lambda: loaded(client, "flights-r2"), 20, "the new release")
        time.sleep(0.2)
        began = time.time()
        change = rollback(workspace, actor="monitor", reason="rule quality: a drill", bar=True)
        assert change.name == "flights-r1"
        decided = decided_at(workspace, "rollback")
        time.sleep(0.3)
        yield Back("flights-r2", "flights-r1", began, decided, time.time())
        clear_release(workspace, "flights-r2", actor="test", reason="the next round")


def unloaded_rounds(workspace: Workspace, client: Client, rounds: int) -> Iterator[Back]:
    """The same where the server has to load the former release again: three others served since."""
    for _ in range(rounds):
        for name in ("flights-r3", "flights-r4", "flights-r2"):
            deploy(workspace, name, actor="test")
            wait_until(lambda name=name: loaded(client, name), 20, name)
        began = time.time()
        rollback(workspace, "flights-r1", actor="monitor", reason="a drill", bar=True)
        decided = decided_at(workspace, "rollback")
        wait_until(lambda: loaded(client, "flights-r1"), 20, "the former release")
        time.sleep(0.3)
        yield Back("flights-r2", "flights-r1", began, decided, time.time())
        clear_release(workspace, "flights-r2", actor="test", reason="the next round")


Rounds = Callable[[Workspace, Client, int], Iterator[Back]]
KINDS: dict[str, Rounds] = {
    "a rollout at 50 %, by its guard rail": guard_rail_rounds,
    "the champion, by a rule of the monitor": champion_rounds,
    "the champion, the former one not in memory": unloaded_rounds,
}


def measure_rollbacks(
    folder: Path, what: str, rounds: int, per_second: float = 200.0
) -> tuple[Workspace, Figures]:
    """So many roll-backs of a kind under so many requests a second."""
    workspace, _, _ = release_pair(folder / "w", latency_p99_ms=0.0001, minimum_minutes=0)
    for name, bias in (("flights-r3", 0.7), ("flights-r4", 0.9)):
        add_release(workspace, name, bias)
    with serving(folder, "--workspace", str(workspace.root)) as server:
        server.wait_ready()
        with asking(server.port, per_second) as callers:
            backs = list(KINDS[what](workspace, server.client(), rounds))
    return workspace, figures(what, callers, backs)


def figures(what: str, callers: Callers, backs: list[Back]) -> Figures:
    """The times of each way back, as the callers knew them."""
    first, last, place = [], [], 0
    heard = sorted(callers.heard)
    mine: set[str] = set()  # whom the release that is left has answered since the last way back
    for back in backs:
        found, latest = float("nan"), back.decided
        while place < len(heard) and heard[place][0] < back.until:
            asked, at, entity, release = heard[place]
            place += 1
            if asked < back.decided:
                mine |= {entity} if release == back.left else set()
            elif release == back.left:
                latest = max(latest, at)
            elif release == back.there and entity in mine:
                found = min(found, at) if found == found else at
        first.append((found - back.decided) * 1000)
        last.append((latest - back.decided) * 1000)
        mine.clear()
    return Figures(what, callers, first, last, [(b.decided - b.looked) * 1000 for b in backs])
