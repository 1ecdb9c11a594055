"""Rollouts under load while everything that takes part in them is killed, stopped, taken away or told a wrong time."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from core_support import NO_POSTGRESQL, postgresql_server, without_postgresql
from rollout_support import decisions, release_pair
from serving_support import Load, RunningServer, logged, start_server, wait_until

from mlops_workbench.core import clock, leases
from mlops_workbench.core.errors import ConflictError, LedgerError, WorkbenchError
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.pipeline.loop import tend
from mlops_workbench.release import rollout_judge, rollouts
from mlops_workbench.release.deployment import rollback, write_projection
from mlops_workbench.release.rollout_judge import Move

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
BY = {"actor": "mover", "reason": "a drill"}


def one_move(workspace: Workspace, draw: random.Random) -> None:
    """Any legal move: start, advance, pause, resume, abort, promote, or back to the other release."""
    ledger = Ledger(workspace.ledger_url)
    slot, found = ledger.slot("champion"), ledger.open_rollout()
    assert slot is not None
    if found is None:
        other = next(row for row in ledger.releases() if row.digest != slot.digest)
        if draw.random() < 0.2:
            rollback(workspace, other.name, **BY)
        else:
            rollouts.start_rollout(workspace, other.name, shares=(0.1, 0.5), **BY)
        return
    verbs = ["abort", "promote"]
    if found.step + 1 < len(found.steps):
        verbs += ["advance"] * 3
    verbs.append("resume" if found.status == "paused" else "pause")
    getattr(rollouts, f"{draw.choice(verbs)}_rollout")(workspace, found, **BY)


def mover(root: Path, seed: int, told: Connection) -> None:
    """A controller that moves without a pause, until it is killed."""
    workspace, draw = Workspace.open(root), random.Random(seed)
    write_projection(workspace)  # as `mwb loop` does at each look
    told.send("begun")
    while True:
        try:
            one_move(workspace, draw)
        except WorkbenchError:
            continue


def killed_mover(root: Path, seed: int) -> None:
    """Let a controller work for a moment, and kill it in the middle."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=mover, args=(root, seed, theirs))
    child.start()
    assert ours.poll(60) and ours.recv() == "begun"
    time.sleep(random.Random(seed).uniform(0, 0.25))
    child.kill()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL


def check_records(workspace: Workspace) -> None:
    """Nothing half-promoted, nothing doubled: the tables are what the audit says, and each end of a rollout is one decision."""
    ledger = Ledger(workspace.ledger_url)
    report = ledger.verify()
    assert report.ok, report.problems[:3]
    rows = ledger.rollouts()
    assert sum(row.ended_at is None for row in rows) <= 1
    ends = Counter(
        d.evidence["rollout"]
        for d in ledger.decisions(limit=100_000, kind="rollout")
        if d.verdict in ("promoted", "aborted")
    )
    assert all(count == 1 for count in ends.values())
    by_rollback = {row.name for row in rows if "rolled back" in row.reason}
    assert {row.name for row in rows if row.ended_at} == set(ends) | by_rollback
    ledger.close()


@contextmanager
def under_load(
    workspace: Workspace, clients: int = 2, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[RunningServer, Load]]:
    """A server, and clients that ask without a pause."""
    here = ("--workspace", str(workspace.root))
    server = start_server(workspace.root.parent, *here, environment=environment)
    server.wait_ready()
    load = Load(server.port).start(clients)
    try:
        yield server, load
    finally:
        load.stop()
        if server.process.poll() is None:
            server.kill()


def test_controllers_killed_at_any_moment_leave_no_half_move(tmp_path: Path) -> None:
    """150 kills in the middle of moves under load: whole records, the server follows the ledger, no request fails."""
    workspace, _, _ = release_pair(tmp_path / "w")
    with under_load(workspace) as (server, load):
        control = server.client()
        for seed in range(150):
            killed_mover(workspace.root, seed)
            if seed % 10 == 9:
                check_records(workspace)
                write_projection(workspace)
                slot = Ledger(workspace.ledger_url).slot("champion")
                assert slot is not None
                wait_until(
                    lambda s=slot: control.get("/health").body["digest"] == s.digest,
                    10,
                    "the champion",
                )
        asked = len(load.answers)
    assert not load.failures, load.failures[:3]
    assert asked > 1000
    check_records(workspace)
    made = Counter(decisions(workspace))
    print("moves between 150 kills:", dict(made), "requests:", asked)
    assert min(made[word] for word in ("started", "advanced", "promoted", "aborted")) >= 5


def test_servers_killed_in_a_rollout_lose_nothing_they_said(tmp_path: Path) -> None:
    """50 kills of the server, its log writer with it, while traffic is split: each acknowledged row is in the log once."""
    workspace, _, new = release_pair(tmp_path / "w")
    rollouts.start_rollout(workspace, new, actor="test", shares=(0.5,), reason="a drill")
    told: Counter[str] = Counter()
    for seed in range(50):
        server = start_server(tmp_path, "--workspace", str(workspace.root))
        server.wait_ready()
        load = Load(server.port, expect_death=True).start(2)
        time.sleep(random.Random(seed).uniform(0.05, 0.4))
        server.kill()
        load.stop()
        told.update(f"{seed}/{each['id']}" for _, status, body in load.answers if status == 200 for each in body["predictions"])  # fmt: skip
        server_log = server.log.read_text()
        assert "Traceback" not in server_log, server_log
    kept = Counter(record["id"] for record in logged(workspace.predictions))
    said = Counter(key.partition("/")[2] for key in told)
    assert sum(said.values()) > 1000
    lost = {key: count for key, count in said.items() if kept[key] < count}
    assert not lost, dict(list(lost.items())[:5])
    check_records(workspace)


def test_a_leader_that_slept_past_its_lease_decides_nothing(tmp_path: Path) -> None:
    """SIGSTOP between look and move; another controller moves; when the first wakes up its move is refused."""
    workspace, _, new = release_pair(tmp_path / "w")
    rollouts.start_rollout(workspace, new, actor="test", shares=(0.1, 0.5), reason="a drill")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def leader() -> None:
        rollout_judge.LEASE_SECONDS = 1.0

        def slow_word(*_: object) -> Move:
            theirs.send("looked")
            time.sleep(0.5)  # stopped here
            return Move("advance", "the sleeper's word")

        rollout_judge.next_move = slow_word
        try:
            rollout_judge.tend_rollout(workspace, actor="sleeper")
        except ConflictError as error:
            theirs.send(f"refused: {error}")
        else:
            theirs.send("moved")

    child = context.Process(target=leader)
    child.start()
    assert ours.poll(60) and ours.recv() == "looked"
    os.kill(child.pid or 0, signal.SIGSTOP)
    time.sleep(1.5)
    ledger = Ledger(workspace.ledger_url)
    lease = ledger.acquire_lease(rollout_judge.LEASE, "second", 60)
    rollouts.advance_rollout(
        workspace, rollouts.the_rollout(ledger), actor="second", reason="awake", fence=lease
    )
    os.kill(child.pid or 0, signal.SIGCONT)
    assert ours.poll(60) and ours.recv().startswith("refused: ")
    child.join(30)
    assert decisions(workspace) == ["started", "advanced"]
    check_records(workspace)


def test_a_clock_an_hour_ahead_gives_no_second_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A controller whose clock jumped takes the lease that seems to have run out; the fence stops the one it took it from."""
    workspace, _, new = release_pair(tmp_path / "w")
    rollouts.start_rollout(workspace, new, actor="test", shares=(0.1, 0.5), reason="a drill")
    ledger = Ledger(workspace.ledger_url)
    seen, first = (
        rollouts.the_rollout(ledger),
        ledger.acquire_lease(rollout_judge.LEASE, "first", 60),
    )
    with monkeypatch.context() as patched:
        ahead = clock.now
        patched.setattr(leases, "now", lambda: ahead() + timedelta(hours=1))
        second = ledger.acquire_lease(rollout_judge.LEASE, "an hour ahead", 60)
        rollouts.advance_rollout(workspace, seen, actor="an hour ahead", reason="x", fence=second)
    for rollout in (seen, rollouts.the_rollout(ledger)):
        with pytest.raises(ConflictError):
            rollouts.promote_rollout(workspace, rollout, actor="first", reason="late", fence=first)
    assert decisions(workspace) == ["started", "advanced"]
    check_records(workspace)


LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
CONTROLLER = """
import select, sys
from pathlib import Path
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.pipeline.loop import tend
workspace = Workspace.open(Path(sys.argv[1]))
while True:
    print(tend(workspace, lambda text: None) or "nobody", flush=True)
    select.select([], [], [], 0.1)  # time.sleep does not work under libfaketime 0.9.10
"""
GONE = """
import os, signal, sys
from pathlib import Path
from mlops_workbench.core.errors import ConflictError
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.release.rollout_judge import LEASE
ledger = Ledger(Workspace.open(Path(sys.argv[1])).ledger_url)
while True:
    try:
        ledger.acquire_lease(LEASE, "gone", 60)
        os.kill(os.getpid(), signal.SIGKILL)
    except ConflictError:
        continue  # the controller had it just then
"""


@pytest.mark.skipif(LIBFAKETIME is None, reason="libfaketime is not installed")
def test_the_clock_of_everybody_jumps_an_hour_ahead_and_back(tmp_path: Path) -> None:
    """Server and controller live on (faketime): no request fails, nothing is decided blind, and a lease of the wrong hour is not waited for."""
    workspace, _, new = release_pair(tmp_path / "w", minimum_minutes=30, minimum_rows=20)
    rollouts.start_rollout(workspace, new, actor="test", shares=(0.1, 0.5), reason="a drill")
    offset, said = tmp_path / "offset", tmp_path / "controller.log"
    environment = {
        "LD_PRELOAD": str(LIBFAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }

    def process(code: str, output: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code, str(workspace.root)]
        with output.open("ab") as stream:
            return subprocess.Popen(
                command, stdout=stream, stderr=stream, env={**os.environ, **environment}
            )

    def jump(seconds: str) -> None:
        offset.write_text(seconds)
        looks = len(said.read_text().split()) if said.exists() else 0
        wait_until(lambda: said.read_text().split()[looks:].count("wait") >= 5, 30, "five looks")

    offset.write_text("+0")
    with under_load(workspace, environment=environment) as (server, load):
        controller = process(CONTROLLER, said)
        jump("+0")
        jump("+3600")
        assert process(GONE, tmp_path / "gone.log").wait(60) == -signal.SIGKILL
        wait_until(lambda: said.read_text().endswith("nobody\n"), 10, "the lease of the dead one")
        jump("+0")
        assert controller.poll() is None and server.process.poll() is None
        controller.kill()
        controller.wait()
        going = rollouts.the_rollout(Ledger(workspace.ledger_url))
        rollouts.advance_rollout(workspace, going, **BY)
        health = server.client()
        wait_until(lambda: health.get("/health").body["arms"][1]["share"] == 0.5, 10, "the split")
    assert not load.failures, load.failures[:3]
    assert decisions(workspace) == ["started", "advanced"]
    assert set(said.read_text().split()) == {"wait", "nobody"}, said.read_text()
    records = logged(workspace.predictions)
    ahead = {round((record["time"] - time.time()) / 3600) for record in records}
    assert ahead == {0, 1}, "the log has both clocks"
    told = Counter(each["id"] for _, _, body in load.answers for each in body["predictions"])
    assert Counter(record["id"] for record in records) == told
    check_records(workspace)


@pytest.mark.skipif(bool(NO_POSTGRESQL), reason=NO_POSTGRESQL or "present")
def test_a_database_killed_at_any_moment_leaves_no_half_move(tmp_path: Path) -> None:
    """PostgreSQL dies 20 times in the middle of moves and comes back; the controller goes on, serving never stops."""
    with postgresql_server() as address:
        workspace, _, _ = release_pair(tmp_path / "w", ledger=address.format(database="postgres"))
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        child = context.Process(target=mover, args=(workspace.root, 1, theirs))
        with under_load(workspace) as (server, load):
            child.start()
            assert ours.poll(60) and ours.recv() == "begun"
            draw = random.Random(2)
            for _ in range(20):
                time.sleep(draw.uniform(0.1, 0.6))
                with without_postgresql(address):
                    time.sleep(draw.uniform(0, 0.3))
            time.sleep(1)
            assert child.is_alive()
            child.kill()
            child.join(30)
            write_projection(workspace)
            slot = Ledger(workspace.ledger_url).slot("champion")
            assert slot is not None
            health = server.client()
            wait_until(lambda: health.get("/health").body["digest"] == slot.digest, 10, "it")
        assert not load.failures, load.failures[:3]
        made = Counter(decisions(workspace))
        print(
            "moves between 20 deaths of the database:", dict(made), "requests:", len(load.answers)
        )
        assert made.total() > 20
        check_records(workspace)


@pytest.mark.skipif(bool(NO_POSTGRESQL), reason=NO_POSTGRESQL or "present")
def test_without_its_database_for_half_a_minute_serving_goes_on_and_nothing_is_decided(
    tmp_path: Path,
) -> None:
    """PostgreSQL is stopped under load; the controller says so and waits, and goes on when it is back."""
    with postgresql_server() as address:
        workspace, _, new = release_pair(tmp_path / "w", ledger=address.format(database="postgres"))
        rollouts.start_rollout(workspace, new, actor="test", shares=(0.1, 0.5), reason="a drill")
        with under_load(workspace) as (_, load):
            time.sleep(0.5)
            before, refused = len(load.answers), 0
            with without_postgresql(address):
                until = time.monotonic() + 30
                while time.monotonic() < until:
                    try:
                        tend(workspace, lambda text: None)
                    except LedgerError:
                        refused += 1
                    time.sleep(0.5)
                during = len(load.answers) - before
            assert refused >= 10 and during > 500
            assert tend(workspace, lambda text: None) == "wait"
        assert not load.failures, load.failures[:3]
        assert decisions(workspace) == ["started"]
        check_records(workspace)
