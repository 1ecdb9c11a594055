"""What recording costs: `python benchmarks/tracking.py` prints the tables.

1. One training step of about 5 ms that records two metrics, in four ways: not at all, with the
   workbench's recorder (the shipper is another process, as in production), with
   `mlflow.log_metric`, and with MLflow's asynchronous logging. The ways take turns in short
   blocks, so that other load of the machine falls on all of them; the added time is the median
   over rounds of the ratio to the block without recording in the same round.
2. How fast a journal left behind arrives in MLflow.
3. Listing 2,000 runs with parameters and metrics: by SQL, and by MLflow's client.
4. The first opening of a new store: migrated from the beginning, and from the template.
"""

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from mlops_workbench.core.workspace import Workspace, create_workspace
from mlops_workbench.experiment.recorder import Recorder
from mlops_workbench.experiment.runs import list_runs
from mlops_workbench.experiment.store import ensure_store, mlflow_client, sqlite_path, template_path
from mlops_workbench.experiment.tracking import finish_run, ship_journal, start_run

STEP_SECONDS = 0.005
METRICS = ("loss", "accuracy")
SHIPPER = """
import sys
from pathlib import Path
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.experiment.tracking import Shipper
with Shipper(Workspace.open(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3])):
    print("ready", flush=True)
    sys.stdin.read()
"""

Record = Callable[[int, float], None]


def make_step() -> Callable[[], float]:
    """A step of fixed work that takes about five milliseconds on this machine."""
    import numpy as np

    generator = np.random.default_rng(0)
    weights = generator.standard_normal((128, 128), dtype=np.float32) / 12
    batch = generator.standard_normal((128, 128), dtype=np.float32)

    def once(repeats: int) -> float:
        values = batch
        for _ in range(repeats):
            values = np.tanh(values @ weights)
        return float(values[0, 0])

    once(50)
    timed = []
    for _ in range(9):
        started = time.perf_counter()
        once(50)
        timed.append((time.perf_counter() - started) / 50)
    repeats = max(1, round(STEP_SECONDS / statistics.median(timed)))
    return lambda: once(repeats)


@dataclass
class Way:
    """One way of recording and what was measured of it."""

    name: str
    record: Record
    settle: Callable[[], None] = lambda: None  # wait for background work, outside the timed part
    step_ms: list[float] = field(default_factory=list)
    call_us: list[float] = field(default_factory=list)  # one metric, on the training thread
    block_ms: list[float] = field(default_factory=list)  # a step's mean in one block


def run_block(way: Way, step: Callable[[], float], first: int, steps: int) -> None:
    """Time some steps recorded in one way."""
    began = time.perf_counter()
    for number in range(first, first + steps):
        started = time.perf_counter()
        value = step()
        before = time.perf_counter()
        way.record(number, value)
        ended = time.perf_counter()
        way.step_ms.append((ended - started) * 1e3)
        way.call_us.append((ended - before) / len(METRICS) * 1e6)
    way.block_ms.append((time.perf_counter() - began) / steps * 1e3)
    way.settle()


def ways_of(workspace: Workspace, recorder: Recorder) -> list[Way]:
    """The four ways, each with its own run."""
    import mlflow
    from mlflow.tracking.fluent import flush_async_logging

    mlflow.set_tracking_uri(ensure_store(workspace))
    ids = {
        name: start_run(workspace, stage="benchmark", cycle=name)
        for name in ("synchronous", "asynchronous")
    }

    def through_mlflow(synchronous: bool) -> Record:
        run_id = ids["synchronous" if synchronous else "asynchronous"]

        def record(number: int, value: float) -> None:
            for name in METRICS:
                mlflow.log_metric(name, value, step=number, run_id=run_id, synchronous=synchronous)

        return record

    def ours(number: int, value: float) -> None:
        for name in METRICS:
            recorder.metric(name, value, number)

    return [
        Way("no recording", lambda number, value: None),
        Way("workbench recorder", ours),
        Way("mlflow.log_metric", through_mlflow(True)),
        Way("mlflow asynchronous", through_mlflow(False), flush_async_logging),
    ]


def measure_steps(workspace: Workspace, rounds: int, steps: int) -> list[Way]:
    """All ways in turn, the order shifted every round."""
    folder = workspace.runs / "benchmark"
    run_id = start_run(workspace, stage="benchmark", cycle="ours", folder=folder)
    recorder, step = Recorder(folder), make_step()
    ways = ways_of(workspace, recorder)
    command = [sys.executable, "-c", SHIPPER, str(workspace.root), run_id, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shipper:
        assert shipper.stdout is not None and shipper.stdin is not None
        shipper.stdout.readline()
        for way in ways:  # warm: imports, connections
            run_block(way, step, 0, 5)
            way.step_ms, way.call_us, way.block_ms = [], [], []
        for number in range(rounds):
            for place in range(len(ways)):
                way = ways[(place + number) % len(ways)]
                run_block(way, step, 5 + number * steps, steps)
        recorder.close()
        shipper.stdin.close()
    history = mlflow_client(workspace).get_metric_history(run_id, METRICS[0])
    assert len(history) == 5 + rounds * steps, "every metric must have arrived"
    finish_run(workspace, run_id, "FINISHED")
    return ways


def added_share(way: Way, base: Way) -> float:
    """How much longer a step takes than without recording: the median over rounds."""
    pairs = zip(way.block_ms, base.block_ms, strict=True)
    return statistics.median(mine / other - 1 for mine, other in pairs)


def step_table(ways: list[Way]) -> list[dict[str, object]]:
    """The measured ways as rows."""
    return [
        {
            "way": way.name,
            "step ms (median)": round(statistics.median(way.step_ms), 3),
            "step ms (p99)": round(statistics.quantiles(way.step_ms, n=100)[98], 3),
            "added to the step": f"{100 * added_share(way, ways[0]):+.1f} %",
            "ms a metric (median)": round(statistics.median(way.call_us) / 1e3, 4),
            "ms a metric (mean)": round(statistics.mean(way.call_us) / 1e3, 4),
        }
        for way in ways
    ]


def fill_store(workspace: Workspace, runs: int) -> None:
    """Add finished runs with 10 parameters, 8 metrics of 10 points and 20 tags, by plain SQL."""
    path = sqlite_path(ensure_store(workspace))
    assert path is not None
    names = [f"metric_{number}" for number in range(8)]
    with closing(sqlite3.connect(path, timeout=60)) as database, database:
        for number in range(runs):
            run, moment = f"{number:032x}", 1_700_000_000_000 + number
            database.execute(
                "INSERT INTO runs (run_uuid, name, status, start_time, end_time, lifecycle_stage,"
                " experiment_id, artifact_uri, source_type, user_id)"
                " VALUES (?, ?, 'FINISHED', ?, ?, 'active', 0, '', 'LOCAL', 'nobody')",
                (run, f"run {number}", moment, moment + 5000),
            )
            database.executemany(
                "INSERT INTO params (key, value, run_uuid) VALUES (?, ?, ?)",
                [(f"parameter_{p}", str(0.1 * p), run) for p in range(10)],
            )
            database.executemany(
                "INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)",
                [("stage", "train", run), ("data_version", "flights@v1.0", run)]
                + [(f"tag_{t}", "x" * 64, run) for t in range(18)],
            )
            points = [
                (name, step / 10 + number, moment, step, 0, run)
                for name in names
                for step in range(10)
            ]
            columns = "(key, value, timestamp, step, is_nan, run_uuid) VALUES (?, ?, ?, ?, ?, ?)"
            database.executemany(f"INSERT INTO metrics {columns}", points)
            database.executemany(f"INSERT INTO latest_metrics {columns}", points[9::10])


def timed(work: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of some repeats."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def measure_listing(workspace: Workspace, runs: int) -> list[dict[str, object]]:
    """Seconds to list so many runs, by SQL and by the client."""
    fill_store(workspace, runs)
    client = mlflow_client(workspace)
    found = list_runs(workspace, runs, best=["metric_0"])
    assert len(found) == runs and len(found[0].metrics) == 8 and len(found[0].parameters) == 10
    rows = {
        "workbench, by SQL": lambda: list_runs(workspace, runs),
        "workbench, with the best value of a metric": lambda: list_runs(
            workspace, runs, best=["metric_0"]
        ),
        "workbench, the newest 20": lambda: list_runs(workspace, 20),
        "MLflow's client": lambda: client.search_runs(["0"], max_results=runs),
    }
    return [
        {"list of 2,000 runs": name, "seconds": round(timed(work), 4)}
        for name, work in rows.items()
    ]


OPEN_STORE = """
import sys, time
from pathlib import Path
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.experiment.store import mlflow_client, quiet_mlflow
quiet_mlflow()
import mlflow.store.tracking.sqlalchemy_store
workspace = Workspace.open(Path(sys.argv[1]))
started = time.perf_counter()
mlflow_client(workspace).search_experiments()
print(time.perf_counter() - started)
"""


def measure_opening(folder: Path) -> list[dict[str, object]]:
    """Seconds until a store answers, imports not counted, each in a process of its own."""
    cache = folder / "cache"
    rows = []
    for name in ("migrated from the beginning", "from the template", "opened again"):
        place = folder / "opening"
        if name != "opened again":
            shutil.rmtree(place, ignore_errors=True)
            create_workspace(place, name="opening")
        done = subprocess.run(
            [sys.executable, "-c", OPEN_STORE, str(place)],
            env={**os.environ, "XDG_CACHE_HOME": str(cache)},
            capture_output=True,
            text=True,
            check=True,
        )
        rows.append({"store": name, "seconds": round(float(done.stdout), 3)})
    return rows


def measure_shipping(workspace: Workspace, metrics: int) -> list[dict[str, object]]:
    """How fast a journal that was left behind arrives."""
    folder = workspace.runs / "shipping"
    run_id = start_run(workspace, stage="benchmark", cycle="shipping", folder=folder)
    with Recorder(folder) as recorder:
        for number in range(metrics):
            recorder.metric("loss", 0.5, number)
    started = time.perf_counter()
    ship_journal(workspace, run_id, folder)
    seconds = time.perf_counter() - started
    finish_run(workspace, run_id, "FINISHED")
    return [
        {
            "shipping": f"{metrics:,} metrics",
            "seconds": round(seconds, 2),
            "ms a metric": round(1e3 * seconds / metrics, 3),
        }
    ]


def print_rows(rows: list[dict[str, object]]) -> None:
    """Print rows as an aligned table."""
    columns = list(rows[0])
    lines = [columns, *[[str(row[column]) for column in columns] for row in rows]]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    print()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each way")
    parser.add_argument("--steps", type=int, default=40, help="steps of a block")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = "1"  # the step is one thread's work, as it would be with a GPU
    folder = Path(tempfile.mkdtemp(prefix="tracking-benchmark-"))
    try:
        template_path().parent.mkdir(parents=True, exist_ok=True)
        workspace = create_workspace(folder / "workspace", name="benchmark")
        ways = measure_steps(workspace, arguments.rounds, arguments.steps)
        tables = {
            "steps": step_table(ways),
            "shipping": measure_shipping(workspace, 20_000),
            "listing": measure_listing(create_workspace(folder / "list", name="list"), 2_000),
            "opening": measure_opening(folder),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        print(json.dumps(tables, indent=2))
        return 0
    for rows in tables.values():
        print_rows(rows)
    ours, base = ways[1], ways[0]
    per_metric_ms = statistics.mean(ours.call_us) / 1e3
    for text, value, limit in (
        ("ms a metric on the training thread", per_metric_ms, 0.1),
        ("% added to a 5 ms step", 100 * added_share(ours, base), 3.0),
    ):
        word = "met" if value <= limit else "NOT MET"
        print(f"{word}: {value:.3f} {text} (at most {limit:g})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
