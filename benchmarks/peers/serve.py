"""One peer that serves the model of a folder; runs in the peer's own environment.

    python benchmarks/peers/serve.py litserve|bentoml|mlserver|echo MODEL-FOLDER PORT

The model is the same torch module with the same encoding of rows as ours, served the way the
peer's first page shows it: one worker, no batching, its own access log off.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(os.environ.get("PEER_MODEL", sys.argv[2] if len(sys.argv) > 2 else "."))


class Model:
    """The torch module behind rows of JSON."""

    def __init__(self, folder: Path) -> None:
        import torch

        from mlops_workbench.core.features import FeatureSchema

        torch.set_num_threads(1)
        self.torch = torch
        self.schema = FeatureSchema.model_validate_json((folder / "features.json").read_text())
        self.module = torch.load(folder / "module.pt", weights_only=False).eval()

    def answer(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Class and probabilities of each row."""
        arrays = self.schema.encode_rows(rows)
        tensors = {name: self.torch.from_numpy(array) for name, array in arrays.items()}
        with self.torch.inference_mode():
            shares = self.module(**tensors).tolist()
        classes = self.schema.classes
        return [
            {
                "prediction": classes[row.index(max(row))],
                "probabilities": dict(zip(classes, row, strict=True)),
            }
            for row in shares
        ]


def litserve(port: int) -> None:
    """LitServe with its default settings."""
    import litserve as ls
    from litserve_api import PeerApi

    os.environ["PEER_MODEL"] = str(FOLDER)
    server = ls.LitServer(PeerApi(), accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=port,
        generate_client_file=False,
        log_level="warning",
        num_api_servers=1,
    )


def bentoml(port: int) -> None:
    """BentoML through its own command."""
    here = Path(__file__).resolve()
    os.environ["PEER_MODEL"] = str(FOLDER)
    os.environ["BENTOML_DO_NOT_TRACK"] = "true"
    os.chdir(here.parent)
    command = ["serve", "bento_service:PeerService", "--port", str(port), "--host", "127.0.0.1"]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", *command])


def mlserver(port: int) -> None:
    """MLServer with a runtime of its own, in the process that answers."""
    folder = FOLDER / "mlserver"
    folder.mkdir(exist_ok=True)
    settings = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": port + 1,
        "metrics_port": port + 2,
        "parallel_workers": 0,
        "debug": False,
        "access_logger": None,
    }
    settings.pop("access_logger")
    (folder / "settings.json").write_text(json.dumps(settings))
    model = {"name": "model", "implementation": "mlserver_runtime.PeerRuntime"}
    (folder / "model-settings.json").write_text(json.dumps(model))
    os.environ["PEER_MODEL"] = str(FOLDER)
    os.environ["PYTHONPATH"] = (
        f"{Path(__file__).resolve().parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    )
    command = Path(sys.executable).parent / "mlserver"
    os.execv(command, [str(command), "start", str(folder)])


def echo(port: int) -> None:
    """A bare app on the HTTP server that ours stands on: it reads the body and sends it back."""
    import uvicorn

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive()).get("body", b"")
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    uvicorn.run(
        app,
        host="127.0.0.1",
        port=port,
        http="httptools",
        loop="uvloop",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
    )


if __name__ == "__main__":
    {"litserve": litserve, "bentoml": bentoml, "mlserver": mlserver, "echo": echo}[sys.argv[1]](
        int(sys.argv[3])
    )
