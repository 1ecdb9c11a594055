"""Reading runs: fast over thousands, safe against odd input, beside a writer, by command line."""

import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest
from experiment_support import benchmark_module, make_workspace

from mlops_workbench.cli.main import main
from mlops_workbench.core.errors import SettingsError, TrackingError, UsageError
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.experiment.recorder import Recorder
from mlops_workbench.experiment.runs import (
    compare_runs,
    list_runs,
    metric_history,
    resolve_run,
    show_run,
)
from mlops_workbench.experiment.store import ensure_store, mlflow_client, sqlite_path
from mlops_workbench.experiment.tracking import finish_run, ship_journal, start_run


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """The template of the store in a cache of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with 2,000 runs of 10 parameters, 8 metrics of 10 points and 20 tags."""
    workspace = make_workspace(tmp_path_factory.mktemp("many") / "workspace")
    benchmark_module().fill_store(workspace, 2000)
    return workspace


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, str, str]:
    """Two training runs that differ in data, code, a parameter and the outcome."""
    workspace = make_workspace(tmp_path_factory.mktemp("pair") / "workspace")
    ids = []
    for number, (rate, accuracies, data) in enumerate(
        [(0.001, [0.7, 0.9, 0.85], "flights@v1.0"), (0.0001, [0.8, 0.92], "flights@v1.1")]
    ):
        if number:
            (workspace.root / "helper.py").write_text("changed = True\n")
        folder = workspace.runs / f"c{number}" / "3_train-1"
        run_id = start_run(
            workspace,
            stage="3_train",
            cycle=f"c{number}",
            tags={"data_version": data},
            parameters={"learning_rate": rate, "epochs": 3},
            folder=folder,
        )
        with Recorder(folder) as recorder:
            for step, accuracy in enumerate(accuracies):
                recorder.metrics({"accuracy": accuracy, "loss": 0.5}, step)
            recorder.metric("system/cpu_percent", 10.0 * number)
        ship_journal(workspace, run_id, folder)
        finish_run(workspace, run_id, "FINISHED")
        ids.append(run_id)
    return workspace, ids[0], ids[1]


def test_two_thousand_runs_are_listed_with_all_they_hold(many: Workspace) -> None:
    rows = list_runs(many, 2000)
    assert len(rows) == 2000 and len(rows[0].parameters) == 10 and len(rows[0].metrics) == 8


def test_the_list_says_the_same_as_mlflows_client(many: Workspace) -> None:
    ours = {row.run_id: row for row in list_runs(many, 300)}
    theirs = mlflow_client(many).search_runs(["0"], max_results=300)
    assert len(ours) == len(theirs) == 300
    for run in theirs:
        row = ours[run.info.run_id]
        assert (row.parameters, row.metrics) == (run.data.params, run.data.metrics)
        assert (row.name, row.status) == (run.info.run_name, run.info.status)


def test_filters_pick_by_field_metric_parameter_and_tag(many: Workspace) -> None:
    assert len(list_runs(many, 5000, "stage=train data=flights@v1.0")) == 2000
    assert [r.name for r in list_runs(many, 10, "metric_0>=1999.9")] == ["run 1999"]
    assert [r.name for r in list_runs(many, 10, "name='run 17'")] == ["run 17"]
    assert len(list_runs(many, 5000, "metric_3<100.85 and status=finished")) == 100
    assert len(list_runs(many, 5000, "parameter_1=1e-1")) == 2000
    assert list_runs(many, 10, "parameter_1!=0.1") == []
    assert len(list_runs(many, 10, f"tag.tag_3={'x' * 64}")) == 10
    assert list_runs(many, 10, "nowhere=1") == []


@pytest.mark.parametrize(
    "text", ["stage='x' OR 1=1", 'a="\'; DROP TABLE runs; --"', "stage=a'", "'", "metric_0", ">3"]
)
def test_a_filter_is_data_or_a_clear_refusal(many: Workspace, text: str) -> None:
    try:
        assert list_runs(many, 10, text) == []
    except UsageError as error:
        assert "filter" in str(error)
    assert len(list_runs(many, 1)) == 1


def test_reading_goes_on_beside_a_writer(many: Workspace) -> None:
    path = sqlite_path(many.tracking_uri)
    assert path is not None
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE runs SET name = 'changed'")
        started = time.perf_counter()
        assert list_runs(many, 1)[0].name == "run 1999"
        assert time.perf_counter() - started < 2
        writer.rollback()


def test_reading_cannot_write(many: Workspace) -> None:
    from mlops_workbench.experiment.runs import open_reader

    with pytest.raises(TrackingError, match="readonly"), open_reader(many) as select:
        select("DELETE FROM runs", {})


def test_compare_names_each_change_and_nothing_else(pair: tuple[Workspace, str, str]) -> None:
    workspace, first, second = pair
    comparison = compare_runs(workspace, first, second)
    texts = [str(difference) for difference in comparison.differences]
    assert texts[0] == "data_version flights@v1.0 -> flights@v1.1"
    assert texts[1].startswith("dirty_hash clean -> ") and len(texts) == 4
    assert texts[2:] == ["learning_rate 0.001 -> 0.0001", "accuracy 0.85 -> 0.92"]
    assert [d.kind for d in comparison.differences] == ["data", "code", "parameter", "metric"]
    assert str(compare_runs(workspace, first, first)) == "no recorded difference"


def test_latest_and_best_values(pair: tuple[Workspace, str, str]) -> None:
    workspace, first, _ = pair
    row = next(r for r in list_runs(workspace, best=["accuracy", "loss"]) if r.run_id == first)
    assert row.metrics["accuracy"] == 0.85 and row.best == {"accuracy": 0.9, "loss": 0.5}
    shown = {metric.name: metric for metric in show_run(workspace, first).metrics}["accuracy"]
    assert (shown.latest, shown.best, shown.lowest, shown.count) == (0.85, 0.9, 0.7, 3)


def test_a_run_is_found_by_beginning_name_and_latest(pair: tuple[Workspace, str, str]) -> None:
    workspace, first, second = pair
    assert resolve_run(workspace, first[:8]) == first
    assert resolve_run(workspace, first[:8].upper()) == first
    assert resolve_run(workspace, "c0/train") == first
    assert resolve_run(workspace, "latest") == second
    for unknown in ("", "zzzz", "' OR 1=1 --", "f" * 32):
        with pytest.raises(UsageError, match="mwb runs list|one run"):
            resolve_run(workspace, unknown)


def test_an_ambiguous_beginning_names_the_candidates(many: Workspace) -> None:
    with pytest.raises(UsageError, match="000000000000"):
        resolve_run(many, "0000")


def test_a_resumed_training_shows_each_step_once(pair: tuple[Workspace, str, str]) -> None:
    workspace, *_ = pair
    folder = workspace.runs / "resumed"
    run_id = start_run(workspace, stage="monitor", cycle="resumed", folder=folder)
    for values in ({0: 0.9, 1: 0.8, 2: 0.7}, {2: 0.7, 3: 0.6}):  # killed after step 2, done again
        with Recorder(folder) as recorder:
            for step, value in values.items():
                recorder.metric("loss", value, step)
        time.sleep(0.01)
    ship_journal(workspace, run_id, folder)
    finish_run(workspace, run_id, "FINISHED")
    curve = metric_history(workspace, [run_id], ["loss"])[run_id, "loss"]
    assert (curve.steps, curve.values) == ((0, 1, 2, 3), (0.9, 0.8, 0.7, 0.6))
    mlflow_client(workspace).delete_run(run_id)
    assert run_id not in {row.run_id for row in list_runs(workspace)}


def test_curves_of_many_runs_and_thinning(many: Workspace) -> None:
    ids = [row.run_id for row in list_runs(many, 20)]
    curves = metric_history(many, ids, ["metric_0", "metric_1"])
    assert len(curves) == 40 and all(curve.steps == tuple(range(10)) for curve in curves.values())
    thin = metric_history(many, ids[:1], ["metric_0"], maximum_points=3)
    assert thin[ids[0], "metric_0"].steps[::2] == (0, 9)
    assert metric_history(many, ids, []) == {}


def test_an_address_that_sql_cannot_read_is_refused(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w", experiment__tracking_uri="http://127.0.0.1:5000")
    with pytest.raises(SettingsError, match="tracking_uri"):
        list_runs(workspace)
    with pytest.raises(SettingsError, match="tracking_uri"):
        ensure_store(workspace)


def test_a_broken_database_is_one_clear_error(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w")
    workspace.state.mkdir()
    (workspace.state / "mlflow.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(TrackingError, match="expected to read runs"):
        list_runs(workspace)
    with pytest.raises(TrackingError, match="create the MLflow database"):
        ensure_store(workspace)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_line(
    pair: tuple[Workspace, str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, first, second = pair
    where = ["-w", str(workspace.root)]
    code, out, _ = call(capsys, "runs", "list", *where, "--json", "-f", "stage=train")
    rows = json.loads(out)
    assert code == 0 and [row["run_id"] for row in rows] == [second, first]
    assert rows[0]["metrics"]["accuracy"] == 0.92
    code, out, _ = call(capsys, "runs", "compare", first[:8], second[:8], *where)
    assert code == 0 and "learning_rate" in out and "0.0001" in out and "loss" not in out
    code, out, _ = call(capsys, "runs", "compare", first, second, *where, "--json")
    assert [d["name"] for d in json.loads(out)["differences"]] == [
        "data_version",
        "dirty_hash",
        "learning_rate",
        "accuracy",
    ]
    code, out, _ = call(capsys, "runs", "show", first, *where)
    assert code == 0 and "flights@v1.0" in out and "learning_rate" in out
    code, _, error = call(capsys, "runs", "show", "nothing like it", *where)
    assert code == 2 and error.count("\n") == 1 and "mwb runs list" in error
    code, _, error = call(capsys, "runs", "list", "-f", "stage", *where)
    assert code == 2 and "filter" in error


def test_the_command_line_prints_no_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = make_workspace(tmp_path / "w")
    where = ["-w", str(workspace.root)]
    assert call(capsys, "runs", "list", *where)[:2] == (0, "no runs yet; `mwb run` makes some\n")
    folder = workspace.runs / "odd"
    name = "<img onerror>\n\x1b[2J\x07"
    run_id = start_run(workspace, stage="monitor", cycle="c", name=name, folder=folder)
    with Recorder(folder) as recorder:
        recorder.parameters({"note": "a\x1b[31m\nb"})
        recorder.tag("remark", "\x1b]0;title\x07")
        recorder.metric("loss", float("nan"))
    ship_journal(workspace, run_id, folder)
    for command in (["list"], ["show", run_id], ["compare", run_id, run_id]):
        code, out, _ = call(capsys, "runs", *command, *where)
        assert code == 0 and not any(ord(c) < 32 and c != "\n" for c in out)
    code, out, _ = call(capsys, "runs", "show", run_id, *where, "--json")
    assert json.loads(out)["name"] == name and json.loads(out)["metrics"]["loss"] is None
