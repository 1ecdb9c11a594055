"""Data versions: round trips, changes, damage, kills, a full disk, two at once, odd keys."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from data_support import (
    files_under,
    flip_byte,
    kill_group,
    new_store,
    pictures,
    result_of,
    start_snapshot,
    table,
    wait_until_ready,
)

from mlops_workbench.cli.main import main
from mlops_workbench.core.errors import DataError, IntegrityError, UsageError
from mlops_workbench.data.dvc import listing, object_path
from mlops_workbench.data.versions import DataStore

NAMES = {"key": "id", "label": "late"}


def git(store: DataStore, *arguments: str) -> str:
    """What git prints in the workspace."""
    return subprocess.run(
        ["git", *arguments], cwd=store.root, check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def store(tmp_path: Path) -> DataStore:
    return new_store(tmp_path)


# what a version is


def test_a_version_comes_back_as_it_went_in(store: DataStore) -> None:
    frame = table(5000)
    version = store.snapshot("flights", frame, message="January", source_batch="january", **NAMES)
    pd.testing.assert_frame_equal(store.load("flights@v1.0"), frame)
    assert (version.ref, version.rows, version.parent) == ("flights@v1.0", 5000, None)
    assert version.columns["carrier"] == "text"
    assert version.commit == git(store, "rev-parse", "flights@v1.0^{commit}").strip()
    files = store.stored(version).files
    assert {group.name for group in files.groups} == {
        "key",
        "label",
        "columns-00",
        "hashes",
        "origin",
    }
    assert all(sum(shard.rows for shard in group.shards) == 5000 for group in files.groups)
    assert store.show("flights")["batches"] == {"january": 5000}
    assert len(store.versions()) == 1
    assert store.resolve("flights") == store.latest("flights") == store.versions("flights")[0]


def test_every_type_of_column_comes_back(store: DataStore) -> None:
    rows = 50
    frame = pd.DataFrame(
        {
            "id": np.arange(rows),
            "late": pd.array([None if n % 7 == 0 else n % 2 for n in range(rows)], dtype="Int64"),
            "large": np.arange(rows, dtype=np.int64) + 2**60,
            "small": np.arange(rows, dtype=np.uint8),
            "single": np.linspace(0, 1, rows, dtype=np.float32),
            "yes": np.arange(rows) % 3 == 0,
            "maybe": pd.array([None, True] * (rows // 2), dtype="boolean"),
            "when": pd.date_range("2013-01-01", periods=rows, freq="h"),
            "zoned": pd.date_range("2013-01-01", periods=rows, freq="h", tz="America/New_York"),
            "kind": pd.Categorical(["a", "b"] * (rows // 2)),
            "text": ["x", None] * (rows // 2),
            "empty": [None] * rows,
            "image": [np.full((4, 4), n, dtype=np.uint8) for n in range(rows)],
            "vector": [np.full(3, n, dtype=np.float32) for n in range(rows)],
        }
    )
    store.snapshot("things", frame, **NAMES)
    back = store.load("things")
    arrays = ["image", "vector"]
    pd.testing.assert_frame_equal(back.drop(columns=arrays), frame.drop(columns=arrays))
    for name in arrays:
        for left, right in zip(back[name], frame[name], strict=True):
            np.testing.assert_array_equal(left, right)
            assert left.dtype == right.dtype
    assert store.snapshot("things", back, **NAMES).unchanged


def test_the_same_rows_are_the_same_version_and_the_same_bytes(tmp_path: Path) -> None:
    frame = table(3000)
    first, second = new_store(tmp_path / "a"), new_store(tmp_path / "b")
    one = first.snapshot("flights", frame, **NAMES)
    two = second.snapshot("flights", frame.sample(frac=1, random_state=5), **NAMES)
    assert one.digest == two.digest
    for group, other in zip(
        *(s.stored("flights").files.groups for s in (first, second)), strict=True
    ):
        assert group == other or group.name == "origin", "only the time of arrival differs"
    again = first.snapshot("flights", frame.sample(frac=1, random_state=6), **NAMES)
    assert again.unchanged and again.ref == "flights@v1.0"
    assert len(first.versions()) == 1


def test_versions_share_what_did_not_change(store: DataStore) -> None:
    frame = table(60_000)
    first = store.snapshot("flights", frame, **NAMES)
    longer = pd.concat([frame, table(6000, first=60_000)], ignore_index=True)
    second = store.snapshot("flights", longer, **NAMES)
    assert second.new_bytes < 0.2 * first.bytes, "10 % more rows"
    ids = [f"row 0030000 {n}" for n in range(60)]
    inserted = pd.concat([longer, table(60, first=0, seed=5).assign(id=ids)])
    third = store.snapshot("flights", inserted, **NAMES)
    assert third.new_bytes < 0.25 * first.bytes, "60 rows in the middle"
    chosen = np.random.default_rng(0).random(len(inserted)) < 0.02
    relabelled = inserted.assign(late=np.where(chosen, 1 - inserted.late, inserted.late))
    fourth = store.snapshot("flights", relabelled, **NAMES)
    groups = zip(*(store.stored(v).files.groups for v in (third, fourth)), strict=True)
    changed = {new.name for old, new in groups if old.shards != new.shards}
    assert changed == {"label", "origin"}
    warmer = relabelled.assign(temperature=relabelled.temperature + 1)
    fifth = store.snapshot("flights", warmer, **NAMES)
    warmest = store.snapshot("flights", warmer.assign(temperature=warmer.temperature + 1), **NAMES)
    kinds = [
        [g.columns for g in store.stored(v).files.groups if g.name.startswith("columns")]
        for v in (fourth, fifth, warmest)
    ]
    assert kinds == [
        [("temperature", "carrier", "hour")],
        *[[("carrier", "hour"), ("temperature",)]] * 2,
    ]
    for version, expected in ((first, frame), (second, longer), (warmest, None)):
        if expected is not None:
            pd.testing.assert_frame_equal(store.load(version), expected)
    assert store.verify() == []


def test_a_row_keeps_its_batch_and_arrival_until_it_changes(store: DataStore) -> None:
    first = store.snapshot("flights", table(500), source_batch="january", **NAMES)
    changed = table(600).assign(late=0)
    second = store.snapshot("flights", changed, source_batch="february", **NAMES)
    rows = store.rows("flights").set_index("key")
    same = (table(500)["late"] == 0) & (table(500)["id"] == changed["id"][:500])
    same &= store.rows(first)["row_hash"] == rows["row_hash"].to_numpy()[:500]
    assert (
        (rows["batch"] == "january").sum()
        == same.sum()
        == (rows["arrived"] == first.created_at).sum()
    )
    assert set(rows.loc[rows["batch"] == "february", "arrived"]) == {second.created_at}


def test_the_order_can_be_declared_and_is_inherited(store: DataStore) -> None:
    frame = table(500)
    store.snapshot("flights", frame, order=["hour"], **NAMES)
    loaded = store.load("flights")
    assert loaded["hour"].is_monotonic_increasing
    store.snapshot("flights", frame.assign(late=1 - frame.late), **NAMES)
    assert store.load("flights")["hour"].is_monotonic_increasing
    assert store.latest("flights").order == ("hour",)  # type: ignore[union-attr]


def test_only_our_own_files_are_committed(store: DataStore) -> None:
    (store.root / "notes.txt").write_text("mine")
    git(store, "add", "notes.txt")
    (store.root / "settings.ini").write_text(
        (store.root / "settings.ini").read_text() + "\n# mine\n"
    )
    store.snapshot("flights", table(100), **NAMES)
    committed = set(git(store, "show", "--name-only", "--format=", "HEAD").split())
    assert committed == {
        "data/flights.json", "data/flights.dvc", "data/.gitignore",
        ".dvc/config", ".dvc/.gitignore", ".dvcignore",
    }  # fmt: skip
    left = {line.strip() for line in git(store, "status", "--porcelain").splitlines()}
    assert left == {"A  notes.txt", "M settings.ini"}


def test_a_person_can_use_dvc_by_hand(store: DataStore) -> None:
    version = store.snapshot("flights", table(300), **NAMES)
    shutil.rmtree(store.root / ".dvc" / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "pull", "data/flights.dvc"],
        cwd=store.root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    keys = pd.read_parquet(store.root / "data" / "flights" / "key")
    assert keys["id"].tolist() == store.load(version)["id"].tolist()
    for words in ("status", "status --cloud", "push"):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *words.split()],
            cwd=store.root, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and ("up to date" in done.stdout or "in sync" in done.stdout), (
            done
        )
    assert git(store, "status", "--porcelain") == ""


# changes


def test_planted_changes_are_found_row_by_row(store: DataStore) -> None:
    numbers = np.random.default_rng(3)
    before = table(8000)
    order = numbers.permutation(8000)
    removed, relabelled, warmer, moved = order[:30], order[30:130], order[130:180], order[180:200]
    after = before.copy()
    after.loc[relabelled, "late"] = 1 - after.loc[relabelled, "late"]
    after.loc[warmer, "temperature"] = after.loc[warmer, "temperature"].fillna(0) + 5.0
    after.loc[moved, ["hour", "carrier"]] = [25, "XX"]
    after = pd.concat([after.drop(index=removed), table(70, first=8000)], ignore_index=True)
    store.snapshot("flights", before, **NAMES)
    store.snapshot("flights", after, **NAMES)
    found = store.diff("flights@v1.0", "flights@v1.1")
    assert found.counts == {
        "added": 70, "removed": 30, "changed": 70, "relabelled": 100, "unchanged": 8000 - 30 - 170,
    }  # fmt: skip
    assert found.by_column == {"temperature": 50, "hour": 20, "carrier": 20}
    assert set(found.removed["id"]) == set(before["id"].iloc[removed])
    assert set(found.added["id"]) == set(table(70, first=8000)["id"])
    assert set(found.relabelled["key"]) == set(before["id"].iloc[relabelled])
    to_late = int((before.loc[relabelled, "late"] == 0).sum())
    assert found.flows[("0", "1")] == to_late and found.flows[("1", "0")] == 100 - to_late
    hours = found.changed[found.changed["column"] == "hour"].set_index("key")
    expected = before.set_index("id")["hour"]
    assert all(row.before == expected[key] and row.after == 25 for key, row in hours.iterrows())
    assert store.diff("flights@v1.1", "flights@v1.0").counts["added"] == 30
    assert store.diff("flights@v1.1", "flights@v1.1").is_empty
    assert "relabelled" in found._repr_html_()


def test_changed_columns_are_told_apart_from_changed_rows(store: DataStore) -> None:
    before = table(2000)
    after = before.assign(wind=1.5, hour=before.hour.astype(float)).drop(columns="carrier")
    store.snapshot("flights", before, **NAMES)
    store.snapshot("flights", after, **NAMES)
    found = store.diff("flights@v1.0", "flights")
    assert found.columns_added == ("wind",)
    assert found.columns_removed == ("carrier",)
    assert found.retyped == (("hour", "int64", "float64"),)
    assert found.counts["changed"] == found.counts["relabelled"] == 0


def test_an_older_version_can_be_gone_back_to(store: DataStore) -> None:
    good, bad = table(1000), table(1000, seed=9)
    store.snapshot("flights", good, **NAMES)
    store.snapshot("flights", bad, **NAMES)
    back = store.snapshot("flights", store.load("flights@v1.0"), message="v1.1 was bad", **NAMES)
    assert back.ref == "flights@v1.2" and back.parent == "flights@v1.1"
    assert back.digest == store.resolve("flights@v1.0").digest
    pd.testing.assert_frame_equal(store.load("flights"), good)
    pd.testing.assert_frame_equal(store.load("flights@v1.1"), bad)
    assert store.diff("flights@v1.0", "flights@v1.2").is_empty
    corrected = good.assign(late=0)
    line = store.snapshot("flights", corrected, parent="flights@v1.0", minor=False, **NAMES)
    assert (line.ref, line.parent) == ("flights@v2.0", "flights@v1.0")


def test_checkout_writes_files_that_others_can_read(store: DataStore, tmp_path: Path) -> None:
    first, second = table(3000), table(2000, seed=1)
    store.snapshot("flights", first, **NAMES)
    store.snapshot("flights", second, **NAMES)
    folder = store.checkout("flights@v1.0", tmp_path / "out")
    pd.testing.assert_frame_equal(pd.read_parquet(folder), first)
    assert json.loads((folder / "_version.json").read_text())["ref"] == "flights@v1.0"
    assert main(["data", "checkout", "flights@v1.1", str(folder), "-w", str(store.root)]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(folder), second)
    assert json.loads((folder / "_version.json").read_text())["classes"] == ["on time", "late"]
    (folder / "more").mkdir()
    (folder / "more" / "analysis.ipynb").write_text("mine")
    with pytest.raises(UsageError, match=r"found also more/analysis\.ipynb; nothing was changed"):
        store.checkout("flights@v1.0", folder)
    assert (folder / "more" / "analysis.ipynb").read_text() == "mine"
    assert json.loads((folder / "_version.json").read_text())["ref"] == "flights@v1.1"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="name another folder"):
        store.checkout("flights", tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


# pictures


def test_a_folder_of_pictures_comes_back_bit_for_bit(store: DataStore, tmp_path: Path) -> None:
    source = pictures(tmp_path / "pets", 300)
    (source / "class 1" / "odd name ✈ 'quoted'\n.png").write_bytes(bytes(range(256)))
    (source / "class 1" / "empty.png").touch()
    first = store.snapshot_folder("pets", source, message="pets")
    assert (first.rows, first.pictures, first.key, first.label) == (302, "image", "path", "label")
    out = store.checkout(first, tmp_path / "out")
    names = [path.relative_to(source) for path in files_under(source)]
    assert [path.relative_to(out) for path in files_under(out)] == sorted(
        [*names, Path("_labels.csv"), Path("_version.json")]
    )
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert store.snapshot_folder("pets", out).unchanged, "a checkout is the same version"


def test_changes_of_pictures_are_told_and_shown(store: DataStore, tmp_path: Path) -> None:
    source = pictures(tmp_path / "pets", 400)
    store.snapshot_folder("pets", source)
    pictures(source, 40, first=400)
    second = store.snapshot_folder("pets", source, source_batch="more")
    rows = store.load("pets")
    chosen = np.random.default_rng(0).permutation(len(rows))[:25]
    labels = rows["label"].to_numpy().copy()
    labels[chosen] = "<script>alert(1)</script>"
    third = store.snapshot("pets", rows.assign(label=labels), key="path", label="label")
    assert third.pictures == "image" and third.new_bytes < 0.05 * third.bytes
    found = store.diff("pets@v1.0", "pets")
    assert found.counts["added"] == 40 and second.rows == third.rows == 440
    old = rows.loc[chosen][rows.loc[chosen, "path"].isin(store.load("pets@v1.0")["path"])]
    assert set(found.relabelled["key"]) == set(old["path"])
    page = found.to_html(tmp_path / "report.html").read_text()
    assert page == found.to_html(tmp_path / "again.html").read_text()
    assert page.count("data:image/png;base64,") >= 24 + 24 and "<script" not in page
    assert "http" not in page.replace("http-equiv", "") and "default-src 'none'" in page
    out = store.checkout("pets", tmp_path / "out")
    assert store.snapshot_folder("pets", out).unchanged
    (out / "_labels.csv").unlink()
    assert store.snapshot_folder("pets", out).digest == second.digest, "back to the folders' names"


def test_labels_can_stand_in_a_file(store: DataStore, tmp_path: Path) -> None:
    source = pictures(tmp_path / "pets", 20)
    names = sorted(str(path.relative_to(source)) for path in files_under(source))
    labels = pd.DataFrame({"path": names, "label": "cat", "photographer": "Ada"})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    version = store.snapshot_folder("pets", source, labels=tmp_path / "labels.csv")
    assert store.show(version)["labels"] == {"cat": 20}
    assert store.load(version)["photographer"].eq("Ada").all()
    labels[1:].to_csv(tmp_path / "labels.csv", index=False)
    with pytest.raises(DataError, match="1 without a label"):
        store.snapshot_folder("pets", source, labels=tmp_path / "labels.csv")
    (source / "link.png").symlink_to(source / names[0])
    with pytest.raises(DataError, match="found the link"):
        store.snapshot_folder("pets", source)


def test_an_unchanged_folder_is_not_read_again(store: DataStore, tmp_path: Path) -> None:
    source = pictures(tmp_path / "pets", 50)
    time.sleep(0.05)
    store.snapshot_folder("pets", source)
    assert store.is_unchanged("pets", source)
    victim = files_under(source)[7]
    state = victim.stat()
    content = bytearray(victim.read_bytes())
    content[100] ^= 1
    victim.write_bytes(content)
    os.utime(victim, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert not store.is_unchanged("pets", source), "same size, same time of modification"
    assert store.snapshot_folder("pets", source).ref == "pets@v1.1"


# odd tables


def test_odd_keys(store: DataStore) -> None:
    keys = [
        "plain",
        "new\nline",
        "tab\t",
        "✈️ 🦆",
        "x" * 10_000,
        " ",
        "quote'\"",
        "\\",
        "null",
        "0",
        "é",
        "e\u0301",
    ]
    frame = pd.DataFrame({"id": sorted(keys), "late": 1})
    store.snapshot("odd", frame, **NAMES)
    pd.testing.assert_frame_equal(store.load("odd"), frame)
    store.snapshot("odd", frame.assign(late=[0] + [1] * (len(keys) - 1)), **NAMES)
    assert store.diff("odd@v1.0", "odd").relabelled["key"].tolist() == [sorted(keys)[0]]


def test_one_row_is_a_version_and_none_is_not(store: DataStore) -> None:
    store.snapshot("one", table(1), **NAMES)
    pd.testing.assert_frame_equal(store.load("one"), table(1))
    with pytest.raises(DataError, match="0 rows"):
        store.snapshot("one", table(1)[:0], **NAMES)


def test_many_columns_and_an_empty_one(store: DataStore) -> None:
    wide = pd.DataFrame({f"x{n}": np.arange(20.0) for n in range(2000)})
    wide = wide.assign(id=[f"{n:02}" for n in range(20)], late=0, nothing=np.nan)
    store.snapshot("wide", wide, **NAMES)
    pd.testing.assert_frame_equal(store.load("wide"), wide)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "same"}, "each key once"),
        ({"id": None}, "a key in every row"),
        ({"id": 1.5}, "text or whole numbers"),
        ({"id": "\ud800"}, "UTF-8|each key once"),
        ({"hour": [1] + ["two"] * 9}, "column 'hour'"),
        ({"hour": [{1, 2}] * 10}, "column 'hour'"),
    ],
)
def test_tables_that_cannot_be_versions(
    store: DataStore, change: dict[str, object], words: str
) -> None:
    frame = table(10)
    for name, value in change.items():
        frame[name] = pd.Series(value, index=frame.index, dtype=object)
    with pytest.raises(DataError, match=words):
        store.snapshot("flights", frame, **NAMES)
    assert store.versions() == []


@pytest.mark.parametrize("name", ["", "../up", "a b", "a@b", "-x", "x.lock", "a..b", "é", "x/y"])
def test_names_that_no_data_set_can_have(store: DataStore, name: str) -> None:
    with pytest.raises(UsageError, match="expected a data set name"):
        store.snapshot(name, table(10), **NAMES)


def test_unknown_versions_say_what_there_is(store: DataStore) -> None:
    with pytest.raises(DataError, match="none yet"):
        store.load("flights")
    store.snapshot("flights", table(10), **NAMES)
    with pytest.raises(DataError, match=r"did you mean flights@v1\.0\? see"):
        store.load("flights@v3.1")
    with pytest.raises(DataError, match=r"did you mean flights@v1\.0"):
        store.load("flights@newest")
    with pytest.raises(UsageError, match="such as flights@v1.0"):
        store.load("flights@")


# damage


def test_a_damaged_file_is_named_and_fetched_again(
    store: DataStore, caplog: pytest.LogCaptureFixture
) -> None:
    frame = table(9000)
    version = store.snapshot("flights", frame, **NAMES)
    shard = store.stored(version).files.shards[2]
    victim = object_path(store.dvc.cache, shard.md5)
    flip_byte(victim)
    with caplog.at_level(logging.WARNING):
        pd.testing.assert_frame_equal(store.load("flights"), frame)
    assert str(victim) in caplog.text and shard.path in caplog.text
    assert "flights@v1.0" in caplog.text
    caplog.clear()
    pd.testing.assert_frame_equal(store.load("flights"), frame)
    assert caplog.text == ""
    assert store.verify() == []


def test_nothing_whole_left_is_an_error_that_names_the_file(store: DataStore) -> None:
    version = store.snapshot("flights", table(9000), **NAMES)
    other = store.snapshot("flights", table(9000, seed=1), **NAMES)
    pointer = git(store, "show", "flights@v1.0:data/flights.dvc")
    name = store.stored(version).files.group("columns-00").shards[0].path
    md5 = listing(store.dvc, pointer)[name]
    assert store.dvc.local_remote is not None
    for base in store.places.bases:
        flip_byte(object_path(base, md5))
    for _ in range(2):
        with pytest.raises(IntegrityError, match=name):
            store.load("flights@v1.0")
    assert [p.repaired for p in store.verify("flights@v1.0")].count(False) >= 1
    assert len(store.load(other)) == 9000


def test_a_lost_version_is_stored_again_from_its_source(store: DataStore) -> None:
    frame = table(9000)
    version = store.snapshot("flights", frame, **NAMES)
    for base in store.places.bases:
        for path in files_under(base):
            flip_byte(path)
    with pytest.raises(IntegrityError, match=version.manifest.path):
        store.load("flights")
    with pytest.raises(IntegrityError, match="--force stores the new rows"):
        store.snapshot("flights", frame.assign(late=0), **NAMES)
    again = store.snapshot("flights", frame, force=True, **NAMES)
    assert not again.unchanged and again.digest == version.digest
    pd.testing.assert_frame_equal(store.load(again), frame)
    pd.testing.assert_frame_equal(store.load(version), frame)
    assert {problem.ref for problem in store.verify(again.ref)} == set()


def test_a_damaged_object_is_not_taken_over_into_the_next_version(store: DataStore) -> None:
    frame = table(9000)
    first = store.snapshot("flights", frame, **NAMES)
    known = {shard.sha256 for shard in store.stored(first).files.shards}
    for base in store.places.bases:
        for path in files_under(base):
            flip_byte(path)
    longer = pd.concat([frame, table(100, first=9000)], ignore_index=True)
    second = store.snapshot("flights", longer, force=True, **NAMES)
    assert known & {shard.sha256 for shard in store.stored(second).files.shards}
    for base in reversed(store.places.bases):
        pd.testing.assert_frame_equal(store.load(second), longer)
        shutil.rmtree(base)


@pytest.mark.parametrize("flips", [24, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flipped_byte_is_found(store: DataStore, tmp_path: Path, flips: int) -> None:
    store.snapshot("flights", table(9000), **NAMES)
    store.snapshot("flights", table(9500, seed=1), **NAMES)
    store.snapshot_folder("pets", pictures(tmp_path / "pets", 200))
    numbers = np.random.default_rng(0)
    files = [path for base in store.places.bases for path in files_under(base)]
    for number in numbers.integers(0, len(files), flips):
        path = files[number]
        flip_byte(path, int(numbers.integers(0, path.stat().st_size)))
        found = store.verify(repair=False)
        assert [problem.path for problem in found] == [str(path)], path
        found = store.verify()
        assert [problem.repaired for problem in found] == [True], path
    assert store.verify() == []


def test_lost_folders_are_made_again(store: DataStore) -> None:
    frame = table(4000)
    store.snapshot("flights", frame, **NAMES)
    shutil.rmtree(store.root / ".dvc" / "cache")
    pd.testing.assert_frame_equal(store.load("flights"), frame)
    shutil.rmtree(store.workspace.remote)
    pd.testing.assert_frame_equal(store.load("flights"), frame)
    found = store.verify()
    assert found and all(problem.repaired for problem in found)
    assert store.verify() == []


def test_a_damaged_record_is_an_error(store: DataStore) -> None:
    store.snapshot("flights", table(100), **NAMES)
    record = store.root / "data" / "flights.json"
    record.write_text(
        record.read_text()
        .replace('"rows": 100', '"rows": 101')
        .replace('"format": 2', '"format": 7')
    )
    git(store, "-c", "user.name=x", "-c", "user.email=x", "commit", "-qam", "edited by hand")
    assert store.load("flights").shape[0] == 100, "the tag counts, not the working tree"
    git(store, "tag", "-f", "flights@v1.0")
    with pytest.raises(
        IntegrityError, match="record of a data version in format 2, found format 7"
    ):
        store.load("flights")


def test_rows_that_do_not_give_the_digest_are_found(store: DataStore) -> None:
    store.snapshot("flights", table(100), **NAMES)
    record = store.root / "data" / "flights.json"
    value = json.loads(record.read_text())
    value["columns"]["hour"] = "int32"
    record.write_text(json.dumps(value))
    git(store, "-c", "user.name=x", "-c", "user.email=x", "commit", "-qam", "edited by hand")
    git(store, "tag", "-f", "flights@v1.0")
    assert [problem.place for problem in store.verify()] == ["git"]


# what goes wrong half-way


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_snapshot_has_never_happened(store: DataStore, tmp_path: Path, kills: int) -> None:
    frame = table(6000)
    store.snapshot("flights", frame, **NAMES)
    parquet = tmp_path / "next.parquet"
    process = start_snapshot(store.workspace, _write(parquet, table(6000, seed=100)), "whole")
    wait_until_ready(process)
    started = time.monotonic()
    result_of(process)
    usual = time.monotonic() - started
    numbers = np.random.default_rng(1)
    killed = 0
    for attempt in range(kills):
        before = store.versions()
        expected = store.load(before[-1])
        new = table(6000, seed=200 + attempt)
        process = start_snapshot(store.workspace, _write(parquet, new), f"attempt {attempt}")
        wait_until_ready(process)
        time.sleep(usual * (attempt + numbers.random()) / kills)
        struck = kill_group(process)
        killed, usual = killed + struck, usual if struck else 0.7 * usual
        time.sleep(0.3)
        after = store.versions()
        assert after[: len(before)] == before
        if len(after) == len(before):
            pd.testing.assert_frame_equal(store.load("flights"), expected)
        else:
            assert len(after) == len(before) + 1
            pd.testing.assert_frame_equal(store.load("flights"), new)
        if attempt % 10 == 3:
            assert store.verify() == []
    assert killed >= kills / 2
    last = store.snapshot("flights", table(6000, seed=999), **NAMES)
    assert last.ref == f"flights@v1.{len(store.versions()) - 1}"
    assert store.verify() == []
    assert not list(store.places.state.glob(".work-*"))


def _write(path: Path, frame: pd.DataFrame) -> Path:
    frame.to_parquet(path)
    return path


def test_two_snapshots_at_once_become_two_versions(store: DataStore, tmp_path: Path) -> None:
    frames = [table(3000, seed=n) for n in range(2)]
    processes = [
        start_snapshot(store.workspace, _write(tmp_path / f"{n}.parquet", frame), f"number {n}")
        for n, frame in enumerate(frames)
    ]
    for process in processes:
        wait_until_ready(process)
    refs = [result_of(process)[0] for process in processes]
    assert sorted(refs) == ["flights@v1.0", "flights@v1.1"]
    for ref, frame in zip(refs, frames, strict=True):
        pd.testing.assert_frame_equal(store.load(ref), frame)
    assert store.resolve("flights@v1.1").parent == "flights@v1.0"


def test_two_equal_snapshots_at_once_become_one_version(store: DataStore, tmp_path: Path) -> None:
    parquet = _write(tmp_path / "same.parquet", table(3000))
    processes = [start_snapshot(store.workspace, parquet, "same") for _ in range(2)]
    for process in processes:
        wait_until_ready(process)
    results = [result_of(process) for process in processes]
    assert [ref for ref, _ in results] == ["flights@v1.0"] * 2
    assert sorted(unchanged for _, unchanged in results) == [False, True]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no program mount")
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("room", [0, 40, 150, 400, 700])
def test_a_full_disk_changes_nothing(small_disk: Path, room: int) -> None:
    store = new_store(small_disk)
    frame = table(4000)
    store.snapshot("flights", frame, **NAMES)
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk)
    size = max(0, free.f_bavail * free.f_frsize - room * 1024)
    with ballast.open("wb") as stream:
        stream.write(b"x" * size)
    bigger = table(60_000, seed=1)
    with pytest.raises(DataError, match="full|space") as failed:
        store.snapshot("flights", bigger, **NAMES)
    assert "try again" in str(failed.value)
    assert [version.ref for version in store.versions()] == ["flights@v1.0"]
    pd.testing.assert_frame_equal(store.load("flights"), frame)
    ballast.unlink()
    small = table(4100, seed=2)
    assert store.snapshot("flights", small, **NAMES).ref == "flights@v1.1"
    pd.testing.assert_frame_equal(store.load("flights"), small)
    assert store.verify() == []


# speed (generous bounds: the machine may be busy)


def test_snapshot_and_load_are_quick(store: DataStore) -> None:
    started = time.perf_counter()
    store.snapshot("flights", table(8000), **NAMES)
    assert time.perf_counter() - started < 16
    store.load("flights")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        store.load("flights")
        times.append(time.perf_counter() - started)
    assert min(times) < 0.2


# the command line


def test_the_whole_command_line(
    store: DataStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = ["-w", str(store.root)]
    table(400).to_csv(tmp_path / "first.csv", index=False)
    table(50, first=400, seed=1).to_csv(tmp_path / "second.csv", index=False)
    names = ["--key", "id", "--label", "late"]
    assert main(["data", "list", *here]) == 0
    assert "no data version yet" in capsys.readouterr().out
    first = ["data", "snapshot", "own", "--from", str(tmp_path / "first.csv"), *names]
    assert main([*first, "-m", "why", "--json", *here]) == 0
    assert json.loads(capsys.readouterr().out)["ref"] == "own@v1.0"
    assert main([*first, "--json", *here]) == 0
    assert json.loads(capsys.readouterr().out)["unchanged"] is True
    more = ["data", "snapshot", "own", "--append", "--from", str(tmp_path / "second.csv")]
    assert main([*more, *here]) == 0
    assert "own@v1.1  stored  450 rows" in capsys.readouterr().out
    assert main(["data", "list", "--json", *here]) == 0
    assert [row["ref"] for row in json.loads(capsys.readouterr().out)] == ["own@v1.0", "own@v1.1"]
    assert main(["data", "diff", "own@v1.0", "own", "--json", "--rows", "3", *here]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["added"] == 50 and len(found["rows"]["added"]) == 3
    assert main(["data", "show", "own", "--json", *here]) == 0
    assert sum(json.loads(capsys.readouterr().out)["batches"].values()) == 450
    assert main(["data", "checkout", "own@v1.0", str(tmp_path / "out"), "--json", *here]) == 0
    assert len(pd.read_parquet(tmp_path / "out")) == 400
    capsys.readouterr()
    victim = files_under(store.dvc.cache)[0]
    flip_byte(victim)
    assert main(["data", "verify", "--no-repair", "--json", *here]) == 1
    output = capsys.readouterr()
    assert json.loads(output.out)[0]["path"] == str(victim)
    assert "expected whole files, found 1 damaged" in output.err
    assert main(["data", "verify", "--json", *here]) == 0
    assert json.loads(capsys.readouterr().out)[0]["repaired"] is True
    assert main(["data", "verify", *here]) == 0
    assert main(["data", "diff", "own@v1.0", "own@v9.9", *here]) == 1
    assert main(["data", "list", "-w", str(tmp_path)]) == 3
