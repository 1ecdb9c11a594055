"""From a delivered file to a version, by the commands: good rows come in, bad ones wait, bad files stay outside."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from data_support import new_store, table

from mlops_workbench.cli.main import main
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.defaults import default_versions
from mlops_workbench.data.forced import forced_rows
from mlops_workbench.data.quarantine import quarantined
from mlops_workbench.data.versions import DataStore
from mlops_workbench.pages.data_views import diff_tables
from mlops_workbench.pages.difference import difference_html
from mlops_workbench.pipeline.reuse import named_version

NAMES = ["--key", "id", "--label", "late"]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to copy from: 2,000 rows as delivered, and the workspace that has them as own@v1.0."""
    folder = tmp_path_factory.mktemp("untouched")
    assert snapshot(new_store(folder), good(2000), *NAMES) == 0
    return folder


@pytest.fixture
def store(untouched: Path, tmp_path: Path) -> DataStore:
    """A copy of that workspace."""
    shutil.copytree(untouched, tmp_path, symlinks=True, dirs_exist_ok=True)
    return DataStore(Workspace.open(tmp_path / "workspace"))


def good(rows: int, first: int = 0) -> pd.DataFrame:
    """Rows whose label follows from the temperature, so that a wrong one can be seen."""
    frame = table(rows, first=first, seed=first).fillna({"temperature": 40.0})
    return frame.assign(late=(frame["temperature"] > 40).astype(int))


def snapshot(store: DataStore, frame: pd.DataFrame | str, *words: str) -> int:
    """Exit code of `mwb data snapshot own --from FILE`; text is the file's content."""
    file = store.root.parent / "delivered.csv"
    if isinstance(frame, str):
        file.write_text(frame)
    else:
        frame.to_csv(file, index=False)
    return main(["data", "snapshot", "own", "--from", str(file), *words, "-w", str(store.root)])


def asked(store: DataStore, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What a command says in JSON."""
    capsys.readouterr()
    assert main([*words, "--json", "-w", str(store.root)]) == 0
    return json.loads(capsys.readouterr().out)


def with_wrong_labels(rows: int, wrong: int, first: int) -> tuple[pd.DataFrame, set[str]]:
    """Good rows of which some, far from the border, have the other label; and the keys of these."""
    frame = good(rows, first)
    far = np.flatnonzero((frame["temperature"] - 40).abs() > 8)[:wrong]
    frame.loc[far, "late"] = 1 - frame.loc[far, "late"]
    return frame, set(frame.loc[far, "id"])


def test_single_bad_rows_wait_and_the_others_come_in(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    frame, wrong = with_wrong_labels(1000, 12, first=2000)
    assert snapshot(store, frame, "--append") == 0
    said = capsys.readouterr().out
    assert "own@v1.1" in said and "mwb data review own" in said
    version = store.resolve("own")
    came = set(store.load(version)["id"])
    waiting = {row["id"] for row in asked(store, capsys, "data", "review", "own")}
    assert wrong <= waiting and not waiting & came
    assert len(waiting) <= 2 * len(wrong)
    assert came | waiting == {f"row {n:07}" for n in range(3000)}
    kinds = [(each.kind, each.verdict) for each in Ledger(store.workspace.ledger_url).decisions()]
    assert ("validation", "quarantined") in kinds
    assert main(["data", "review", "own", "--accept", min(wrong), "-w", str(store.root)]) == 0
    assert min(wrong) in set(store.load("own")["id"])


def test_a_batch_that_is_bad_as_a_whole_stays_outside(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    frame, _ = with_wrong_labels(1000, 400, first=2000)
    assert snapshot(store, frame, "--append") == 4
    assert "look wrong beyond what this model's own errors explain" in capsys.readouterr().err
    assert [version.ref for version in store.versions("own")] == ["own@v1.0"]
    assert snapshot(store, frame, "--append", "--force") == 0
    assert store.resolve("own").forced


def test_a_file_of_a_header_alone_is_refused(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    header = ",".join(good(1).columns) + "\n"
    for words in ([], ["--append"]):
        assert snapshot(store, header, *words) != 0
        assert "row" in capsys.readouterr().err
    assert len(store.versions("own")) == 1


@pytest.mark.parametrize("append", [True, False])
def test_a_wrong_column_name_in_a_small_batch_is_refused(
    store: DataStore, capsys: pytest.CaptureFixture[str], append: bool
) -> None:
    frame = good(5, first=2000).rename(columns={"temperature": "temprature"})
    assert snapshot(store, frame, *(["--append"] if append else [])) == 4
    said = capsys.readouterr().err
    assert "temperature" in said and "temprature" in said
    assert len(store.versions("own")) == 1


def test_a_name_given_by_hand_works_wherever_a_version_does(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "tag", "own@v1.0", "golden", "-w", str(store.root)]) == 0
    assert snapshot(store, good(500, first=2000), "--append") == 0
    assert store.resolve("own@golden").ref == "own@v1.0"
    assert asked(store, capsys, "data", "show", "own@golden")["ref"] == "own@v1.0"
    named = named_version(store.workspace, {"data_version": "own@golden"})
    assert named is not None and named[0] == "own@v1.0"
    assert main(["data", "show", "own@goldn", "-w", str(store.root)]) == 1
    assert "did you mean own@golden" in capsys.readouterr().err
    assert main(["data", "rollback", "own@golden", "-w", str(store.root)]) == 0


def test_going_back_to_forced_rows_says_what_is_known_of_them(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    frame, _ = with_wrong_labels(1000, 400, first=2000)
    assert snapshot(store, frame, "--append", "--force") == 0
    here = ["-w", str(store.root)]
    assert main(["data", "rollback", "own@v1.0", *here]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["data", "rollback", "own@v1.1", *here]) == 0
    said = capsys.readouterr()
    assert "stored against the checks" in said.err and "look wrong" in said.err
    assert "taken back before" in said.err
    assert "undo: mwb data rollback own@v1.0" in said.out


def test_the_list_is_readable_with_a_long_message(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert snapshot(store, good(2100), "-m", "retrain because of drift " * 40) == 0
    capsys.readouterr()
    assert main(["data", "list", "-w", str(store.root)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) < 180
    assert "default" in lines[-1] and "own@v1.1" in lines[-1]
    whole = asked(store, capsys, "data", "list")
    assert len(whole[-1]["message"]) > 900


def test_deliveries_at_once_all_come_in(store: DataStore, tmp_path: Path) -> None:
    frame, wrong = with_wrong_labels(1000, 12, first=2000)
    assert snapshot(store, frame, "--append") == 0
    commands = [["review", "own", "--accept", each] for each in sorted(wrong)[:2]]
    for number in range(2):
        file = tmp_path / f"delivered-{number}.csv"
        good(1000, first=3000 + 1000 * number).to_csv(file, index=False)
        commands.append(["snapshot", "own", "--from", str(file), "--append"])
    here = ["-w", str(store.root)]
    program = [sys.executable, "-m", "mlops_workbench.cli.main", "data"]
    running = [subprocess.Popen([*program, *command, *here]) for command in commands]
    assert [process.wait(120) for process in running] == [0, 0, 0, 0]
    came = set(store.load(default_versions(store.workspace)["own"])["id"])
    assert set(sorted(wrong)[:2]) <= came
    waiting = set(quarantined(store, "own")["id"])
    assert came | waiting == {f"row {n:07}" for n in range(5000)} and not came & waiting


@pytest.mark.parametrize(
    ("column", "cell", "reason"),
    [
        ("temperature", "forty", "temperature is 'forty': expected numbers"),
        ("late", "perhaps", "late is 'perhaps': expected one of the known labels"),
        ("temperature", -5e9, "temperature is -5000000000.0: expected values from"),
    ],
)
def test_a_single_absurd_cell_waits_and_the_others_come_in(
    store: DataStore, capsys: pytest.CaptureFixture[str], column: str, cell: object, reason: str
) -> None:
    frame = good(500, first=2000).astype({column: object})
    frame.loc[[3, 77], column] = cell
    assert snapshot(store, frame, "--append") == 0
    waiting = asked(store, capsys, "data", "review", "own")
    assert {row["id"] for row in waiting} == {"row 0002003", "row 0002077"}
    assert all(reason in row["reason"] for row in waiting), waiting
    stored = store.load("own")
    assert len(stored) == 2498 and stored.dtypes.equals(store.load("own@v1.0").dtypes)
    if isinstance(cell, str):
        words = ["data", "review", "own", "--accept", "row 0002003", "-w", str(store.root)]
        assert main(words) == 1
        assert "deliver them again" in capsys.readouterr().err


def test_a_drop_that_leaves_only_good_rows_is_no_longer_forced(
    store: DataStore, tmp_path: Path
) -> None:
    frame, wrong = with_wrong_labels(1000, 400, first=2000)
    assert snapshot(store, frame, "--append", "--force") == 0
    assert forced_rows(store, "own@v1.1").sum() == 1000
    keys = tmp_path / "keys.json"
    few = sorted(wrong)[:100]
    keys.write_text(json.dumps(few))
    words = ["-w", str(store.root), "--keys-from", str(keys)]
    assert main(["data", "drop", "own@v1.1", *words]) == 0
    assert forced_rows(store, "own").sum() == 900  # the rest is no better
    keys.write_text(json.dumps(sorted(wrong)))
    assert main(["data", "drop", "own@v1.1", *words]) == 0
    version = store.resolve("own")
    assert (version.rows, version.parent, version.forced) == (2600, "own@v1.0", False)
    assert forced_rows(store, "own").sum() == 0


def test_a_part_does_not_silently_take_the_place_of_the_whole(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """A delivery of new rows without --append would have left the old ones out."""
    assert snapshot(store, good(100, first=2000)) == 2
    told = capsys.readouterr().err
    assert "2,000 of them missing" in told and "--append" in told and "--replace" in told
    assert store.resolve("own").ref == "own@v1.0"
    assert snapshot(store, good(100, first=2000), "--append") == 0
    assert snapshot(store, good(1200), "--force") == 0  # a good part of them: said by the row count
    assert snapshot(store, good(100), "--replace") == 0
    assert len(store.load("own")) == 100


def test_a_changed_number_is_shown_in_digits_that_tell_the_change(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = good(2000).assign(price=23004.25)
    assert snapshot(store, frame, "--force") == 0
    frame.loc[5, "price"] = 23004.5
    frame.loc[6, "price"] += 1e-9
    assert snapshot(store, frame, "--force") == 0
    capsys.readouterr()
    assert main(["data", "diff", "own@v1.1", "own@v1.2", "-w", str(store.root)]) == 0
    said = capsys.readouterr().out
    assert "23,004.2  23,004.5" in re.sub(" {2,}", "  ", said)
    assert "23,004.250000001" in said


@pytest.mark.parametrize(
    ("text", "offered"), [("fast", False), ("9999", True)], ids=["no number", "absurd number"]
)
def test_force_is_offered_where_it_helps(
    store: DataStore, capsys: pytest.CaptureFixture[str], text: str, offered: bool
) -> None:
    frame = good(100, first=2000).astype({"temperature": object})
    frame.loc[:60, "temperature"] = text
    assert snapshot(store, frame, "--append") == 4
    assert ("--force" in capsys.readouterr().err) == offered
    assert (snapshot(store, frame, "--append", "--force") == 0) == offered


def test_the_page_and_the_command_say_the_same_of_a_batch(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = good(300, first=2000)
    frame["temperature"] *= 100
    capsys.readouterr()
    assert snapshot(store, frame, "--append", "--force") == 0
    said = capsys.readouterr().out
    tables = diff_tables(store, store.resolve("own@v1.0"), store.resolve("own@v1.1"))
    words = {row[0]: row[5] for row in tables["columns"][1]}
    assert words["temperature"].startswith("peak moved right by")
    assert f"temperature: {words['temperature']}; effect" in said
    shown = difference_html(
        {
            name: [dict(zip(head, row, strict=True)) for row in rows]
            for name, (head, rows) in tables.items()
        }
    )
    assert "300 rows new or changed in own@v1.1" in shown


def test_rows_that_hold_the_same_are_one_decision_in_the_data_set_where_they_wait(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = good(100, first=2000).round(3)
    assert snapshot(store, pd.concat([frame, frame[3:4], frame[3:4]]), "--append") == 0
    capsys.readouterr()
    here = ["-w", str(store.root)]
    assert main(["data", "review", *here]) == 0  # the recipe's data set is another one
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["data", "set", "key", "copies"] and len(lines) == 3
    assert lines[2].startswith("own") and f"temperature {frame['temperature'][3]:.4g}" in lines[2]
    assert main(["data", "review", "--accept", frame["id"][3], *here]) == 0
    said = capsys.readouterr().out
    assert "3 rows accepted" in said and "0 still waiting" in said
    assert store.load("own")["id"].tolist().count(frame["id"][3]) == 1
    changed = frame[3:4].assign(temperature=frame["temperature"][3] + 1)
    assert snapshot(store, pd.concat([good(100, first=2100), changed, changed]), "--append") == 0
    assert main(["data", "review", "own", "--accept-all", *here]) == 0
    assert "in place of 1 row of the same key" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["checkout", "own@v1.0", "{file}/x"], "expected a place that can be written"),
        (["push", "own@v1.0", "--to", "{file}/x"], "expected a folder that can be written"),
        (["import", "other", "absent"], "found none at"),
        (["snapshot", "{file}"], "did you mean --from"),
        (["snapshot", "own", "{file}", "--from", "{file}"], "expected one file"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_clear_line(
    store: DataStore,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    told: str,
) -> None:
    monkeypatch.chdir(store.root)
    file = store.root.parent / "delivered.csv"
    capsys.readouterr()
    assert main(["data", *(word.format(file=file) for word in words)]) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and "dvc get" not in said


def test_an_empty_file_is_called_empty(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert snapshot(store, "", "--append") == 1
    said = capsys.readouterr().err
    assert "found an empty file" in said and "damaged" not in said


def test_a_version_needs_its_number_alone_where_the_data_set_is_clear(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["-w", str(store.root)]
    assert snapshot(store, good(2100)) == 0
    assert main(["data", "tag", "own@v1.0", "golden", *here]) == 0
    capsys.readouterr()
    for sides in (["golden", "v1.1"], ["own@v1.0", "v1.1"], ["v1.0", "own"]):
        assert main(["data", "diff", *sides, *here]) == 0
        assert "own@v1.0 -> own@v1.1: 100 added" in capsys.readouterr().out
    store.snapshot("more", good(10), key="id", label="late")
    assert main(["data", "diff", "golden", "own@v1.1", *here]) == 0
    assert main(["data", "diff", "golden", "v1.1", *here]) == 1
    assert "did you mean own@golden" in capsys.readouterr().err


def test_one_row_is_called_one_row(
    store: DataStore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    capsys.readouterr()
    assert snapshot(store, good(2001)) == 0
    here = ["-w", str(store.root)]
    assert main(["data", "push", "own@v1.1", "--to", str(tmp_path / "remote"), *here]) == 0
    frame = good(2001)
    frame.loc[7, "carrier"] = "DL" if frame["carrier"][7] != "DL" else "UA"
    assert snapshot(store, frame) == 0
    assert main(["data", "diff", "own@v1.1", "own@v1.2", *here]) == 0
    said = capsys.readouterr().out
    assert "1 version to" in said and "carrier: 1 row changed" in said
    assert not re.search(r"\b1 (rows|versions|objects|files)\b", said), said


def test_one_bad_row_of_ten_waits_and_nine_come_in(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    """Few rows: a share of 10 % is one row, and says nothing about the delivery."""
    ten = good(10, first=2000).astype({"temperature": object}).assign(extra=1)
    ten.loc[3, "temperature"] = "abc"
    assert snapshot(store, ten, "--append") == 0
    said = capsys.readouterr().out
    assert "1 row held back" in said and "missing" not in said
    assert "extra: a new column" in said and "own@v1.0" in said  # what it was compared with
    assert store.resolve("own").rows == 2009
    worst = good(10, first=3000).assign(temperature="abc")
    assert snapshot(store, worst, "--append") == 4  # all of them is another matter


def test_a_row_that_was_turned_down_can_be_taken_in_later(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    frame, wrong = with_wrong_labels(1000, 12, first=2000)
    assert snapshot(store, frame, "--append") == 0
    key, here = sorted(wrong)[0], ["-w", str(store.root)]
    assert main(["data", "review", "own", "--reject", key, *here]) == 0
    assert asked(store, capsys, "data", "review", "own", "--rejected")[0]["id"] == key
    assert main(["data", "review", "own", "--accept", key, *here]) == 0
    assert "1 row accepted" in capsys.readouterr().out
    assert key in set(store.load("own")["id"])
    assert main(["data", "review", "mine", *here]) == 1  # no such data set
    assert main(["data", "list", "mine", *here]) == 1


def test_what_was_refused_once_gets_no_tolerance(
    store: DataStore, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of forced rows, the worst half of the wrong ones goes: the rest would pass a first look, and stays marked."""
    frame, wrong = with_wrong_labels(900, 160, first=2000)
    assert snapshot(store, frame, "--append", "--force", "--batch", "may") == 0
    keys = tmp_path / "keys"
    here = ["-w", str(store.root)]
    keys.write_text("\n".join(sorted(wrong)[:100]))
    assert main(["data", "drop", "own", "--keys-from", str(keys), *here]) == 0
    assert "stay marked" in capsys.readouterr().err
    assert forced_rows(store, "own@v1.2").sum() == 800
    assert "on v1.1 (forced)" in (main(["data", "list", "own", *here]), capsys.readouterr().out)[1]
    keys.write_text("\n".join(sorted(wrong)[100:]))
    assert main(["data", "drop", "own", "--keys-from", str(keys), *here]) == 0
    assert (
        "740 rows that had been forced in and stay pass the checks now" in capsys.readouterr().out
    )
    rows = store.rows("own@v1.3")
    assert not forced_rows(store, "own@v1.3").any() and (rows["batch"] == "may").sum() == 740
