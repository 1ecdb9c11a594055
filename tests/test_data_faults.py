"""SIGKILL at 50 moments each of a push, a roll-back and a collection: nothing lost, nothing half-done. (A snapshot: test_data_versions.)"""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from data_support import files_under, kill_group, new_store, table, wait_until_ready

from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.defaults import data_slot, set_default_data
from mlops_workbench.data.transfer import pull
from mlops_workbench.data.versions import DataStore
from mlops_workbench.pipeline.data_rollback import rollback_data

pytestmark = pytest.mark.slow
KILLS = 50
NAMES = {"key": "id", "label": "late"}
WORK = """
import sys
from pathlib import Path
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.transfer import push
from mlops_workbench.data.versions import DataStore
from mlops_workbench.pipeline.data_gc import collect_data
from mlops_workbench.pipeline.data_rollback import rollback_data
workspace, words = Workspace.open(Path(sys.argv[1])), sys.argv[3:]
print("ready", flush=True)
if sys.argv[2] == "push":
    push(DataStore(workspace), remote=words[0])
elif sys.argv[2] == "rollback":
    rollback_data(workspace, words[0], actor="test", reason="a test")
else:
    collect_data(workspace, actor="test", remote=True, delete=True)
"""


@pytest.fixture
def store(tmp_path: Path) -> DataStore:
    """Three versions, the last one is the default."""
    made = new_store(tmp_path)
    for rows in (4000, 5000, 6000):
        set_default_data(
            made.workspace, made.snapshot("flights", table(rows), **NAMES).ref, actor="t", reason=""
        )
    return made


def begin(store: DataStore, *words: str) -> "subprocess.Popen[str]":
    """The work in a process group of its own, imported and about to begin."""
    command = [sys.executable, "-c", WORK, str(store.root), *words]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until_ready(process)
    return process


def kill_again_and_again(
    store: DataStore, words: Callable[[int], list[str]], check: Callable[[], None]
) -> None:
    """Kill the work at moments spread over its usual time, with a look after each."""
    process = begin(store, *words(0))
    begun = time.monotonic()
    assert process.wait(120) == 0, process.communicate()
    usual, moments = time.monotonic() - begun, np.random.default_rng(4)
    killed = attempt = 0
    while killed < KILLS:
        attempt += 1
        process = begin(store, *words(attempt))
        time.sleep(usual * (killed + moments.random()) / KILLS)
        if kill_group(process):
            killed += 1
        else:  # it was faster than usual
            usual *= 0.95
        check()


def test_a_killed_push_goes_on(store: DataStore, tmp_path: Path) -> None:
    far: list[Path] = []

    def words(attempt: int) -> list[str]:
        far.append(tmp_path / f"far {attempt}")
        return ["push", str(far[-1])]

    kill_again_and_again(store, words, lambda: None)
    for folder in far[5 :: KILLS // 5]:
        process = begin(store, "push", str(folder))
        assert process.wait(120) == 0, process.communicate()
        copy = tmp_path / "copy" / folder.name
        subprocess.run(["git", "clone", "-q", str(store.root), str(copy)], check=True)
        clone = DataStore(Workspace.open(copy))
        pull(clone, remote=str(folder))
        for version in store.versions():
            pd.testing.assert_frame_equal(clone.load(version.ref), store.load(version))


def test_a_killed_roll_back_has_happened_or_not(store: DataStore) -> None:
    ledger = Ledger(store.workspace.ledger_url)
    rows = {"flights@v1.0": 4000, "flights@v1.2": 6000}
    decided = [len(ledger.decisions(limit=1000))]

    def default() -> str:
        slot = ledger.slot(data_slot("flights@v1.0"))
        assert slot is not None
        return slot.digest

    def words(attempt: int) -> list[str]:
        return ["rollback", "flights@v1.0" if default() == "flights@v1.2" else "flights@v1.2"]

    def check() -> None:
        assert len(store.load(default())) == rows[default()]
        assert ledger.verify().ok
        now = len(ledger.decisions(limit=1000))
        assert now - decided[-1] in (0, 1, 2)
        decided.append(now)

    kill_again_and_again(store, words, check)
    told = [message for message in ledger.messages(1000) if "rolled back" in message.title]
    made = [row for row in ledger.decisions(limit=1000) if row.verdict == "rolled back"]
    assert len(told) == len(made)
    if default() != "flights@v1.0":
        rollback_data(store.workspace, "flights@v1.0", actor="test", reason="a test")
    assert default() == "flights@v1.0" and store.verify() == []


def test_a_killed_collection_takes_nothing_that_is_needed(store: DataStore) -> None:
    frame, needed = table(6000), store.versions()[-1]
    number = iter(range(10_000))

    def words(attempt: int) -> list[str]:
        for _ in range(2):  # versions that nothing needs
            store.snapshot("spare", table(2000, seed=next(number)), **NAMES)
        store.snapshot("flights", frame[: 3000 + attempt], **NAMES, parent=needed.ref)
        return ["collect"]

    def check() -> None:
        pd.testing.assert_frame_equal(store.load(needed), frame)
        for version in store.versions():
            if version.name == "flights":
                store.load(version)

    kill_again_and_again(store, words, check)
    process = begin(store, "collect")
    assert process.wait(120) == 0, process.communicate()
    assert [problem for problem in store.verify() if not problem.repaired] == []
    pd.testing.assert_frame_equal(store.load(needed), frame)
    assert not [path for path in files_under(store.root) if path.suffix == ".partial"]
    assert Ledger(store.workspace.ledger_url).verify().ok
