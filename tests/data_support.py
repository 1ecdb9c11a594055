"""Helpers of the data room's tests: tables, flipped bytes, a snapshot in a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from mlops_workbench.core.workspace import Workspace, create_workspace
from mlops_workbench.data.versions import DataStore


def new_store(folder: Path) -> DataStore:
    """The data versions of a new workspace."""
    return DataStore(create_workspace(folder / "workspace", name="example", recipe="flights"))


def table(rows: int, first: int = 0, seed: int = 0) -> pd.DataFrame:
    """A table with text key, numbers with holes, categories and a label."""
    numbers = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "id": [f"row {first + n:07}" for n in range(rows)],
            "temperature": numbers.normal(40, 10, rows),
            "carrier": numbers.choice(["UA", "DL", "B6"], rows),
            "hour": numbers.integers(0, 24, rows),
            "late": numbers.integers(0, 2, rows),
        }
    )
    frame.loc[numbers.random(rows) < 0.05, "temperature"] = np.nan
    return frame


def pictures(folder: Path, count: int, first: int = 0) -> Path:
    """Files of 1 KB that begin like a PNG, in ten folders; returns the folder."""
    numbers = np.random.default_rng(first)
    for number in range(first, first + count):
        path = folder / f"class {number % 10}" / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + numbers.bytes(1000))
    return folder


def flip_byte(path: Path, place: int | None = None) -> None:
    """Turn one bit of a file as a bad disk would: permissions and times stay as they were."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    path.chmod(status.st_mode & 0o777)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def files_under(folder: Path) -> list[Path]:
    """All files under a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


SNAPSHOT = """
import json, sys
import pandas as pd
from pathlib import Path
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.versions import DataStore
store = DataStore(Workspace.open(Path(sys.argv[1])))
frame = pd.read_parquet(sys.argv[2])
print("ready", flush=True)
version = store.snapshot("flights", frame, key="id", label="late", message=sys.argv[3])
print(json.dumps([version.ref, version.unchanged]), flush=True)
"""


def start_snapshot(workspace: Workspace, parquet: Path, message: str) -> "subprocess.Popen[str]":
    """A snapshot in a process group of its own; it says "ready" before it begins."""
    command = [sys.executable, "-c", SNAPSHOT, str(workspace.root), str(parquet), message]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until_ready(process: "subprocess.Popen[str]") -> None:
    """Wait for the process to begin its snapshot; byte by byte, for `communicate` does not see what a buffer took."""
    assert process.stdout is not None
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(process.stdout.fileno(), 1)):
        line += byte
    assert line == b"ready\n", process.stderr.read() if process.stderr else line


def kill_group(process: "subprocess.Popen[str]") -> bool:
    """Kill a process and everything it started in its group; False when it had ended before."""
    ended = process.poll() is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        ended = True
    process.communicate(timeout=60)
    return not ended


def result_of(process: "subprocess.Popen[str]", timeout_seconds: float = 120.0) -> tuple[str, bool]:
    """Reference and "unchanged" of a snapshot that ran to its end."""
    output, errors = process.communicate(timeout=timeout_seconds)
    assert process.returncode == 0, errors
    ref, unchanged = json.loads(output.strip().splitlines()[-1])
    return ref, unchanged
