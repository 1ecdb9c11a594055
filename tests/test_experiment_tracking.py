"""Recording and shipping against a real MLflow store: races, kills, odd values, PostgreSQL."""

import json
import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
from core_support import NO_POSTGRESQL, postgresql_server
from experiment_support import make_workspace, query, run_forking
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.core.errors import TrackingError, UsageError, WorkbenchError
from mlops_workbench.core.journal import read_journal
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.experiment.hardware import HardwareSampler, open_gpus
from mlops_workbench.experiment.owner import OWNER_FILE
from mlops_workbench.experiment.recorder import JOURNAL_NAME, Recorder, check_name
from mlops_workbench.experiment.runs import compare_runs, list_runs, metric_history, show_run
from mlops_workbench.experiment.shipping import SHIPPED_FILE, Shipper
from mlops_workbench.experiment.store import ensure_store, mlflow_client, template_path
from mlops_workbench.experiment.tracking import (
    set_alias,
    ship_journal,
    ship_left_behind,
    start_run,
)

ODD_TEXTS = [
    "<img src=x onerror=alert(1)>",
    "two\nlines",
    "=cmd|'/c calc'!A1",
    "\x1b[31mred",
    "ü 🛫",
    "",
]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The template of the store in a cache of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return make_workspace(tmp_path / "workspace")


@pytest.fixture
def run(workspace: Workspace) -> tuple[str, Path]:
    """A started run and its folder."""
    folder = workspace.runs / "c1" / "3_train-1"
    run_id = start_run(
        workspace, stage="3_train", cycle="c1", tags={"data_version": "flights@v1.0"}, folder=folder
    )
    return run_id, folder


@pytest.mark.parametrize("template", [False, True])
def test_eight_processes_open_a_fresh_store_at_once(
    workspace: Workspace, tmp_path: Path, template: bool
) -> None:
    """Without the lock all eight crash on the creation of the tables."""
    cache = template_path().parent.parent if template else tmp_path / "empty cache"
    if template:
        ensure_store(make_workspace(tmp_path / "earlier"))
    run_forking(
        """
at = time.time() + 1
def work():
    time.sleep(max(0, at - time.time()))
    run_id = start_run(workspace, stage="monitor", cycle="race")
    finish_run(workspace, run_id, "FINISHED")
pids = [forked(work) for _ in range(8)]
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 8
""",
        workspace.root,
        environment={"XDG_CACHE_HOME": str(cache)},
    )
    assert [row.status for row in list_runs(workspace)] == ["FINISHED"] * 8
    assert query(workspace, "PRAGMA journal_mode") == [("wal",)]
    assert {row[0] for row in query(workspace, "SELECT name FROM experiments")} == {
        "Default",
        "tests",
    }


def test_a_store_made_by_mlflow_itself_is_taken_over(tmp_path: Path) -> None:
    """It has no write-ahead log and keeps its runs."""
    from mlflow.tracking import MlflowClient

    workspace = make_workspace(tmp_path / "workspace")
    workspace.state.mkdir()
    client = MlflowClient(workspace.tracking_uri)
    client.create_run("0", run_name="from before")
    assert query(workspace, "PRAGMA journal_mode") == [("delete",)]
    ensure_store(workspace)
    assert query(workspace, "PRAGMA journal_mode") == [("wal",)]
    assert [row.name for row in list_runs(workspace)] == ["from before"]


def test_a_store_of_an_older_mlflow_is_upgraded_and_kept_beside(workspace: Workspace) -> None:
    from alembic import command
    from mlflow.store.db import utils
    from mlflow.store.tracking.dbmodels.initial_models import Base

    workspace.state.mkdir()
    engine = utils.create_sqlalchemy_engine(workspace.tracking_uri)
    Base.metadata.create_all(engine)
    config = utils._get_alembic_config(workspace.tracking_uri)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "2b4d017a5e9b")  # the model registry of MLflow 1.4
    engine.dispose()
    start_run(workspace, stage="monitor", cycle="c1")
    assert len(list_runs(workspace)) == 1
    copies = list(workspace.state.glob("mlflow.db.before-*"))
    assert len(copies) == 1
    with closing(sqlite3.connect(copies[0])) as copy:
        assert copy.execute("SELECT version_num FROM alembic_version").fetchall() == [
            ("2b4d017a5e9b",)
        ]


def test_ensure_store_repeats_what_a_killed_process_left_undone(workspace: Workspace) -> None:
    ensure_store(workspace)
    (workspace.state / "mlflow-store.json").unlink()  # as if killed before it was written
    ensure_store(workspace)
    start_run(workspace, stage="monitor", cycle="c1")


@pytest.mark.parametrize("data_version", ["", "flights", "flights@latest"])
@pytest.mark.parametrize("stage", ["train", "3_train", "2_explore"])
def test_training_without_a_recorded_data_version_is_an_error(
    workspace: Workspace, stage: str, data_version: str
) -> None:
    with pytest.raises(TrackingError, match="data version"):
        start_run(workspace, stage=stage, cycle="c1", parameters={"data_version": data_version})
    assert not (workspace.state / "mlflow.db").exists()


def test_a_run_knows_where_it_comes_from(workspace: Workspace, run: tuple[str, Path]) -> None:
    tags = show_run(workspace, run[0]).row.tags
    for name in ("code_commit", "lock_digest", "library", "recipe_digest", "python", "host"):
        assert tags[name] not in ("", "none", "unknown"), name
    assert (tags["dirty_hash"], tags["data_version"]) == ("", "flights@v1.0")
    assert tags["mlflow.source.git.commit"] == tags["code_commit"]


@pytest.mark.parametrize("wanted", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_every_metric_exactly_once_though_writer_and_shipper_are_killed(
    workspace: Workspace, run: tuple[str, Path], wanted: int
) -> None:
    """Kills at random moments; pages so small that many fall before the writing down."""
    run_id, folder = run
    done = run_forking(
        """
run_id, folder = sys.argv[2], Path(sys.argv[3])
shipping.PAGE_BYTES = 3000
chance = random.Random(7)
def write():
    recorder = Recorder(folder)
    recorder.parameters({"learning_rate": 0.001})
    step = last_steps(folder).get("loss", -1)
    while True:
        step += 1
        recorder.metrics({"loss": 1 / (step + 1), "constant": 0.5}, step)
        time.sleep(0.0005)
def ship():
    write_down = shipping.write_json
    moment = random.Random(os.getpid())
    def dies_before_writing_down(path, value):
        if moment.random() < 0.2:
            os.kill(os.getpid(), signal.SIGKILL)
        write_down(path, value)
    shipping.write_json = dies_before_writing_down
    while True:
        ship_journal(workspace, run_id, folder)
def sent_but_not_written_down():
    offset = shipping.read_progress(folder, run_id).offset
    noted = shipping.read_journal(folder / "journal.log").records
    left = shipping.read_journal(folder / "journal.log", offset).records
    database = sqlite3.connect(workspace.state / "mlflow.db")
    sql = "SELECT COUNT(*) FROM metrics WHERE run_uuid = ? AND key = 'loss'"
    (arrived,) = database.execute(sql, (run_id,)).fetchone()
    database.close()
    return arrived > sum(r["kind"] == "metrics" for r in noted[:len(noted) - len(left)])
kills = between = 0
writer = forked(write)
while kills < int(sys.argv[4]):
    shipper = forked_and_ready(ship)
    kills += killed_after(shipper, chance.uniform(0, 1))
    between += sent_but_not_written_down()
    if kills % 3 == 0:
        kills += killed_after(writer, 0)
        writer = forked(write)
killed_after(writer, 0)
pid = forked(lambda: ship_journal(workspace, run_id, folder))
assert os.waitpid(pid, 0)[1] == 0
print(kills, between)
""",
        workspace.root,
        run_id,
        folder,
        wanted,
    )
    kills, between = map(int, done.stdout.split())
    assert kills >= wanted and between >= wanted / 13, (
        "too few kills fell where a page is sent twice"
    )
    page = read_journal(folder / JOURNAL_NAME)
    steps = sorted(int(r["step"]) for r in page.records if r["kind"] == "metrics")
    assert steps == list(range(len(steps))) and len(steps) > 100 and not page.damaged
    for name in ("loss", "constant"):
        sql = "SELECT step FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY step"
        assert [step for (step,) in query(workspace, sql, run_id, name)] == steps
    assert show_run(workspace, run_id).row.parameters == {"learning_rate": "0.001"}
    assert "shipping_problems" not in show_run(workspace, run_id).row.tags


@pytest.mark.parametrize("kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_no_run_stays_open_whenever_its_process_is_killed(workspace: Workspace, kills: int) -> None:
    """Whole small lives, from start to finish, killed at random moments."""
    ensure_store(workspace)
    run_forking(
        """
chance = random.Random(11)
def live(number):
    folder = workspace.runs / f"c{number}" / "6_monitor-1"
    run_id = start_run(workspace, stage="monitor", cycle=f"c{number}", folder=folder)
    with Recorder(folder) as recorder:
        for step in range(50):
            recorder.metric("loss", 0.5, step)
    ship_journal(workspace, run_id, folder)
    finish_run(workspace, run_id, "FINISHED")
kills = number = 0
while kills < int(sys.argv[2]):
    number += 1
    kills += killed_after(forked_and_ready(lambda: live(number)), chance.uniform(0, 0.3))
""",
        workspace.root,
        str(kills),
    )
    before = {row.run_id: row.status for row in list_runs(workspace, 1000)}
    left = [run_id for run_id, status in before.items() if status == "RUNNING"]
    assert left, "no kill fell into a run; the test proves nothing"
    assert ship_left_behind(workspace) == len(left)
    for row in list_runs(workspace, 1000):
        assert row.status == ("KILLED" if row.run_id in left else "FINISHED")
        folder = workspace.runs / row.cycle / "6_monitor-1"
        recorded = [
            r for r in read_journal(folder / JOURNAL_NAME).records if r["kind"] == "metrics"
        ]
        curves = metric_history(workspace, [row.run_id], ["loss"])
        shipped = curves[row.run_id, "loss"].steps if curves else ()
        assert list(shipped) == [r["step"] for r in recorded]
    assert ship_left_behind(workspace) == 0


def test_runs_of_others_are_left_alone(workspace: Workspace, run: tuple[str, Path]) -> None:
    """Of living owners, of people who log by themselves, of machines that were heard of lately."""
    run_id, folder = run
    foreign = mlflow_client(workspace).create_run("0", run_name="by hand").info.run_id
    assert ship_left_behind(workspace) == 0
    owner = {"run_id": run_id, "host": "another-machine", "pid": 1, "identity": "x"}
    (folder / OWNER_FILE).write_text(json.dumps(owner))
    mlflow_client(workspace).set_tag(run_id, "owner", "another-machine:1:x")
    assert ship_left_behind(workspace) == 0
    long_ago = time.time() - 3600
    os.utime(folder / OWNER_FILE, (long_ago, long_ago))
    assert ship_left_behind(workspace) == 1
    assert {row.run_id: row.status for row in list_runs(workspace)} == {
        run_id: "KILLED",
        foreign: "RUNNING",
    }


def test_a_moved_workspace_closes_its_runs_with_their_journal(tmp_path: Path) -> None:
    old = make_workspace(tmp_path / "old")
    script = """
folder = workspace.runs / "c1" / "6_monitor-1"
run_id = start_run(workspace, stage="monitor", cycle="c1", folder=folder)
Recorder(folder).metric("loss", 0.5)
"""
    run_forking(script, old.root)
    old.root.rename(tmp_path / "new")
    moved = Workspace.open(tmp_path / "new")
    assert ship_left_behind(moved) == 1
    assert list_runs(moved)[0].metrics == {"loss": 0.5}


def test_values_that_are_not_finite_are_seen_as_such(
    workspace: Workspace, run: tuple[str, Path]
) -> None:
    """MLflow alone stores infinity as 1.797e308."""
    run_id, folder = run
    with Recorder(folder) as recorder:
        for step, value in enumerate([0.5, float("inf"), float("-inf"), float("nan")]):
            recorder.metric("loss", value, step)
        recorder.metric("accuracy", 0.9)
    ship_journal(workspace, run_id, folder)
    (folder / SHIPPED_FILE).unlink()
    ship_journal(workspace, run_id, folder)
    row = show_run(workspace, run_id).row
    assert str(row.metrics["loss"]) == "nan" and row.metrics["accuracy"] == 0.9
    assert json.loads(row.tags["not_finite"]) == {
        "loss": {"count": 3, "first_step": 1, "value": "inf"}
    }
    curve = metric_history(workspace, [run_id], ["loss"])[run_id, "loss"]
    assert [str(value) for value in curve.values] == ["0.5", "nan", "nan", "nan"]
    summary = next(m for m in show_run(workspace, run_id).metrics if m.name == "loss")
    assert (summary.best, summary.lowest, summary.highest, summary.count) == (0.5, 0.5, 0.5, 4)


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_are_kept_as_they_are(workspace: Workspace, text: str) -> None:
    folder = workspace.runs / "odd"
    run_id = start_run(
        workspace,
        stage="monitor",
        cycle="c1",
        name=text or None,
        parameters={"note": text},
        folder=folder,
    )
    with Recorder(folder) as recorder:
        recorder.tag("remark", text)
        recorder.parameters({"later": text})
        for bad in [text, f"metric {text}\n"]:
            with pytest.raises(UsageError):
                recorder.metric(bad + "<", 1.0)
    ship_journal(workspace, run_id, folder)
    row = show_run(workspace, run_id).row
    assert row.parameters == {"note": text, "later": text} and row.tags["remark"] == text
    assert not text or row.name == text


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=260) | st.from_regex(r"[a-z./: \-]{0,12}", fullmatch=True))
def test_a_name_that_we_take_is_taken_by_mlflow(name: str) -> None:
    from mlflow.utils.validation import (
        _validate_metric_name,
        _validate_param_name,
        _validate_tag_name,
    )

    try:
        check_name(name)
    except UsageError:
        return
    for validate in (_validate_metric_name, _validate_param_name, _validate_tag_name):
        validate(name)


def test_large_pages_and_long_values_fit_mlflows_limits(
    workspace: Workspace, run: tuple[str, Path]
) -> None:
    run_id, folder = run
    with Recorder(folder) as recorder:
        recorder.parameters(
            {f"p{number}": number for number in range(250)} | {"long": "x" * 10_000}
        )
        recorder.metrics({f"m{number}": number for number in range(2500)})
        for number in range(250):
            recorder.tag(f"t{number}", "y" * 9000)
    ship_journal(workspace, run_id, folder)
    row = show_run(workspace, run_id).row
    assert len(row.parameters) == 251 and len(row.metrics) == 2500
    assert (
        row.parameters["long"].endswith("(10000 characters)")
        and len(row.parameters["long"]) == 6000
    )
    assert (
        sum(name.startswith("t") and len(value) == 8000 for name, value in row.tags.items()) == 250
    )


def test_two_shippers_of_one_journal(workspace: Workspace, run: tuple[str, Path]) -> None:
    run_id, folder = run
    with Recorder(folder) as recorder:
        for step in range(3000):
            recorder.metric("loss", 0.5, step)
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda: counts.append(ship_journal(workspace, run_id, folder)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(counts) == [0, 3000]
    assert query(workspace, "SELECT COUNT(*) FROM metrics") == [(3000,)]


def test_files_of_a_run_arrive_and_others_do_not(
    workspace: Workspace, run: tuple[str, Path]
) -> None:
    run_id, folder = run
    outputs = folder / "outputs"
    (outputs / "parts").mkdir(parents=True)
    (outputs / "model.onnx").write_bytes(b"onnx")
    (outputs / "parts" / "one.txt").write_text("1")
    (outputs / "gone.txt").write_text("soon")
    (outputs / "link.txt").symlink_to("/etc/hostname")
    with Recorder(folder) as recorder:
        recorder.artifact(outputs / "model.onnx", "model/flights.onnx")
        recorder.artifact(outputs / "parts")
        recorder.artifact(outputs / "gone.txt")
        recorder.artifact(outputs / "link.txt")
    (outputs / "gone.txt").unlink()
    ship_journal(workspace, run_id, folder)
    kept = workspace.artifacts / run_id / "artifacts"
    found = {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()}
    assert found == {"model/flights.onnx", "parts/one.txt"}
    assert (kept / "model" / "flights.onnx").read_bytes() == b"onnx"
    problems = show_run(workspace, run_id).row.tags["shipping_problems"]
    assert "gone.txt' is missing" in problems and "link.txt' lies outside" in problems


def test_a_damaged_journal_ships_the_rest_and_says_so(
    workspace: Workspace, run: tuple[str, Path]
) -> None:
    run_id, folder = run
    with Recorder(folder) as recorder:
        for step in range(3):
            recorder.metric("loss", 0.5, step)
    journal = folder / JOURNAL_NAME
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + lines[1].replace(b"0.5", b"0.6") + lines[2] + b"half a li")
    ship_journal(workspace, run_id, folder)
    assert [step for (step,) in query(workspace, "SELECT step FROM metrics ORDER BY step")] == [
        0,
        2,
    ]
    assert "damaged record at byte" in show_run(workspace, run_id).row.tags["shipping_problems"]


def test_the_shipper_survives_a_database_that_is_locked_or_refuses(
    workspace: Workspace, run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records wait in the journal, and arrive when the database is back."""
    run_id, folder = run
    client = mlflow_client(workspace)
    from mlflow.exceptions import MlflowException

    failures = iter([True, True])
    original = client.log_batch

    def refuses_twice(*arguments: object, **named: object) -> object:
        if next(failures, False):
            raise MlflowException("database is locked")
        return original(*arguments, **named)

    monkeypatch.setattr(client, "log_batch", refuses_twice)
    with Recorder(folder) as recorder, Shipper(workspace, run_id, folder) as shipper:
        recorder.metric("loss", 0.5)
        deadline = time.monotonic() + 30
        while not query(workspace, "SELECT 1 FROM metrics") and time.monotonic() < deadline:
            time.sleep(0.05)
    assert query(workspace, "SELECT COUNT(*) FROM metrics") == [(1,)]
    assert shipper.error is None and next(failures, None) is None


def test_a_shipper_that_cannot_ship_says_so_at_the_end(
    workspace: Workspace, run: tuple[str, Path]
) -> None:
    run_id, folder = run
    shipper = Shipper(workspace, run_id, folder).start()
    Recorder(folder).metric("loss", 0.5)
    mlflow_client(workspace).delete_run(run_id)
    with pytest.raises(TrackingError, match="expected to ship"):
        shipper.stop()


def test_hardware_is_recorded_and_a_gpu_never_as_zero(
    workspace: Workspace, run: tuple[str, Path]
) -> None:
    run_id, folder = run
    with Recorder(folder) as recorder, HardwareSampler(os.getpid(), recorder, 0.05):
        time.sleep(0.3)
    ship_journal(workspace, run_id, folder)
    row = show_run(workspace, run_id).row
    assert row.metrics["system/wall_seconds"] >= 0.3 and row.metrics["system/memory_peak_mb"] > 10
    assert row.metrics["system/cpu_seconds"] > 0
    measured = any(name.startswith("system/gpu") for name in row.metrics)
    assert measured != row.tags["gpu"].startswith("not measured")


class BindingWithTwoGpus:
    """Answers as NVML's binding does on a machine with two GPUs, of which one tells no load."""

    class NVMLError(Exception):
        """As the binding raises it."""

    def __init__(self, driver: bool = True) -> None:
        self.driver = driver

    def nvmlInit(self) -> None:
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, device: int) -> bytes:
        return b"Some GPU"

    def nvmlDeviceGetUtilizationRates(self, device: int) -> SimpleNamespace:
        if device == 1:
            raise self.NVMLError("Not Supported")
        return SimpleNamespace(gpu=37)

    def nvmlDeviceGetMemoryInfo(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(used=2_000_000_000 * (device + 1))


def test_gpus_are_read_through_the_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have no GPU, so its binding is stood in for; what is not told is out."""
    monkeypatch.setitem(sys.modules, "pynvml", BindingWithTwoGpus())
    read, names = open_gpus()
    assert read is not None and names == "Some GPU, Some GPU"
    assert read() == {
        "system/gpu_0_percent": 37.0,
        "system/gpu_0_memory_mb": 2000.0,
        "system/gpu_1_memory_mb": 4000.0,
    }
    monkeypatch.setitem(sys.modules, "pynvml", BindingWithTwoGpus(driver=False))
    assert open_gpus() == (None, "not measured: Driver Not Loaded")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_gpus()[1].startswith("not measured: the NVML binding is not installed")


def test_importing_the_recorder_and_the_reader_stays_light() -> None:
    """A training process must not pay for MLflow, nor `mwb runs` for SQLAlchemy."""
    code = (
        "import sys; import mlops_workbench.experiment.recorder, mlops_workbench.experiment.runs, "
        "mlops_workbench.experiment.tracking, mlops_workbench.cli.runs; "
        "heavy = ('mlflow', 'torch', 'pandas', 'numpy', 'sqlalchemy'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_tracking_tells_nobody_on_the_network(workspace: Workspace) -> None:
    code = (
        "import os, sys; from pathlib import Path; "
        "from mlops_workbench.core.workspace import Workspace; "
        "from mlops_workbench.experiment.tracking import start_run; "
        "start_run(Workspace.open(Path(sys.argv[1])), stage='monitor', cycle='c'); "
        "from mlflow.telemetry.utils import is_telemetry_disabled; print(is_telemetry_disabled())"
    )
    environment = {
        k: v
        for k, v in os.environ.items()
        if "TELEMETRY" not in k and "TRACK" not in k and k != "CI"
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(workspace.root)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.strip() == "True"


@pytest.mark.skipif(bool(NO_POSTGRESQL), reason=NO_POSTGRESQL)
def test_the_same_on_postgresql(tmp_path: Path) -> None:
    import sqlalchemy

    with postgresql_server() as server:
        engine = sqlalchemy.create_engine(
            server.format(database="postgres"), isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.execute(sqlalchemy.text("CREATE DATABASE tracking"))
        engine.dispose()
        url = server.format(database="tracking")
        workspace = make_workspace(tmp_path / "workspace", experiment__tracking_uri=url)
        run_forking(
            """
def live(rate):
    folder = workspace.runs / f"rate {rate}"
    run_id = start_run(workspace, stage="train", cycle=f"c{rate}", folder=folder,
                       parameters={"learning_rate": rate, "data_version": "flights@v1.0"})
    with Recorder(folder) as recorder:
        recorder.metrics({"accuracy": 1 - rate, "loss": float("inf")}, 1)
    ship_journal(workspace, run_id, folder)
    (folder / "shipped.json").unlink()
    ship_journal(workspace, run_id, folder)
    finish_run(workspace, run_id, "FINISHED")
pids = [forked(lambda: live(rate)) for rate in (0.1, 0.01, 0.001)]
pids.append(forked(lambda: start_run(workspace, stage="monitor", cycle="dead")))
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
""",
            workspace.root,
        )
        rows = list_runs(
            workspace, filter="learning_rate<0.05 accuracy>0.95 stage=train", best=["accuracy"]
        )
        assert {row.best["accuracy"] for row in rows} == {0.99, 0.999}
        text = str(compare_runs(workspace, "c0.1/train", "c0.001/train"))
        assert text == "learning_rate 0.1 -> 0.001, accuracy 0.9 -> 0.999"
        history = metric_history(workspace, [rows[0].run_id])
        assert {name: len(curve.steps) for (_, name), curve in history.items()} == {
            "accuracy": 1,
            "loss": 1,
        }
        assert ship_left_behind(workspace) == 1
        with pytest.raises(WorkbenchError):
            set_alias(workspace, "flights", "champion", "1")
