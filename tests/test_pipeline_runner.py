"""The runner: what counts as finished, what is used again, and what is left after things were killed."""

import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from pipeline_support import (
    OPEN,
    cell,
    clean_environment,
    make_workspace,
    mwb,
    notebook,
    run_folders,
    share_kernels,
    stage_cells,
    tracked_runs,
    write_stages,
)

from mlops_workbench.core.errors import (
    ConflictError,
    StageError,
    StageParameterError,
    UsageError,
)
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.defaults import set_default_data
from mlops_workbench.pipeline.cycles import (
    create_cycle,
    current_cycle,
    cycle_names,
    finished_run,
    open_runs,
)
from mlops_workbench.pipeline.manifest import read_manifest, read_run
from mlops_workbench.pipeline.records import processes_of
from mlops_workbench.pipeline.runner import Progress, run_stages

TWO = {
    "1_make": stage_cells("make"),
    "2_use": stage_cells("use", body="got = stage.upstream('make').read('out')"),
}


def fresh(folder: Path, stages: dict[str, Any], **settings: object) -> Workspace:
    """A workspace whose kernels come from the parent that all tests share."""
    return share_kernels(make_workspace(folder / "workspace", stages, **settings))


def failed(workspace: Workspace, said: str, status: str = "failed", **arguments: Any) -> Any:
    """Run, expect a red stage whose failure says this and whose run left no manifest; its outcome."""
    result = run_stages(workspace, **arguments)
    last = result.stages[-1]
    assert not result.ok and last.failure is not None
    assert said in last.failure.text, last.failure.text
    assert last.status == status
    assert read_manifest(last.folder) is None
    record = read_run(last.folder)
    assert record is not None and record.status == status
    return last


def statuses(workspace: Workspace) -> list[str]:
    """The states of the tracker's runs, in their order."""
    return [run["status"] for run in tracked_runs(workspace)]


def alive(pid: int) -> bool:
    """Whether a process still runs; one that only waits to be collected does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# %% a good run
def test_a_run_leaves_folder_manifest_and_tracker_run(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, TWO)
    events: list[Progress] = []
    result = run_stages(workspace, parameters={"make": {"value": 5}}, progress=events.append)
    assert (result.ok, result.exit_code) == (True, 0)
    make, use = result.stages
    assert (make.status, make.kernel, make.verdict) == ("finished", "warm", "done")
    manifest = read_manifest(make.folder)
    assert manifest is not None
    assert manifest.parameters == {"value": 5}
    assert json.loads(manifest.path("out").read_text()) == {"value": 5}
    assert manifest.run_id == make.run_id
    used = read_manifest(use.folder)
    assert used is not None and used.upstream == {"make": "cycle-0001/1_make-1"}
    executed = json.loads(make.notebook.read_text())
    assert any("injected-parameters" in entry["metadata"]["tags"] for entry in executed["cells"])
    first, second = tracked_runs(workspace)
    assert (first["status"], second["status"]) == ("FINISHED", "FINISHED")
    assert (first["name"], first["params"]) == ("cycle-0001/1_make-1", {"value": "5"})
    assert first["latest_metrics"]["value"] == 1.0
    assert {"code_commit", "notebook_digest", "lock_digest", "dirty_hash"} <= set(first["tags"])
    assert first["tags"]["stage"] == "make" and first["tags"]["kernel"] == "warm"
    stored = list(workspace.artifacts.glob(f"{make.run_id}/artifacts/notebook.ipynb"))
    assert stored and stored[0].read_bytes() == make.notebook.read_bytes()
    assert open_runs(workspace) == []
    assert [event.cell for event in events if event.kind == "cell" and event.stage == "make"] == [
        2,
        3,
        4,
        5,
        6,
    ]
    assert Ledger(workspace.ledger_url).lease("runner") is None


# %% reuse
def test_equal_inputs_are_used_again_and_changed_ones_are_not(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, TWO)
    run_stages(workspace)
    before = run_folders(workspace)
    again = run_stages(workspace)
    assert [stage.status for stage in again.stages] == ["reused", "reused"]
    assert run_folders(workspace) == before and len(tracked_runs(workspace)) == 2
    assert again.seconds < 0.5

    cells = stage_cells("use", body="got = stage.upstream('make').read('out')\nmore = 1")
    write_stages(workspace, {"2_use": cells})
    changed = run_stages(workspace)
    assert [stage.status for stage in changed.stages] == ["reused", "finished"]
    assert changed.cycle == "cycle-0002"

    write_stages(workspace, {"2_use": [cell("# other words", kind="markdown"), *cells[1:]]})
    assert [stage.status for stage in run_stages(workspace).stages] == ["reused", "reused"]

    (workspace.root / "features.py").write_text("a = 1")
    assert [stage.status for stage in run_stages(workspace).stages] == ["finished", "finished"]
    forced = run_stages(workspace, ["use"], force=True)
    assert [stage.status for stage in forced.stages] == ["finished"]
    assert forced.stages[0].folder.name == "2_use-2"


def test_a_file_that_was_read_is_part_of_the_inputs(tmp_path: Path) -> None:
    body = "from pathlib import Path\nrows = stage.input(Path('incoming.csv')).read_text()"
    workspace = fresh(tmp_path, {"1_look": stage_cells("look", body=body)})
    batch = workspace.root / "incoming.csv"
    batch.write_text("a,b\n1,2\n")
    assert [run_stages(workspace).stages[0].status for _ in range(2)] == ["finished", "reused"]
    batch.write_text("a,b\n1,3\n")
    assert [run_stages(workspace).stages[0].status for _ in range(2)] == ["finished", "reused"]


def test_a_run_that_read_a_slot_is_used_again_only_while_the_slot_stands(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, {"1_look": stage_cells("look", body="stage.slot('data:tiny')")})

    def status() -> str:
        return run_stages(workspace).stages[0].status

    assert [status(), status()] == ["finished", "reused"]
    set_default_data(workspace, "tiny@v1.0", actor="somebody", reason="a first batch")
    assert [status(), status()] == ["finished", "reused"]
    set_default_data(workspace, "tiny@v1.1", actor="somebody", reason="another batch")
    assert [status(), status()] == ["finished", "reused"]
    set_default_data(workspace, "tiny@v1.0", actor="somebody", reason="rolled back")
    assert status() == "finished"


def test_an_output_that_was_damaged_later_is_made_again(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, TWO)
    first = run_stages(workspace)
    (first.stages[0].folder / "outputs" / "out.json").write_text('{"value": 6}')
    again = run_stages(workspace)
    assert [stage.status for stage in again.stages] == ["finished", "reused"]


def test_a_stage_that_looks_at_the_living_world_always_runs(tmp_path: Path) -> None:
    cells = stage_cells("watch", tags=("parameters", "always"))
    workspace = fresh(tmp_path, {"1_make": stage_cells("make"), "2_watch": cells})
    run_stages(workspace)
    again = run_stages(workspace)
    assert [stage.status for stage in again.stages] == ["reused", "finished"]


def test_each_look_at_the_living_world_has_its_own_window(tmp_path: Path) -> None:
    """Also in a cycle that was left half done: what an earlier look was told is not told to the next one."""
    watch = stage_cells("watch", "since = 0.0", tags=("parameters", "always"))
    workspace = fresh(tmp_path, {"1_make": stage_cells("make"), "2_watch": watch})
    run_stages(workspace, ["watch"], parameters={"watch": {"since": 1_364_774_400.0}})
    again = run_stages(workspace, ["watch"])
    manifest = read_manifest(again.stages[0].folder)
    assert manifest is not None and manifest.parameters == {"since": 0.0}


def test_parameters_stay_with_a_cycle_until_it_is_complete(tmp_path: Path) -> None:
    workspace = fresh(
        tmp_path,
        {
            "1_make": stage_cells("make"),
            "2_use": stage_cells("use", body="raise ValueError('stop')"),
        },
    )
    run_stages(workspace, parameters={"make": {"value": 7}})
    again = run_stages(workspace)
    assert [stage.status for stage in again.stages] == ["reused", "failed"]
    manifest = finished_run(workspace, current_cycle(workspace), "make")
    assert manifest is not None and manifest.parameters == {"value": 7}


def test_a_cycle_is_linked_to_its_trigger(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, {"1_make": stage_cells("make")})
    run_stages(workspace)
    result = run_stages(workspace, cycle="new", trigger="drift of cycle-0001", force=True)
    manifest = read_manifest(result.stages[0].folder)
    assert manifest is not None and manifest.trigger == "drift of cycle-0001"
    assert tracked_runs(workspace)[-1]["tags"]["trigger"] == "drift of cycle-0001"


# %% refusals
def test_a_lost_tag_is_refused_before_anything_runs(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, {"1_make": stage_cells("make", tags=())})
    with pytest.raises(StageParameterError, match="tagged 'parameters' in 1_make.ipynb, found 0"):
        run_stages(workspace)
    write_stages(workspace, {"1_make": [*stage_cells("make"), cell("x = 2", "parameters")]})
    with pytest.raises(StageParameterError, match="found 2"):
        run_stages(workspace)
    write_stages(workspace, {"1_make": [cell("x = 1", "parameters", kind="markdown")]})
    with pytest.raises(StageParameterError, match="exactly one code cell"):
        run_stages(workspace)
    assert run_folders(workspace) == [] and not (workspace.state / "ledger.db").exists()


def test_a_missing_upstream_and_an_unknown_stage_are_refused(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, TWO)
    with pytest.raises(StageError, match="mwb run make use"):
        run_stages(workspace, ["use"])
    with pytest.raises(UsageError, match="did you mean 'make'"):
        run_stages(workspace, ["mak"])
    with pytest.raises(UsageError, match="some of 'use'"):
        run_stages(workspace, ["make"], parameters={"use": {"value": 1}})
    assert run_folders(workspace) == []


def test_a_parameter_that_a_cell_changed_is_noticed(tmp_path: Path) -> None:
    cells = stage_cells("make")
    cells.insert(2, cell("value = 99"))
    workspace = fresh(tmp_path, {"1_make": cells})
    failed(workspace, "expected parameter 'value' to be 1")


# %% red although the notebook "succeeded"
RED = {
    "missing": ("stage.output('out.json').unlink()", "found no file"),
    "emptied": ("stage.output('out.json').write_text('')", "found it empty"),
    "old": ("os.utime(stage.output('out.json'), (1, 1))", "older than the run"),
    "cut": ("stage.output('out.json').write_text('{\"a')", "to be JSON"),
    "a link": ("p = stage.output('out.json'); p.unlink(); p.symlink_to('/etc/hostname')", "inside"),
    "no result": ("(stage.folder / 'result.json').unlink()", "declare its result"),
}


@pytest.mark.parametrize("kind", RED)
def test_an_output_that_is_not_there_turns_the_run_red(tmp_path: Path, kind: str) -> None:
    after, said = RED[kind]
    workspace = fresh(tmp_path, {"1_make": [*stage_cells("make"), cell(after)]})
    failed(workspace, said)
    assert statuses(workspace) == ["FAILED"]


def test_an_output_outside_the_run_folder_is_refused_in_the_cell(tmp_path: Path) -> None:
    cells = stage_cells("make")
    cells[-1] = cell("stage.finish(outputs={'x': stage.workspace.root / 'settings.ini'})")
    workspace = fresh(tmp_path, {"1_make": cells})
    assert failed(workspace, "expected output 'x' inside").failure.cell == 6


def test_a_failing_cell_says_where_and_how_to_go_on(tmp_path: Path) -> None:
    body = "stage.upstream('make')\nif not (stage.workspace.root / 'go').exists():\n    raise ValueError('no such column: tailnum')"
    workspace = fresh(
        tmp_path, {"1_make": stage_cells("make"), "2_use": stage_cells("use", body=body)}
    )
    done = mwb(workspace, "run")
    assert done.returncode == 1
    assert "stage use failed in cell 5: ValueError: no such column: tailnum" in done.stderr
    assert "go on     mwb run" in done.stderr and "notebook.ipynb" in done.stderr
    said = done.stdout + done.stderr
    assert said.count("no such column: tailnum") == 1 and "raise ValueError" not in said
    assert statuses(workspace) == ["FINISHED", "FAILED"]
    (workspace.root / "go").touch()
    again = run_stages(workspace)
    assert [stage.status for stage in again.stages] == ["reused", "finished"]
    assert (again.stages[1].folder / "notebook-0.ipynb").exists()


def test_a_refused_gate_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    body = "from mlops_workbench.core.errors import GateRefusedError\nraise GateRefusedError('brier 0.3 above 0.25')"
    workspace = fresh(tmp_path, {"1_make": stage_cells("make", body=body)})
    done = mwb(workspace, "run")
    assert done.returncode == 4
    assert "cell 5: brier 0.3 above 0.25" in done.stderr and "GateRefusedError" not in done.stderr


def test_a_new_cycle_in_which_nothing_ran_is_not_kept(tmp_path: Path) -> None:
    workspace = fresh(
        tmp_path,
        {
            "1_make": stage_cells("make"),
            "2_use": stage_cells("use", body="stage.upstream('make')"),
        },
    )
    assert mwb(workspace, "run").returncode == 0
    done = mwb(workspace, "run", "--cycle", "new")
    assert done.returncode == 0
    assert "no cycle was begun, the runs are those of cycle-0001" in done.stdout
    assert cycle_names(workspace) == ["cycle-0001"]
    refused = mwb(workspace, "run", "use", "--cycle", "new")  # nothing was made in that cycle
    assert refused.returncode != 0
    assert cycle_names(workspace) == ["cycle-0001"]
    current = current_cycle(workspace)
    assert current is not None and current.name == "cycle-0001"
    assert mwb(workspace, "run", "--cycle", "new", "--force").returncode == 0
    assert cycle_names(workspace) == ["cycle-0001", "cycle-0002"]


# %% limits
def test_a_stage_that_takes_too_long_is_ended_with_all_it_started(tmp_path: Path) -> None:
    body = "import subprocess\np = subprocess.Popen(['sleep', '600'])\n(stage.folder / 'pid').write_text(str(p.pid))\nwhile True: pass"
    workspace = fresh(
        tmp_path, {"1_make": stage_cells("make", body=body)}, pipeline__stage_timeout_seconds=2
    )
    run_stages_begun = time.monotonic()
    last = failed(workspace, "not done after 2 s (in cell 5)", "timeout")
    assert time.monotonic() - run_stages_begun < 15
    assert not alive(int((last.folder / "pid").read_text()))
    assert statuses(workspace) == ["KILLED"]
    states = [
        entry["metadata"]["papermill"]["status"]
        for entry in json.loads(last.notebook.read_text())["cells"]
    ]
    assert states == ["completed"] * 4 + ["failed", "not run"]


def test_a_stage_that_takes_too_much_memory_is_ended(tmp_path: Path) -> None:
    body = "block = bytearray(700_000_000)\nfor i in range(0, len(block), 4096): block[i] = 1\ntime.sleep(60)"
    workspace = fresh(
        tmp_path, {"1_make": stage_cells("make", body=body)}, pipeline__memory_limit_mb=400
    )
    failed(workspace, "more than 400 MB", "memory")
    assert statuses(workspace) == ["KILLED"]


@pytest.mark.parametrize("warm", [True, False])
def test_a_killed_kernel_is_no_success(tmp_path: Path, warm: bool) -> None:
    body = "import signal\nos.kill(os.getpid(), signal.SIGKILL)"
    workspace = fresh(
        tmp_path, {"1_make": stage_cells("make", body=body)}, pipeline__warm_kernels=warm
    )
    last = failed(workspace, "the kernel's process ended by signal 9 in cell 5", "killed")
    assert last.kernel.startswith("warm" if warm else "cold: pipeline.warm_kernels is off")
    states = [
        entry["metadata"]["papermill"]["status"]
        for entry in json.loads(last.notebook.read_text())["cells"]
    ]
    assert states == ["completed"] * 4 + ["failed", "not run"]
    assert statuses(workspace) == ["KILLED"]


def test_a_kernel_that_leaves_by_itself_is_no_success(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, {"1_make": stage_cells("make", body="os._exit(0)")})
    failed(workspace, "ended with exit code 0", "killed")


# %% two runners
SLOW = {
    "1_make": stage_cells(
        "make", body="while not (stage.workspace.root / 'go').exists(): time.sleep(0.02)"
    )
}


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return when something has become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def start(workspace: Workspace, *arguments: str) -> "subprocess.Popen[str]":
    """A runner in a process of its own."""
    command = [sys.executable, "-m", "mlops_workbench.cli.main", "run", *arguments]
    return subprocess.Popen(
        command,
        cwd=workspace.root,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def working(workspace: Workspace) -> list[Path]:
    """The folders of runs whose kernel is at work."""
    found = []
    for folder in open_runs(workspace):
        record = read_run(folder)
        if record is not None and record.status == "running" and record.kernel_process:
            found.append(folder)
    return found


def test_of_two_runners_one_works_and_the_other_says_who(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, SLOW)
    first = start(workspace)
    wait_for(lambda: bool(working(workspace)))
    second = mwb(workspace, "run")
    assert second.returncode == 5
    assert f"process {first.pid} on " in second.stderr and "epoch" not in second.stderr
    with pytest.raises(ConflictError):
        run_stages(workspace, force=True)
    (workspace.root / "go").touch()
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 0, output
    assert run_folders(workspace) == ["cycle-0001/1_make-1"]


def freeze_between_writes(process: "subprocess.Popen[str]", workspace: Workspace) -> None:
    """Stop a process at a moment when it does not hold the ledger's write lock, which nobody could take from it."""
    for _ in range(50):
        process.send_signal(signal.SIGSTOP)
        database = sqlite3.connect(workspace.state / "ledger.db", timeout=0.2, isolation_level=None)
        try:
            database.execute("BEGIN IMMEDIATE")
            database.execute("ROLLBACK")
            return
        except sqlite3.OperationalError:
            process.send_signal(signal.SIGCONT)
            time.sleep(0.02)
        finally:
            database.close()
    raise AssertionError("expected a moment without a write, found none")


def test_a_runner_that_lost_its_lease_promotes_nothing(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, SLOW, pipeline__lease_seconds=0.6)
    first = start(workspace)
    wait_for(lambda: bool(working(workspace)))
    folder = working(workspace)[0]
    freeze_between_writes(first, workspace)
    time.sleep(1.0)
    ledger = Ledger(workspace.ledger_url)
    lease = ledger.acquire_lease("runner", "elsewhere:1:x (mwb run)", 600)
    first.send_signal(signal.SIGCONT)
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 5, output
    assert read_manifest(folder) is None
    assert not processes_of(folder)
    ledger.release_lease(lease)
    (workspace.root / "go").touch()
    assert run_stages(workspace).ok


def ask_to_stop(process: "subprocess.Popen[str]", number: signal.Signals) -> str:
    """Ask as a person does: again when nothing has happened for a while; what the process said."""
    for _ in range(4):
        process.send_signal(number)
        try:
            return process.communicate(timeout=20)[0]
        except subprocess.TimeoutExpired:
            continue
    raise AssertionError("expected the runner to stop within 80 s")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_runner_that_is_asked_to_stop_puts_everything_in_order(
    tmp_path: Path, number: signal.Signals
) -> None:
    workspace = fresh(tmp_path, SLOW)
    first = start(workspace)
    wait_for(lambda: bool(working(workspace)))
    folder = working(workspace)[0]
    output = ask_to_stop(first, number)
    assert first.returncode == 130, output
    record = read_run(folder)
    assert record is not None and record.status == "interrupted"
    assert statuses(workspace) == ["KILLED"] and open_runs(workspace) == []
    assert Ledger(workspace.ledger_url).lease("runner") is None


# %% killed at any moment
EPOCHS = 12
TRAIN = f"""\
point = stage.work / "checkpoint.json"
epoch = json.loads(point.read_text())["epoch"] if point.exists() else 0
log = (stage.workspace.root / "epochs.log").open("a")
while epoch < {EPOCHS}:
    time.sleep(0.06)
    epoch += 1
    stage.recorder.metric("loss", 1.0 / epoch, step=epoch)
    log.write(f"{{epoch}}\\n")
    log.flush()
    partial = point.with_suffix(".partial")
    partial.write_text(json.dumps({{"epoch": epoch}}))
    partial.replace(point)
"""
LOOP = {
    "1_make": stage_cells("make"),
    "2_fit": stage_cells("fit", body=f"stage.upstream('make').read('out')\n{TRAIN}"),
    "3_ship": stage_cells("ship", body="stage.upstream('fit').read('out')"),
}


def assert_nothing_lost_or_doubled(workspace: Workspace, kills: int) -> None:
    """What has to be true after a loop was killed again and again and then finished."""
    cycle = current_cycle(workspace)
    assert cycle is not None and cycle.name == "cycle-0001"
    manifests = [path for path in workspace.runs.glob("*/*/manifest.json")]
    assert sorted(path.parent.name for path in manifests) == ["1_make-1", "2_fit-1", "3_ship-1"]
    assert run_folders(workspace) == [
        "cycle-0001/1_make-1",
        "cycle-0001/2_fit-1",
        "cycle-0001/3_ship-1",
    ]
    assert sorted(cycle.stages) == ["fit", "make", "ship"]
    epochs = [int(line) for line in (workspace.root / "epochs.log").read_text().split()]
    assert epochs == sorted(epochs) and set(epochs) == set(range(1, EPOCHS + 1))
    assert len(epochs) <= EPOCHS + kills
    runs = tracked_runs(workspace)
    assert "RUNNING" not in [run["status"] for run in runs]
    finished = [run["name"] for run in runs if run["status"] == "FINISHED"]
    assert sorted(finished) == ["cycle-0001/1_make-1", "cycle-0001/2_fit-1", "cycle-0001/3_ship-1"]
    by_id = {run["id"]: run for run in runs}
    for path in manifests:
        manifest = read_manifest(path.parent)
        assert manifest is not None and by_id[manifest.run_id]["status"] == "FINISHED"
    fitted = read_manifest(workspace.runs / cycle.stages["fit"])
    assert fitted is not None
    curve = by_id[fitted.run_id]
    assert curve["latest_metrics"]["loss"] == pytest.approx(1.0 / EPOCHS)
    assert open_runs(workspace) == []
    assert Ledger(workspace.ledger_url).verify().ok
    for folder in workspace.runs.glob("*/*"):
        assert not processes_of(folder)


@pytest.mark.parametrize("wanted", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_runner_killed_at_random_moments_goes_on_where_it_was(
    tmp_path: Path, wanted: int
) -> None:
    """So many kills, over as many loops as a machine of this speed needs for them."""
    choose = random.Random(20)
    struck = 0
    for number in range(30):
        workspace = fresh(tmp_path / str(number), LOOP)
        kills = 0
        while (ended := run_for(workspace, choose.uniform(0.15, 2.5 + kills / 5))) != 0:
            assert ended == -signal.SIGKILL
            kills += 1
        assert_nothing_lost_or_doubled(workspace, kills)
        struck += kills
        if struck >= wanted:
            return
    raise AssertionError(f"expected {wanted} kills in 30 loops, managed {struck}")


def test_a_folder_that_a_dead_process_left_without_a_record_is_used(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, LOOP)
    cycle = create_cycle(workspace)
    (workspace.runs / cycle.name / "1_make-1" / "outputs").mkdir(parents=True)
    assert run_for(workspace, 120) == 0
    assert_nothing_lost_or_doubled(workspace, kills=0)
    empty = fresh(tmp_path / "empty", LOOP)
    (empty.runs / "cycle-0001").mkdir(parents=True)
    assert run_for(empty, 120) == 0
    assert_nothing_lost_or_doubled(empty, kills=0)


def run_for(workspace: Workspace, seconds: float) -> int:
    """The exit status of `mwb run`, which is killed when it takes longer than this."""
    runner = start(workspace)
    try:
        runner.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        runner.kill()
        runner.communicate(timeout=60)
    return int(runner.returncode)


def kill_later(pid: int, seconds: float) -> None:
    """End a process after a while; never another one that got its number."""
    handle = os.pidfd_open(pid)

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)

    threading.Timer(seconds, end).start()


@pytest.mark.parametrize("most", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_kernel_killed_at_random_moments_goes_on_where_it_was(tmp_path: Path, most: int) -> None:
    workspace = fresh(tmp_path, LOOP)
    choose = random.Random(10)
    kills = 0

    def strike(event: Progress) -> None:
        if event.kind == "kernel" and kills < most:
            record = read_run(working(workspace)[-1])
            assert record is not None
            kill_later(int(record.kernel_process.partition(":")[0]), choose.uniform(0.0, 0.7))

    for _ in range(40):
        result = run_stages(workspace, progress=strike)
        if result.ok:
            break
        kills += 1
        assert result.stages[-1].status == "killed"
        assert result.resume == "mwb run"
    assert result.ok and kills >= 3
    assert_nothing_lost_or_doubled(workspace, kills)


def test_a_cold_kernel_does_not_outlive_its_runner(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, SLOW, pipeline__warm_kernels=False)
    runner = start(workspace)
    wait_for(lambda: bool(working(workspace)))
    folder = working(workspace)[0]
    wait_for(
        lambda: (
            "open_stage" in (folder / "notebook.ipynb").read_text() and bool(processes_of(folder))
        )
    )
    runner.kill()
    runner.communicate()
    (workspace.root / "go").touch()
    assert run_stages(workspace).ok
    assert not processes_of(folder)
    wait_for(lambda: "RUNNING" not in statuses(workspace))
    assert statuses(workspace).count("FINISHED") == 1


# %% a full disk
@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    done = subprocess.run(
        [mount or "false", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip() or 'no mount'}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_loses_nothing_and_promotes_nothing(small_disk: Path) -> None:
    body = "stage.upstream('make')\nif not (stage.workspace.root / 'go').exists():\n    (stage.work / 'fill').write_bytes(bytes(40_000_000))"
    workspace = fresh(
        small_disk, {"1_make": stage_cells("make"), "2_use": stage_cells("use", body=body)}
    )
    done = mwb(workspace, "run")
    assert done.returncode not in (0, 2)
    assert "Traceback" not in done.stderr
    assert read_manifest(workspace.runs / "cycle-0001" / "1_make-1") is not None
    made = workspace.runs / "cycle-0001" / "2_use-1"
    assert read_manifest(made) is None
    done = mwb(workspace, "run")
    assert done.returncode not in (0, 2)
    assert "Traceback" not in done.stderr
    for filled in workspace.runs.glob("*/*/work/fill"):
        filled.unlink()
    (workspace.root / "go").touch()
    again = run_stages(workspace)
    assert [stage.status for stage in again.stages] == ["reused", "finished"]
    assert "RUNNING" not in statuses(workspace)
    assert Ledger(workspace.ledger_url).verify().ok


# %% by hand
BY_HAND = """\
import papermill, sys
papermill.execute_notebook(sys.argv[1], sys.argv[2], progress_bar=False, cwd=sys.argv[3], kernel_name="python3")
"""


def test_a_stage_run_by_hand_leaves_the_same_records(tmp_path: Path) -> None:
    """JupyterLab starts a kernel in the folder of the notebook and sends it the cells; so does this."""
    workspace = fresh(tmp_path, TWO)
    run_stages(workspace, ["make"])
    stages = workspace.root / "nbs" / "stages"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        BY_HAND,
        str(stages / "2_use.ipynb"),
        str(tmp_path / "o.ipynb"),
        str(stages),
    ]
    subprocess.run(command, env=clean_environment(), check=True, capture_output=True, text=True)
    manifest = read_manifest(workspace.runs / "cycle-0001" / "2_use-1")
    assert manifest is not None and manifest.kernel == "by hand"
    assert manifest.upstream == {"make": "cycle-0001/1_make-1"}
    run = tracked_runs(workspace)[-1]
    assert (run["status"], run["name"], run["tags"]["by"]) == (
        "FINISHED",
        "cycle-0001/2_use-1",
        "hand",
    )
    assert (manifest.folder / "notebook.ipynb").exists()
    assert [stage.status for stage in run_stages(workspace).stages] == ["reused", "reused"]


def test_a_stage_left_open_by_hand_is_closed(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, {"1_make": stage_cells("make")})
    program = f"{OPEN}\nstage = open_stage('make', {{'value': 1}})\nprint(stage.run_id)"
    for extra in ("", "\nimport os; os.kill(os.getpid(), 9)"):
        subprocess.run(
            [sys.executable, "-c", program + extra],
            cwd=workspace.root,
            env=clean_environment(),
            check=False,
            timeout=120,
        )
    wait_for(lambda: statuses(workspace) == ["KILLED", "KILLED"])
    assert run_stages(workspace).ok
    assert statuses(workspace) == ["KILLED", "KILLED", "FINISHED"]


# %% the command line
def test_the_command_line_shows_stages_and_their_parameters(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, {"1_make": stage_cells("make", "value = 1  # how many")})
    listed = json.loads(mwb(workspace, "stage", "list", "--json").stdout)
    assert [(row["stage"], row["status"]) for row in listed] == [("make", "not run")]
    assert "how many" in mwb(workspace, "stage", "show", "1").stdout
    ran = json.loads(mwb(workspace, "run", "--json").stdout)
    assert (ran["ok"], ran["stages"][0]["status"]) == (True, "finished")
    assert json.loads(mwb(workspace, "stage", "list", "--json").stdout)[0]["status"] == "finished"
    again = mwb(workspace, "run")
    assert "nothing has changed" in again.stdout


def test_progress_is_shown_on_a_terminal_only(tmp_path: Path) -> None:
    import pty

    workspace = fresh(
        tmp_path, {"1_make": stage_cells("make", body="time.sleep(1)"), "2_use": stage_cells("use")}
    )
    quiet = mwb(workspace, "run")
    assert "\x1b" not in quiet.stdout and "cell" not in quiet.stdout
    controller, terminal = pty.openpty()
    runner = subprocess.Popen(
        [sys.executable, "-m", "mlops_workbench.cli.main", "run", "--force"], cwd=workspace.root, stdout=terminal, stderr=terminal,
        stdin=subprocess.DEVNULL, env={**clean_environment(), "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    try:
        while data := os.read(controller, 65536):
            shown += data
    except OSError:
        pass
    os.close(controller)
    assert runner.wait(60) == 0
    text = shown.decode()
    assert "1/2 make" in text and "cell 5/6" in text and "ok" in text, text


def test_stages_outside_the_workspace_are_not_run(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, {"1_make": stage_cells("make")})
    (tmp_path / "elsewhere.ipynb").write_text(notebook(stage_cells("far")))
    (workspace.root / "nbs" / "stages" / "2_far.ipynb").symlink_to(tmp_path / "elsewhere.ipynb")
    with pytest.raises(StageError, match="found a link"):
        run_stages(workspace)


def test_a_stage_that_says_refused_ends_the_cycle(tmp_path: Path) -> None:
    cells = stage_cells("judge")
    cells[-1] = cell("stage.finish(verdict='refused', summary='brier 0.30 above 0.25')")
    workspace = fresh(tmp_path, {"1_judge": cells, "2_ship": stage_cells("ship")})
    for _ in range(2):
        done = mwb(workspace, "run")
        assert done.returncode == 4
        assert "refused by stage judge: brier 0.30 above 0.25" in done.stderr
    assert run_folders(workspace) == ["cycle-0001/1_judge-1"]
    assert statuses(workspace) == ["FINISHED"]


def test_a_data_version_is_part_of_the_key_and_of_the_record(tmp_path: Path) -> None:
    from mlops_workbench.pipeline.notebooks import find_stages
    from mlops_workbench.pipeline.reuse import data_reference, reuse_key

    workspace = fresh(tmp_path, {"1_look": stage_cells("look", 'data_version = "tiny"')})
    stage = find_stages(workspace.root)[0]
    keys = [reuse_key(workspace, stage, {"data_version": "tiny"}, {}, "code")]
    for number, digest in enumerate(("a" * 64, "b" * 64)):
        record = workspace.root / "data" / "tiny.json"
        record.parent.mkdir(exist_ok=True)
        record.write_text(json.dumps({"digest": digest}))
        (workspace.root / "data" / "tiny.dvc").write_text("outs: []\n")
        for command in (
            ["add", "data"],
            ["commit", "-qm", "data"],
            ["tag", "-a", f"tiny@v1.{number}", "-m", "data"],
        ):
            identity = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
            subprocess.run(
                ["git", *identity, *command], cwd=workspace.root, check=True, capture_output=True
            )
        keys.append(reuse_key(workspace, stage, {"data_version": "tiny"}, {}, "code"))
    assert len(set(keys)) == 3
    assert data_reference(workspace, {"data_version": "tiny"}, {}) == "tiny@v1.1"
    assert data_reference(workspace, {"data_version": "tiny@v1.0"}, {}) == "tiny@v1.0"
    assert reuse_key(workspace, stage, {"data_version": "tiny@v1.1"}, {}, "code") != keys[-1]


def test_a_stage_that_trains_needs_a_data_version(tmp_path: Path) -> None:
    workspace = fresh(tmp_path, {"3_train": stage_cells("train")})
    done = mwb(workspace, "run")
    assert done.returncode == 1 and "expected a recorded data version" in done.stderr
    assert run_folders(workspace) == []
