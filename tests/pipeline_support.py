"""Small workspaces with tiny stages for the tests of the pipeline."""

import atexit
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from mlops_workbench.core.workspace import Workspace, create_workspace
from mlops_workbench.pipeline.kernels import stop_parents

OPEN = "from mlops_workbench.pipeline.stage import open_stage"


def cell(source: str, *tags: str, kind: str = "code") -> dict[str, Any]:
    """One cell of a notebook."""
    extra: dict[str, Any] = {"outputs": [], "execution_count": None} if kind == "code" else {}
    return {
        "cell_type": kind,
        "id": f"c{abs(hash(source)) % 10**8}",
        "metadata": {"tags": list(tags)},
        "source": source,
        **extra,
    }


def notebook(cells: Sequence[dict[str, Any]]) -> str:
    """The text of a notebook."""
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernelspec, "language_info": {"name": "python"}}
    numbered = [{**entry, "id": f"cell-{number}"} for number, entry in enumerate(cells)]
    return json.dumps({"cells": numbered, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def stage_cells(
    name: str,
    parameters: str = "value = 1",
    body: str = "",
    *,
    tags: Sequence[str] = ("parameters",),
) -> list[dict[str, Any]]:
    """A stage that writes its parameter into one file and declares it."""
    names = [
        line.split("=")[0].split(":")[0].strip() for line in parameters.splitlines() if "=" in line
    ]
    given = ", ".join(f'"{key}": {key}' for key in names)
    finish = "stage.output('out.json').write_text(json.dumps(stage.parameters)); "
    finish += "stage.finish(metrics={'value': 1.0}, outputs={'out': stage.output('out.json')}, verdict='done', summary='a tiny stage')"
    return [
        cell(f"# {name}", kind="markdown"),
        cell(parameters, *tags),
        cell(f"import json, os, time\n{OPEN}\nstage = open_stage({name!r}, {{{given}}})"),
        cell(body or "pass"),
        cell(finish),
    ]


def make_workspace(
    folder: Path, stages: Mapping[str, Sequence[dict[str, Any]]], **settings: object
) -> Workspace:
    """A workspace with these stage notebooks (file name without suffix -> cells)."""
    values = {"pipeline.kernel_idle_seconds": 120, "experiment.ship_interval_seconds": 0.2}
    values |= {key.replace("__", "."): value for key, value in settings.items()}
    workspace = create_workspace(folder, name="tiny", settings=values)
    write_stages(workspace, stages)
    return workspace


def write_stages(workspace: Workspace, stages: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Write or replace stage notebooks."""
    place = workspace.root / "nbs" / "stages"
    place.mkdir(parents=True, exist_ok=True)
    for name, cells in stages.items():
        (place / f"{name}.ipynb").write_text(notebook(cells))


def mwb(
    workspace: Workspace, *arguments: str, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run the command line in a workspace."""
    return subprocess.run(
        [sys.executable, "-m", "mlops_workbench.cli.main", *arguments],
        cwd=workspace.root, env=clean_environment() | environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def clean_environment() -> dict[str, str]:
    """The environment without what a surrounding run of the workbench may have left in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MWB_")}


_shared: dict[str, Path] = {}


def share_kernels(workspace: Workspace) -> Workspace:
    """Let all test workspaces of this process use one pre-warmed parent; it ends with the process."""
    if "folder" not in _shared:
        _shared["folder"] = Path(tempfile.mkdtemp(prefix="mwb-test-kernels-"))
        atexit.register(_stop_shared)
    workspace.state.mkdir(parents=True, exist_ok=True)
    workspace.kernels.symlink_to(_shared["folder"], target_is_directory=True)
    return workspace


def _stop_shared() -> None:
    stop_parents(_shared["folder"])
    shutil.rmtree(_shared["folder"], ignore_errors=True)


def tracked_runs(workspace: Workspace) -> list[dict[str, Any]]:
    """The tracker's runs as it stores them: name, status, and the metrics, parameters and tags of each."""
    database = workspace.tracking_uri.removeprefix("sqlite:///")
    with closing(sqlite3.connect(database)) as connection:
        runs = [
            {"id": row[0], "name": row[1], "status": row[2]}
            for row in connection.execute(
                "SELECT run_uuid, name, status FROM runs ORDER BY start_time"
            )
        ]
        for run in runs:
            for table in ("params", "tags", "latest_metrics"):
                query = f"SELECT key, value FROM {table} WHERE run_uuid = ?"
                run[table] = dict(connection.execute(query, (run["id"],)).fetchall())
    return runs


def run_folders(workspace: Workspace) -> list[str]:
    """The folders of all runs, relative to runs/."""
    return sorted(
        path.parent.relative_to(workspace.runs).as_posix()
        for path in workspace.runs.glob("*/*/run.json")
    )
