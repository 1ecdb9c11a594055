"""A small real release and a real server process, for tests (no torch, no mocks)."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mlops_workbench.core.bundle import BundleManifest, manifest_digest
from mlops_workbench.core.features import Feature, FeatureSchema
from mlops_workbench.core.files import sha256_file, write_json
from mlops_workbench.core.journal import read_journal
from mlops_workbench.core.pointer import Pointer, SlotEntry, write_pointer
from mlops_workbench.core.workspace import Workspace

CARRIERS = ("AA", "B6", "DL", "UA")
ORIGINS = ("EWR", "JFK", "LGA")
SCHEMA = FeatureSchema(
    features=(
        Feature(name="hour", kind="number", nullable=False, minimum=0, maximum=23),
        Feature(name="distance", kind="number", minimum=80, maximum=5000),
        Feature(name="temp", kind="number"),
        Feature(name="carrier", kind="category", categories=CARRIERS),
        Feature(name="origin", kind="category", categories=ORIGINS, nullable=False),
    ),
    classes=("on time", "late"),
    label="late",
    key="flight_id",
)
ROW: dict[str, object] = {
    "flight_id": "UA-1545-2013-01-01",
    "hour": 17,
    "distance": 1400,
    "temp": 39.02,
    "carrier": "UA",
    "origin": "EWR",
}


def late_model(bias: float = 0.0, *, nan: bool = False, classes: int = 2) -> bytes:
    """A logistic regression over scaled numbers and one weight a category, as ONNX bytes.

    Missing numbers become the mean and scaled numbers are clipped, as in a real exported recipe, so
    the answer is finite for every input; `nan=True` divides by zero on purpose.
    """
    generator = np.random.default_rng(7)
    mean = np.array([13.0, 1000.0, 55.0], dtype=np.float32)
    deviation = np.array([0.0] * 3 if nan else [5.0, 700.0, 18.0], dtype=np.float32)
    if nan:
        mean = np.array([np.nan] * 3, dtype=np.float32)
    constants = {
        "mean": mean,
        "deviation": deviation,
        "low": np.array(-10.0, dtype=np.float32),
        "high": np.array(10.0, dtype=np.float32),
        "weights": np.array([[-0.6, 0.6], [0.1, -0.1], [0.2, -0.2]], dtype=np.float32)[:, :classes]
        if classes == 2
        else generator.normal(size=(3, classes)).astype(np.float32),
        "bias": np.array([bias, -bias] + [0.0] * (classes - 2), dtype=np.float32),
        "carrier_table": generator.normal(size=(len(CARRIERS) + 1, classes)).astype(np.float32),
        "origin_table": generator.normal(size=(len(ORIGINS) + 1, classes)).astype(np.float32),
        "column_0": np.array(0, dtype=np.int64),
        "column_1": np.array(1, dtype=np.int64),
    }
    parts = ["from_numbers", "from_carrier", "from_origin"]
    nodes = [
        helper.make_node("IsNaN", ["numbers"], ["missing"]),
        helper.make_node("Where", ["missing", "mean", "numbers"], ["filled"]),
        helper.make_node("Sub", ["filled", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "deviation"], ["scaled"]),
        helper.make_node("Clip", ["scaled", "low", "high"], ["clipped"]),
        helper.make_node("MatMul", ["clipped", "weights"], ["from_numbers"]),
        helper.make_node("Gather", ["categories", "column_0"], ["carrier"], axis=1),
        helper.make_node("Gather", ["categories", "column_1"], ["origin"], axis=1),
        helper.make_node("Gather", ["carrier_table", "carrier"], ["from_carrier"], axis=0),
        helper.make_node("Gather", ["origin_table", "origin"], ["from_origin"], axis=0),
        helper.make_node("Sum", [*parts, "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "late",
        [
            helper.make_tensor_value_info("numbers", TensorProto.FLOAT, ["rows", 3]),
            helper.make_tensor_value_info("categories", TensorProto.INT64, ["rows", 2]),
        ],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", classes])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def with_nodes(*nodes: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> bytes:
    """The logistic regression with further steps behind it, which make "probabilities" of "plain"."""
    model = onnx.load_from_string(late_model())
    model.graph.node[-1].output[0] = "plain"
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in constants.items()
    )
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def endless_model() -> bytes:
    """A model that counts to 2^62 before it answers."""
    inside = helper.make_graph(
        [
            helper.make_node("Identity", ["go_on"], ["still"]),
            helper.make_node("Mul", ["state", "one"], ["next"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["rows", 2]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["rows", 2]),
        ],
    )
    loop = helper.make_node("Loop", ["turns", "yes", "plain"], ["probabilities"], body=inside)
    constants = {
        "turns": np.array(1 << 62, dtype=np.int64),
        "yes": np.array(True),
        "one": np.array(1, dtype=np.float32),
    }
    return with_nodes(loop, constants=constants)


def herd_model() -> bytes:
    """A model that gives every row the mean answer of all rows of the request."""
    mean = helper.make_node("ReduceMean", ["plain"], ["herd"], axes=[0], keepdims=1)
    none = helper.make_node("Mul", ["plain", "zero"], ["nothing"])
    added = helper.make_node("Add", ["nothing", "herd"], ["probabilities"])
    return with_nodes(mean, none, added, constants={"zero": np.array(0, dtype=np.float32)})


def doubled_model() -> bytes:
    """A model whose probabilities sum to two."""
    return with_nodes(helper.make_node("Add", ["plain", "plain"], ["probabilities"]), constants={})


def picture_model(size: int = 16, shape: tuple[int, ...] = (1, 4, 4)) -> bytes:
    """Ten classes of small pictures by one matrix, as ONNX bytes."""
    weights = np.random.default_rng(0).normal(size=(size, 10)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        ],
        "digit",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["rows", *shape])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["rows", 10])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def build_bundle(
    root: Path,
    *,
    name: str = "flights-r1",
    bias: float = 0.0,
    model: bytes | None = None,
    schema: FeatureSchema = SCHEMA,
    inputs: tuple[str, ...] = ("numbers", "categories"),
    data_version: str = "flights@v1.0",
) -> Path:
    """Write a complete bundle to root/<digest> and return its folder."""
    draft = root / f"draft-{name}-{os.urandom(4).hex()}"
    draft.mkdir(parents=True)
    (draft / "model.onnx").write_bytes(late_model(bias) if model is None else model)
    (draft / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    (draft / "features.json").write_text(schema.model_dump_json())
    write_json(draft / "profile.json", {})
    write_json(draft / "parameters.json", {"bias": bias})
    (draft / "environment.lock").write_text("onnxruntime\n")
    files = {path.name: sha256_file(path) for path in sorted(draft.iterdir())}
    manifest = BundleManifest(
        digest="0" * 64,
        name=name,
        recipe="flights",
        created_at="2013-04-01T00:00:00+00:00",
        data_version=data_version,
        data_digest="0" * 64,
        code_commit="0" * 40,
        dirty_hash="",
        run_id="1" * 32,
        cycle="cycle-1",
        parameters={"bias": bias},
        thresholds={},
        metrics={"brier": 0.2},
        lock_digest="2" * 64,
        files=files,
        inputs=inputs,
    )
    manifest = manifest.model_copy(update={"digest": manifest_digest(manifest)})
    write_json(draft / "manifest.json", manifest.model_dump(mode="json"))
    folder = root / manifest.digest
    draft.rename(folder)
    return folder


def point_at(pointer_path: Path, bundle: Path, *, epoch: int, name: str = "") -> str:
    """Make the bundle in this folder the champion; returns its digest."""
    entry = SlotEntry(digest=bundle.name, path=str(bundle), name=name or bundle.name[:8])
    write_pointer(
        pointer_path, Pointer(epoch=epoch, slots={"champion": entry}, split={"champion": 1.0})
    )
    return bundle.name


@dataclass
class Answer:
    """What the server said."""

    status: int
    body: Any
    headers: dict[str, str]


class Client:
    """One keep-alive connection to the server."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.token = token

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send one request as it stands and decode the answer when it is JSON."""
        sent = dict(headers or {})
        if self.token is not None:
            sent.setdefault("Authorization", f"Bearer {self.token}")
        self.connection.request(method, path, body=body, headers=sent)
        reply = self.connection.getresponse()
        content = reply.read()
        kind = reply.getheader("content-type", "")
        decoded = (
            json.loads(content) if kind.startswith("application/json") and content else content
        )
        return Answer(reply.status, decoded, {k.lower(): v for k, v in reply.getheaders()})

    def post(self, path: str, value: object) -> Answer:
        """POST a JSON value."""
        return self.send(
            "POST", path, json.dumps(value).encode(), {"Content-Type": "application/json"}
        )

    def get(self, path: str) -> Answer:
        """GET a path."""
        return self.send("GET", path)

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


@dataclass
class RunningServer:
    """A server process and where it listens."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def client(self, token: str | None = None) -> Client:
        """A new connection."""
        return Client(self.port, token)

    def wait_ready(self, seconds: float = 20.0, token: str | None = None) -> None:
        """Wait until /ready says 200."""
        wait_until(lambda: self.client(token).get("/ready").status == 200, seconds, "ready")

    def kill(self) -> None:
        """SIGKILL: the server gets no chance to tidy up."""
        self.process.kill()
        self.process.wait()

    def stop(self, seconds: float = 20.0) -> int:
        """SIGTERM and wait; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def wait_until(condition: Any, seconds: float, what: str) -> None:
    """Wait until the condition holds, or fail with what was waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds} s for: {what}")


def start_server(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> RunningServer:
    """Start `python -m mlops_workbench.serving.server` on a free port and wait until it listens."""
    stem = os.urandom(4).hex()
    port_file, log = folder / f"port-{stem}", folder / f"server-{stem}.log"
    command = [sys.executable, "-m", "mlops_workbench.serving.server", *arguments]
    command += ["--port", "0", "--port-file", str(port_file)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **(environment or {})}
        )
    wait_until(
        lambda: port_file.exists() or process.poll() is not None, 30, f"the port file; {log}"
    )
    if process.poll() is not None:
        raise AssertionError(f"the server ended with {process.returncode}: {log.read_text()}")
    return RunningServer(process, int(port_file.read_text()), log)


@contextmanager
def serving(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> Iterator[RunningServer]:
    """A ready server for the length of a block."""
    server = start_server(folder, *arguments, environment=environment)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


@contextmanager
def serving_bundle(folder: Path, bundle: Path) -> Iterator[RunningServer]:
    """A ready server of one release for the length of a block, its log in folder/predictions."""
    with serving(
        folder, "--bundle", str(bundle), "--predictions", str(folder / "predictions")
    ) as server:
        server.wait_ready()
        yield server


def logged(predictions: Path, kind: str = "prediction") -> list[dict[str, Any]]:
    """All records of one kind in all segments, in order of the segments' names."""
    records: list[dict[str, Any]] = []
    for segment in sorted((predictions / "segments").glob("*.log")):
        page = read_journal(segment)
        assert not page.damaged, f"damaged lines in {segment}: {page.damaged}"
        records += [record for record in page.records if record["kind"] == kind]
    return records


def start_on_small_disk(
    disk: Path,  # a folder that becomes a file system of 256 KB
    ballast: int,  # bytes of it that are taken
    port_file: Path,
    log: Path,
    *options: object,  # of the server
) -> tuple[RunningServer, Path]:
    """A ready server in a mount namespace of its own, and the disk as it is seen from outside."""
    words = " ".join(map(str, options))
    script = (
        f"mount -t tmpfs -o size=256k tmpfs {disk} && head -c {ballast} /dev/zero > {disk}/ballast && "
        f"exec {sys.executable} -m mlops_workbench.serving.server {words} --port 0 --port-file {port_file}"
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "-rm", "sh", "-c", script], stdout=output, stderr=output
        )
    try:
        wait_until(lambda: port_file.exists() or process.poll() is not None, 30, "port")
        server = RunningServer(process, int(port_file.read_text()), log)
        server.wait_ready()
    except BaseException:
        process.kill()
        raise
    return server, Path(f"/proc/{process.pid}/root{disk}")


def can_mount() -> bool:
    """True where a process may mount a small file system of its own."""
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /mnt"]
    try:
        return subprocess.run(probe, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def make_workspace(root: Path, **serving_settings: object) -> Workspace:
    """A workspace with nothing in it but settings, which is all that a server needs."""
    root.mkdir(parents=True, exist_ok=True)
    lines = ["[workspace]", "name = serving-test", "[serving]"]
    lines += [f"{name} = {value}" for name, value in serving_settings.items()]
    (root / "settings.ini").write_text("\n".join(lines) + "\n")
    return Workspace.open(root)


@dataclass
class Load:
    """Client threads that ask without a pause and keep what they were told."""

    port: int
    answers: list[tuple[float, int, Any]] = field(default_factory=list)  # asked at, status, body
    failures: list[str] = field(default_factory=list)
    running: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)
    expect_death: bool = False

    def start(self, clients: int) -> "Load":
        """Begin to ask."""
        self.running.set()
        for number in range(clients):
            thread = threading.Thread(target=self._ask, args=(number,), daemon=True)
            thread.start()
            self.threads.append(thread)
        return self

    def stop(self) -> None:
        """Stop asking."""
        self.running.clear()
        for thread in self.threads:
            thread.join()

    def _ask(self, number: int) -> None:
        client = Client(self.port)
        asked = 0
        while self.running.is_set():
            asked += 1
            rows = [{**ROW, "hour": asked % 24, "carrier": CARRIERS[asked % 4]}] * (1 + asked % 3)
            ids = [f"{number}-{asked}-{row}" for row in range(len(rows))]
            began = time.monotonic()
            try:
                answer = client.post("/predict", {"rows": rows, "ids": ids})
            except Exception as error:  # noqa: BLE001 - every failure of a request is a finding
                if self.expect_death:
                    return
                self.failures.append(repr(error))
                client = Client(self.port)
                continue
            self.answers.append((began, answer.status, answer.body))
            if answer.status != 200:
                self.failures.append(str(answer))
