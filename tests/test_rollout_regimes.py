"""A foreseen shock, replayed through a real server: the special takes over and gives way by itself, and the drill keeps its times."""

import json
import random
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from rollout_support import add_release, release_pair, split
from test_rollout import QUICK, Traffic, begin, serve
from test_rollout_records import outputs

from mlops_workbench.cli.main import main
from mlops_workbench.core.clock import iso, now, timestamp
from mlops_workbench.core.errors import ConflictError, UsageError
from mlops_workbench.core.ledger import DecisionRow, Ledger
from mlops_workbench.pipeline.decision_record import write_records
from mlops_workbench.pipeline.loop import rehearse_due
from mlops_workbench.release.deployment import deploy
from mlops_workbench.release.regime_watch import tend_regimes
from mlops_workbench.release.regimes import (
    Regime,
    register_regime,
    switch,
    switch_back,
)
from mlops_workbench.release.rollouts import promote_rollout, start_rollout
from mlops_workbench.release.waiting import in_the_way
from mlops_workbench.release.way_back import rollback_target
from mlops_workbench.serving.models import LoadedModel, load_model

BY = {"actor": "test", "reason": "a test"}


def world(model: LoadedModel) -> Callable[[dict[str, object]], str]:
    """A world in which this model is right in 95 of 100 rows."""

    def truth(row: dict[str, object]) -> str:
        asked = {feature.name: row[feature.name] for feature in model.schema.features}
        place = int(model.probabilities([asked])[0].argmax())
        wrong = random.Random(str(row["flight_id"])).random() < 0.05
        return model.classes[1 - place if wrong else place]

    return truth


def test_a_shock_is_met_by_the_special_and_both_ways_go_by_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ordinary model loses more than 30 points of accuracy; special in, measured, special out; one switch, no request lost."""
    workspace, old, new = release_pair(tmp_path / "w", bias=1.5, **QUICK)
    ledger, here = Ledger(workspace.ledger_url), ["-w", str(workspace.root)]
    ordinary, special = (
        load_model(Path(ledger.release(name).path), ledger.release(name).digest)
        for name in (old, new)
    )
    normal, shock = world(ordinary), world(special)
    when = ["--when", "accuracy below 0.8", "--window", "0.05", "--hold", "0"]
    with serve(workspace) as server:
        traffic = Traffic(server, normal)
        traffic.send(20)
        assert main(["release", "special", "storm", new, *when, *here]) == 0
        assert tend_regimes(workspace, actor="controller") is None
        assert main(["release", "rehearse", "storm", "--rounds", "2", *here]) == 0
        told = capsys.readouterr().out
        assert "0 of" in told and "of the labelled rows right" in told
        for _ in range(5):
            traffic.send(5)
            assert tend_regimes(workspace, actor="controller") is None  # nothing happens: no switch
        traffic.truth = shock
        there = until_decided(lambda: tend_regimes(workspace, actor="controller"), traffic)
        assert (there.verdict, there.evidence["by"]) == ("switched", "detector")
        assert in_the_way(ledger) == "the special of storm", (
            "no cycle begins, no release is deployed"
        )
        for _ in range(10):
            traffic.send(5)
            assert (
                tend_regimes(workspace, actor="controller") is None
            )  # it stays as long as the shock
        assert main(["release", "switch", "--report", "--json", *here]) == 0
        report = json.loads(capsys.readouterr().out)[0]
        traffic.truth = normal
        back = until_decided(lambda: tend_regimes(workspace, actor="controller"), traffic)
        assert (back.verdict, back.evidence["by"]) == ("back", "detector")
        traffic.send(10)
        assert tend_regimes(workspace, actor="controller") is None
        assert set(traffic.statuses) == {200}
    assert report["special_mean"] > 0.85  # 0.95 in truth, of a few hundred rows
    assert report["special_mean"] - report["ordinary_mean"] > 0.25
    gained = (report["special_mean"] - report["ordinary_mean"]) * report["labelled"]
    assert report["avoided"] == pytest.approx(gained, abs=1) and gained > 100
    assert 0 < report["avoided_from"] < gained < report["avoided_to"]
    assert 0 <= report["first_answer_ms"] < 1000
    assert [d.verdict for d in ledger.decisions(kind="switch")] == ["back", "switched"]
    told = ledger.messages()[0].body
    assert "wrong answers avoided" in told and told.endswith("_back.ipynb")
    assert write_records(workspace) == {there.id: "", back.id: ""}
    text, pictures = outputs(Path(back.record_path or ""))
    assert len(pictures) == 1 and "storm: back by controller" in text and "avoided" in text
    assert ledger.verify().ok


def until_decided(look: Callable[[], DecisionRow | None], traffic: Traffic) -> DecisionRow:
    """Traffic and looks until one of them decides something."""
    for _ in range(120):
        traffic.send(4)
        if (found := look()) is not None:
            return found
        time.sleep(0.02)
    raise AssertionError("nothing was decided")


def test_a_rollout_waits_for_the_end_of_a_regime(tmp_path: Path) -> None:
    workspace, old, new = release_pair(tmp_path / "w", **QUICK)
    add_release(workspace, "flights-r3")
    register_regime(workspace, Regime("storm", "flights-r3"), **BY)
    with serve(workspace) as server:
        traffic = Traffic(server, lambda row: "late")
        begin(workspace, traffic, new, (0.5,))
        switch(workspace, "storm", **BY)
        ledger = Ledger(workspace.ledger_url)
        going = ledger.open_rollout()
        assert going is not None and going.status == "paused"
        assert split(workspace) == {"champion": 1.0, "shadow": 0.0}
        here = ["-w", str(workspace.root), "-m", "a test"]
        assert main(["release", "promote", *here]) != 0  # not while the special serves
        time.sleep(0.8)  # nobody asks: that is not the switch
        traffic.send(3)
        report = switch_back(workspace, **BY).evidence["report"]
        assert 0 <= report["first_answer_ms"] < 700 and report["rows"] == 60
        going = ledger.open_rollout()
        assert going is not None and going.status == "running"
        assert split(workspace) == {"champion": 0.5, "challenger": 0.5, "special:storm": 0.0}
        traffic.send(5)
        assert set(traffic.statuses) == {200}


def test_a_persons_way_back_holds_against_the_calendar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until the special is registered anew, or another window begins; and no rollout starts while a special serves."""
    workspace, old, new = release_pair(tmp_path / "w", **QUICK)
    start = now() - timedelta(hours=1)
    window = Regime("sale", new, since=iso(start), until=iso(start + timedelta(days=1)))
    register_regime(workspace, window, **BY)
    ledger = Ledger(workspace.ledger_url)
    with ledger.decision(
        "rehearsal", actor="test", subject="sale", verdict="passed", reason="",
        evidence={"digest": ledger.release(new).digest},
    ):  # fmt: skip
        pass
    there = tend_regimes(workspace, actor="controller")
    assert there is not None and there.evidence["by"] == "calendar"
    assert main(["audit", "asof", str(timestamp()), "-w", str(workspace.root)]) == 0
    told = capsys.readouterr().out
    assert f"the special of sale, in place of {old}" in told and "put there: switch" in told, told
    for wrong, why in (
        (Regime("fog", new, when="mean of carrier above 10"), "expected a column of numbers"),
        (Regime("fog", new, since="2026-01-01", until="2026-01-02"), "a time that is not over"),
    ):
        with pytest.raises(UsageError, match=why):
            register_regime(workspace, wrong, **BY)
    add_release(workspace, "flights-r3")
    with pytest.raises(ConflictError, match="found the special of sale; no rollout was started"):
        start_rollout(workspace, "flights-r3", actor="test", shares=(0.5,))
    switch_back(workspace, **BY)
    assert tend_regimes(workspace, actor="controller") is None
    later = {**vars(window), "since": iso(now() + timedelta(hours=1))}
    register_regime(workspace, Regime(**later), **BY)
    moment = timestamp() + 7200
    there = tend_regimes(workspace, actor="controller", moment=moment)
    assert there is not None and there.verdict == "switched"


def test_the_loop_rehearses_the_way_back_and_new_specials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twenty times back under requests: none fails, and what serves people does not move."""
    workspace, old, new = release_pair(tmp_path / "w", **QUICK)
    deploy(workspace, new, actor="test")
    register_regime(workspace, Regime("storm", old), **BY)
    before, said = workspace.pointer_path.read_bytes(), list[str]()
    rehearse_due(workspace, said.append)
    assert [line.split(":")[0] for line in said] == ["drill", "storm"]
    rehearse_due(workspace, said.append)
    assert len(said) == 2  # a week is not over, and nothing is new
    assert main(["drill", "--rounds", "20", "-w", str(workspace.root)]) == 0
    assert f"back to {old} 20 times" in capsys.readouterr().out
    drills = Ledger(workspace.ledger_url).decisions(kind="drill")
    assert [d.verdict for d in drills] == ["passed", "passed"]
    assert drills[0].evidence["failed"] == 0 and drills[0].evidence["p99_ms"] < 500
    assert workspace.pointer_path.read_bytes() == before


def test_a_promoted_release_is_one_to_go_back_to(tmp_path: Path) -> None:
    """What a rollout put to work counts as a former champion, like what was deployed."""
    workspace, old, new = release_pair(tmp_path / "w", **QUICK)
    add_release(workspace, "flights-r3")
    rollout = start_rollout(workspace, new, actor="test", shares=(0.5,))
    promote_rollout(workspace, rollout, **BY)
    deploy(workspace, "flights-r3", actor="test")
    ledger = Ledger(workspace.ledger_url)
    target = rollback_target(ledger, ledger.release("flights-r3").digest)
    assert ledger.release(target).name == new
