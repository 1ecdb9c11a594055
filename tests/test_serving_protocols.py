"""Other people's clients on our server: tritonclient for the Open Inference protocol, what mlflow's clients post."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from serving_support import (
    ROW,
    SCHEMA,
    Answer,
    RunningServer,
    build_bundle,
    late_model,
    logged,
    make_workspace,
    picture_model,
    point_at,
    serving,
    serving_bundle,
    wait_until,
)

from mlops_workbench.core.features import Feature, FeatureSchema
from mlops_workbench.core.pointer import Pointer, SlotEntry, write_pointer
from mlops_workbench.serving.routes import ROUTES

FEATURES = {feature.name: ROW[feature.name] for feature in SCHEMA.features}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    """A ready server of a small release, its log in tmp_path/predictions."""
    with serving_bundle(tmp_path, build_bundle(tmp_path / "bundles")) as running:
        yield running


def client_of(server: RunningServer) -> triton.InferenceServerClient:
    """The usual client of the protocol."""
    return triton.InferenceServerClient(f"127.0.0.1:{server.port}")


def tensors(rows: list[dict[str, Any]], *, binary: bool) -> list[triton.InferInput]:
    """The rows as that client sends them, by the datatypes that the server's metadata name."""
    found = []
    for name in rows[0]:
        feature = next((each for each in SCHEMA.features if each.name == name), None)
        is_number = feature is not None and feature.kind == "number"
        given = triton.InferInput(name, [len(rows), 1], "FP64" if is_number else "BYTES")
        values = [row[name] for row in rows]
        array = np.array(values, np.float64 if is_number else np.object_).reshape(-1, 1)
        given.set_data_from_numpy(array, binary_data=binary)
        found.append(given)
    return found


# ---- Open Inference


def test_the_client_finds_out_all_it_needs(server: RunningServer) -> None:
    client = client_of(server)
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("flights") and client.is_model_ready("flights", "flights-r1")
    assert not client.is_model_ready("pictures")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    about = client.get_model_metadata("flights")
    assert (about["name"], about["versions"]) == ("flights", ["flights-r1"])
    datatypes = {given["name"]: given["datatype"] for given in about["inputs"]}
    assert datatypes == {
        **dict.fromkeys(("hour", "distance", "temp"), "FP64"),
        **dict.fromkeys(("carrier", "origin", "flight_id"), "BYTES"),
    }
    assert about["outputs"][0] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]}
    with pytest.raises(triton.InferenceServerException, match="expected a version that serves"):
        client.get_model_metadata("flights", "2")


@pytest.mark.parametrize("binary", [True, False])
def test_tensors_are_answered_as_rows_are(
    server: RunningServer, tmp_path: Path, binary: bool
) -> None:
    rows = [
        {**ROW, "hour": hour, "carrier": carrier} for hour in (5, 17) for carrier in ("UA", "?")
    ]
    ours = server.client().post("/predict", {"rows": rows}).body["predictions"]
    client = client_of(server)
    outputs = [
        triton.InferRequestedOutput(name, binary_data=binary)
        for name in ("probabilities", "prediction", "id", "release")
    ]
    for wanted in (outputs, None):
        answer = client.infer(
            "flights", tensors(rows, binary=binary), outputs=wanted, request_id="mine"
        )
        said = answer.as_numpy("probabilities")
        assert said.shape == (4, 2) and said.dtype == np.float32
        expected = [list(each["probabilities"].values()) for each in ours]
        assert said == pytest.approx(np.array(expected), abs=1e-6)
        classes = [
            text.decode() if isinstance(text, bytes) else text
            for text in answer.as_numpy("prediction")
        ]
        assert classes == [each["prediction"] for each in ours]
        response = answer.get_response()
        assert (response["id"], response["model_version"]) == ("mine", "flights-r1")
        # what was answered stands in the log, and feedback finds it by the id in the answer
        ids = [text.decode() if isinstance(text, bytes) else text for text in answer.as_numpy("id")]
        assert [record["id"] for record in logged(tmp_path / "predictions")[-4:]] == ids
        assert logged(tmp_path / "predictions")[-1]["row"] == rows[-1]
        label = {"feedback": [{"id": ids[0], "label": "late"}]}
        assert server.client().post("/feedback", label).body["orphan"] == 0


def test_gaps_own_ids_and_refusals_go_the_common_way(server: RunningServer, tmp_path: Path) -> None:
    client = client_of(server)
    inputs = tensors([{"hour": 17.0, "origin": "EWR", "temp": float("nan")}], binary=True)
    named = triton.InferInput("id", [1], "BYTES")
    named.set_data_from_numpy(np.array(["chosen"], np.object_))
    gaps = client.infer("flights", [*inputs, named]).as_numpy("probabilities")[0]
    plain = server.client().post("/predict", {"row": {"hour": 17, "origin": "EWR"}}).body
    assert gaps == pytest.approx(list(plain["predictions"][0]["probabilities"].values()), abs=1e-6)
    first = logged(tmp_path / "predictions")[0]
    assert (first["id"], first["row"]["temp"]) == ("chosen", None)
    for wrong, words in [
        ([{**FEATURES, "distanc": 1.0}], "did you mean 'distance'"),
        ([{**FEATURES, "hour": float("inf")}], "finite"),
        ([{**FEATURES, "hour": float("nan")}], "field 'hour' of row 0"),
    ]:
        for binary in (True, False):
            if not binary and "finite" in words or not binary and "hour" in words:
                continue  # JSON has no such numbers
            with pytest.raises(triton.InferenceServerException, match=words):
                client.infer("flights", tensors(wrong, binary=binary))
    errors = logged(tmp_path / "predictions", "error")
    assert {record["route"] for record in errors} == {"/v2/models/{name}/infer"}
    with pytest.raises(triton.InferenceServerException, match="expected model 'flights'"):
        client.infer("pictures", inputs)
    with pytest.raises(triton.InferenceServerException, match="at most 10000 rows"):
        client.infer("flights", tensors([FEATURES] * 10_001, binary=True))


def test_pictures_travel_as_one_binary_tensor(tmp_path: Path) -> None:
    image = Feature(name="image", kind="image", nullable=False, maximum=16, shape=(1, 4, 4))
    schema = FeatureSchema(
        features=(image,), classes=tuple("0123456789"), label="digit", key="picture_id"
    )
    bundle = build_bundle(
        tmp_path, name="digits-r1", model=picture_model(), schema=schema, inputs=("image",)
    )
    pictures = np.random.default_rng(0).integers(0, 17, (100, 1, 4, 4))
    with serving(tmp_path, "--bundle", str(bundle)) as server:
        server.wait_ready()
        rows = [{"image": picture.tolist()} for picture in pictures]
        ours = server.client().post("/predict", {"rows": rows}).body["predictions"]
        for datatype, dtype in (("FP32", np.float32), ("UINT8", np.uint8)):
            given = triton.InferInput("image", list(pictures.shape), datatype)
            given.set_data_from_numpy(pictures.astype(dtype))
            said = client_of(server).infer("flights", [given]).as_numpy("probabilities")
            expected = [list(each["probabilities"].values()) for each in ours]
            assert said == pytest.approx(np.array(expected), abs=1e-6)
        given = triton.InferInput("image", [1, 4, 5], "UINT8")
        given.set_data_from_numpy(np.zeros((1, 4, 5), np.uint8))
        with pytest.raises(triton.InferenceServerException, match="1, 4, 4"):
            client_of(server).infer("flights", [given])


def test_with_a_split_each_row_says_which_release_answered(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w")
    entries = {}
    for slot, name, bias in (("champion", "flights-r1", 0.0), ("challenger", "flights-r2", 1.0)):
        bundle = build_bundle(workspace.bundles, name=name, bias=bias)
        entries[slot] = SlotEntry(digest=bundle.name, path=str(bundle), name=name)
    split = {"champion": 0.5, "challenger": 0.5}
    write_pointer(workspace.pointer_path, Pointer(epoch=1, slots=entries, split=split, salt="s"))
    rows = [{**ROW, "flight_id": f"F{number}"} for number in range(40)]
    with serving(tmp_path, "--workspace", str(workspace.root)) as server:
        server.wait_ready()
        wait_until(lambda: len(server.client().get("/health").body["arms"]) == 2, 10, "two arms")
        client = client_of(server)
        answer = client.infer("flights", tensors(rows, binary=True))
        releases = [name.decode() for name in answer.as_numpy("release")]
        assert {"flights-r1", "flights-r2"} == set(releases)
        ours = server.client().post("/predict", {"rows": rows}).body["predictions"]
        assert [each["release"] for each in ours] == releases
        assert client.get_model_metadata("flights")["versions"] == ["flights-r1", "flights-r2"]
        with pytest.raises(triton.InferenceServerException, match="without a version"):
            client.infer("flights", tensors(rows, binary=True), model_version="flights-r2")


def test_a_web_page_cannot_post_tensors_without_saying_their_type(server: RunningServer) -> None:
    body = json.dumps(
        {"inputs": [{"name": "hour", "shape": [1], "datatype": "INT64", "data": [1]}]}
    )
    path = "/v2/models/flights/infer"
    page = {"Origin": "http://elsewhere.example"}
    assert server.client().send("POST", path, body.encode(), page).status == 415
    plain = {**page, "Content-Type": "text/plain"}
    assert server.client().send("POST", path, body.encode(), plain).status == 415


def test_every_new_route_asks_for_the_token(tmp_path: Path) -> None:
    token = "a-token-nobody-can-guess"
    workspace = make_workspace(tmp_path / "w", token="secret://MWB_TEST_TOKEN")
    point_at(workspace.pointer_path, build_bundle(workspace.bundles), epoch=1)
    secret = {"MWB_TEST_TOKEN": token}
    with serving(tmp_path, "--workspace", str(workspace.root), environment=secret) as server:
        server.wait_ready()
        for path, route in ROUTES.items():
            asked = path.format(name="flights", version="flights-r1")
            status = (
                server.client()
                .send(route.method, asked, b"" if route.method == "POST" else None)
                .status
            )
            assert (status in (401, 429)) != route.is_open, (path, status)
        client = client_of(server)
        headers = {"Authorization": f"Bearer {token}"}
        assert client.is_server_ready()
        with pytest.raises(triton.InferenceServerException, match="Authorization|bad tokens"):
            client.infer("flights", tensors([FEATURES], binary=True))
        assert client.infer("flights", tensors([FEATURES], binary=True), headers=headers)


# ---- MLflow


def invocation_bodies(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows in each form of MLflow's scoring protocol."""
    names = list(rows[0])
    return {
        "dataframe_split": {
            "columns": names,
            "data": [[row[name] for name in names] for row in rows],
        },
        "dataframe_records": rows,
        "instances": rows,
        "inputs": {name: [row[name] for row in rows] for name in names},
    }


ROWS = [
    FEATURES,
    {**FEATURES, "hour": 5, "carrier": "B6"},
    {**FEATURES, "carrier": "nobody", "origin": "LGA", "distance": 80},
    {**FEATURES, "distance": 4999, "temp": -3.5},
]


def test_invocations_take_all_four_forms(server: RunningServer, tmp_path: Path) -> None:
    ours = server.client().post("/predict", {"rows": ROWS}).body["predictions"]
    expected = [{name: each[name] for name in ("prediction", "probabilities")} for each in ours]
    for form, value in invocation_bodies(ROWS).items():
        said = server.client().post("/invocations", {form: value})
        assert said.status == 200, (form, said.body)
        assert said.body["predictions"] == expected, form
        assert said.body["ids"] == [
            record["id"] for record in logged(tmp_path / "predictions")[-4:]
        ]
    label = {"feedback": [{"id": said.body["ids"][0], "label": "late"}]}
    assert server.client().post("/feedback", label).body["orphan"] == 0
    assert server.client().get("/ping").status == 200
    for body, status, field, row in [
        ({"dataframe_records": [FEATURES, {**FEATURES, "hour": "noon"}]}, 422, "hour", 1),
        ({"dataframe_records": [{**FEATURES, "distanc": 1}]}, 422, "distanc", 0),
        ({"inputs": {"hour": [1, 2], "temp": [1]}}, 422, "inputs", None),
        ({"instances": [[1, 2]]}, 422, "instances", 0),
        ({"instances": ROWS, "inputs": {}}, 422, None, None),
        ({"instances": []}, 422, "rows", None),
        ({"dataframe_records": [FEATURES] * 10_001}, 413, None, None),
    ]:
        answer = server.client().post("/invocations", body)
        found = answer.status, answer.body.get("field"), answer.body.get("row")
        assert found == (status, field, row), (str(body)[:200], answer.body)


MLFLOW_MODEL = '''
"""The release's own ONNX graph as an MLflow model, with the release's features beside it."""

import json
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import onnxruntime
import pandas as pd

from mlops_workbench.core.features import FeatureSchema


class Release(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        self.schema = FeatureSchema.model_validate_json(Path(context.artifacts["features"]).read_text())
        self.session = onnxruntime.InferenceSession(context.artifacts["model"])

    def predict(self, context, model_input, params=None):
        table = pd.DataFrame(model_input)
        arrays = self.schema.encode_columns({name: table[name].to_numpy() for name in table})
        [shares] = self.session.run(["probabilities"], arrays)
        classes = self.schema.classes
        return [
            {
                "prediction": classes[int(np.argmax(row))],
                "probabilities": dict(zip(classes, row.astype(float).round(7).tolist())),
            }
            for row in shares
        ]


mlflow.models.set_model(Release())
'''


@pytest.mark.timeout(280)
def test_mlflow_models_serve_says_the_same(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path / "bundles", model=late_model(0.3))
    (tmp_path / "release_model.py").write_text(MLFLOW_MODEL)
    make = (
        "import sys, mlflow.pyfunc; folder, model, bundle = sys.argv[1:];"
        "mlflow.pyfunc.save_model(folder, python_model=model, pip_requirements=[],"
        " artifacts={'model': bundle + '/model.onnx', 'features': bundle + '/features.json'})"
    )
    saved = tmp_path / "mlflow-model"
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # it calls uvicorn
    }
    command = [
        sys.executable,
        "-c",
        make,
        str(saved),
        str(tmp_path / "release_model.py"),
        str(bundle),
    ]
    subprocess.run(
        command, check=True, env=environment, cwd=tmp_path, timeout=120, capture_output=True
    )
    with serving(tmp_path, "--bundle", str(bundle)) as server:
        server.wait_ready()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        serve = ["-m", "mlflow", "models", "serve", "-m", str(saved), "--env-manager", "local"]
        with (tmp_path / "mlflow.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *serve, "--port", str(port), "--workers", "1"],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=tmp_path,
                start_new_session=True,
            )
        try:
            await_ping(port, process, tmp_path / "mlflow.log")
            for form, value in invocation_bodies(ROWS).items():
                theirs = post(port, {form: value})
                ours = server.client().post("/invocations", {form: value}).body
                assert len(theirs["predictions"]) == len(ROWS)
                for their, our in zip(theirs["predictions"], ours["predictions"], strict=True):
                    assert our["prediction"] == their["prediction"], form
                    assert our["probabilities"] == pytest.approx(their["probabilities"], abs=1e-6)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def await_ping(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until MLflow's server answers."""
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def post(port: int, value: object) -> Any:
    """POST to MLflow's /invocations."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/invocations",
        json.dumps(value).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


# ---- too much at once


def test_more_large_requests_than_can_wait_are_told_to_come_again(server: RunningServer) -> None:
    rows = [{**ROW, "hour": number % 24} for number in range(5_000)]
    answers: list[Answer] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(server.client().post("/predict", {"rows": rows}))
        )
        for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    small = server.client()
    waited = []
    while any(thread.is_alive() for thread in threads):
        before = time.perf_counter()
        assert small.post("/predict", {"row": ROW}).status == 200
        waited.append(time.perf_counter() - before)
    for thread in threads:
        thread.join()
    found = Counter(answer.status for answer in answers)
    print("answers:", dict(found), f"small ones: median {sorted(waited)[len(waited) // 2]:.3f} s")
    assert set(found) == {200, 429} and found[200] >= 17, found
    refused = [answer for answer in answers if answer.status == 429]
    assert all(answer.headers["retry-after"] == "1" for answer in refused)
    assert "come again" in refused[0].body["error"]
    assert server.client().post("/predict", {"rows": rows}).status == 200
