"""The pages without a browser: what they hold, what their kernels load, how they are fed and ended."""

import asyncio
import gc
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest
from pages_support import (
    HOSTILE,
    Factory,
    free_port,
    make_factory,
    pages_running,
    record_run,
    spoil,
    wait_until,
)

from mlops_workbench.cli.main import main
from mlops_workbench.cli.pages import noted_address
from mlops_workbench.cli.status import services
from mlops_workbench.core.workspace import Workspace, create_workspace
from mlops_workbench.pages import reader
from mlops_workbench.pages.experiments import ExperimentsPage
from mlops_workbench.pages.live import keep_reading
from mlops_workbench.pages.monitoring import MonitoringPage
from mlops_workbench.pages.read_models import model_mark, open_model, read_state, read_table
from mlops_workbench.pages.voila_server import apps_folder


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The template of the tracking store in a cache of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """A workspace with runs, two releases and traffic in which all is well."""
    return make_factory(tmp_path_factory.mktemp("pages"))


PAGE_MODULES = """
import sys
from mlops_workbench.pages.data import data_page
from mlops_workbench.pages.experiments import experiments_page
from mlops_workbench.pages.monitoring import monitoring_page
pages = experiments_page(), monitoring_page()
assert "runs of" in pages[0].head.value, pages[0].head.value
assert "OK" in pages[1].parts["tiles"].value
data = data_page()
assert "No data version yet" in data.head.value, data.head.value
heavy = {"mlflow", "evidently", "torch", "sqlalchemy", "duckdb", "sklearn", "pydantic"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""


def test_the_kernel_of_a_page_loads_no_heavy_package_and_no_settings(factory: Factory) -> None:
    environment = {**os.environ, "WORKBENCH_READ_MODELS": str(factory.workspace.read_models)}
    done = subprocess.run(
        [sys.executable, "-c", PAGE_MODULES],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=environment,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stdout + done.stderr


@pytest.mark.parametrize("name", ["monitoring", "data"])
def test_a_page_without_figures_needs_neither_pandas_nor_plotly(
    factory: Factory, name: str
) -> None:
    script = (
        f"import sys\nfrom mlops_workbench.pages.{name} import {name}_page\n{name}_page()\n"
        "print([name for name in ('pandas', 'plotly', 'numpy') if name in sys.modules])"
    )
    environment = {**os.environ, "WORKBENCH_READ_MODELS": str(factory.workspace.read_models)}
    found = subprocess.check_output([sys.executable, "-c", script], text=True, env=environment)
    assert found.strip() == "[]"


def test_the_experiments_page_shows_only_what_differs_and_escapes_names(factory: Factory) -> None:
    page = ExperimentsPage(factory.workspace.read_models)
    assert page.problem.value == "" and page.reader_problem.value == ""
    newest = page.chosen()[-1]
    assert newest["name"] == HOSTILE
    assert HOSTILE not in page.comparison.value and "&lt;img" in page.comparison.value
    assert HOSTILE not in page.table._dt_args["data_json"]
    assert "learning_rate" in page.comparison.value and "batch_size" not in page.comparison.value
    assert "flights@v1.1" in page.comparison.value and "-0.019" in page.comparison.value
    assert {len(trace.x) for trace in page.curves.data} == {12}
    assert all(HOSTILE not in trace.name for trace in [*page.curves.data, *page.axes.data])


def test_a_selection_survives_new_runs(factory: Factory) -> None:
    page = ExperimentsPage(factory.workspace.read_models)
    page.table.selected_rows = [2, 4]
    kept = [run["run_id"] for run in page.chosen()]
    record_run(factory.workspace, cycle="2013-05-01", learning_rate=0.005, seed=20)
    reader.refresh(factory.workspace, {})
    page.update()
    assert list(page.table.selected_rows) == [3, 5]
    assert [run["run_id"] for run in page.chosen()] == kept
    assert "7 runs" in page.head.value


def test_many_selected_runs_are_cut_with_a_word(factory: Factory) -> None:
    page = ExperimentsPage(factory.workspace.read_models)
    page.table.selected_rows = list(range(len(page.runs)))
    assert f"{len(page.runs) - 6} more are selected" in page.comparison.value
    page.table.selected_rows = []
    assert "No run is selected" in page.comparison.value and len(page.curves.data) == 0


def test_nothing_yet_is_said_in_words(tmp_path: Path) -> None:
    workspace = create_workspace(tmp_path / "empty", name="empty")
    reader.refresh(workspace, {})
    experiments = ExperimentsPage(workspace.read_models)
    monitoring = MonitoringPage(workspace.read_models)
    assert "mwb run" in experiments.head.value and experiments.body.children == ()
    assert "Nothing has been measured yet" in monitoring.parts["head"].value
    assert "Nothing has been deployed yet" in monitoring.parts["releases"].value
    assert experiments.problem.value == monitoring.problem.value == ""
    assert experiments.reader_problem.value == ""


def test_a_damaged_read_model_is_said_and_then_forgotten(tmp_path: Path, factory: Factory) -> None:
    model = tmp_path / "monitoring.db"
    model.write_bytes(b"not a database, but long enough to be mistaken for one" * 20)
    page = MonitoringPage(tmp_path)
    assert (
        "cannot be shown just now" in page.problem.value and "not a database" in page.problem.value
    )
    model.unlink()
    os.link(factory.workspace.read_models / "monitoring.db", model)
    page.update()
    assert page.problem.value == "" and "Accuracy" in page.parts["tiles"].value


def test_tiles_turn_when_quality_falls(tmp_path: Path) -> None:
    factory = make_factory(tmp_path)
    page = MonitoringPage(factory.workspace.read_models)
    tiles = page.parts["tiles"].value
    assert tiles.count("OK") == 6 and "CRITICAL" not in tiles
    assert "flights-r2" in page.parts["releases"].value
    assert "flights-r1" in page.parts["releases"].value
    assert "flights@v1.0" in page.parts["releases"].value
    spoil(factory)
    reader.refresh(factory.workspace, {})
    page.update()
    tiles, head = page.parts["tiles"].value, page.parts["head"].value
    assert "CRITICAL" in tiles and "WARNING" in tiles
    assert "alarms are firing" in head and "quality_lost" in head
    assert "temp" in page.parts["moved"].value and "firing for" in page.parts["alerts"].value
    page.span.value = "looks"
    assert page.parts["charts"].value.count("<svg") == 6


def test_old_data_is_marked(factory: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    page = MonitoringPage(factory.workspace.read_models)
    assert "OLD DATA" not in page.parts["head"].value
    monkeypatch.setenv("MWB_CLOCK_OFFSET_SECONDS", "7200")
    page.update()
    assert "OLD DATA" in page.parts["head"].value
    assert "looked 2 hours ago" in page.parts["head"].value
    assert "last looked 2 hours ago" in page.reader_problem.value


def test_the_reader_says_what_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = create_workspace(tmp_path / "w")
    workspace.monitoring.mkdir(parents=True)
    (workspace.monitoring / "latest.json").write_text("{ torn")
    known = reader.refresh(workspace, {})
    assert (
        set(known) == {"experiments", "data"}
        and "monitoring cannot be read" in capsys.readouterr().err
    )
    page = MonitoringPage(workspace.read_models)
    assert "cannot be renewed just now" in page.reader_problem.value
    (workspace.monitoring / "latest.json").unlink()
    assert set(reader.refresh(workspace, known)) == {"experiments", "data", "monitoring"}
    assert read_state(workspace.read_models).problems == {}


def test_a_model_is_written_again_only_when_its_source_changed(factory: Factory) -> None:
    workspace = factory.workspace
    names = ("experiments", "monitoring", "data")
    models = [workspace.read_models / f"{name}.db" for name in names]
    known = reader.refresh(workspace, {})
    before = [model_mark(model) for model in models]
    known = reader.refresh(workspace, known)
    assert [model_mark(model) for model in models] == before
    record_run(workspace, cycle="2013-06-01", seed=30)
    reader.refresh(workspace, known)
    after = [model_mark(model) for model in models]
    assert after[0] != before[0] and after[1:] == before[1:]


def test_a_page_cannot_write_into_a_read_model(factory: Factory) -> None:
    path = factory.workspace.read_models / "experiments.db"
    with open_model(path) as model, pytest.raises(sqlite3.OperationalError, match="readonly"):
        model.execute("DELETE FROM runs")
    assert read_table(path, "runs")


def test_a_page_that_nobody_holds_any_more_leaves_no_task(factory: Factory) -> None:
    import weakref

    async def open_and_forget() -> bool:
        page = MonitoringPage(factory.workspace.read_models)
        watched = weakref.ref(page)
        task = asyncio.get_running_loop().create_task(keep_reading(watched))
        await asyncio.sleep(0.01)
        page.close()
        page.unobserve_all()
        for part in (page.span, *page.parts.values()):
            part.close()
            part.unobserve_all()
        del page, part
        gc.collect()
        await asyncio.sleep(1.3)
        return watched() is None and task.done()

    assert asyncio.run(open_and_forget())


def test_page_notebooks_are_short_and_of_the_minor_version_that_voila_needs() -> None:
    for name in ("experiments", "data", "monitoring"):
        notebook = nbformat.read(apps_folder() / f"{name}.ipynb", as_version=4)
        code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
        assert notebook.nbformat_minor == 5 and len(code.splitlines()) <= 20
        assert notebook.cells[0].source.startswith(f"# {name.capitalize()}")
        compile(code, name, "exec")


def test_an_address_that_others_reach_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_workspace(tmp_path / "w", settings={"pages.host": "0.0.0.0"})
    assert main(["pages", "-w", str(tmp_path / "w")]) == 2
    assert "no login" in capsys.readouterr().err


def test_pages_start_answer_and_end_together(tmp_path: Path) -> None:
    workspace = create_workspace(tmp_path / "w", name="w")
    with pages_running(workspace, environment={"TEAM_CHANNEL": "slack://a-secret"}) as (
        address,
        process,
    ):
        with urllib.request.urlopen(address, timeout=20) as answer:
            page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
        assert "Experiments" in page and "https://" not in page and "'self'" in policy
        for closed in ("/voila/files/experiments.ipynb", "/voila/render/nothing.ipynb"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(address + closed, timeout=20)
            assert refused.value.code in (403, 404)
        children = psutil.Process(process.pid).children(recursive=True)
        names = [" ".join(child.cmdline()) for child in children]
        assert any("pages.reader" in name for name in names)
        voila = next(child for child in children if "voila_server" in " ".join(child.cmdline()))
        wait_until(lambda: (workspace.read_models / "reader.json").exists())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert not any(child.is_running() for child in children), voila
        output = process.stdout.read() if process.stdout else ""
    assert f"{address}/voila/render/experiments.ipynb" in output
    assert f"{address}/voila/render/data.ipynb" in output
    assert f"{address}/voila/render/monitoring.ipynb" in output


def test_pages_leave_no_process_when_they_are_killed(tmp_path: Path) -> None:
    workspace = create_workspace(tmp_path / "w", name="w")
    with pages_running(workspace) as (_, process):
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        process.kill()
        process.wait(10)
        wait_until(lambda: not any(child.is_running() for child in children), seconds=20)


def test_a_taken_port_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = create_workspace(tmp_path / "w")
    port = free_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        assert main(["pages", "-w", str(workspace.root), "--port", str(port)]) == 5
    assert "to be free" in capsys.readouterr().err


def test_the_newest_of_many_looks_and_runs_are_kept(tmp_path: Path) -> None:
    from experiment_support import benchmark_module

    workspace: Workspace = create_workspace(tmp_path / "w")
    benchmark_module().fill_store(workspace, 2000)
    workspace.monitoring.mkdir(parents=True)
    for number in range(400):
        look = {"at_seconds": float(number), "summary": "", "figures": {"brier": 0.2}}
        path = workspace.monitoring / f"2026112300{number:04d}.json"
        path.write_text(json.dumps(look))
    reader.refresh(workspace, {})
    assert len(read_table(workspace.read_models / "experiments.db", "runs")) == 500
    assert len(read_table(workspace.read_models / "monitoring.db", "looks")) == 200


def test_status_tells_where_the_pages_of_this_workspace_run(tmp_path: Path) -> None:
    workspace = create_workspace(tmp_path / "w")

    def told() -> tuple[str, str]:
        found = {each["service"]: each for each in services(workspace)}["pages"]
        return found["state"], found["address"]

    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        place.listen()
        address = f"http://127.0.0.1:{place.getsockname()[1]}"
        with noted_address(workspace, address):
            assert told() == ("answers", address)
        settings = workspace.root / "settings.ini"
        port = f"port = {place.getsockname()[1]} "
        settings.write_text(re.sub(r"port = 8866 ", port, settings.read_text()))
        workspace = Workspace.open(workspace.root)
        assert told() == ("not running; another program listens there", address)
    assert told() == ("not running", address)
