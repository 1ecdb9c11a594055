"""Kernels that are forked from a pre-warmed parent: fresh where they must be, cold where they have to be, and never left behind."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from pipeline_support import clean_environment, make_workspace, mwb, share_kernels, stage_cells

from mlops_workbench.core.errors import StageError
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.pipeline.kernels import (
    LOST,
    ForkedProcess,
    ask,
    fork_module,
    jupyter_environment,
    parent_key,
    parents,
    socket_of,
    start_parent,
    stop_parents,
)
from mlops_workbench.pipeline.runner import run_stages

LIGHT = ("json", "random", "numpy")


@contextmanager
def parent(
    folder: Path, first: tuple[str, ...] = LIGHT, idle_seconds: float = 60.0, **environment: str
) -> Iterator[Path]:
    """A pre-warmed parent with a short list of imports."""
    given = clean_environment() | environment
    key = parent_key(None, first=first, later=())
    try:
        yield start_parent(
            folder, key, first=first, later=(), idle_seconds=idle_seconds, environment=given
        )
    finally:
        stop_parents(folder)


JOB = "import os, runpy; runpy.run_path(os.environ['JOB'], run_name='__main__')"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module that runs the file named in JOB."""
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "job_runner.py").write_text(JOB)
    return folder


def run_job(
    server: Path, jobs: Path, code: str, *, cwd: Path | None = None, **environment: str
) -> Any:
    """What a piece of code prints as JSON in a forked child."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "job.py"
        place.write_text(textwrap.dedent(code))
        output = Path(name) / "output"
        surrounding = (
            clean_environment() | {"PYTHONPATH": str(jobs), "JOB": str(place)} | environment
        )
        with output.open("wb") as stream, Path(os.devnull).open("rb") as nothing:
            streams = (nothing.fileno(), stream.fileno(), stream.fileno())
            process = fork_module(
                server, "job_runner", cwd=cwd or jobs, environment=surrounding, streams=streams
            )
            code_at_end = process.wait(60)
        said = output.read_text()
        assert code_at_end == 0, said
        return json.loads(said.splitlines()[-1])


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory, jobs: Path) -> Iterator[Path]:
    """A parent that has imported numpy."""
    with parent(tmp_path_factory.mktemp("kernels"), PYTHONPATH=str(jobs)) as server:
        yield server


# %% a child is a fresh process
def test_children_draw_different_random_numbers(light: Path, jobs: Path) -> None:
    code = "import json, random, numpy; print(json.dumps([random.random(), float(numpy.random.rand())]))"
    drawn = [run_job(light, jobs, code) for _ in range(4)]
    assert len({pair[0] for pair in drawn}) == len({pair[1] for pair in drawn}) == 4


def test_a_seed_that_a_child_sets_is_kept(light: Path, jobs: Path) -> None:
    code = "import json, random, numpy; random.seed(3); numpy.random.seed(3); print(json.dumps([random.random(), float(numpy.random.rand())]))"
    assert run_job(light, jobs, code) == run_job(light, jobs, code)


def test_a_child_has_its_own_folder_environment_umask_and_session(
    light: Path, jobs: Path, tmp_path: Path
) -> None:
    code = """
        import json, os, signal, sys, threading
        previous = os.umask(0)
        print(json.dumps({"cwd": os.getcwd(), "hello": os.environ.get("HELLO"), "home": os.environ.get("ONLY_PARENT"), "umask": previous,
            "leader": os.getsid(0) == os.getpid(), "threads": threading.active_count(), "argv": sys.argv[1:],
            "int": signal.getsignal(signal.SIGINT) is signal.default_int_handler, "chld": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
            "files": len(os.listdir("/proc/self/fd")), "stdin": sys.stdin.read()}))
    """
    previous = os.umask(0o027)
    try:
        found = run_job(light, jobs, code, cwd=tmp_path, HELLO="there")
    finally:
        os.umask(previous)
    assert found == {  # one thread and one file more than a new process: the watch over the caller
        "cwd": str(tmp_path), "hello": "there", "home": None, "umask": 0o027, "leader": True,
        "threads": 2, "argv": [], "int": True,
        "chld": True, "files": 5, "stdin": "",
    }  # fmt: skip


def test_a_child_keeps_its_own_time_zone(light: Path, jobs: Path) -> None:
    code = "import json, time; print(json.dumps(time.localtime(0).tm_hour))"
    assert (run_job(light, jobs, code, TZ="Asia/Tokyo"), run_job(light, jobs, code, TZ="UTC")) == (
        9,
        0,
    )


def test_nothing_of_ours_is_in_the_parent(light: Path, jobs: Path) -> None:
    code = "import json, sys; print(json.dumps([name for name in sys.modules if name.startswith('mlops_workbench')]))"
    assert run_job(light, jobs, code) == []


def test_the_end_of_a_child_is_told_truly(light: Path, jobs: Path, tmp_path: Path) -> None:
    for code, expected in (
        ("import sys; sys.exit(3)", 3),
        ("raise ValueError", 1),
        ("import os; os.kill(os.getpid(), 11)", -11),
        ("pass", 0),
    ):
        place = tmp_path / "job.py"
        place.write_text(code)
        environment = clean_environment() | {"PYTHONPATH": str(jobs), "JOB": str(place)}
        with Path(os.devnull).open("r+b") as nothing:
            process = fork_module(
                light,
                "job_runner",
                cwd=jobs,
                environment=environment,
                streams=(nothing.fileno(),) * 3,
            )
        assert process.wait(30) == expected
        assert process.poll() == expected


def test_hooks_run_before_a_child_leaves(light: Path, jobs: Path) -> None:
    code = "import atexit; atexit.register(lambda: print('\"hook\"'))"
    assert run_job(light, jobs, code) == "hook"


# %% who may ask, and who is refused
def test_the_socket_belongs_to_its_owner_alone(light: Path) -> None:
    assert stat.S_IMODE(light.stat().st_mode) == 0o600
    assert stat.S_IMODE(light.parent.stat().st_mode) == 0o700


def test_a_socket_that_others_may_open_is_not_used(tmp_path: Path) -> None:
    with parent(tmp_path, first=("json",)) as server:
        server.chmod(0o666)
        assert ask(server, "status") is None
        server.chmod(0o600)
        assert ask(server, "status") is not None


def test_nonsense_does_not_harm_the_parent(light: Path) -> None:
    for data in (
        b"",
        b"\x00",
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x02[]",
        b'\x00\x00\x00\x0b{"op": 1234',
        os.urandom(300),
    ):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(light))
            connection.sendall(data)
    status = ask(light, "status")
    assert status is not None and status["reason"] == ""


@pytest.mark.parametrize(
    "name",
    [
        "OMP_NUM_THREADS",
        "PYTHONHASHSEED",
        "LD_PRELOAD",
        "OPENBLAS_NUM_THREADS",
        "TORCH_LOGS",
        "LC_ALL",
    ],
)
def test_a_variable_read_at_import_that_differs_is_refused(
    light: Path, jobs: Path, name: str
) -> None:
    with pytest.raises(StageError, match=name):
        run_job(light, jobs, "pass", **{name: "7"})


def test_a_parent_that_runs_threads_is_not_forked(tmp_path: Path) -> None:
    (tmp_path / "pool.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True, name='a pool').start()"
    )
    with (
        pytest.raises(StageError, match="a pool"),
        parent(tmp_path / "k", first=("pool",), PYTHONPATH=str(tmp_path)),
    ):
        pass
    assert parents(tmp_path / "k") == []


def test_a_parent_whose_import_fails_to_start_says_so(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import os; os._exit(3)")
    with (
        pytest.raises(StageError, match="last words"),
        parent(tmp_path / "k", first=("broken",), PYTHONPATH=str(tmp_path)),
    ):
        pass


def test_cuda_is_untouched_in_the_parent(tmp_path: Path) -> None:
    from mlops_workbench.pipeline import kernel_parent

    class Cuda:
        """CUDA that an import has started."""

        cuda = type("cuda", (), {"is_initialized": staticmethod(lambda: True)})

    before = sys.modules.get("torch")
    sys.modules["torch"] = Cuda  # type: ignore[assignment]
    try:
        assert "CUDA" in kernel_parent.unfitness() or "thread" in kernel_parent.unfitness()
    finally:
        sys.modules.pop("torch")
        if before is not None:
            sys.modules["torch"] = before


# %% nothing is left behind
def test_a_parent_ends_when_nobody_needs_it(tmp_path: Path) -> None:
    with parent(tmp_path, first=("json",), idle_seconds=0.5) as server:
        status = ask(server, "status")
        assert status is not None
        ended = psutil.Process(status["pid"])
        ended.wait(20)
        assert not server.exists()


def test_a_parent_ends_when_its_folder_is_removed(tmp_path: Path) -> None:
    with parent(tmp_path / "k", first=("json",)) as server:
        status = ask(server, "status")
        assert status is not None
        ended = psutil.Process(status["pid"])
        server.unlink()
        ended.wait(20)


def test_another_key_replaces_the_parent(tmp_path: Path) -> None:
    with parent(tmp_path, first=("json",)) as old:
        status = ask(old, "status")
        assert status is not None
        with parent(tmp_path, first=("json", "random")) as new:
            psutil.Process(status["pid"]).wait(20) if psutil.pid_exists(status["pid"]) else None
            assert [found["key"] for found in parents(tmp_path)] == [new.stem]


def test_two_starters_get_one_parent(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from mlops_workbench.pipeline.kernels import *\n"
        "print(start_parent(Path(sys.argv[1]), 'key', first=('json',), later=()))"
    )
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    assert {starter.communicate(timeout=60)[0].strip() for starter in starters} == {
        str(socket_of(tmp_path, "key"))
    }
    status = ask(socket_of(tmp_path, "key"), "status")
    assert status is not None
    named = [
        process.pid
        for process in psutil.process_iter()
        if str(tmp_path) in " ".join(_command(process))
    ]
    assert named == [status["pid"]]
    stop_parents(tmp_path)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


SLEEP = "import time; time.sleep(600)"


def sleeper(server: Path, jobs: Path, folder: Path, *, outlive: bool = False) -> ForkedProcess:
    """A child that does nothing for ten minutes."""
    (folder / "sleep.py").write_text(SLEEP)
    environment = clean_environment() | {"PYTHONPATH": str(jobs), "JOB": str(folder / "sleep.py")}
    return fork_module(server, "job_runner", cwd=jobs, environment=environment, outlive=outlive)


def test_a_child_ends_with_its_caller(light: Path, jobs: Path, tmp_path: Path) -> None:
    for outlive in (False, True):
        process = sleeper(light, jobs, tmp_path, outlive=outlive)
        assert process._connection is not None
        process._connection.close()  # what the death of this process would do
        process._connection = None
        if outlive:
            time.sleep(1.5)
            assert process.poll() is None
            process.kill()
        assert process.wait(10) == LOST


def test_a_child_is_watched_when_its_parent_is_killed(tmp_path: Path, jobs: Path) -> None:
    with parent(tmp_path / "k", PYTHONPATH=str(jobs)) as server:
        process = sleeper(server, jobs, tmp_path)
        status = ask(server, "status")
        assert status is not None and status["running"] == [process.pid]
        os.kill(status["pid"], signal.SIGKILL)
        time.sleep(0.3)
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.terminate()
        assert process.wait(10) == LOST
        again = start_parent(
            tmp_path / "k", server.stem, first=LIGHT, later=(), environment=clean_environment()
        )
        assert ask(again, "status") is not None


CALLER = """
import sys
from pathlib import Path
from mlops_workbench.pipeline.kernels import ask
import signal
sys.path.insert(0, "tests")
from test_pipeline_kernels import sleeper
server = Path(sys.argv[1])
process = sleeper(server, Path(sys.argv[2]), Path(sys.argv[3]))
print(process.pid, ask(server, "status")["pid"], flush=True)
signal.pause()
"""


def test_a_child_ends_when_parent_and_caller_are_killed_together(
    tmp_path: Path, jobs: Path
) -> None:
    with parent(tmp_path / "k", PYTHONPATH=str(jobs)) as server:
        command = [sys.executable, "-c", CALLER, str(server), str(jobs), str(tmp_path)]
        root = Path(__file__).resolve().parent.parent
        caller = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
        assert caller.stdout is not None
        child, watcher = map(int, caller.stdout.readline().split())
        assert psutil.pid_exists(child)
        os.kill(watcher, signal.SIGKILL)
        caller.kill()
        caller.wait(10)
        for _ in range(100):
            if not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie":
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"expected process {child} to end with its caller")


def test_stop_waits_for_the_last_child(tmp_path: Path, jobs: Path) -> None:
    with parent(tmp_path / "k", PYTHONPATH=str(jobs)) as server:
        process = sleeper(server, jobs, tmp_path)
        assert stop_parents(tmp_path / "k") == 1
        with pytest.raises(StageError, match="ending"):
            sleeper(server, jobs, tmp_path)
        assert process.poll() is None
        process.kill()
        assert process.wait(10) == -signal.SIGKILL


# %% the whole thing: torch, Jupyter, the runner
@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with one stage that computes with torch."""
    body = """
        import torch, numpy, pandas, mlflow, random
        torch.set_num_threads(2)
        product = torch.randn(300, 300) @ torch.randn(300, 300)
        layer = torch.nn.Linear(300, 10)
        layer(product).sum().backward()
        numpy.linalg.svd(numpy.random.rand(200, 200))
        stage.output('drawn.json').write_text(json.dumps([float(torch.rand(1)), float(numpy.random.rand()), random.random()]))
        stage.recorder.tag('origin', os.environ['MWB_KERNEL_ORIGIN'])
    """
    cells = stage_cells("compute", body=textwrap.dedent(body))
    return share_kernels(
        make_workspace(tmp_path_factory.mktemp("torch") / "workspace", {"1_compute": cells})
    )


def test_torch_computes_in_a_fork_and_draws_anew(workspace: Workspace) -> None:
    drawn = []
    for _ in range(3):
        result = run_stages(workspace, force=True)
        assert result.ok and result.stages[0].kernel == "warm"
        drawn.append(json.loads((result.stages[0].folder / "outputs" / "drawn.json").read_text()))
    for position in range(3):
        assert len({numbers[position] for numbers in drawn}) == 3


def test_a_differing_variable_gives_a_cold_kernel_that_is_seen(workspace: Workspace) -> None:
    done = mwb(workspace, "run", "--force", "--json", OMP_NUM_THREADS="1")
    stage = json.loads(done.stdout)["stages"][0]
    assert stage["status"] == "finished"
    assert stage["kernel"].startswith("cold:") and "OMP_NUM_THREADS" in stage["kernel"]
    shown = mwb(workspace, "run", "--force", OMP_NUM_THREADS="1")
    assert "(kernel cold: " in shown.stdout


def test_the_command_line_shows_and_stops_the_parent(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "workspace", {"1_make": stage_cells("make")})
    assert "no pre-warmed parent" in mwb(workspace, "kernels", "status").stdout
    assert mwb(workspace, "run").returncode == 0
    rows = json.loads(mwb(workspace, "kernels", "status", "--json").stdout)
    assert [row["state"] for row in rows] == ["ready"]
    assert rows[0]["started_so_far"] == 2  # the stage's kernel and the tracker's helper
    assert "1 told to end" in mwb(workspace, "kernels", "stop").stdout
    deadline = time.monotonic() + 20
    while parents(workspace.kernels) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "no pre-warmed parent" in mwb(workspace, "kernels", "status").stdout


def wait_until_all_is_imported(workspace: Workspace) -> None:
    """Return when the parent has everything on its list."""
    deadline = time.monotonic() + 60
    while any(status["still_to_import"] for status in parents(workspace.kernels)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


JUPYTER = """\
import asyncio, json, os, sys
from jupyter_client import AsyncKernelManager

async def ask(client, code):
    reply = await client.execute_interactive(code, store_history=False, timeout=60, output_hook=collect)
    return reply["content"]["status"]

said = []
def collect(message):
    if message["msg_type"] == "stream":
        said.append(message["content"]["text"].strip())
    if message["msg_type"] in ("display_data", "execute_result"):
        said.append(sorted(message["content"]["data"]))

async def main():
    manager = AsyncKernelManager(kernel_name="python3")
    await manager.start_kernel(cwd=sys.argv[1])
    client = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=60)
    await ask(client, "import os; print(os.environ['MWB_KERNEL_ORIGIN'], os.getcwd())")
    await ask(client, "import matplotlib.pyplot as plt; plt.plot([1, 2]); None")
    running = asyncio.create_task(ask(client, "import time; time.sleep(60)"))
    await asyncio.sleep(0.5)
    await manager.interrupt_kernel()
    said.append(await asyncio.wait_for(running, 20))
    await manager.restart_kernel()
    await client.wait_for_ready(timeout=60)
    await ask(client, "import os; print(os.environ['MWB_KERNEL_ORIGIN'])")
    client.stop_channels()
    pid = manager.provisioner.pid
    await manager.shutdown_kernel()
    said.append(manager.provisioner is None or not manager.provisioner.has_process)
    print(json.dumps(said))

asyncio.run(main())
"""


def test_jupyter_gets_warm_kernels_that_plot_interrupt_and_restart(workspace: Workspace) -> None:
    """The way JupyterLab and Voila start a kernel: by the name in the notebook, in the folder of the notebook."""
    run_stages(workspace)
    wait_until_all_is_imported(workspace)
    folder = workspace.root / "nbs" / "stages"
    environment = jupyter_environment(workspace.kernels, clean_environment())
    done = subprocess.run(
        [sys.executable, "-c", JUPYTER, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert len(said) == 5, said
    origin, figure, interrupted, again, ended = said
    assert origin == f"warm {folder}"
    assert "image/png" in figure
    assert (interrupted, again, ended) == ("error", "warm", True)


def test_a_kernel_leaves_in_a_fraction_of_a_second(workspace: Workspace) -> None:
    program = """
import sys, time
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="python3", cwd=sys.argv[1])
client.execute_interactive("import torch, mlflow, pandas", timeout=60)
client.stop_channels()
begun = time.monotonic()
manager.shutdown_kernel()
print(time.monotonic() - begun)
"""
    environment = jupyter_environment(workspace.kernels, clean_environment())
    seconds = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", program, str(workspace.root)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        seconds.append(float(done.stdout))
    assert min(seconds) < 1.0
