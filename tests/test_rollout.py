"""A new release against the one that serves, with a real server, real requests and real labels."""

import json
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from core_support import race
from pipeline_support import stage_cells, write_stages
from rollout_support import add_release, decisions, release_pair, split
from serving_support import (
    CARRIERS,
    ORIGINS,
    ROW,
    RunningServer,
    late_model,
    logged,
    serving,
    wait_until,
)

from mlops_workbench.cli.main import main
from mlops_workbench.core.clock import iso, now
from mlops_workbench.core.errors import ConflictError, IntegrityError
from mlops_workbench.core.ledger import Ledger, RolloutRow
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.pipeline.loop import deploy_waiting
from mlops_workbench.release.deployment import deploy, rollback
from mlops_workbench.release.rollout_evidence import read_evidence
from mlops_workbench.release.rollout_judge import tend_rollout
from mlops_workbench.release.rollouts import (
    abort_rollout,
    advance_rollout,
    start_rollout,
    the_rollout,
)
from mlops_workbench.release.waiting import in_the_way, let_wait, waiting_release

QUICK = {"minimum_minutes": 0, "minimum_rows": 200, "margin": 0.1}
BY = {"actor": "test", "reason": "a test"}


def flight(number: int) -> dict[str, object]:
    """A request; the same number always asks the same."""
    draw = random.Random(number)
    changed = {
        "hour": draw.randrange(24),
        "distance": draw.randrange(100, 3000),
        "temp": draw.uniform(10, 90),
    }
    return {
        **ROW,
        **changed,
        "carrier": draw.choice(CARRIERS),
        "origin": draw.choice(ORIGINS),
        "flight_id": f"F{number}",
    }


class Traffic:
    """Requests one after another, each labelled at once; every answer is kept."""

    def __init__(self, server: RunningServer, truth: Callable[[dict[str, object]], str]) -> None:
        self.client, self.truth = server.client(), truth
        self.statuses: Counter[int] = Counter()
        self.slots: dict[str, set[str]] = {}
        self.asked = 0

    def send(self, count: int, rows: int = 20) -> None:
        """So many requests of `rows` rows, with their labels."""
        for _ in range(count):
            flights = [flight(self.asked + place) for place in range(rows)]
            self.asked += rows
            answer = self.client.post("/predict", {"rows": flights})
            self.statuses[answer.status] += 1
            for row, told in zip(flights, answer.body["predictions"], strict=True):
                slot = told.get("slot", answer.body["slot"])
                self.slots.setdefault(str(row["flight_id"]), set()).add(slot)
            labels = [
                {"id": told["id"], "label": self.truth(row)}
                for row, told in zip(flights, answer.body["predictions"], strict=True)
            ]
            self.client.post("/feedback", {"feedback": labels})


@contextmanager
def serve(workspace: Workspace) -> Iterator[RunningServer]:
    """The workspace's own server, ready."""
    with serving(workspace.root.parent, "--workspace", str(workspace.root)) as server:
        server.wait_ready()
        yield server


def mostly(word: str, share: float) -> Callable[[dict[str, object]], str]:
    """The truth of a world in which so many flights are `word`."""
    other = {"late": "on time", "on time": "late"}[word]
    return lambda row: word if random.Random(str(row["flight_id"])).random() < share else other


def tended(workspace: Workspace, traffic: Traffic, looks: int = 30) -> list[str]:
    """Traffic and looks until the rollout ended; the kinds of the moves that were made."""
    moves = []
    for _ in range(looks):
        traffic.send(15)
        looked = tend_rollout(workspace, actor="controller")
        if looked is None:
            break
        if looked[2].kind != "wait":
            moves.append(looked[2].kind)
            shares = split(workspace)
            wait_until(lambda shares=shares: in_force(traffic, shares), 10, f"the split {shares}")
    return moves


def in_force(traffic: Traffic, shares: dict[str, float]) -> bool:
    """Whether the server gives its slots these shares."""
    arms = traffic.client.get("/health").body["arms"]
    return {arm["slot"]: pytest.approx(arm["share"]) for arm in arms} == shares


def begin(
    workspace: Workspace, traffic: Traffic, new: str, shares: tuple[float, ...]
) -> RolloutRow:
    """Start a rollout and wait until the server splits the traffic."""
    rollout = start_rollout(workspace, new, actor="test", shares=shares)
    wait_until(lambda: in_force(traffic, split(workspace)), 10, "the split")
    return rollout


def test_the_better_release_takes_over_step_by_step(tmp_path: Path) -> None:
    """The new release says "on time" more often, which is the truth: 20 %, half, everything; nobody is answered by two releases a step."""
    workspace, old, new = release_pair(tmp_path / "w", bias=1.5, **QUICK)
    with serve(workspace) as server:
        traffic = Traffic(server, mostly("on time", 0.95))
        traffic.send(5)
        begin(workspace, traffic, new, (0.2, 0.5))
        assert tended(workspace, traffic) == ["advance", "promote"]
        assert split(workspace) == {"champion": 1.0}
        assert traffic.client.get("/release").body["release"] == new
        assert set(traffic.statuses) == {200}
    ledger = Ledger(workspace.ledger_url)
    assert decisions(workspace) == ["started", "advanced", "promoted"]
    last = ledger.decisions(kind="rollout")[0]
    assert last.reason.startswith("better: accuracy +") and last.evidence["new"]["name"] == new
    assert last.evidence["old"]["mean"] < last.evidence["new"]["mean"]
    assert ledger.verify().ok
    assert [m.title for m in ledger.messages()][0] == f"{new} serves all traffic now"


def test_the_worse_release_goes_back_by_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, old, new = release_pair(tmp_path / "w", bias=1.5, **QUICK)
    with serve(workspace) as server:
        traffic = Traffic(server, mostly("late", 0.95))
        begin(workspace, traffic, new, (0.2, 0.5))
        assert tended(workspace, traffic)[-1] == "abort"
        decided = time.monotonic()
        wait_until(lambda: in_force(traffic, {"champion": 1.0}), 5, "the old release alone")
        assert time.monotonic() - decided < 1
        assert {record["name"] for record in logged(workspace.predictions)[-20:]} <= {old, new}
        traffic.send(3)
        assert {record["name"] for record in logged(workspace.predictions)[-20:]} == {old}
        assert set(traffic.statuses) == {200}
    assert Ledger(workspace.ledger_url).release(new).status == "barred"
    here = ["-w", str(workspace.root)]
    assert main(["release", "start", new, "--steps", "5", *here]) == 4
    assert "barred" in capsys.readouterr().err
    assert main(["release", "status", *here]) == 0
    assert "worse: accuracy" in capsys.readouterr().out


def test_equal_releases_get_no_false_word_and_the_time_ends_it(tmp_path: Path) -> None:
    """The same model under another name: "not yet" or "equivalent", never "better" or "worse"; after the longest time the former one stays."""
    workspace, old, new = release_pair(
        tmp_path / "w",
        bias=0.0001,
        minimum_minutes=0,
        minimum_rows=200,
        margin=0.005,
        maximum_hours=2,
    )
    with serve(workspace) as server:
        traffic = Traffic(server, mostly("late", 0.6))
        begin(workspace, traffic, new, (0.5,))
        assert tended(workspace, traffic, looks=4) == []
        evidence = read_evidence(workspace, the_rollout(Ledger(workspace.ledger_url)))
        assert (
            evidence.verdict.word == "not yet" and evidence.ratio is not None and evidence.ratio.ok
        )
        looked = tend_rollout(workspace, actor="controller", moment=time.time() + 3 * 3600)
    assert looked is not None and looked[2].kind == "abort" and "in 2 hours" in looked[2].reason
    assert (
        Ledger(workspace.ledger_url).release(new).status == "approved"
    )  # not barred: nothing was wrong with it


def test_everybody_stays_with_one_release_through_a_restart(tmp_path: Path) -> None:
    workspace, old, new = release_pair(tmp_path / "w", bias=1.5, **QUICK)
    found: dict[str, set[str]] = {}
    loaded = set[str]()
    start_rollout(workspace, new, actor="test", shares=(0.3,))
    for _ in range(2):  # another process each time
        with serve(workspace) as server:
            traffic = Traffic(server, mostly("late", 0.5))
            wait_until(lambda traffic=traffic: in_force(traffic, split(workspace)), 10, "the split")
            about, slot = traffic.client.get("/release").body, Ledger(workspace.ledger_url).slot
            assert (serving := slot("champion")) and about["since"] == serving.updated_at
            loaded.add(about["loaded_at"])
            traffic.send(50)
            for entity, slots in traffic.slots.items():
                found.setdefault(entity, set()).update(slots)
    assert len(loaded) == 2, (
        "each process says when it began, and both since when the release serves"
    )
    assert len(found) == 1000 and all(len(slots) == 1 for slots in found.values())
    share = sum(slots == {"challenger"} for slots in found.values()) / len(found)
    assert 0.25 < share < 0.35


@pytest.mark.parametrize("fault", ["no number", "damaged"])
def test_a_broken_release_never_receives_traffic(tmp_path: Path, fault: str) -> None:
    workspace, old, new = release_pair(tmp_path / "w", **QUICK)
    model = late_model(nan=True) if fault == "no number" else None
    bundle = add_release(workspace, "flights-r9", model=model)
    if fault == "damaged":
        (bundle / "model.onnx").write_bytes(b"damaged")
        with pytest.raises(IntegrityError):
            start_rollout(workspace, "flights-r9", actor="test", shares=(0.5,))
        assert decisions(workspace) == []
        return
    with serve(workspace) as server:
        traffic = Traffic(server, mostly("late", 0.5))
        start_rollout(workspace, "flights-r9", actor="test", shares=(0.5,))
        wait_until(lambda: traffic.client.get("/health").body["problem"], 10, "the refusal")
        traffic.send(30)
        assert set(traffic.statuses) == {200}
        assert {record["name"] for record in logged(workspace.predictions)} == {old}
        looked = tend_rollout(workspace, actor="controller")
    assert looked is not None and looked[2].kind == "wait" and "not" in looked[2].reason


def test_eight_controllers_make_one_decision(tmp_path: Path) -> None:
    workspace, old, new = release_pair(tmp_path / "w", **QUICK)
    rollout = start_rollout(workspace, new, actor="test", shares=(0.1, 0.2, 0.3, 0.4, 0.5))
    for step in range(1, 5):

        def advance(number: int, seen: RolloutRow = rollout) -> bool:
            try:
                advance_rollout(workspace, seen, actor=f"controller {number}", reason="a race")
            except ConflictError:
                return False
            return True

        assert sum(answer is True for answer in race(advance)) == 1
        rollout = the_rollout(Ledger(workspace.ledger_url))
        assert (rollout.step, rollout.version) == (step, step + 1)
    assert decisions(workspace) == ["started", *["advanced"] * 4]
    assert Ledger(workspace.ledger_url).verify().ok


def test_a_deployment_beside_a_rollout_is_refused_and_a_rollback_ends_it(tmp_path: Path) -> None:
    workspace, old, new = release_pair(tmp_path / "w", **QUICK)
    add_release(workspace, "flights-r3")
    deploy(workspace, new, actor="test")
    start_rollout(workspace, "flights-r3", actor="test", shares=(0.1,))
    with pytest.raises(ConflictError, match="mwb release promote, or mwb release abort"):
        deploy(workspace, old, actor="test")
    rollback(workspace, **BY)
    ledger = Ledger(workspace.ledger_url)
    assert ledger.open_rollout() is None and ledger.rollouts()[0].status == "aborted"
    assert split(workspace) == {"champion": 1.0}
    assert json.loads(workspace.pointer_path.read_text())["slots"].keys() == {"champion"}
    assert ledger.verify().ok


def test_moves_under_load_fail_no_request(tmp_path: Path) -> None:
    """Start, advance, abort and start again while four clients ask all the time: every request is answered."""
    workspace, old, new = release_pair(tmp_path / "w", bias=1.5, **QUICK)
    with serve(workspace) as server:
        stop, found = threading.Event(), Counter()

        def ask(
            number: int,
            server: RunningServer = server,
            stop: threading.Event = stop,
            found: Counter = found,
        ) -> None:
            client, asked = server.client(), 0
            while not stop.is_set():
                asked += 1
                found[
                    client.post("/predict", {"row": flight(number * 100_000 + asked)}).status
                ] += 1

        clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for client in clients:
            client.start()
        watch = Traffic(server, mostly("late", 0.5))
        here = ["-w", str(workspace.root), "-m", "a test"]
        for _ in range(5):
            rollout = begin(workspace, watch, new, (0.2, 0.5))
            advance_rollout(workspace, rollout, **BY)
            wait_until(lambda: in_force(watch, split(workspace)), 10, "the split")
            assert main(["release", "abort", *here]) == 0
            wait_until(lambda: in_force(watch, {"champion": 1.0}), 10, "the old release alone")
        stop.set()
        for client in clients:
            client.join()
    assert set(found) == {200} and found[200] > 100


def test_the_deploy_stage_starts_a_rollout_where_the_settings_ask_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, old, new = release_pair(tmp_path / "w", steps="5, 50")
    here = ["-w", str(workspace.root)]
    assert main(["run", "deploy", "-p", f"deploy.release={new}", *here]) == 0
    assert f"{new} (flights@v1.0) gets 5 % of the traffic beside {old}" in capsys.readouterr().out
    assert split(workspace) == {"champion": 0.95, "challenger": 0.05}
    started = Ledger(workspace.ledger_url).decisions(kind="rollout")[0]
    assert started.record_path is not None and Path(started.record_path).is_file()
    assert main(["audit", "asof", iso(now()), "--json", *here]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["release"]["name"] == old and told["rollout"]["share"] == 0.05
    assert main(["status", "--json", *here]) == 0
    assert json.loads(capsys.readouterr().out)["rollout"]["share"] == 0.05
    assert main(["status", *here]) == 0
    assert f"rollout-1, running: {new} has 5 % of the traffic" in capsys.readouterr().out


def test_a_release_made_during_a_rollout_waits_for_its_turn_and_only_the_newest_is_deployed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The deploy stage of a cycle is no failure then; status and log say what it waits for; the loop deploys it afterwards."""
    workspace, old, new = release_pair(tmp_path / "w", steps="5, 50")
    add_release(workspace, "flights-r3")
    made = """digest = stage.ledger.release("flights-r3").digest
stage.output("release.json").write_text(json.dumps({"digest": digest}))
stage.finish({}, {"release.json": stage.output("release.json")}, "passed", "passed")"""
    cells = stage_cells("evaluate", body=made)[:-1]
    write_stages(workspace, {"4_evaluate": cells})
    shipped = Path(__file__).parents[1] / "nbs" / "stages" / "5_deploy.ipynb"
    shutil.copy(shipped, workspace.root / "nbs" / "stages")
    start_rollout(workspace, new, **BY)
    here, said = ["-w", str(workspace.root)], list[str]()
    assert main(["run", "evaluate", "deploy", *here]) == 0
    assert "flights-r3 waits for rollout-1" in capsys.readouterr().out
    assert main(["status", *here]) == 0
    assert "flights-r3 waits for rollout-1, since" in capsys.readouterr().out
    assert deploy_waiting(workspace, said.append) and said == ["flights-r3 waits for rollout-1"]

    ledger = Ledger(workspace.ledger_url)
    abort_rollout(workspace, the_rollout(ledger), **BY)
    assert deploy_waiting(workspace, said.append)
    assert f"flights-r3 (flights@v1.0) gets 5 % of the traffic beside {old}" in said[-1]
    assert the_rollout(ledger).candidate == ledger.release("flights-r3").digest
    assert waiting_release(ledger) is None, "its turn has come"

    by = {"actor": "test", "cycle": "cycle-0001"}
    for name in ("flights-r4", "flights-r5"):
        add_release(workspace, name)
        words = let_wait(ledger, ledger.release(name), in_the_way(ledger), **by)
        assert words == f"{name} waits for rollout-2"
    waiting = waiting_release(ledger)
    assert waiting is not None and waiting.name == "flights-r5"
    add_release(workspace, "flights-r6")  # approved, and by now on its way to its own deployment
    assert waiting_release(ledger) is None, "a newer one is approved"
