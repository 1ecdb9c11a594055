"""What somebody who wishes us ill puts into a bundle or into an address: nothing runs, nothing outside is read, the old release goes on."""

import json
import os
import pickle
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper, numpy_helper
from rollout_support import release_pair
from serving_support import (
    ROW,
    build_bundle,
    late_model,
    make_workspace,
    point_at,
    serving,
    wait_until,
)
from test_control import bearer, control_plane

from mlops_workbench.core.access import grant
from mlops_workbench.core.bundle import BundleManifest, manifest_digest
from mlops_workbench.core.errors import WorkbenchError
from mlops_workbench.core.files import sha256_file, write_json
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.data.versions import DataStore

CANARY = "canary-7f3a9c: nobody reads this"


class Trap:
    """Whoever unpickles it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"echo sprung > '{self.path}'",)


def sign(folder: Path, **changes: object) -> Path:
    """The manifest of a bundle written anew over its files as they are, as one who can write there would do; the new folder."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    manifest |= {"digest": "0" * 64, "files": files, **changes}
    made = BundleManifest.model_validate(manifest)
    made = made.model_copy(update={"digest": manifest_digest(made)})
    write_json(folder / "manifest.json", made.model_dump(mode="json"))
    return folder.rename(folder.parent / made.digest)


def torch_zip(trap: Path) -> bytes:
    """The zip that `torch.save` makes, with a pickle that runs a command."""
    import io

    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as packed:
        packed.writestr("model/data.pkl", pickle.dumps(Trap(trap)))
        packed.writestr("../../../sprung", "slipped out")
    return content.getvalue()


def outside_weights(location: str) -> bytes:
    """A model whose weights are said to lie in another file."""
    model = onnx.load_from_string(late_model())
    tensor = model.graph.initializer[0]
    size = len(numpy_helper.to_array(tensor).tobytes())
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for name, value in (("location", location), ("offset", "0"), ("length", str(size))):
        tensor.external_data.add(key=name, value=value)
    return bytes(model.SerializeToString())


def bomb() -> bytes:
    """A model that asks for four terabytes when it is run."""
    shape = numpy_helper.from_array(np.array([1 << 40], dtype=np.int64), "shape")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["huge"]),
        helper.make_node("ReduceSum", ["huge"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["numbers"], ["given"], keepdims=0),
        helper.make_node("Add", ["total", "given"], ["probabilities"]),
    ]
    whole = onnx.load_from_string(late_model()).graph
    graph = helper.make_graph(nodes, "bomb", list(whole.input), list(whole.output), [shape])
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString())


def foreign_operator() -> bytes:
    """A model that wants an operator of somebody's own library."""
    model = onnx.load_from_string(late_model())
    model.graph.node[0].domain = "evil.example"
    model.opset_import.append(helper.make_opsetid("evil.example", 1))
    return bytes(model.SerializeToString())


def malicious(root: Path, trap: Path, secret: Path) -> dict[str, Path]:
    """Bundles whose hashes are right, in the hands of somebody who can write files but not the ledger."""

    def bundle(name: str, model: bytes | None = None) -> Path:
        return build_bundle(root, name=name, bias=0.01 * len(name), model=model)

    found = {
        "a pickle as the model": bundle("pickle", pickle.dumps(Trap(trap))),
        "a torch archive as the model": bundle("torch", torch_zip(trap)),
        "weights by a relative path": bundle("relative", outside_weights("../../canary.txt")),
        "weights by an absolute path": bundle("absolute", outside_weights(str(secret))),
        "an operator of a library": bundle("operator", foreign_operator()),
        "four terabytes": bundle("bomb", bomb()),
    }
    folder = bundle("upwards")
    found["a file above the bundle"] = sign(
        folder,
        files={
            "model.onnx": sha256_file(folder / "model.onnx"),
            "../../canary.txt": sha256_file(secret),
        },
    )
    folder = bundle("rooted")
    found["a file by its absolute path"] = sign(
        folder,
        files={"model.onnx": sha256_file(folder / "model.onnx"), str(secret): sha256_file(secret)},
    )
    folder = bundle("link")
    (folder / "profile.json").unlink()
    (folder / "profile.json").symlink_to(secret)
    found["a link to a file"] = sign(folder)
    folder = bundle("linked-folder")
    (folder / "more").symlink_to(secret.parent)
    found["a link to a folder"] = folder
    folder = bundle("nested")
    (folder / "features.json").write_text('{"features": ' + "[" * 100_000 + "]" * 100_000 + "}")
    found["a schema without bottom"] = sign(folder)
    folder = bundle("manifest")
    (folder / "manifest.json").write_text("[" * 200_000)
    found["a manifest without bottom"] = folder
    return found


def harmless(root: Path, trap: Path) -> Path:
    """A bundle with code, a pickle and a header of 2^62 bytes beside a good model: none of it is ever opened."""
    folder = build_bundle(root, name="luggage", bias=0.3)
    (folder / "code").mkdir()
    for name in ("__init__.py", "sitecustomize.py", "conftest.py"):
        (folder / "code" / name).write_text(f"open({str(trap)!r}, 'w').write('sprung')")
    (folder / "model.pkl").write_bytes(pickle.dumps(Trap(trap)))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    return sign(folder)


def test_malicious_bundles_run_nothing_read_nothing_and_never_serve(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w")
    trap, secret = tmp_path / "sprung", tmp_path / "canary.txt"
    secret.write_text(CANARY * 100)
    good = build_bundle(workspace.bundles, name="flights-good")
    bundles = malicious(workspace.bundles, trap, secret)
    assert len(bundles) == 12
    point_at(workspace.pointer_path, good, epoch=1)
    with serving(tmp_path, "--workspace", str(workspace.root)) as server:
        server.wait_ready()
        client = server.client()
        for epoch, (what, folder) in enumerate(bundles.items(), start=2):
            point_at(workspace.pointer_path, folder, epoch=epoch, name=f"evil-{epoch}")
            wait_until(
                lambda f=folder: (
                    (client.get("/health").body["problem"] or {}).get("digest") == f.name
                ),
                20,
                f"refusal of {what}",
            )
            health = client.get("/health").body
            assert health["digest"] == good.name and health["problem"]["reason"], what
            assert CANARY not in json.dumps(health), what
            assert client.post("/predict", {"row": ROW}).body["digest"] == good.name, what
        luggage = harmless(workspace.bundles, trap)
        point_at(workspace.pointer_path, luggage, epoch=90)
        wait_until(
            lambda: client.post("/predict", {"row": ROW}).body["digest"] == luggage.name,
            20,
            "it serves",
        )
    assert not trap.exists(), "something was run"
    assert not (tmp_path.parent / "sprung").exists() and not (tmp_path / "w" / "sprung").exists()


def test_a_header_of_exabytes_is_refused_where_weights_are_read(tmp_path: Path) -> None:
    """Training goes on from safetensors; a length that cannot be is an error, not an allocation."""
    import safetensors
    import safetensors.torch

    path = tmp_path / "model.safetensors"
    for length in (1 << 62, 1 << 40, (1 << 64) - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(safetensors.SafetensorError):
            safetensors.torch.load_file(path)


UPWARDS = (
    "../", "..\\", "..%2f", "%2e%2e/", "%2e%2e%2f", "..%5c", "%252e%252e%252f", "....//", "..;/", "%c0%ae%c0%ae/",
    "..%00/", "/./../", "//", "~/", "file:///",
)  # fmt: skip
TARGETS = ("canary.txt", "etc/passwd", ".mwb/access.json", "settings.ini")
TRAVERSALS = [up * (1 if up in ("//", "~/", "file:///") else 6) + target for up in UPWARDS for target in TARGETS]  # fmt: skip


def raw(port: int, method: str, target: str, headers: dict[str, str], body: bytes = b"") -> bytes:
    """The whole answer to a request whose target no client library has tidied."""
    lines = [
        f"{method} {target} HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        f"Content-Length: {len(body)}",
    ]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        parts = []
        while part := connection.recv(65_536):
            parts.append(part)
    return b"".join(parts)


def gave_away(answer: bytes) -> bool:
    """Whether an answer holds something that lies outside of what may be asked."""
    return any(
        word in answer
        for word in (CANARY.encode(), b"root:x:0:0", b'"hash"', b"maximum_body_bytes")
    )


def test_sixty_ways_upwards_lead_nowhere(tmp_path: Path) -> None:
    """On both ports, as addresses and as names of releases, models and data versions."""
    workspace, _, _ = release_pair(tmp_path / "w")
    (tmp_path / "canary.txt").write_text(CANARY)
    (workspace.root / "canary.txt").write_text(CANARY)
    admin = bearer(grant(workspace, "boss", "admin", actor="test"))
    assert len(TRAVERSALS) == len(set(TRAVERSALS)) == 60
    with (
        serving(tmp_path, "--workspace", str(workspace.root)) as server,
        control_plane(workspace) as address,
    ):
        server.wait_ready()
        plane = int(address.rpartition(":")[2])
        for text in TRAVERSALS:
            asked = [
                raw(server.port, method, prefix + text, {})
                for method in ("GET", "POST")
                for prefix in ("/", "/predict/", "/v2/models/")
            ]
            asked += [
                raw(plane, "GET", prefix + text, admin)
                for prefix in ("/", "/api/releases/", "/api/tokens/")
            ]
            body = json.dumps({"reason": "x", "version": f"{text}@v1.0"}).encode()
            kind = {"Content-Type": "application/json"}
            asked.append(raw(plane, "POST", "/api/data/rollback", {**admin, **kind}, body))
            body = json.dumps({"reason": "x", "release": text}).encode()
            asked.append(raw(plane, "POST", "/api/rollout", {**admin, **kind}, body))
            for answer in asked:
                status = int(answer.split()[1])
                assert 400 <= status < 500 and not gave_away(answer), (text, answer[:300])
    store = DataStore(workspace)
    for text in TRAVERSALS:
        for ask in (
            lambda t=text: store.resolve(f"{t}@v1.0"),
            lambda t=text: Ledger(workspace.ledger_url).release(t),
            lambda t=text: store.snapshot(
                t, pd.DataFrame({"a": [1], "b": [1]}), key="a", label="b"
            ),
        ):
            with pytest.raises(WorkbenchError):
                ask()
    assert sorted(
        p.name for p in tmp_path.iterdir() if p.suffix != ".log" and not p.name.startswith("port-")
    ) == ["canary.txt", "w"]
