"""Ours and the peers, side by side: environments, models, servers, rounds, one table."""

import http.client
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop
from serving_support import build_bundle, make_workspace

from mlops_workbench.core.pointer import Pointer, SlotEntry, write_pointer
from peers.load import Arrivals, measure, request_bytes

ROOT = Path(__file__).resolve().parent.parent.parent
PEERS = ["mlflow", "mlserver", "bentoml", "litserve", "echo"]
PACKAGES = {
    "mlserver": "mlserver==1.7.1",
    "bentoml": "bentoml==1.4.40",
    "litserve": "litserve==0.2.19",
}
TOKEN = "a-token-for-the-benchmark"
CONNECTIONS = (1, 16, 64)
RATE = 1000.0  # Poisson arrivals a second
GOALS = {  # ours, one worker, divided by the peer: tabular, picture
    "mlflow": (25.0, 15.0),
    "mlserver": (6.0, 4.0),
    "bentoml": (6.0, 4.0),
    "litserve": (6.0, 4.0),
    "echo": (0.5, 0.0),
}


def peer_python(name: str, environments: Path) -> str:
    """The interpreter of a peer's own environment, which is made when it is missing."""
    if name not in PACKAGES:
        return sys.executable
    folder = environments / name
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        print(f"making the environment of {name} in {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        packages = ["torch==2.13.0", "numpy", PACKAGES[name]]
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
        (folder / ".ready").touch()
    return str(python)


def networks(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """A recipe, its network with fixed weights, and one row."""
    import torch

    from mlops_workbench.recipes.flights import flights
    from mlops_workbench.recipes.pictures import fashion

    torch.manual_seed(7)
    recipe = flights if kind == "tabular" else fashion
    generator = np.random.default_rng(7)
    if kind == "tabular":
        rows = flights.source("0:2000")
        arrays = flights.features.encode_columns(rows)
        sample = json.loads(rows.iloc[[7]].to_json(orient="records"))[0]
        row = {feature.name: sample[feature.name] for feature in flights.features.features}
        found = recipe.statistics(arrays)
    else:
        row = {"image": generator.integers(0, 256, (28, 28)).tolist()}
        found = {"mean": 0.3, "deviation": 0.35}
    return recipe, recipe.model(recipe.default_parameters(), found).eval(), row


@dataclass
class Model:
    """The same weights in every form that a server takes, and a request in every protocol."""

    kind: str
    folder: Path
    bundles: list[Path]
    row: dict[str, Any]
    requests: dict[str, bytes] = field(default_factory=dict)


MLFLOW_CODE = """
import sys
import mlflow.pyfunc
import pandas as pd

sys.path.insert(0, {peers!r})
from serve import Model


class Peer(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        from pathlib import Path
        self.model = Model(Path({folder!r}))

    def predict(self, context, model_input, params=None):
        rows = model_input.astype(object).where(model_input.notna(), None).to_dict("records")
        return self.model.answer(rows)


mlflow.models.set_model(Peer())
"""


def make_model(kind: str, scratch: Path) -> Model:
    """Bundles of two releases, the torch module, an MLflow model."""
    import torch

    from mlops_workbench.experiment.export import to_onnx

    recipe, network, row = networks(kind)
    folder = scratch / kind
    (folder / "bundles").mkdir(parents=True)
    onnx = to_onnx(network, recipe.features)
    inputs = recipe.features.inputs
    bundles = [
        build_bundle(
            folder / "bundles",
            name=f"{kind}-r{number}",
            model=onnx,
            schema=recipe.features,
            inputs=inputs,
            bias=number,
        )
        for number in (1, 2)
    ]
    torch.save(network, folder / "module.pt")
    (folder / "features.json").write_text(recipe.features.model_dump_json())
    (folder / "model_code.py").write_text(
        MLFLOW_CODE.format(peers=str(ROOT / "benchmarks" / "peers"), folder=str(folder))
    )
    return Model(kind, folder, bundles, row, requests_of(row))


def requests_of(row: dict[str, Any]) -> dict[str, bytes]:
    """The same row in the protocol of each server."""
    tensors = []
    for name, value in row.items():
        if name == "image":
            flat = [pixel for line in value for pixel in line]
            tensors.append({"name": name, "shape": [28, 28], "datatype": "FP32", "data": flat})
        else:
            datatype = "BYTES" if isinstance(value, str) else "FP64"
            tensors.append({"name": name, "shape": [1], "datatype": datatype, "data": [value]})
    plain = json.dumps({"row": row}).encode()
    return {
        "ours": request_bytes(plain, token=TOKEN),
        "mlflow": request_bytes(json.dumps({"dataframe_records": [row]}).encode(), "/invocations"),
        "mlserver": request_bytes(
            json.dumps({"inputs": tensors}).encode(), "/v2/models/model/infer"
        ),
        "bentoml": request_bytes(plain, "/predict"),
        "litserve": request_bytes(plain, "/predict"),
        "echo": request_bytes(plain, "/predict"),
    }


@dataclass
class Served:
    """A server that is up."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    request: bytes
    start_seconds: float
    log: Path
    memory_mb: float = 0.0
    answered: int = 0
    cpu_us: list[float] = field(default_factory=list)  # of all its processes, a request
    rates: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    p99: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    arrivals: list[tuple[float, float, int]] = field(default_factory=list)  # mean, p99, errors

    def stop(self) -> None:
        """End it with all that it started."""
        for group in {self.process.pid}:
            try:
                os.killpg(group, signal.SIGTERM)
                self.process.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(group, signal.SIGKILL)
                self.process.wait()


def free_port() -> int:
    """A port that is free, and whose two followers are probably free too."""
    while True:
        port = random.randrange(20_000, 30_000, 4)
        try:
            for number in range(port, port + 3):
                socket.create_server(("127.0.0.1", number)).close()
        except OSError:
            continue
        return port


def command_of(
    name: str, model: Model, port: int, environments: Path
) -> tuple[list[str], dict[str, str]]:
    """How a server is started, and its environment."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # mlflow calls uvicorn by name
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "SERVING_BENCHMARK_TOKEN": TOKEN,
    }
    if name.startswith("ours"):
        workers = name.partition("-")[2]
        workspace = make_workspace(
            model.folder / name, token="secret://SERVING_BENCHMARK_TOKEN", workers=workers
        )
        entries = {
            slot: SlotEntry(digest=bundle.name, path=str(bundle), name=f"{model.kind}-{slot}")
            for slot, bundle in zip(("champion", "challenger"), model.bundles, strict=True)
        }
        split = {"champion": 0.9, "challenger": 0.1}
        pointer = Pointer(epoch=1, slots=entries, split=split, salt="benchmark")
        write_pointer(workspace.pointer_path, pointer)
        module = ["-m", "mlops_workbench.serving.server", "--workspace", str(workspace.root)]
        return [sys.executable, *module, "--port", str(port)], environment
    if name == "mlflow":
        saved = model.folder / "mlflow-model"
        if not saved.exists():
            environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{model.folder}/mlflow.db"
            code = "import sys, mlflow; mlflow.pyfunc.save_model(sys.argv[1], python_model=sys.argv[2], pip_requirements=[])"
            make = [sys.executable, "-c", code, str(saved), str(model.folder / "model_code.py")]
            subprocess.run(make, check=True, env=environment, cwd=model.folder, capture_output=True)
        serve = ["-m", "mlflow", "models", "serve", "-m", str(saved), "--env-manager", "local"]
        return [sys.executable, *serve, "--port", str(port), "--workers", "1"], environment
    script = [str(ROOT / "benchmarks" / "peers" / "serve.py"), name, str(model.folder), str(port)]
    return [peer_python(name, environments), *script], environment


def start(name: str, model: Model, environments: Path) -> Served:
    """Start a server and wait for its first right answer."""
    port = free_port()
    command, environment = command_of(name, model, port, environments)
    log = model.folder / f"{name}.log"
    began = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=model.folder,
            start_new_session=True,
        )
    request = model.requests["ours" if name.startswith("ours") else name]
    while not answers(port, request):
        if process.poll() is not None or time.perf_counter() - began > 120:
            raise RuntimeError(f"{name} did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.02)
    return Served(name, process, port, request, time.perf_counter() - began, log)


def answers(port: int, request: bytes) -> bool:
    """Whether a request is answered with 200."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            connection.sendall(request)
            reply = http.client.HTTPResponse(connection)
            reply.begin()
            reply.read()
            return reply.status == 200
    except (OSError, http.client.HTTPException):
        return False


def memory_mb(served: Served) -> float:
    """Memory of the whole process tree, shared pages divided among those that share them."""
    process = psutil.Process(served.process.pid)
    tree = [process, *process.children(recursive=True)]
    return float(sum(each.memory_full_info().pss for each in tree)) / 1e6


def cpu_seconds(served: Served) -> float:
    """Processor time of the whole process tree; unlike requests a second it hardly depends on who else is busy."""
    process = psutil.Process(served.process.pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return float(sum(each.user + each.system for each in times))


def one_round(servers: list[Served], seconds: float) -> None:
    """Every load on every server, one after the other."""
    for connections in CONNECTIONS:
        for served in servers:
            before = cpu_seconds(served)
            found = uvloop.run(measure(served.port, served.request, connections, seconds))
            served.cpu_us.append((cpu_seconds(served) - before) / len(found) * 1e6)
            served.answered += len(found)
            served.rates[connections].append(len(found) / seconds)
            served.p99[connections].append(found[len(found) * 99 // 100] * 1000)
    for served in servers:
        arrivals = Arrivals(served.port, served.request, RATE, seconds)
        uvloop.run(arrivals.run())
        found = sorted(arrivals.latencies) or [float("nan")]
        p99 = found[len(found) * 99 // 100] * 1000
        errors = arrivals.errors + arrivals.refused
        served.arrivals.append((statistics.fmean(found) * 1000, p99, errors))


def table(servers: list[Served], kind: str) -> list[str]:
    """The medians of all rounds, and ours divided by each."""
    ours = next((each for each in servers if each.name == "ours-1"), None)
    middle = statistics.median
    lines = [
        f"\n{kind}: one row a request; req/s (p99 ms) at 1, 16, 64 connections; Poisson {RATE:g}/s mean / p99 ms, errors",
        f"{'server':<10}"
        + "".join(f"{count:>18}" for count in CONNECTIONS)
        + f"{'Poisson':>24}{'CPU us':>8}{'start s':>9}{'MB':>7}   ours / it (goal)",
    ]
    for each in servers:
        cells = "".join(
            f"{middle(each.rates[count]):>9.0f} ({middle(each.p99[count]):>6.1f})"
            for count in CONNECTIONS
        )
        means, tails, errors = zip(*each.arrivals, strict=True)
        poisson = f"{middle(means):>8.2f} /{middle(tails):>7.2f}, {sum(errors):>4}"
        ratio = ""
        if ours is not None and each is not ours:
            ratios = [middle(ours.rates[c]) / middle(each.rates[c]) for c in CONNECTIONS]
            ratio = " ".join(f"{value:.2f}" for value in ratios)
            goal = GOALS.get(each.name, (0.0, 0.0))[kind != "tabular"]
            ratio += f" ({goal:g})" if goal else ""
            ratio += f"; CPU {middle(each.cpu_us) / middle(ours.cpu_us):.1f}"
            if each.name == "ours-2":
                ratio = " ".join(f"{1 / value:.2f}" for value in ratios) + " of one (goal 1.6)"
        lines.append(
            f"{each.name:<10}{cells}{poisson:>24}{middle(each.cpu_us):>8.0f}{each.start_seconds:>9.2f}{each.memory_mb:>7.0f}   {ratio}"
        )
    return lines


def compare(
    peers: list[str], kinds: list[str], rounds: int, seconds: float, environments: Path
) -> int:
    """Measure ours with one and two workers and the peers; print a table a kind."""
    names = ["ours-1", "ours-2", *peers]
    for name in peers:
        peer_python(name, environments)
    with tempfile.TemporaryDirectory(prefix="serving-peers-") as scratch:
        for kind in kinds:
            model = make_model(kind, Path(scratch))
            servers: list[Served] = []
            try:
                for name in names:
                    servers.append(start(name, model, environments))
                for served in servers:
                    uvloop.run(measure(served.port, served.request, 4, 0.5))
                for _ in range(rounds):
                    one_round(servers, seconds)
                for served in servers:
                    served.memory_mb = memory_mb(served)
                check_log(model, servers)
            finally:
                for served in servers:
                    served.stop()
            print("\n".join(table(servers, kind)), flush=True)
    print(
        f"\nmedians of {rounds} rounds of {seconds:g} s on {os.cpu_count()} cores, the client included; "
        f"load average of the machine {os.getloadavg()[0]:.1f}\n"
        "CPU us: processor time of all its processes a request; behind the goal: how many times ours that is"
    )
    return 0


def check_log(model: Model, servers: list[Served]) -> None:
    """Nothing that was answered is missing in our log."""
    for served in servers:
        if served.name.startswith("ours"):
            segments = (model.folder / served.name).rglob("segments/*.log")
            lines = sum(path.read_bytes().count(b'"kind":"prediction"') for path in segments)
            assert lines >= served.answered, (served.name, lines, served.answered)
