"""The way back: further where the one before is broken, never back and forth, and nobody notices it under load."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_support import table
from rollback_support import KINDS, measure_rollbacks
from rollout_support import add_release, decisions, release_pair
from serving_support import build_bundle

from mlops_workbench.cli.main import main
from mlops_workbench.core.errors import ConflictError, GateRefusedError
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.defaults import default_versions, set_default_data
from mlops_workbench.data.versions import DataStore
from mlops_workbench.pages.monitoring import releases_html
from mlops_workbench.pages.reader import monitoring_tables
from mlops_workbench.release.deployment import clear_release, deploy, record_release, rollback
from mlops_workbench.release.regimes import Regime, register_regime, switch, switch_back
from mlops_workbench.release.rollouts import start_rollout

BY = {"actor": "monitor", "reason": "rule quality: too many wrong answers"}


def four_releases(folder: Path) -> Workspace:
    """Four releases that served one after the other, each of its own data version; the last one serves."""
    workspace, _, second = release_pair(folder / "w")
    deploy(workspace, second, actor="test")
    for number in (3, 4):
        name = f"flights-r{number}"
        add_release(workspace, name, number / 10, data_version=f"flights@v1.{number}")
        deploy(workspace, name, actor="test")
    return workspace


def damage(workspace: Workspace, name: str) -> None:
    """One bit of a release's model is no longer what it was."""
    model = Path(Ledger(workspace.ledger_url).release(name).path) / "model.onnx"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_the_way_back_goes_further_where_the_one_before_is_broken(tmp_path: Path) -> None:
    """And data go with the model. Where nothing whole is left, the release that serves goes on, and is not barred."""
    workspace = four_releases(tmp_path)
    damage(workspace, "flights-r3")
    change = rollback(workspace, **BY, bar=True)
    assert (change.previous, change.name) == ("flights-r4", "flights-r2")
    assert default_versions(workspace)["flights"] == change.data_version == "flights@v1.0"
    damage(workspace, "flights-r1")
    before = workspace.pointer_path.read_bytes()
    with pytest.raises(ConflictError, match=r"none that is whole; damaged: \['flights-r1"):
        rollback(workspace, **BY, bar=True)
    ledger = Ledger(workspace.ledger_url)
    statuses = {row.name: row.status for row in ledger.releases()}
    assert (
        Counter(statuses.values()) == {"approved": 3, "barred": 1}
        and statuses["flights-r4"] == "barred"
    )
    assert workspace.pointer_path.read_bytes() == before and ledger.verify().ok


def test_data_that_go_back_alone_say_which_release_still_answers_from_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = four_releases(tmp_path)
    store, rows = DataStore(workspace), table(50)
    for number in range(10, 60, 10):
        ref = store.snapshot("flights", rows[:number], key="id", label="late").ref
        set_default_data(workspace, ref, actor="test", reason="accepted")
    here = ["-w", str(workspace.root)]
    assert main(["data", "rollback", "flights@v1.2", *here]) == 0
    said = capsys.readouterr()
    assert "flights-r4 serves and learned from flights@v1.4, which does not count" in said.err
    assert "`mwb rollback --to flights-r2` gives the traffic back" in said.err
    assert main(["rollback", "--to", "flights-r2", *here]) == 0
    assert main(["data", "rollback", "flights@v1.2", *here]) == 0
    assert "learned from" not in capsys.readouterr().err


def test_what_was_sent_back_stays_away_until_a_person_clears_it(tmp_path: Path) -> None:
    """Three alarms in a row lead down to the first release, and not once up again."""
    workspace = four_releases(tmp_path)
    seen = [rollback(workspace, **BY, bar=True).name for _ in range(3)]
    assert seen == ["flights-r3", "flights-r2", "flights-r1"]
    with pytest.raises(ConflictError, match="none that is whole"):
        rollback(workspace, **BY, bar=True)
    with pytest.raises(GateRefusedError, match="is barred since it was rolled back"):
        deploy(workspace, "flights-r4", actor="loop")
    with pytest.raises(GateRefusedError, match="is barred"):
        start_rollout(workspace, "flights-r4", actor="loop", shares=(0.5,))
    with pytest.raises(ConflictError, match="is barred; clear it first"):
        rollback(workspace, "flights-r4", **BY)
    clear_release(
        workspace, "flights-r4", actor="ann", reason="the sensor was broken, not the model"
    )
    assert deploy(workspace, "flights-r4", actor="ann").previous == "flights-r1"
    assert rollback(workspace, **BY, bar=True).name == "flights-r1"


def test_back_leads_only_to_what_passed_its_gates_and_served(tmp_path: Path) -> None:
    """A roll-back is no side door for a release that was refused, or that never served; nor to the release that serves."""
    workspace = four_releases(tmp_path)
    ledger = Ledger(workspace.ledger_url)
    add_release(workspace, "flights-r5")
    refused = build_bundle(workspace.bundles, name="flights-r6", bias=2.0)
    failed = {"passed": False, "reason": "refused by quality", "results": []}
    record_release(workspace, refused, failed, actor="test", cycle="c", record_path="")
    for name in ("flights-r5", "flights-r6"):
        with pytest.raises(ConflictError, match=f"served all traffic before, found {name}"):
            rollback(workspace, name, **BY)
    with pytest.raises(ConflictError, match="found flights-r4; nothing was rolled back"):
        rollback(workspace, "flights-r4", **BY)
    # forced, found bad and cleared, it is what its gates said
    deploy(workspace, "flights-r6", actor="ann", force=True)
    assert rollback(workspace, **BY, bar=True).name == "flights-r4"
    clear_release(workspace, "flights-r6", actor="ann", reason="a mistake")
    assert ledger.release("flights-r6").status == "refused"
    with pytest.raises(ConflictError, match="found flights-r6"):
        rollback(workspace, "flights-r6", **BY)
    with pytest.raises(GateRefusedError, match="is refused"):
        start_rollout(workspace, "flights-r6", actor="ann", shares=(0.5,))


def test_the_way_back_leads_down_and_everybody_names_the_same_release(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not up again to what a roll-back left, nor to a special: page, both commands of the state and the roll-back itself agree."""
    workspace = four_releases(tmp_path)
    rollback(workspace, "flights-r3", **BY)  # r4 is left, and not barred
    add_release(workspace, "flights-r5")
    register_regime(workspace, Regime("hand", "flights-r5"), **BY)
    switch(workspace, "hand", **BY)
    switch_back(workspace, **BY)
    for there in ("flights-r2", "flights-r1"):
        here = ["-w", str(workspace.root)]
        assert main(["status", "--json", *here]) == 0
        slots = {slot["slot"]: slot for slot in json.loads(capsys.readouterr().out)["slots"]}
        tables = monitoring_tables(workspace)
        page = releases_html(
            *([dict(zip(names, row, strict=True)) for row in rows] for names, rows in (tables["slots"], tables["releases"]))
        )  # fmt: skip
        assert main(["release", "status", *here]) == 0
        assert f"`mwb rollback` goes back to {there}\n" in capsys.readouterr().out
        assert slots["champion"]["before"] == there
        assert re.findall(r"Before it</span><b>([^<]*)", page) == [there]
        assert main(["rollback", *here]) == 0
        assert f"{there} (flights@" in capsys.readouterr().out
    with pytest.raises(ConflictError, match="damaged: none"):
        rollback(workspace, **BY)
    assert main(["release", "status", "-w", str(workspace.root)]) == 0
    assert "; nothing to go back to\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("what", list(KINDS))
def test_a_hundred_ways_back_fail_no_request(tmp_path: Path, what: str) -> None:
    """At 200 requests a second; each time the former release answers, and soon the other one does not answer any more."""
    rounds = 100 if "not in memory" not in what else 20
    workspace, found = measure_rollbacks(tmp_path, what, rounds)
    print(f"\n{found.line()}")
    callers = found.callers
    assert callers.failed == []
    assert len(callers.heard) > 0.95 * 200 * callers.seconds > 100 * rounds
    assert len(found.first) == rounds and not np.isnan(found.first).any()
    assert float(np.median(found.first)) < 100 and max(found.last) < 1000
    if what.startswith("a rollout"):
        assert Counter(decisions(workspace)) == {"started": rounds, "aborted": rounds}
    verdicts = Counter(row.verdict for row in Ledger(workspace.ledger_url).decisions(limit=100_000))
    assert verdicts["rolled back"] == (0 if what.startswith("a rollout") else rounds)
    assert verdicts["cleared"] == rounds and Ledger(workspace.ledger_url).verify().ok
