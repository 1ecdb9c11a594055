"""Who used these rows: over ten thousand releases, through the command, and what a roll-back of the data moves."""

import json
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from data_support import (
    files_under,
    kill_group,
    new_store,
    result_of,
    start_snapshot,
    table,
    wait_until_ready,
)
from experiment_support import benchmark_module
from pipeline_support import make_workspace, share_kernels, stage_cells
from remotes_support import start_command

from mlops_workbench.cli.main import main
from mlops_workbench.core.errors import UsageError
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.defaults import default_versions, set_default_data, withdrawn_versions
from mlops_workbench.data.dvc import run_dvc
from mlops_workbench.data.names import name_version
from mlops_workbench.data.usage import used_by
from mlops_workbench.data.versions import DataStore
from mlops_workbench.pipeline.cycles import create_cycle, read_cycle
from mlops_workbench.pipeline.data_gc import collect_data
from mlops_workbench.pipeline.data_rollback import base_version, rollback_data
from mlops_workbench.pipeline.manifest import read_manifest
from mlops_workbench.pipeline.runner import CycleResult, run_stages

NAMES = {"key": "id", "label": "late"}


@pytest.fixture
def store(tmp_path: Path) -> DataStore:
    return new_store(tmp_path)


# --- used-by --------------------------------------------------------------------------------------


def test_rows_are_found_among_ten_thousand_releases(store: DataStore) -> None:
    frame = table(20_000)
    refs = [store.snapshot("flights", frame[: 5000 * part], **NAMES).ref for part in (1, 2, 3, 4)]
    ledger = Ledger(store.workspace.ledger_url)
    benchmark_module("usage").many_releases(ledger, 10_000, refs)
    report = ledger.verify()
    assert report.ok, report.problems[:3]
    keys = [*frame["id"][15_000:15_020], *frame["id"][10_000:10_010], "nobody"]
    use = used_by(store, "flights", keys)
    assert [(version.ref, version.rows) for version in use.versions] == [
        (refs[2], 10),
        (refs[3], 30),
    ]
    assert len(use.releases) == 5000 and len(use.production) == 5000
    assert {release.data_version for release in use.releases} == set(refs[2:])
    assert [serving.release for serving in use.serves_now] == ["flights-r10000"]
    assert use.unknown == ("nobody",)
    spans = [serving for serving in use.production if serving.until is not None]
    assert all(serving.since <= serving.until for serving in spans if serving.until)


def test_a_corrected_row_is_told_with_the_label_it_had(store: DataStore) -> None:
    frame = table(100)
    store.snapshot("flights", frame, source_batch="january", **NAMES)
    frame.loc[7, "late"] = 1 - frame.loc[7, "late"]
    store.snapshot("flights", frame.drop(index=3), source_batch="mended", **NAMES)
    use = used_by(store, "flights", [frame["id"][7], frame["id"][3]])
    first, second = use.versions
    assert first.keys == (frame["id"][3], frame["id"][7]) and second.keys == (frame["id"][7],)
    assert first.labels[1] != second.labels[0]
    assert (first.batches, second.batches) == (("january",), ("mended",))
    assert "january" in use._repr_html_()


@pytest.mark.parametrize("key", ["two\nlines", "🛫", "x" * 10_000, "<img onerror=1>", "a,b'\""])
def test_odd_keys_are_found(store: DataStore, tmp_path: Path, key: str) -> None:
    frame = table(10)
    frame.loc[4, "id"] = key
    store.snapshot("flights", frame, **NAMES)
    (tmp_path / "keys.json").write_text(json.dumps([key]))
    words = ["data", "used-by", "flights", "--keys-from", str(tmp_path / "keys.json")]
    assert main([*words, "-w", str(store.root)]) == 0
    use = used_by(store, "flights", [key])
    assert use.versions[0].keys == (key,)
    assert "<img" not in use._repr_html_()


def test_the_command_says_what_is_missing(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    store.snapshot("flights", table(10), **NAMES)
    here = ["-w", str(store.root)]
    assert main(["data", "used-by", "flights", *here]) == 2
    assert main(["data", "used-by", "planes", "1", *here]) == 1
    said = capsys.readouterr().err
    assert "at least one key" in said and "there are: flights" in said
    assert main(["data", "used-by", "flights", "row 0000003", "--json", *here]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"][0]["ref"] == "flights@v1.0" and found["releases"] == []


# --- a roll-back and what may be used again -------------------------------------------------------


MAKE = """
rows = stage.data.latest("flights").rows if stage.data.versions("flights") else 0
version = stage.data.snapshot(
    "flights",
    pd.DataFrame({"id": range(rows + 10), "late": [batch % 2] * (rows + 10)}),
    key="id",
    label="late",
    parent=stage.slot("data:flights"),
)
stage.data_version = version.ref
set_default_data(stage.workspace, version.ref, actor="test", reason="accepted")
"""


LEARN = "choose_data(stage, data_version, stage.upstream('prepare', optional=True))"
IMPORTS = """
import pandas as pd
from mlops_workbench.pipeline.outcome import choose_data
from mlops_workbench.data.defaults import set_default_data
"""


@pytest.fixture
def factory(tmp_path: Path) -> DataStore:
    """A workspace with two stages: one makes data, the other learns from it."""
    stages = {
        "1_prepare": stage_cells("prepare", "batch = 0", IMPORTS + MAKE),
        "2_train": stage_cells("train", 'data_version = ""', IMPORTS + LEARN),
    }
    return DataStore(share_kernels(make_workspace(tmp_path / "tiny", stages)))


def turn(store: DataStore, batch: int, cycle: str | None = "new") -> CycleResult:
    """One cycle with a batch."""
    result = run_stages(
        store.workspace, ["prepare", "train"], parameters={"prepare": {"batch": batch}}, cycle=cycle
    )
    assert result.ok, result
    return result


def shown(result: CycleResult) -> list[tuple[str, str, str]]:
    """Stage, status and data version of each stage."""
    manifests = {stage.stage: read_manifest(stage.folder) for stage in result.stages}
    return [
        (stage.stage, stage.status, manifest.data_version)
        for stage in result.stages
        if (manifest := manifests[stage.stage]) is not None
    ]


def test_after_a_rollback_nothing_that_stands_on_the_bad_data_is_used_again(
    factory: DataStore,
) -> None:
    workspace = factory.workspace
    assert shown(turn(factory, 0))[1] == ("train", "finished", "flights@v1.0")
    assert shown(turn(factory, 1))[1] == ("train", "finished", "flights@v1.1")
    assert [status for _, status, _ in shown(turn(factory, 1))] == ["reused", "reused"]
    name_version(factory, "flights@v1.0", "golden")
    back = rollback_data(workspace, "flights@golden", actor="test", reason="wrong labels")
    assert (back.ref, back.previous) == ("flights@v1.0", "flights@v1.1")
    # the cycle of the bad version is still the current one; training follows the default now
    trained = run_stages(workspace, ["train"])
    assert shown(trained) == [("train", "finished", "flights@v1.0")]
    assert shown(run_stages(workspace, ["train"]))[0][1] == "reused"
    # whoever asks for the bad version by name gets the finished run of nobody else
    asked = run_stages(workspace, ["train"], parameters={"train": {"data_version": "flights@v1.1"}})
    assert shown(asked) == [("train", "finished", "flights@v1.1")]
    # the batch that made the bad version is taken again, joined to the default
    again = turn(factory, 1)
    assert shown(again)[0][1:] == ("finished", "flights@v1.2")
    assert factory.resolve("flights@v1.2").parent == "flights@v1.0"
    assert withdrawn_versions(workspace) == {"flights@v1.1"}
    assert [status for _, status, _ in shown(turn(factory, 1))] == ["reused", "reused"]
    # nothing was deleted, and forward again is one command
    assert len(factory.load("flights@v1.1")) == 20
    rollback_data(workspace, "flights@v1.1", actor="test", reason="it was right")
    assert shown(run_stages(workspace, ["train"]))[0][2] == "flights@v1.1"


def test_one_decision_moves_everything(
    store: DataStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here, and in a clone, where no ledger is."""
    frame = table(300)
    for rows in (100, 200, 300):
        ref = store.snapshot("flights", frame[:rows], **NAMES).ref
        set_default_data(store.workspace, ref, actor="test", reason="accepted")
    ledger = Ledger(store.workspace.ledger_url)
    before = len(ledger.decisions())
    here = ["-w", str(store.root)]
    assert main(["data", "rollback", "flights@v1.0", "-m", "bad batch", "--json", *here]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["previous"] == "flights@v1.2"
    assert said["withdrawn"] == ["flights@v1.1", "flights@v1.2"]
    assert len(ledger.decisions()) == before + 1
    assert (ledger.decisions()[0].verdict, ledger.decisions()[0].reason) == (
        "rolled back",
        "bad batch",
    )
    assert ledger.verify().ok
    assert main(["data", "rollback", "flights@v1.0", *here]) == 0
    assert "already" in capsys.readouterr().out
    assert len(ledger.decisions()) == before + 1
    assert main(["data", "rollback", "flights@v9.0", *here]) == 1
    assert default_versions(store.workspace)["flights"] == "flights@v1.0"
    assert main(["data", "list", *here]) == 0
    listed = capsys.readouterr().out
    assert "taken back" in listed
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(store.root), str(clone)], check=True)
    there = ["-w", str(clone)]
    assert main(["data", "list", *there]) == 0
    assert capsys.readouterr().out.count("taken back") == listed.count("taken back") == 2
    assert DataStore(Workspace.open(clone)).resolve("flights").ref == "flights@v1.0"
    assert main(["data", "verify", *there]) == 1
    assert "mwb data pull" in capsys.readouterr().err
    remote = store.dvc.remote
    assert main(["data", "pull", "flights@v1.0", "--from", remote, *there]) == 0
    assert len(DataStore(Workspace.open(clone)).load("flights")) == 100


def test_a_clone_builds_on_the_default_that_was_named_there(
    store: DataStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No ledger came with it: that v1.1 and v1.2 lay on the way to the default follows from the lineage."""
    frame = table(400)
    for rows in (100, 200, 300, 400):
        store.snapshot("flights", frame[:rows], **NAMES)
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(store.root), str(clone)], check=True)
    there = ["-w", str(clone)]
    assert main(["data", "pull", *there]) != 0, "nothing was ever put into the clone's own remote"
    assert "mwb data pull --from" in capsys.readouterr().err
    remote = Path(store.dvc.remote)
    monkeypatch.chdir(remote.parent)
    assert main(["data", "pull", "--from", remote.name, *there]) == 0
    capsys.readouterr()
    assert main(["data", "verify", *there]) == 0
    assert capsys.readouterr().out == "every file is whole\n"
    assert main(["data", "rollback", "flights@v1.0", "--json", *there]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["withdrawn"] == ["flights@v1.1", "flights@v1.2", "flights@v1.3"]
    base = base_version(Workspace.open(clone), "flights")
    assert base is not None
    assert base.ref == "flights@v1.0"
    newer = DataStore(Workspace.open(clone)).snapshot(
        "flights", table(450), parent=base.ref, **NAMES
    )
    assert main(["data", "pull", "--from", remote.name, *there]) == 0
    said = capsys.readouterr().out
    assert said.startswith("4 versions from ") and f"whole here: {newer.ref}" in said


@pytest.mark.parametrize("label", ["default", "Taken-back", "latest", "v2", "1.0", "V1.0"])
def test_a_word_for_a_state_or_a_number_is_no_name(store: DataStore, label: str) -> None:
    store.snapshot("flights", table(50), **NAMES)
    with pytest.raises(UsageError, match="for example golden"):
        name_version(store, "flights@v1.0", label)


def test_a_lost_version_is_not_rolled_back_to(store: DataStore) -> None:
    frame = table(300)
    for rows in (200, 300):
        ref = store.snapshot("flights", frame[:rows], **NAMES).ref
        set_default_data(store.workspace, ref, actor="test", reason="accepted")
    for folder in (store.dvc.cache, store.dvc.local_remote):
        assert folder is not None
        for path in [path for path in folder.rglob("*") if path.is_file()]:
            path.unlink()
    words = ["data", "rollback", "flights@v1.0", "-w", str(store.root)]
    assert main(words) == 1
    assert default_versions(store.workspace)["flights"] == "flights@v1.1"


def test_labels_are_given_once(store: DataStore, capsys: pytest.CaptureFixture[str]) -> None:
    for rows in (50, 60):
        store.snapshot("flights", table(rows), **NAMES)
    here = ["-w", str(store.root)]
    assert main(["data", "tag", "flights@v1.0", "golden", *here]) == 0
    assert main(["data", "tag", "flights@v1.0", "golden", *here]) == 0
    assert main(["data", "tag", "flights@v1.1", "golden", *here]) == 5
    assert "given to flights@v1.0" in capsys.readouterr().err
    assert main(["data", "tag", "flights@v1.1", "v2.0", *here]) == 2
    assert main(["data", "diff", "flights@golden", "flights", *here]) == 0
    assert main(["data", "verify", "flights@golden", *here]) == 0
    assert np.array_equal(store.load("flights@v1.0")["id"], table(50)["id"])


@pytest.mark.slow
def test_the_cycle_keeps_its_record(factory: DataStore) -> None:
    turn(factory, 0)
    result = turn(factory, 1)
    rollback_data(factory.workspace, "flights@v1.0", actor="test", reason="wrong labels")
    kept = read_cycle(factory.workspace, result.cycle)
    assert kept is not None and set(kept.stages) == {"prepare", "train"}
    assert create_cycle(factory.workspace).name != result.cycle


# --- what may go ----------------------------------------------------------------------------------


def test_gc_keeps_what_is_needed_and_leaves_other_files_alone(
    store: DataStore, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = table(5000)
    for rows in (2000, 3000, 4000, 5000):
        store.snapshot("flights", frame[:rows], **NAMES)
    (store.root / "own.bin").write_bytes(b"tracked by hand" * 1000)
    run_dvc(store.root, "add", "own.bin")
    (store.root / "own.bin").unlink()
    release = {"digest": "d" * 64, "name": "flights-r1", "recipe": "flights", "path": "/x"}
    release |= {"data_version": "flights@v1.1", "run_id": "run"}
    with Ledger(store.workspace.ledger_url).decision(
        "gate", actor="test", subject="flights-r1", verdict="approved", reason="all gates passed"
    ) as change:
        change.add_release(release)
    here = ["-w", str(store.root)]
    before = files_under(store.root)
    assert main(["data", "gc", "--remote", "--json", *here]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["dropped"] == ["flights@v1.0", "flights@v1.2"] and not planned["deleted"]
    assert planned["kept"]["flights@v1.1"] == ["release flights-r1"]
    assert [path for path in before if path not in set(files_under(store.root))] == []
    assert main(["data", "gc", "--remote", "--yes", *here]) == 0
    assert [version.ref for version in store.versions()] == ["flights@v1.1", "flights@v1.3"]
    assert store.verify() == []
    assert len(store.load("flights@v1.1")) == 3000
    run_dvc(store.root, "checkout", "own.bin.dvc")
    assert (store.root / "own.bin").stat().st_size == 15_000
    assert store.snapshot("flights", frame[:100], **NAMES).ref == "flights@v1.4"
    assert Ledger(store.workspace.ledger_url).verify().ok


@pytest.mark.slow
def test_gc_beside_snapshots_and_kills(store: DataStore, tmp_path: Path) -> None:
    frame, moments = table(3000), random.Random(2)
    for rows in (1000, 1500, 2000):
        store.snapshot("flights", frame[:rows], **NAMES)
    kills = 0
    for turn_number in range(10):
        frame[: 2010 + turn_number].to_parquet(tmp_path / "new.parquet")
        writer = start_snapshot(store.workspace, tmp_path / "new.parquet", "beside")
        wait_until_ready(writer)
        cleaner = start_command(store.root, "gc", "--yes", "--remote", environment={})
        if turn_number % 2:
            time.sleep(moments.uniform(1.0, 5.0))
            kills += kill_group(cleaner)
        else:
            assert cleaner.wait(120) == 0, cleaner.communicate()
        result_of(writer)
    collect_data(store.workspace, actor="test", remote=True, delete=True)
    assert [problem for problem in store.verify() if not problem.repaired] == []
    assert store.resolve("flights").rows == 2019 and len(store.load("flights")) == 2019
