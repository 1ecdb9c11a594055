"""What a rollout decides by a written log: late labels, no labels, no traffic, a log that is gone. It never goes forward blind."""

import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from monitoring_support import write_log
from rollout_support import decisions, release_pair, replace_setting
from serving_support import ROW, wait_until

from mlops_workbench.cli.main import main
from mlops_workbench.cli.rollout import status_lines
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.pipeline.decision_record import read_rollout_decision
from mlops_workbench.pipeline.loop import CurrentSettings, tend_always
from mlops_workbench.pipeline.rollout_figures import sides_table
from mlops_workbench.release.rollout_evidence import Evidence, read_evidence
from mlops_workbench.release.rollout_judge import tend_rollout
from mlops_workbench.release.rollouts import start_rollout, the_rollout

RULES = {"minimum_minutes": 1, "minimum_rows": 200, "margin": 0.05, "maximum_hours": 6}
HOUR = 3600.0


def running(folder: Path, **rules: object) -> Workspace:
    """A workspace with a rollout at half of the traffic."""
    workspace, _, new = release_pair(folder / "w", **{**RULES, **rules})
    start_rollout(workspace, new, actor="test", shares=(0.5,))
    return workspace


def answered(workspace: Workspace, count: int, hours: float) -> list[dict[str, object]]:
    """So many answers in turn by both releases, all "on time", spread over the hours since the rollout began; written to the log."""
    rollout = the_rollout(Ledger(workspace.ledger_url))
    begun = time.time() + 1
    records: list[dict[str, object]] = [
        {
            "kind": "prediction",
            "id": f"q{number}",
            "request": f"r{number}",
            "time": begun + number / count * hours * HOUR,
            "release": (rollout.champion, rollout.candidate)[number % 2],
            "name": ("flights-r1", "flights-r2")[number % 2],
            "slot": ("champion", "challenger")[number % 2],
            "row": {**ROW, "flight_id": f"F{number}"},
            "probabilities": [0.8, 0.2],
            "prediction": 0,
            "latency_ms": 2.0,
        }
        for number in range(count)
    ]
    write_log(workspace.predictions, records)
    return records


def labelled(
    workspace: Workspace,
    records: Sequence[dict[str, object]],
    late_old: float,  # share of the champion's rows that were late: its wrong answers
    late_new: float,
    tag: str,
) -> None:
    """The labels of these rows."""
    draw = np.random.default_rng(1)
    late = [draw.random() < (late_new if r["slot"] == "challenger" else late_old) for r in records]
    labels: list[dict[str, object]] = [
        {"kind": "feedback", "id": record["id"], "time": record["time"], "label": label}
        for record, label in zip(records, np.where(late, "late", "on time").tolist(), strict=True)
    ]
    write_log(workspace.predictions, labels, tag=tag)


def evidence(workspace: Workspace, hours: float) -> Evidence:
    """What is found so many hours from now."""
    rollout = the_rollout(Ledger(workspace.ledger_url))
    return read_evidence(workspace, rollout, time.time() + hours * HOUR)


def test_labels_that_come_first_do_not_speak_for_those_that_come_late(tmp_path: Path) -> None:
    """A good outcome is known at once and a bad one after an hour: rows that are younger than that do not count, so nobody is misled."""
    workspace = running(tmp_path, label_delay_minutes=60)
    records = answered(workspace, 4_000, hours=2)
    ripe, young = records[:2_000], records[2_000:]
    labelled(workspace, ripe, 0.3, 0.3, "ripe")
    early = [r for r in young if r["slot"] == "challenger" or int(str(r["id"])[1:]) % 4]
    labelled(
        workspace, early, 0.6, 0.0, "early"
    )  # what has come of the young rows flatters the new
    found = evidence(workspace, 2.0)
    assert found.new.rows == 2_000
    assert 980 <= found.new.labelled.rows <= 1_000 and 980 <= found.old.labelled.rows <= 1_000
    assert found.verdict.word == "not yet"
    workspace_now = running(tmp_path / "at once", label_delay_minutes=0)
    misled = answered(workspace_now, 4_000, hours=2)
    labelled(workspace_now, misled[:2_000], 0.3, 0.3, "ripe")
    labelled(workspace_now, misled[2_000:], 0.6, 0.0, "early")
    assert (
        evidence(workspace_now, 2.0).verdict.word == "better"
    )  # the same labels, believed at once


@pytest.mark.parametrize("blind", ["no traffic", "no labels", "labels of no class", "no log"])
def test_a_rollout_never_goes_forward_blind(tmp_path: Path, blind: str) -> None:
    """However long it waits; after the longest time the former release stays, and the new one is not to blame."""
    workspace = running(tmp_path)
    if blind != "no traffic":
        records = answered(workspace, 3_000, hours=2)
    if blind == "labels of no class":
        unknown = [{"kind": "feedback", "id": r["id"], "time": r["time"], "label": label} for r, label in zip(records, ["NaN", "", "?"] * 1_000, strict=True)]  # fmt: skip
        write_log(workspace.predictions, unknown, tag="odd")
    if blind == "no log":
        labelled(workspace, records, 0.5, 0.1, "labels")  # it was better, by a log that is gone
        shutil.rmtree(workspace.predictions)
    for hours in (0.1, 2.5, 5.9):
        looked = tend_rollout(workspace, actor="test", moment=time.time() + hours * HOUR)
        assert looked is not None and looked[2].kind == "wait", looked
    assert decisions(workspace) == ["started"]
    looked = tend_rollout(workspace, actor="test", moment=time.time() + 6.1 * HOUR)
    assert looked is not None and looked[2].kind == "abort" and not looked[2].bar


def test_equal_releases_are_called_equivalent_and_the_new_one_serves(tmp_path: Path) -> None:
    """The whole interval lies within the margin."""
    workspace = running(tmp_path)
    labelled(workspace, answered(workspace, 8_000, hours=2), 0.1, 0.1, "labels")
    looked = tend_rollout(workspace, actor="test", moment=time.time() + 2.5 * HOUR)
    assert looked is not None and looked[2].kind == "promote"
    assert (
        looked[2].reason.startswith("equivalent: accuracy ") and "0.05 matters" in looked[2].reason
    )
    interval = looked[1].verdict.interval
    assert -0.05 < interval.low < 0 < interval.high < 0.05


def test_a_planned_end_decides_by_fewer_rows_and_not_between_its_looks(tmp_path: Path) -> None:
    """6 points better: 3,000 planned rows say so, an open end does not yet; rows after a look change nothing until the next."""
    planned = running(tmp_path, planned_rows=3000)
    records = answered(planned, 3_000, hours=2)
    labelled(planned, records[:2_940], 0.30, 0.24, "first")
    before = evidence(planned, 3.0)
    labelled(planned, records[2_940:2_990], 0.30, 1.0, "between")  # wrong by the new one
    between = evidence(planned, 3.0)
    assert before.verdict == between.verdict and not before.verdict.over
    assert between.new.labelled.rows > before.new.labelled.rows
    labelled(planned, records[2_990:], 0.30, 0.24, "last")
    assert evidence(planned, 3.0).verdict.word == "better"
    text = planned.root.joinpath("settings.ini").read_text()
    planned.root.joinpath("settings.ini").write_text(replace_setting(text, "planned_rows", 0))
    open_end = evidence(Workspace.open(planned.root), 2.2)
    assert open_end.verdict.word == "not yet"
    assert open_end.verdict.reason.endswith("if it stays so") and open_end.hours_to_word is not None
    assert 0 < open_end.hours_to_word < 6  # an open end needs up to three times the rows


def test_a_planned_end_without_a_word_keeps_the_former_release(tmp_path: Path) -> None:
    workspace = running(tmp_path, planned_rows=2000, margin=0.01)
    labelled(workspace, answered(workspace, 2_100, hours=2), 0.3, 0.3, "all")
    looked = tend_rollout(workspace, actor="test", moment=time.time() + 3 * HOUR)
    assert looked is not None and looked[2].kind == "abort" and not looked[2].bar
    assert "by the planned 2,000 labelled rows: accuracy" in looked[2].reason


def test_word_and_table_of_a_planned_end_are_of_the_same_rows(tmp_path: Path) -> None:
    """Rows after the look that is due change neither; what no figure counts is told, and what is missing, but no time without traffic."""
    workspace = running(tmp_path, planned_rows=400)
    records = answered(workspace, 500, hours=0.001)
    labelled(workspace, records[:201], 0.3, 0.3, "first")
    found = evidence(workspace, 1.0)
    missing = "200 of the 400 planned labelled rows are missing; no labelled rows come at this time"
    assert missing in found.verdict.reason and "minutes" not in found.verdict.reason
    assert found.hours_to_word is None and found.old.rows + found.left_out == found.new.rows == 250
    labelled(workspace, records[201:401], 0.3, 0.3, "until the end")
    labelled(workspace, records[401:], 1.0, 1.0, "after it")  # all wrong
    looked = tend_rollout(workspace, actor="test", moment=time.time() + HOUR)
    assert looked is not None and looked[2].kind == "abort"
    assert "by the first 400 labelled rows" in looked[2].reason
    [end] = Ledger(workspace.ledger_url).decisions(1, "rollout")
    table = sides_table(read_rollout_decision(workspace, end.id))
    old, new = (looked[1].as_dict()[side] for side in ("old", "new"))
    judged = table.loc["the word and the mean are of the first"].astype(int)
    assert judged.sum() == 400 and table.loc["with label"].astype(int).sum() == 499
    shown = table.loc["accuracy"].astype(float)
    value = looked[1].verdict.interval.value
    assert shown["flights-r2"] - shown["flights-r1"] == pytest.approx(value, abs=1e-4)
    assert old["mean"] > 0.6 and new["mean"] > 0.6, "the rows after the end do not count"
    assert table.loc["left out", "flights-r1"].startswith("1 rows before the first answer")
    lines = "\n".join(status_lines(looked[0], looked[1], looked[2]))
    assert "250 labelled, the word on the first 200" in lines
    assert "left out  1 rows of flights-r1 from before the first answer of flights-r2" in lines


def test_the_running_loop_goes_by_the_settings_of_this_moment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second person asked for, a file that cannot be read, a guard rail drawn closer: each counts at the next look."""
    workspace = running(tmp_path, minimum_minutes=0, interval_seconds=0.2)
    place, name = workspace.root / "settings.ini", "flights-r2"
    labelled(workspace, answered(workspace, 3_000, hours=1 / HOUR), 0.5, 0.1, "labels")
    text = place.read_text().replace("four_eyes = no ", "four_eyes = yes ")
    place.write_text(text)
    time.sleep(2.2)  # until the last of the answers has been given
    said, stop = list[str](), threading.Event()
    current = CurrentSettings(workspace, said.append)
    loop = threading.Thread(target=tend_always, args=(current, stop, said.append))
    loop.start()
    try:
        called = f"rollout-1: {name} waits for a second person: mwb release approve {name} -m WHY"
        wait_until(lambda: called in said, 20, "the call for a second person")
        assert main(["release", "status", "-w", str(workspace.root)]) == 0
        assert "next      wait: waits for a second person" in capsys.readouterr().out
        place.write_text(text.replace("[rollout]", "[rollout]\nalfa = 1"))
        wait_until(lambda: "stay as they were" in said[-1] and "alfa" in said[-1], 20, "the word")
        place.write_text(replace_setting(text, "latency_p99_ms", 0.5))
        wait_until(lambda: decisions(workspace)[-1] == "aborted", 20, "the end of the rollout")
    finally:
        stop.set()
        loop.join()
    assert len(said) == 3, said
    assert "gets no traffic any more: guard rail: p99 2.0 ms, at most 0.5 ms" in said[-1]
