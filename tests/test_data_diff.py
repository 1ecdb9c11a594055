"""The difference of two versions against a comparison row by row that knows nothing of files."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from data_support import new_store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlops_workbench.data import groups
from mlops_workbench.data.diff import DataDiff
from mlops_workbench.data.versions import DataStore

NUMBERS = itertools.count()
VALUES = {
    "size": st.sampled_from([0, 1, 2]),
    "share": st.sampled_from([0.0, 1.0, 1.5, None]),
    "word": st.sampled_from(["", "a", "b", None]),
    "flag": st.booleans(),
}
NAMES = {"key": "id", "label": "late"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DataStore:
    return new_store(tmp_path_factory.mktemp("diff"))


@pytest.fixture
def tiny_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few rows, so that a small table has many that two versions can share."""
    monkeypatch.setattr(groups, "SMALLEST_BYTES", 1)
    monkeypatch.setattr(groups, "COLUMN_BYTES", 1)
    monkeypatch.setattr(groups, "GROUP_BYTES", 200)


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    """A table of up to 80 rows with some of the columns."""
    keys = sorted(draw(st.sets(st.integers(0, 99), min_size=1, max_size=80)))
    seed = np.random.default_rng(draw(st.integers(0, 3)))
    columns: dict[str, object] = {"id": [f"{key:03d}" for key in keys]}
    columns["late"] = pd.Series(seed.integers(0, 3, 100)[keys], dtype="Int64")
    for name in draw(st.sets(st.sampled_from(sorted(VALUES)), min_size=1)):
        common = draw(VALUES[name])
        cells = pd.Series([common] * len(keys), dtype=object)
        for row in draw(st.sets(st.integers(0, len(keys) - 1), max_size=8)):
            cells[row] = draw(VALUES[name])
        columns[name] = cells.infer_objects()
    frame = pd.DataFrame(columns)
    for row in draw(st.sets(st.integers(0, len(keys) - 1), max_size=6)):
        frame.loc[row, "late"] = draw(st.sampled_from([0, 1, None]))
    return frame


def by_key(frame: pd.DataFrame) -> dict[str, dict[str, object]]:
    """The cells by key and column, every missing one None."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return {str(row["id"]): row for row in rows}


def check(found: DataDiff, before: pd.DataFrame, after: pd.DataFrame) -> None:
    """The difference is that of two dictionaries."""
    old, new = by_key(before), by_key(after)
    assert by_key(found.added) == {key: row for key, row in new.items() if key not in old}
    assert by_key(found.removed) == {key: row for key, row in old.items() if key not in new}
    both = [key for key in new if key in old]
    columns = [name for name in after if name in before and name != "late"]
    assert found.changed.astype(object).where(found.changed.notna(), None).to_numpy().tolist() == [
        [key, name, old[key][name], new[key][name]]
        for name in columns
        for key in both
        if old[key][name] != new[key][name]
    ]
    texts = [
        (key, *(None if row["late"] is None else str(row["late"]) for row in (old[key], new[key])))
        for key in both
    ]
    moved = [list(row) for row in texts if row[1] != row[2]]
    assert found.relabelled.to_numpy().tolist() == moved
    touched = {row[0] for row in moved} | set(found.changed["key"])
    assert found.counts["unchanged"] == len(both) - len(touched)
    assert set(found.columns_added) == set(after) - set(before)
    assert set(found.columns_removed) == set(before) - set(after)


@pytest.mark.usefixtures("tiny_files")
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(versions=st.lists(tables(), min_size=2, max_size=3))
def test_a_difference_is_that_of_the_rows(store: DataStore, versions: list[pd.DataFrame]) -> None:
    name = f"table{next(NUMBERS)}"
    refs = [store.snapshot(name, frame, **NAMES).ref for frame in versions]
    for a, b in itertools.permutations(range(len(versions)), 2):
        check(store.diff(refs[a], refs[b]), versions[a], versions[b])


def test_the_same_file_at_other_rows_is_read(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    values = {"size": [2, 1, 2, 1], "late": [0, 1, 0, 1]}
    before = pd.DataFrame({"id": ["a", "b", "c", "d"], **values})
    after = pd.DataFrame({"id": ["b", "c", "d", "e"], **values})
    store.snapshot("moved", before, **NAMES)
    store.snapshot("moved", after, **NAMES)
    found = store.diff("moved@v1.0", "moved")
    assert found.counts == {
        "added": 1, "removed": 1, "changed": 3, "relabelled": 3, "unchanged": 0
    }  # fmt: skip
    check(found, before, after)


@pytest.mark.parametrize("text", [True, False])
def test_many_rows_removed_here_and_there(store: DataStore, text: bool) -> None:
    keys = np.arange(0, 120_000, 3)
    frame = pd.DataFrame({"id": [f"{key:06}" for key in keys] if text else keys, "late": 0})
    frame["size"] = np.random.default_rng(0).normal(size=len(frame))
    gone = np.random.default_rng(1).permutation(len(frame))[:300]
    name = f"scattered-{text}"
    store.snapshot(name, frame, **NAMES)
    store.snapshot(name, frame.drop(index=gone), **NAMES)
    found = store.diff(f"{name}@v1.0", name)
    assert found.removed["id"].tolist() == frame["id"].iloc[np.sort(gone)].tolist()
    assert found.counts["removed"] == 300 and found.counts["unchanged"] == len(frame) - 300
