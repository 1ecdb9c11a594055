"""What data versions cost: `python benchmarks/data.py` prints two tables, of a table and of pictures.

The peers store whole files: `dvc add` of one Parquet file (zstd, as ours) and of a folder of pictures, `dvc status`,
`dvc checkout`, and git-lfs (`git add` and `git commit`; Debian package git-lfs) where it is installed. Every repeat
takes all of them in turn, each in a fresh folder, and the table shows medians. Our own times are those of the library
in one process, including the commit, the tag and the copy on the remote, which the peers' do not have; a command of
DVC starts an interpreter of its own, so the line "a fresh process" shows ours with that as well.
"""

import argparse
import contextlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from mlops_workbench.core.workspace import create_workspace
from mlops_workbench.data.versions import DataStore

NAMES = {"key": "id", "label": "label"}
Times = defaultdict[str, list[float]]

FRESH = """
import sys, time
started = time.perf_counter()
from pathlib import Path
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.versions import DataStore
store = DataStore(Workspace.open(Path(sys.argv[1])))
print(store.is_unchanged("pets", sys.argv[2]))
"""
DIFF = """
import sys, time
from pathlib import Path
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.versions import DataStore
store = DataStore(Workspace.open(Path(sys.argv[1])))
store.versions()
started = time.perf_counter()
found = store.diff(sys.argv[2], sys.argv[3])
seconds = time.perf_counter() - started
assert found.counts[sys.argv[4]] > 0, found.counts
print(seconds, int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024)
"""
MERGE = """
import sys, time
import pandas as pd
started = time.perf_counter()
before, after = (pd.read_parquet(path) for path in sys.argv[1:3])
both = before.merge(after, on="id", how="outer", indicator=True, suffixes=("", " after"))
same = both["_merge"] == "both"
changed = {name: int((same & (both[name] != both[name + " after"])).sum()) for name in before.columns if name != "id"}
seconds = time.perf_counter() - started
found = {"added": int((both["_merge"] == "right_only").sum()), "removed": int((both["_merge"] == "left_only").sum())}
found |= {"relabelled": changed.pop("label"), "changed": max(changed.values())}
assert found[sys.argv[3]] > 0, found
print(seconds, int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024)
"""
DIFF_SECONDS, DIFF_MEGABYTES = 1.0, 1000.0  # limits at 1,000,000 rows


@contextlib.contextmanager
def measured(times: Times, what: str) -> Iterator[None]:
    """Note how long a block takes."""
    started = time.perf_counter()
    yield
    times[what].append(time.perf_counter() - started)


def say(*command: str, folder: Path) -> str:
    """Run a command quietly and return what it prints; it must succeed."""
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {folder}: {done.stderr}")
    return done.stdout


def dvc(*arguments: str, folder: Path) -> str:
    """Run a command of DVC."""
    return say(sys.executable, "-m", "dvc", *arguments, folder=folder)


def size_of(folder: Path) -> int:
    """The bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def disk_of(folder: Path) -> int:
    """The bytes that the disk gives to all files and folders under a folder, in whole blocks."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def dvc_repository(folder: Path) -> Path:
    """A new git repository with DVC in it."""
    folder.mkdir(parents=True)
    say("git", "init", "-q", folder=folder)
    dvc("init", "-q", folder=folder)
    return folder


def lfs_repository(folder: Path, pattern: str) -> Path | None:
    """A new git repository with git-lfs in it; None where git-lfs is not installed."""
    if shutil.which("git-lfs") is None:
        return None
    folder.mkdir(parents=True)
    say("git", "init", "-q", folder=folder)
    for name, value in (("user.name", "benchmark"), ("user.email", "benchmark@localhost")):
        say("git", "config", name, value, folder=folder)
    say("git", "lfs", "install", "--local", folder=folder)
    say("git", "lfs", "track", pattern, folder=folder)
    return folder


def lfs_commit(repository: Path) -> None:
    """Commit everything."""
    say("git", "add", "-A", folder=repository)
    say("git", "commit", "-q", "-m", "version", folder=repository)


def make_table(rows: int, seed: int = 0) -> pd.DataFrame:
    """20 columns as in a real table: key, label, categories, whole numbers, measured numbers with and without rounding."""
    numbers = np.random.default_rng(seed)
    columns: dict[str, object] = {"id": [f"{n:010}" for n in range(0, 10 * rows, 10)]}
    columns["label"] = numbers.integers(0, 2, rows)
    for name, values in (("carrier", 16), ("origin", 3), ("dest", 100)):
        columns[name] = np.array([f"{name} {n}" for n in range(values)], dtype=object)[
            numbers.integers(0, values, rows)
        ]
    for name, most in (("hour", 24), ("distance", 5000), ("seconds", 10**9)):
        columns[name] = numbers.integers(0, most, rows)
    columns["temp"] = numbers.normal(50, 20, rows).round(1)
    while len(columns) < 20:
        columns[f"measured {len(columns)}"] = numbers.normal(size=rows)
    return pd.DataFrame(columns)


def changed_tables(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The versions that follow each other, by what was done."""
    rows, numbers = len(frame), np.random.default_rng(1)
    new = make_table(rows // 10, seed=2)
    new["id"] = [f"{10 * (rows + n):010}" for n in range(len(new))]
    longer = pd.concat([frame, new], ignore_index=True)
    chosen = numbers.random(len(longer)) < 0.02
    relabelled = longer.assign(label=np.where(chosen, 1 - longer["label"], longer["label"]))
    middle = make_table(max(rows // 1000, 1), seed=3)
    middle["id"] = [f"{10 * (rows // 2) + 1:010} {n:05}" for n in range(len(middle))]
    inserted = pd.concat(
        [relabelled[: rows // 2], middle, relabelled[rows // 2 :]], ignore_index=True
    )
    corrected = inserted.copy()
    places = numbers.permutation(len(inserted))
    corrected.loc[places[: rows // 100], "measured 12"] += 1.0
    corrected.loc[places[rows // 100 : rows // 50], "hour"] = 99
    corrected.loc[places[rows // 50 : rows // 25], "label"] = 1 - corrected["label"]
    corrected = corrected.drop(index=range(rows // 4, rows // 4 + rows // 1000)).reset_index(
        drop=True
    )
    return {
        "first version": frame,
        "append 10 %": longer,
        "relabel 2 % scattered": relabelled,
        "insert 0.1 % in the middle": inserted,
        "correct 2 columns, relabel 2 %, remove a block": corrected,
        "remove 0.1 % scattered": corrected.drop(
            index=numbers.permutation(len(corrected))[: rows // 1000]
        ).reset_index(drop=True),
    }


def bench_table(folder: Path, rows: int, repeats: int) -> None:
    """Print what the versions of a table cost."""
    versions = changed_tables(make_table(rows))
    times: Times = defaultdict(list)
    sizes: dict[str, dict[str, int]] = {}
    for repeat in range(repeats):
        place = folder / f"table {repeat}"
        store = DataStore(create_workspace(place / "ours", name="example", recipe="flights"))
        peer = dvc_repository(place / "dvc")
        lfs = lfs_repository(place / "lfs", "*.parquet") if repeat == 0 else None
        before = [0, 0, 0]
        for what, frame in versions.items():
            frame.to_parquet(peer / "table.parquet", compression="zstd", index=False)
            with measured(times, f"dvc {what}"):
                dvc("add", "-q", "table.parquet", folder=peer)
            with measured(times, f"ours {what}"):
                store.snapshot("table", frame, **NAMES)
            if lfs is not None:
                shutil.copy(peer / "table.parquet", lfs / "table.parquet")
                with measured(times, f"lfs {what}"):
                    lfs_commit(lfs)
            if repeat == 0:
                now = [
                    size_of(store.dvc.cache),
                    size_of(peer / ".dvc" / "cache"),
                    size_of(lfs / ".git") if lfs else 0,
                ]
                sizes[what] = {
                    n: a - b for n, a, b in zip(("ours", "dvc", "lfs"), now, before, strict=True)
                }
                before = now
        if repeat == 0:
            first = place / "ours"
        else:
            shutil.rmtree(place)
    print_storage(rows, sizes, times)
    print_diffs(first, versions, repeats)
    shutil.rmtree(first.parent)


def print_storage(rows: int, sizes: dict[str, dict[str, int]], times: Times) -> None:
    """The new bytes and seconds of each version."""
    print(f"\n{rows:,} rows x 20 columns\n")
    print(
        "| version | new bytes | % of first | dvc add | git-lfs | seconds | dvc add | git-lfs |\n|---|---|---|---|---|---|---|---|"
    )
    start = sizes["first version"]["ours"]
    for what, size in sizes.items():
        seconds = [
            f"{statistics.median(times[f'{who} {what}']):.1f}" if times[f"{who} {what}"] else "-"
            for who in ("ours", "dvc", "lfs")
        ]
        print(
            f"| {what} | {size['ours'] / 1e6:.2f} MB | {100 * size['ours'] / start:.2f} | {size['dvc'] / 1e6:.1f} MB "
            f"| {size['lfs'] / 1e6:.1f} MB | {' | '.join(seconds)} |"
        )
    three = list(sizes.values())[:3]
    ratio = sum(size["ours"] for size in three) / sum(size["dvc"] for size in three)
    share = sizes["append 10 %"]["ours"] / (0.1 * start)
    print(
        f"\nnew bytes of the append / added share: {share:.3f} (goal 1.15); three versions / DVC's store: {ratio:.3f} (goal 0.4)"
    )


def print_diffs(root: Path, versions: dict[str, pd.DataFrame], repeats: int) -> None:
    """The time and memory of a comparison in a fresh process, after the imports, beside a merge by pandas.

    Both read their files; ours names each changed column of each row, the merge counts by column. They take turns.
    """
    names = list(versions)
    files = [root.parent / f"{number}.parquet" for number in range(len(names))]
    for path, frame in zip(files, versions.values(), strict=True):
        frame.to_parquet(path, compression="zstd", index=False)
    kinds = ("added", "relabelled", "added", "changed", "removed")
    pairs = [(n, n + 1, kind, names[n + 1]) for n, kind in enumerate(kinds)]
    pairs.append((0, 4, "changed", "the first four of them together"))
    print(f"\nlimits at 1,000,000 rows: {DIFF_SECONDS:g} s and {DIFF_MEGABYTES:g} MB")
    print(
        "\n| diff | seconds | peak memory | kept | pandas merge | peak memory |\n|---|---|---|---|---|---|"
    )
    for before, after, kind, what in pairs:
        ours, merge = [], []
        for _ in range(repeats):
            refs = f"table@v1.{before}", f"table@v1.{after}"
            for runs, words in (
                (ours, (DIFF, str(root), *refs, kind)),
                (merge, (MERGE, str(files[before]), str(files[after]), kind)),
            ):
                said = say(sys.executable, "-c", *words, folder=root).split()
                runs.append([float(each) for each in said])
        seconds, memory, *peer = (
            statistics.median(run[n] for run in runs) for runs in (ours, merge) for n in (0, 1)
        )
        kept = seconds <= DIFF_SECONDS and memory <= DIFF_MEGABYTES
        print(
            f"| {what} | {seconds:.2f} | {memory:.0f} MB | {'yes' if kept else 'NO'} | {peer[0]:.2f} | {peer[1]:.0f} MB |"
        )


def make_pictures(folder: Path, first: int, count: int, seed: int) -> None:
    """Files of 2 KB that do not compress, in ten folders."""
    numbers = np.random.default_rng(seed)
    for number in range(first, first + count):
        path = folder / f"class {number % 10}" / f"{number:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + numbers.bytes(2040))


def settle() -> None:
    """Wait until what was written before is on the disk, so that nobody pays for another's files."""
    os.sync()
    time.sleep(0.1)


def bench_pictures(folder: Path, count: int, repeats: int) -> None:
    """Print what the versions of a folder of pictures cost."""
    times: Times = defaultdict(list)
    for repeat in range(repeats):
        place = folder / f"pictures {repeat}"
        store = DataStore(create_workspace(place / "ours", name="example", recipe="flights"))
        peer = dvc_repository(place / "dvc")
        lfs = lfs_repository(place / "lfs", "*.png")
        source = place / "source"
        make_pictures(source, 0, count, seed=repeat)
        for target in filter(None, (peer, lfs)):
            shutil.copytree(source, target / "source")
        for who in ("dvc", "ours") if repeat % 2 else ("ours", "dvc"):
            settle()
            with measured(times, "dvc: add" if who == "dvc" else "ours: snapshot"):
                if who == "dvc":
                    dvc("add", "-q", "source", folder=peer)
                else:
                    version = store.snapshot_folder("pets", source)
        settle()
        if lfs is not None:
            with measured(times, "git-lfs: add and commit"):
                lfs_commit(lfs)
        for _ in range(3):
            with measured(times, "dvc: status"):
                dvc("status", "-q", folder=peer)
            with measured(times, "ours: unchanged"):
                assert store.is_unchanged("pets", source)
        with measured(times, "ours: unchanged, a fresh process"):
            assert (
                say(sys.executable, "-c", FRESH, str(store.root), str(source), folder=place).strip()
                == "True"
            )
        shutil.rmtree(peer / "source")
        for who in ("dvc", "ours") if repeat % 2 else ("ours", "dvc"):
            settle()
            with measured(times, f"{who}: checkout"):
                if who == "dvc":
                    dvc("checkout", "-q", folder=peer)
                else:
                    store.checkout(version, place / "out")
        if repeat == 0:
            sizes = grow_pictures(store, peer, source, count)
        shutil.rmtree(place)
    print(f"\n{count:,} pictures of 2 KB\n\n| what | seconds |\n|---|---|")
    for what, seconds in times.items():
        print(f"| {what} | {statistics.median(seconds):.3f} |")
    print()
    for what, (ours, theirs) in (("bytes", sizes[:2]), ("blocks of the disk", sizes[2:])):
        print(
            f"three versions (+10 %, 2 % relabelled), {what}: {ours / 1e6:.1f} MB, DVC {theirs / 1e6:.1f} MB: {ours / theirs:.3f} (goal 0.4)"
        )
    print(
        "(DVC stores a file that only moved once; what does not compress cannot take less than its bytes)"
    )
    for ours_name, peer_name, goal in (
        ("snapshot", "add", 0.25),
        ("unchanged", "status", 0.1),
        ("checkout", "checkout", 1.0),
    ):
        ratio = statistics.median(times[f"ours: {ours_name}"]) / statistics.median(
            times[f"dvc: {peer_name}"]
        )
        print(f"{ours_name} / dvc {peer_name}: {ratio:.3f} (goal {goal})")


def grow_pictures(store: DataStore, peer: Path, source: Path, count: int) -> list[int]:
    """Our bytes and DVC's, then our disk blocks and DVC's, after two more versions; a label is a picture's folder."""
    for folder in (source, peer / "source"):
        make_pictures(folder, count, count // 10, seed=99)
    store.snapshot_folder("pets", source)
    dvc("add", "-q", "source", folder=peer)
    rows = store.load("pets")
    chosen = np.random.default_rng(5).random(len(rows)) < 0.02
    store.snapshot(
        "pets",
        rows.assign(label=np.where(chosen, "class 0", rows["label"])),
        key="path",
        label="label",
    )
    for path in rows["path"][chosen]:
        (peer / "source" / path).rename(peer / "source" / "class 0" / Path(path).name)
    dvc("add", "-q", "source", folder=peer)
    caches = store.dvc.cache, peer / ".dvc" / "cache"
    return [measure(cache) for measure in (size_of, disk_of) for cache in caches]


def main() -> int:
    """Run both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["table", "pictures"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.only != "pictures":
            bench_table(Path(folder), arguments.rows, arguments.repeats)
        if arguments.only != "table":
            bench_pictures(Path(folder), arguments.pictures, arguments.repeats)
    print(
        f"\npeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
