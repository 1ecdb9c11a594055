"""How long five small stages take: papermill with fresh kernels against the runner, cold, with the parent's start, warm, and unchanged.

    python benchmarks/pipeline.py [--rounds 3] [--json]

Each stage imports torch, mlflow and pandas and logs one metric and one file. The baseline does it with papermill and mlflow
directly, a fresh kernel each; ours through `mwb run`, the start of the command included. All times are wall clock of whole
processes; the tracking databases exist before the clock starts. Exit code 1 when a limit is not kept.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlops_workbench.core.workspace import Workspace, create_workspace
from mlops_workbench.experiment.tracking import ensure_store
from mlops_workbench.pipeline.kernels import stop_parents

STAGES = 5
LIMITS = {"warm": 0.15, "with the parent's start": 0.25, "cold": 0.75}
UNCHANGED_SECONDS = 0.3

BASELINE_CELL = """\
import pathlib
import mlflow, pandas, torch
mlflow.set_tracking_uri({uri!r})
with mlflow.start_run():
    mlflow.log_metric("value", value)
    pathlib.Path({file!r}).write_text("a file")
    mlflow.log_artifact({file!r})
"""
STAGE_CELLS = [
    'from mlops_workbench.pipeline.stage import open_stage\nstage = open_stage({name!r}, {{"value": value}})',
    "import mlflow, pandas, torch",
    "stage.output('file.txt').write_text('a file')\nstage.recorder.artifact(stage.output('file.txt'))",
    "stage.finish(metrics={{'value': value}}, outputs={{'file': stage.output('file.txt')}}, verdict='done', summary='')",
]
BASELINE_PROGRAM = """\
import sys
import papermill
for number in range({stages}):
    papermill.execute_notebook(sys.argv[1], f"{{sys.argv[2]}}/{{number}}.ipynb", {{"value": float(number)}}, progress_bar=False)
"""


def notebook(sources: list[str]) -> str:
    """The text of a notebook whose first cell holds the parameters."""
    cells: list[dict[str, Any]] = [
        {
            "cell_type": "code",
            "id": f"c{number}",
            "metadata": {"tags": [] if number else ["parameters"]},
            "source": source,
        }
        | {"outputs": [], "execution_count": None}
        for number, source in enumerate(["value = 1.0", *sources])
    ]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernelspec, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def environment() -> dict[str, str]:
    """This process's environment, with Python's compiled files allowed and no word of another workspace."""
    hidden = ("MWB_", "JUPYTER_PATH", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if not name.startswith(hidden)}


def timed(command: list[str], cwd: Path) -> float:
    """The wall time of a command that must succeed."""
    begun = time.perf_counter()
    done = subprocess.run(
        command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begun
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return seconds


def wait_until_warm(workspace: Workspace) -> None:
    """Return when the parent has imported everything on its list."""
    from mlops_workbench.pipeline.kernels import parents

    while any(status["still_to_import"] for status in parents(workspace.kernels)):
        time.sleep(0.1)


def wait_until_stopped(workspace: Workspace) -> None:
    """Stop the parent and return when it has ended."""
    stop_parents(workspace.kernels)
    while list(workspace.kernels.glob("*.sock")):
        time.sleep(0.05)


def prepare(folder: Path) -> tuple[Workspace, Callable[[], float]]:
    """A workspace with five stages, and the baseline as something to call for its time."""
    workspace = create_workspace(folder / "ours", name="benchmark")
    place = workspace.root / "nbs" / "stages"
    place.mkdir(parents=True)
    for number in range(1, STAGES + 1):
        name = f"step{number}"
        (place / f"{number}_{name}.ipynb").write_text(
            notebook([cell.format(name=name) for cell in STAGE_CELLS])
        )
    ensure_store(workspace)
    database = folder / "baseline.db"
    shutil.copyfile(workspace.tracking_uri.removeprefix("sqlite:///"), database)
    source = folder / "baseline.ipynb"
    source.write_text(
        notebook([BASELINE_CELL.format(uri=f"sqlite:///{database}", file=str(folder / "file.txt"))])
    )
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        BASELINE_PROGRAM.format(stages=STAGES),
        str(source),
        str(folder),
    ]
    return workspace, lambda: timed(command, folder)


def measure(folder: Path, rounds: int, say: Callable[[str], None]) -> dict[str, list[float]]:
    """The times of every way, in seconds, one of each a round."""
    workspace, baseline = prepare(folder)
    run = [sys.executable, "-m", "mlops_workbench.cli.main", "run", "--json"]
    found: dict[str, list[float]] = {
        "papermill": [],
        **{name: [] for name in LIMITS},
        "unchanged": [],
    }
    baseline()
    timed(
        [
            sys.executable,
            "-m",
            "mlops_workbench.cli.main",
            "--set",
            "pipeline.warm_kernels=false",
            "run",
            "--force",
        ],
        workspace.root,
    )
    for number in range(rounds):
        found["papermill"].append(baseline())
        cold = [
            sys.executable,
            "-m",
            "mlops_workbench.cli.main",
            "--set",
            "pipeline.warm_kernels=false",
            "run",
            "--force",
            "--json",
        ]
        found["cold"].append(timed(cold, workspace.root))
        wait_until_stopped(workspace)
        found["with the parent's start"].append(timed([*run, "--force"], workspace.root))
        wait_until_warm(workspace)
        found["warm"].append(timed([*run, "--force"], workspace.root))
        timed(run, workspace.root)
        found["unchanged"].append(min(timed(run, workspace.root) for _ in range(3)))
        say(
            f"round {number + 1}: "
            + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in found.items())
        )
    wait_until_stopped(workspace)
    return found


def main() -> int:
    """Measure, print, and judge by the limits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(
            Path(name).resolve(),
            options.rounds,
            lambda text: print(text, file=sys.stderr, flush=True),
        )
    seconds = {way: statistics.median(times) for way, times in found.items()}
    ratios = {way: seconds[way] / seconds["papermill"] for way in LIMITS}
    kept = {way: ratios[way] <= limit for way, limit in LIMITS.items()} | {
        "unchanged": seconds["unchanged"] < UNCHANGED_SECONDS
    }
    if options.json:
        print(
            json.dumps(
                {"seconds": seconds, "ratios": ratios, "limits": LIMITS, "kept": kept}, indent=2
            )
        )
    else:
        print(f"papermill, five fresh kernels  {seconds['papermill']:6.2f} s")
        for way, limit in LIMITS.items():
            print(
                f"{way:<30} {seconds[way]:6.2f} s  {ratios[way]:.3f} of it, limit {limit}  {'kept' if kept[way] else 'NOT KEPT'}"
            )
        print(
            f"{'unchanged':<30} {seconds['unchanged']:6.2f} s  limit {UNCHANGED_SECONDS} s  {'kept' if kept['unchanged'] else 'NOT KEPT'}"
        )
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
