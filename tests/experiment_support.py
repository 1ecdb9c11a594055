"""Helpers of the experiment tests: workspaces, raw reads of MLflow's tables, killed processes."""

import importlib.util
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

from mlops_workbench.core.workspace import Workspace, create_workspace
from mlops_workbench.experiment.store import sqlite_path

REPOSITORY = Path(__file__).resolve().parent.parent

# Imports once and then forks, so that a hundred short lives cost no hundred imports of mlflow.
FORKING = """
import os, random, signal, sqlite3, sys, time
from pathlib import Path
from mlops_workbench.experiment.store import quiet_mlflow
quiet_mlflow()
import mlflow.store.tracking.sqlalchemy_store
import mlflow.store.model_registry.sqlalchemy_store
from mlflow.tracking import MlflowClient
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.experiment import shipping
from mlops_workbench.experiment.recorder import Recorder, last_steps
from mlops_workbench.experiment.store import ensure_store, mlflow_client
from mlops_workbench.experiment.tracking import finish_run, ship_journal, start_run


def forked(work):
    '''Start a process that does some work and then ends; its id.'''
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return pid


def forked_and_ready(work):
    '''The same for a process that first opens the store; returns when it has.'''
    reading, writing = os.pipe()
    def ready_then_work():
        mlflow_client(workspace).get_experiment("0")
        os.write(writing, b"!")
        work()
    pid = forked(ready_then_work)
    os.close(writing)
    assert os.read(reading, 1) == b"!"
    os.close(reading)
    return pid


def killed_after(pid, seconds):
    '''SIGKILL a process after some time; True when it was killed, False when it had ended well.'''
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            assert status in (0, signal.SIGKILL), status
            return status == signal.SIGKILL
        if time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
        time.sleep(0.002)


workspace = Workspace.open(Path(sys.argv[1]))
"""


def make_workspace(folder: Path, **settings: object) -> Workspace:
    """A workspace whose settings are named with `__` for the dot."""
    values = {name.replace("__", "."): value for name, value in settings.items()}
    return create_workspace(folder, name="tests", recipe="flights", settings=values)


def run_forking(
    script: str, *arguments: object, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script that begins with `FORKING`; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", FORKING + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def query(workspace: Workspace, sql: str, *values: Any) -> list[tuple[Any, ...]]:
    """Rows straight from MLflow's SQLite database."""
    path = sqlite_path(workspace.tracking_uri)
    assert path is not None
    with closing(sqlite3.connect(path, timeout=30)) as database:
        return database.execute(sql, values).fetchall()


def benchmark_module(name: str = "tracking") -> ModuleType:
    """A file of benchmarks/ as a module, for the data it makes."""
    path = REPOSITORY / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
