"""Deliveries as people make them: few rows, a typed file, a turned sign; what waits, what is said, what a person may take in."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mlops_workbench.cli.main import main
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.versions import DataStore
from mlops_workbench.pages.data_views import diff_tables


def orders(rows: int, first: int, seed: int = 0) -> pd.DataFrame:
    """Orders that are late when far, heavy or in a slow courier's hands, with noise: nine in ten can be told at best."""
    numbers = np.random.default_rng((seed, first))
    frame = pd.DataFrame(
        {
            "order": [f"O{first + number:06}" for number in range(rows)],
            "km": numbers.gamma(2, 6, rows).round(2),
            "items": numbers.integers(1, 12, rows),
            "weight": numbers.lognormal(1, 0.6, rows).round(3),
            "courier": numbers.choice(["bike", "van", "foot"], rows, p=[0.5, 0.3, 0.2]),
        }
    )
    slow = frame["courier"].map({"bike": -1.0, "van": 0.0, "foot": 1.5})
    score = 0.12 * frame["km"] + 0.15 * frame["items"] + 0.3 * frame["weight"] + slow - 3
    return frame.assign(late=np.where(score + numbers.normal(0, 0.5, rows) > 0, "yes", "no"))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace made from a CSV of 3,000 orders, which are its orders@v1.0."""
    folder = tmp_path_factory.mktemp("untouched")
    orders(3000, 0).to_csv(folder / "orders.csv", index=False)
    place = folder / "orders"
    assert main(["init", str(place), "--csv", str(folder / "orders.csv"), "--label", "late"]) == 0
    assert main(["data", "snapshot", "-w", str(place)]) == 0
    return place


@pytest.fixture
def store(untouched: Path, tmp_path: Path) -> DataStore:
    """A copy of that workspace."""
    place = tmp_path / "orders"
    shutil.copytree(untouched, place, symlinks=True)
    return DataStore(Workspace.open(place))


def deliver(
    store: DataStore, rows: pd.DataFrame | str, *words: str, encoding: str = "utf-8"
) -> int:
    """Exit code of `mwb data snapshot --from FILE --append`; text is the file's content."""
    file = store.root.parent / "delivered.csv"
    text = rows if isinstance(rows, str) else rows.to_csv(index=False)
    file.write_text(text, encoding=encoding)
    return run(store, "snapshot", "--from", str(file), "--append", *words)


def run(store: DataStore, *words: str) -> int:
    """Exit code of a verb of `mwb data` in the workspace."""
    return main(["data", *words, "-w", str(store.root)])


def asked(store: DataStore, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    """What such a verb says in JSON."""
    capsys.readouterr()
    assert run(store, *words, "--json") == 0
    return json.loads(capsys.readouterr().out)


def turned(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with the other label each."""
    return frame.assign(late=np.where(frame["late"] == "yes", "no", "yes"))


def with_certain_error(rows: int, first: int) -> pd.DataFrame:
    """Honest rows of which the first cannot have its label."""
    frame = orders(rows, first)
    frame.loc[0, ["km", "items", "weight", "courier", "late"]] = [30.0, 9, 5.0, "foot", "no"]
    return frame


@pytest.mark.parametrize("rows", [10, 30])
def test_few_rows_whose_labels_are_all_turned_are_refused(
    store: DataStore, capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    assert deliver(store, turned(orders(rows, 3000))) == 4
    said = capsys.readouterr().err
    assert f"of {rows} labels look wrong, this model's own errors among them" in said
    assert "so it would to " in said and "what this model's own errors explain" not in said
    assert deliver(store, orders(rows, 3000)) == 0
    assert store.resolve("orders").rows == 3000 + rows


@pytest.mark.parametrize("rows", [1, 20, 300])
def test_a_single_label_that_cannot_be_right_waits(
    store: DataStore, capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    assert deliver(store, with_certain_error(rows, 3000)) == 0
    waiting = {row["id"]: row for row in asked(store, capsys, "review", "orders")}
    assert waiting["O003000"]["probability"] >= 0.9 and waiting["O003000"]["likely"] == "yes"
    assert len(waiting) <= 2
    assert store.resolve("orders").rows == 3000 + rows - len(waiting)


def test_three_rows_are_too_few_to_judge_together_and_that_is_said(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert deliver(store, orders(3, 3000)) == 0
    assert "the labels of 3 rows: too few to judge them as a whole" in capsys.readouterr().out


@pytest.mark.slow
def test_of_honest_orders_hardly_any_waits_however_they_are_delivered(store: DataStore) -> None:
    first = 3000
    for rows in (1, 1, 1, 5, 5, 20, 20, 40, 100, 100, 300, 300, 1000, 1000):
        assert deliver(store, orders(rows, first)) == 0
        first += rows
    assert store.resolve("orders").rows >= first - 4


def test_a_column_that_came_once_may_stay_away(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    early = orders(20, 3000)
    early.loc[5, "courier"] = "drone"
    assert deliver(store, early) == 0
    assert deliver(store, orders(20, 3020).assign(extra=1)) == 0
    capsys.readouterr()
    assert deliver(store, orders(20, 3040)) == 0
    assert "extra: the column is missing; no recipe uses it" in capsys.readouterr().out
    assert deliver(store, orders(20, 3060).rename(columns={"weight": "Weight"})) == 4
    assert "is 'Weight' meant" in capsys.readouterr().err
    assert run(store, "review", "orders", "--accept", "O003005") == 0
    rows = store.load("orders")
    assert len(rows) == 3060 and rows["extra"].notna().sum() == 20
    capsys.readouterr()
    assert deliver(store, orders(20, 3040)) == 0  # the same again, without the column
    said = capsys.readouterr().out
    assert (
        "nothing new: all 20 rows are in orders@v1.4 as they are" in said and "beside" not in said
    )


def test_rows_that_wait_change_no_type(store: DataStore) -> None:
    rows = orders(20, 3000).astype({"late": object})
    rows.loc[5, "late"] = None
    assert deliver(store, rows) == 0
    assert dict(store.resolve("orders").columns) == dict(store.resolve("orders@v1.0").columns)


def test_what_nobody_can_take_in_stays_and_the_others_come(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = orders(100, 3000).astype({"weight": object, "late": object})
    rows.loc[1, "late"] = None
    rows.loc[2, "weight"] = "inf"
    rows.loc[3, "order"] = None
    rows.loc[4, "courier"] = "drone"
    rows.loc[5, "late"] = "maybe"
    assert deliver(store, rows) == 0
    assert "1 row without a key" in capsys.readouterr().out
    for name, why in (("O003001", "no label"), ("O003002", "no finite"), ("(no key)", "no key")):
        assert run(store, "review", "orders", "--accept", name) == 1
        assert why in capsys.readouterr().err
    assert run(store, "review", "orders", "--accept-all", "-m", "a drone it was") == 1
    said = capsys.readouterr()
    assert "1 row accepted" in said.out and "4 still waiting" in said.out
    for why in ("O003001: it has no label", "(no key): it has no key", "late is 'maybe', no class"):
        assert why in said.err
    shown = asked(store, capsys, "show", "orders")
    assert (shown["rows_accepted_by_hand"], shown["rows_against_checks"]) == (1, 0)
    assert any("drone" in note for note in shown["validation"]["notes"])
    assert asked(store, capsys, "show", "orders@v1.1")["rows_accepted_by_hand"] == 0


def test_a_turned_sign_is_refused_however_few_the_rows(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = orders(8, 3000)
    assert deliver(store, rows.assign(km=-rows["km"])) == 4
    assert "when the sign is turned" in capsys.readouterr().err


def test_one_value_below_0_does_not_widen_what_is_usual(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    for first, km in ((3000, -5.0), (3020, -5.0)):
        rows = orders(20, first)
        rows.loc[5, "km"] = km
        assert deliver(store, rows) == 0
        assert "km: 1 value below 0, first -5, where " in capsys.readouterr().out
    far = orders(20, 3040)
    far.loc[5, "km"] = -1.5 * store.load("orders@v1.0")["km"].max()
    assert deliver(store, far) == 0
    assert [row["id"] for row in asked(store, capsys, "review", "orders")] == ["O003045"]


def test_a_single_value_far_below_0_waits(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = orders(20, 3000)
    rows.loc[5, "km"] = -40.0
    assert deliver(store, rows) == 0
    assert "first -40, where none of 3,000 was before: wrong sign?" in capsys.readouterr().out
    rows = orders(20, 3020)
    rows.loc[5, "km"], rows.loc[6, "km"] = -400.0, -40.0  # more than a twentieth: as before
    assert deliver(store, rows) == 0
    rows = orders(40, 3040)
    rows.loc[5, "km"], rows.loc[6, "km"] = -400.0, -40.0
    assert deliver(store, rows) == 0
    waiting = [row["id"] for row in asked(store, capsys, "review", "orders")]
    assert waiting == ["O003005", "O003025", "O003045", "O003046"]


def test_numbers_for_classes_are_taken_in_and_it_is_said_how_they_were_read(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = orders(40, 3000)
    assert deliver(store, rows.assign(late=(rows["late"] == "yes").astype(int))) == 0
    assert "remark: labels 0, 1 read as 'no', 'yes'" in capsys.readouterr().out
    assert deliver(store, orders(20, 3040)) == 0
    assert "read as" not in capsys.readouterr().out
    stored = store.load("orders").set_index("order").loc[rows["order"], "late"]
    assert stored.tolist() == (rows["late"] == "yes").astype(int).tolist()
    versions = [store.resolve(f"orders@v1.{number}") for number in range(3)]
    tables = [diff_tables(store, *pair) for pair in pairwise(versions)]
    (late,) = (row for row in tables[0]["columns"][1] if row[0] == "late")
    assert set(json.loads(late[-1])["names"][:2]) == {"no", "yes"}
    sample = json.loads(tables[0]["samples"][1][0][2])
    assert {row[sample["columns"].index("late")] for row in sample["rows"]} == {"no", "yes"}


def test_new_changed_and_relabelled_rows_are_counted(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    known = orders(3000, 0)[:6]
    known.loc[:1, "weight"] += 0.5
    known.loc[2, "weight"] += 0.5
    known.loc[2, "late"] = "no" if known["late"][2] == "yes" else "yes"
    assert deliver(store, pd.concat([known, orders(50, 3000)]), "--force") == 0
    assert ": 50 new, 3 changed (1 of them relabelled)" in capsys.readouterr().out
    counts = asked(store, capsys, "show", "orders")["rows"]
    assert counts == 3050


@pytest.mark.parametrize(
    ("column", "change", "told"),
    [
        ("late", str.capitalize, "20 rows with labels that are no class, first "),
        ("km", lambda cell: str(cell).replace(".", ","), "a decimal comma? write "),
    ],
)
def test_a_fault_of_typing_is_said_once_and_in_plain_words(
    store: DataStore, capsys: pytest.CaptureFixture[str], column: str, change: Any, told: str
) -> None:
    rows = orders(20, 3000)
    rows[column] = rows[column].map(change)
    assert deliver(store, rows) == 4
    said = capsys.readouterr().err
    assert told in said and said.count(f"{column}: ") == 1
    assert "dtype" not in said and "isin" not in said
    if column == "late":
        assert "classes are 'no', 'yes'; is '" in said


@pytest.mark.parametrize(
    ("separator", "encoding", "told"),
    [(";", "utf-8", "found 5 ';'"), (",", "latin-1", "in UTF-8"), ("\t", "utf-8", "commas")],
)
def test_a_spreadsheets_file_is_not_called_damaged(
    store: DataStore, capsys: pytest.CaptureFixture[str], separator: str, encoding: str, told: str
) -> None:
    rows = orders(20, 3000).assign(courier="Müller")
    assert deliver(store, rows.to_csv(index=False, sep=separator), encoding=encoding) == 1
    said = capsys.readouterr().err
    assert told in said and "damaged" not in said and "cut off" not in said
