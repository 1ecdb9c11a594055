"""A copy of the traffic for a new release: answered apart, compared pair by pair, never in the champion's way."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from rollout_support import add_release, decisions, release_pair, replace_setting, split
from serving_support import RunningServer, late_model, logged, wait_until
from test_rollout import QUICK, Traffic, begin, flight, in_force, mostly, serve

from mlops_workbench.cli.main import main
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.monitoring.partitions import compact
from mlops_workbench.monitoring.prediction_store import read_shadow, read_window
from mlops_workbench.release.rollout_evidence import read_evidence
from mlops_workbench.release.rollout_judge import tend_rollout
from mlops_workbench.release.rollouts import the_rollout

STEPS = (0.0, 0.5)


def copies(workspace: Workspace) -> int:
    """How many rows the copy has answered so far."""
    return len(logged(workspace.predictions, "shadow"))


@contextmanager
def copied(
    folder: Path, truth: Callable[[dict[str, object]], str]
) -> Iterator[tuple[Workspace, str, str, RunningServer, Traffic]]:
    """A workspace, its old and its new release, a server whose copy answers, and traffic with such labels."""
    workspace, old, new = release_pair(folder / "w", bias=1.5, **QUICK)
    with serve(workspace) as server:
        traffic = Traffic(server, truth)
        begin(workspace, traffic, new, STEPS)
        traffic.send(1)
        wait_until(lambda: copies(workspace) > 0, 120, "the first answers of the copy")
        yield workspace, old, new, server, traffic


def copied_rows(workspace: Workspace, traffic: Traffic) -> None:
    """Four hundred rows that both releases have answered."""
    traffic.send(20)
    wait_until(lambda: copies(workspace) >= 400, 30, "the answers of the copy")


def test_a_copy_is_compared_and_never_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shadow, then half, then everything: in shadow every caller hears the champion, and its figures do not know of the copy."""
    with copied(tmp_path, mostly("on time", 0.95)) as (workspace, old, _, _, traffic):
        copied_rows(workspace, traffic)
        assert set().union(*traffic.slots.values()) == {"champion"}
        window = read_window(workspace.predictions, 0, time.time() + 1)
        assert len(window.predictions) == traffic.asked
        assert set(window.predictions["name"]) == {old}
        rollout = the_rollout(Ledger(workspace.ledger_url))
        found = read_evidence(workspace, rollout)
        assert found.copied is not None and 0 < found.copied.agreement < 1
        assert found.verdict.word == "better" and found.new.labelled.rows >= 400  # pair by pair
        assert main(["release", "status", "-w", str(workspace.root)]) == 0
        told = capsys.readouterr().out
        assert "has a copy of the traffic (shadow)" in told and "agrees on" in told
        looked = tend_rollout(workspace, actor="controller")
        assert looked is not None and looked[2].kind == "advance"
        wait_until(lambda: in_force(traffic, split(workspace)), 10, "half of the traffic")
        before = copies(workspace)
        traffic.send(10)
        assert copies(workspace) == before
        assert {"champion", "challenger"} == set(split(workspace))
        assert set(traffic.statuses) == {200}
    assert compact(workspace.predictions, older_than_seconds=0).records > 0
    assert len(read_shadow(workspace.predictions, 0, rollout.candidate)) == before
    assert decisions(workspace) == ["started", "advanced"]


def test_a_copy_with_few_labels_goes_nowhere(tmp_path: Path) -> None:
    """However many rows both releases answered: of twenty alone it is known who is right."""
    with copied(tmp_path, mostly("on time", 0.95)) as (workspace, _, _, _, traffic):
        for number in range(20):
            traffic.client.post("/predict", {"rows": [flight(number * 20 + n) for n in range(20)]})
        wait_until(lambda: copies(workspace) >= 300, 20, "the copies")
        looked = tend_rollout(workspace, actor="controller")
    assert looked is not None and looked[2].kind == "wait"
    assert looked[1].new.rows >= 300 and "200 rows an arm are asked for" in looked[2].reason


def test_a_worse_copy_goes_back_before_anybody_heard_it(tmp_path: Path) -> None:
    with copied(tmp_path, mostly("late", 0.95)) as (workspace, old, new, _, traffic):
        copied_rows(workspace, traffic)
        looked = tend_rollout(workspace, actor="controller")
        assert looked is not None and looked[2].kind == "abort" and looked[2].bar
        assert looked[2].reason.startswith("worse: accuracy")
        assert {record["name"] for record in logged(workspace.predictions)} == {old}
    assert Ledger(workspace.ledger_url).release(new).status == "barred"


def test_a_copy_that_gives_no_numbers_goes_back(tmp_path: Path) -> None:
    """The model passes its warm-up and fails on real rows: each failed row counts; the callers notice nothing."""
    workspace, old, new = release_pair(tmp_path / "w", **QUICK)
    add_release(workspace, "flights-r9", model=late_model(nan=True))
    with serve(workspace) as server:
        traffic = Traffic(server, mostly("late", 0.5))
        begin(workspace, traffic, "flights-r9", STEPS)
        wait_until(lambda: copies(workspace) >= 3, 40, "three attempts to load it")
        traffic.send(5)
        looked = tend_rollout(workspace, actor="controller")
        assert looked is not None and looked[2].kind == "abort"
        assert looked[2].reason.startswith("guard rail: it failed on 3 of 3 rows")
        assert set(traffic.statuses) == {200}


def test_the_champion_does_not_wait_for_a_copy_that_hangs_or_dies(tmp_path: Path) -> None:
    """The copy's process is stopped, then killed: all requests are answered, what was not copied is counted, a new process goes on."""
    with copied(tmp_path, mostly("late", 0.5)) as (workspace, _, _, server, traffic):
        pid = copy_process(server.process.pid)
        os.kill(pid, signal.SIGSTOP)
        client = server.client()
        for number in range(150):
            rows = [flight(100_000 + number * 200 + place) for place in range(200)]
            assert client.post("/predict", {"rows": rows}).status == 200
        log = client.get("/health").body["log"]
        assert log["copies_dropped"] > 1000
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: copy_process(server.process.pid) not in (0, pid), 20, "a new process")
        before = copies(workspace)
        wait_until(lambda: bool(traffic.send(1) or copies(workspace) > before), 30, "its answers")
        found = read_evidence(workspace, the_rollout(Ledger(workspace.ledger_url)))
        assert found.copied is not None and found.copied.missed > 1000
        assert server.stop() == 0
    assert not alive(pid)


def copy_process(server: int) -> int:
    """The process that answers the copy, 0 when there is none."""
    listed = ["pgrep", "-P", str(server), "-f", "serving.shadow"]
    found = subprocess.run(listed, capture_output=True, text=True, check=False).stdout.split()
    return int(found[0]) if found else 0


def alive(pid: int) -> bool:
    """Whether a process is there."""
    return Path(f"/proc/{pid}").exists()


def test_a_copy_costs_the_champion_next_to_nothing(tmp_path: Path) -> None:
    """Latency seen by one client, with and without a copy, in turns: the medians differ by less than a third of a millisecond."""
    workspace, old, new = release_pair(tmp_path / "w", bias=1.5, **QUICK)
    found: dict[str, list[float]] = {"alone": [], "copied": []}
    with serve(workspace) as server:
        traffic = Traffic(server, mostly("late", 0.5))
        here = ["-w", str(workspace.root)]
        for turn in range(2):
            for name in found:
                if name == "copied":
                    begin(workspace, traffic, new, STEPS)
                    wait_until(lambda: copy_process(server.process.pid), 10, "the copy")
                    before = copies(workspace)
                    wait_until(
                        lambda before=before: bool(traffic.send(1) or copies(workspace) > before),
                        30,
                        "its answers",
                    )
                for number in range(400):
                    begun = time.perf_counter()
                    traffic.client.post("/predict", {"row": flight(number)})
                    found[name].append((time.perf_counter() - begun) * 1000)
            assert main(["release", "abort", "-m", f"turn {turn}", *here]) == 0
            wait_until(lambda: in_force(traffic, {"champion": 1.0}), 10, "the champion alone")
    medians = {name: float(np.median(values)) for name, values in found.items()}
    print(medians, {name: float(np.quantile(values, 0.99)) for name, values in found.items()})
    assert medians["copied"] < medians["alone"] + 0.35, medians


def test_the_former_releases_belief_narrows_the_interval(tmp_path: Path) -> None:
    """A label that the champion foresees: its belief explains a part of the variance, in both arms, and the word stays right."""
    workspace, old, new = release_pair(tmp_path / "w", bias=0.3, covariate="belief", **QUICK)
    with serve(workspace) as server:
        traffic = Traffic(server, lambda row: "late")
        rollout = begin(workspace, traffic, new, (0.5,))
        traffic.send(60)
        found = read_evidence(workspace, rollout)
    assert found.covariate.startswith("belief explains "), found.covariate
    path = workspace.root / "settings.ini"
    path.write_text(replace_setting(path.read_text(), "covariate", ""))
    plain = read_evidence(Workspace.open(workspace.root), rollout)
    narrow, wide = (e.verdict.interval.high - e.verdict.interval.low for e in (found, plain))
    assert narrow < wide and plain.covariate == ""
    assert found.new.mean == plain.new.mean  # what is shown is the plain mean
