"""Other MLflow models: brought in unrun, served by a process of their own once trusted; its faults stay its own."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from serving_support import (
    ROW,
    RunningServer,
    build_bundle,
    logged,
    make_workspace,
    point_at,
    serving,
    wait_until,
)

from mlops_workbench.cli.main import main
from mlops_workbench.core.errors import GateRefusedError
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.release.deployment import deploy
from mlops_workbench.release.imports import import_model, trust_release

COLUMNS = ["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]


def workers_of(server: RunningServer) -> list[psutil.Process]:
    """The processes that run imported models for a server."""
    return psutil.Process(server.process.pid).children()


def log_iris(workspace: Workspace, kind: str = "sklearn") -> tuple[str, Any, pd.DataFrame]:
    """A forest of scikit-learn or XGBoost in the workspace's store: its run, MLflow's own view of it, and rows to ask."""
    from mlops_workbench.experiment.store import ensure_store, quiet_mlflow

    quiet_mlflow()
    import mlflow
    import mlflow.sklearn
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier

    mlflow.set_tracking_uri(ensure_store(workspace))
    rows, labels = load_iris(as_frame=True, return_X_y=True)
    if kind == "xgboost":
        import mlflow.xgboost
        from xgboost import XGBRFClassifier

        forest, save = XGBRFClassifier(n_estimators=20, random_state=0), mlflow.xgboost.log_model
    else:
        forest = RandomForestClassifier(20, random_state=0)
        save = partial(mlflow.sklearn.log_model, serialization_format="cloudpickle")
    forest.fit(rows, labels)
    signature = mlflow.models.infer_signature(rows, forest.predict(rows))
    with mlflow.start_run() as run:
        made = save(forest, name="model", signature=signature, pip_requirements=[])
    return run.info.run_id, mlflow.pyfunc.load_model(made.model_uri), rows.iloc[::10]


def invocation_forms(rows: pd.DataFrame) -> dict[str, Any]:
    """The same rows in each form of MLflow's protocol."""
    return {
        "dataframe_split": json.loads(rows.to_json(orient="split")),
        "dataframe_records": rows.to_dict("records"),
        "inputs": {name: rows[name].tolist() for name in rows},
        "instances": rows.to_dict("records"),
    }


@pytest.mark.parametrize("kind", ["sklearn", pytest.param("xgboost", marks=pytest.mark.slow)])
def test_an_mlflow_model_is_served_once_a_person_trusts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import mlflow

    workspace = make_workspace(tmp_path / "w", pyfunc_seconds=30)
    monkeypatch.chdir(workspace.root)
    run, theirs, rows = log_iris(workspace, kind)
    mlflow.set_tracking_uri(
        f"sqlite:///{tmp_path}/elsewhere.db"
    )  # not where the workspace keeps its runs
    good = build_bundle(workspace.bundles, name="flights-r1")
    point_at(workspace.pointer_path, good, epoch=1)
    assert main(["release", "import", run, "--name", "iris"]) == 0
    assert "mwb release trust iris-r1" in capsys.readouterr().out
    iris = Ledger(workspace.ledger_url).release("iris-r1")
    with pytest.raises(GateRefusedError, match="mwb release trust iris-r1 -m WHY"):
        deploy(workspace, "iris-r1", actor="test", force=True)
    with serving(tmp_path, "--workspace", str(workspace.root)) as server:
        server.wait_ready()
        client = server.client()
        point_at(
            workspace.pointer_path, Path(iris.path), epoch=2, name="iris-r1"
        )  # past the ledger
        wait_until(lambda: client.get("/health").body["problem"], 60, "refusal of an untrusted one")
        health = client.get("/health").body
        assert "mwb release trust iris-r1" in health["problem"]["reason"]
        assert health["digest"] == good.name
        assert client.post("/predict", {"row": ROW}).body["release"] == "flights-r1"
        assert not workers_of(server)

        assert main(["release", "trust", "iris-r1", "-m", "our own run"]) == 0
        assert main(["release", "show", "iris-r1"]) == 0
        assert kind in capsys.readouterr().out
        deploy(workspace, "iris-r1", actor="test")
        wait_until(lambda: client.get("/health").body["digest"] == iris.digest, 60, "iris")
        expected = theirs.predict(rows).tolist()
        answer = client.post("/predict", {"rows": rows.to_dict("records")})
        assert answer.status == 200, answer.body
        assert [each["prediction"] for each in answer.body["predictions"]] == expected
        assert (answer.body["release"], answer.body["digest"]) == ("iris-r1", iris.digest)
        for form, value in invocation_forms(rows).items():
            answer = client.post("/invocations", {form: value})
            assert answer.body == {"predictions": expected}, form
        refused = client.post("/predict", {"row": {COLUMNS[0]: 5.1}})
        assert refused.status == 422 and "sepal width" in refused.body["error"]
        assert client.post("/feedback", {"feedback": []}).status == 501
        about = client.get("/release").body
        assert (about["kind"], about["parameters"]["source"]) == ("pyfunc", run)

        maps = Path(f"/proc/{server.process.pid}/maps").read_text()
        for heavy in ("torch", "pandas", "mlflow", "sklearn", "xgboost", "scipy", "sqlalchemy"):
            assert f"/{heavy}/" not in maps, heavy

        point_at(workspace.pointer_path, good, epoch=9)
        wait_until(lambda: client.get("/health").body["digest"] == good.name, 10, "the way back")
        assert client.post("/predict", {"row": ROW}).status == 200
        [worker] = workers_of(server)  # kept, for a quick way back
        assert server.stop() == 0
        worker.wait(10)
    records = logged(workspace.predictions, "imported")
    assert records[0]["answer"] == expected and records[0]["rows"] == len(rows)
    assert records[0]["question"]["rows"] == rows.to_dict("records")
    assert len(logged(workspace.predictions)) == 2, "the flights alone count as predictions"


MOODY = """
import os, pathlib, time
import mlflow

class Moody(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        mood = pathlib.Path({mood!r})
        pathlib.Path({trap!r}).write_text("loaded")
        if mood.read_text() == "hang":
            time.sleep(1000)

    def predict(self, context, model_input, params=None):
        value = float(model_input["value"][0])
        if value == 1:
            time.sleep(1000)
        if value == 2:
            os._exit(9)
        if value == 3:
            raise ValueError("three is too many")
        return [float("nan") if value == 4 else value] * (3 if value == 5 else len(model_input))

mlflow.models.set_model(Moody())
"""


@pytest.mark.slow
def test_a_model_that_hangs_dies_or_talks_nonsense_costs_its_own_answers_alone(
    tmp_path: Path,
) -> None:
    import mlflow.pyfunc

    workspace = make_workspace(tmp_path / "w", pyfunc_seconds=2, open_seconds=25)
    mood, trap = tmp_path / "mood", tmp_path / "loaded"
    mood.write_text("good")
    (tmp_path / "moody.py").write_text(MOODY.format(mood=str(mood), trap=str(trap)))
    mlflow.pyfunc.save_model(
        tmp_path / "moody",
        python_model=str(tmp_path / "moody.py"),
        input_example=pd.DataFrame({"value": [7.0]}),
        pip_requirements=[],
    )
    trap.unlink(missing_ok=True)  # saving opens it
    made = import_model(workspace, str(tmp_path / "moody"), actor="test")
    assert not trap.exists(), "bringing it in ran it"
    good = build_bundle(workspace.bundles, name="flights-r1")
    point_at(workspace.pointer_path, good, epoch=1)
    with serving(tmp_path, "--workspace", str(workspace.root)) as server:
        server.wait_ready()
        client = server.client()
        point_at(workspace.pointer_path, Path(made.path), epoch=2)
        wait_until(lambda: client.get("/health").body["problem"], 60, "refusal")
        assert not trap.exists(), "nobody trusts it, and it was loaded"
        trust_release(workspace, made.name, actor="test", reason="a test")

        mood.write_text("hang")
        deploy(workspace, made.name, actor="test")
        said = "not ready after 25 s"
        wait_until(
            lambda: said in (client.get("/health").body["problem"] or {}).get("reason", ""),
            90,
            "it hangs in loading",
        )
        assert client.post("/predict", {"row": ROW}).body["release"] == "flights-r1"
        assert not workers_of(server)
        mood.write_text("good")
        wait_until(lambda: client.get("/health").body["digest"] == made.digest, 90, "a second try")

        def ask(value: float) -> Any:
            return client.post("/predict", {"row": {"value": value}})

        assert ask(7).body["predictions"][0]["prediction"] == 7
        assert ask(3).status == 422  # MLflow calls a failing model a bad request
        assert ask(4).status == 500 and "finite" in ask(4).body["error"]
        assert ask(5).status == 500 and "1 answers, found 3" in ask(5).body["error"]
        began = time.monotonic()
        assert ask(1).status == 503 and time.monotonic() - began < 5
        assert client.get("/ready").status == 200
        wait_until(lambda: ask(7).status == 200, 60, "after a hang")
        assert ask(2).status == 503
        answer = ask(7)
        assert answer.status == 503 and answer.headers["retry-after"]
        assert client.get("/health").body["status"] == "degraded"
        wait_until(lambda: ask(7).status == 200, 60, "after a death")
        health = client.get("/health").body
        assert (health["status"], health["imported"]["problem"]) == ("ok", "")
        document = client.get("/openapi.json").body["paths"]["/predict"]["post"]["responses"]["200"]
        assert "probabilities" not in json.dumps(document)
        [worker] = workers_of(server)
        server.kill()
        worker.wait(10)
        assert server.process.poll() is not None


def test_what_is_pointed_at_in_a_bundle_alone_is_not_run(tmp_path: Path) -> None:
    """No workspace, nobody's trust."""
    workspace = make_workspace(tmp_path / "w")
    model = tmp_path / "iris"
    model.mkdir()
    (model / "MLmodel").write_text("flavors: {python_function: {loader_module: mlflow.sklearn}}")
    made = import_model(workspace, str(model), actor="test")
    from mlops_workbench.core.errors import BundleError
    from mlops_workbench.core.settings import ServingSettings
    from mlops_workbench.serving.pyfunc import load_release

    with pytest.raises(BundleError, match="workspace that trusts it"):
        load_release(Path(made.path), made.digest, ServingSettings(), None)
