"""Two workspaces on one machine, set to the same port: nobody takes the other's server for their own."""

import http.server
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_support import (
    ROW,
    RunningServer,
    build_bundle,
    logged,
    start_server,
    wait_until,
)

from mlops_workbench.core.bundle import read_manifest
from mlops_workbench.core.errors import IntegrityError
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace, create_workspace
from mlops_workbench.experiment.store import mlflow_client
from mlops_workbench.release.deployment import deploy, rollback, write_projection
from mlops_workbench.serving.address import find_server


def mwb(workspace: Workspace, *words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command in a workspace."""
    command = [sys.executable, "-m", "mlops_workbench.cli.main", *words]
    command += ["-w", str(workspace.root)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def a_workspace(folder: Path, name: str, port: int) -> Workspace:
    """A workspace in which flights-r2 has replaced flights-r1."""
    settings = {"serving.port": port, "pages.port": 0}
    workspace = create_workspace(folder / name, name=name, settings=settings)
    ledger = Ledger(workspace.ledger_url)
    for number in (1, 2):
        bundle = build_bundle(workspace.bundles, name=f"flights-r{number}", bias=number / 10)
        manifest = read_manifest(bundle)
        release = {
            "digest": manifest.digest,
            "name": manifest.name,
            "recipe": "flights",
            "data_version": manifest.data_version,
            "run_id": manifest.run_id,
            "path": str(bundle),
        }
        with ledger.decision(
            "gate", actor="ada", subject=manifest.name, verdict="approved", reason="good"
        ) as change:
            change.add_release(release, status="approved")
        deploy(workspace, manifest.name, actor="ada")
    ledger.close()
    return workspace


def champion(workspace: Workspace) -> str:
    """The name of the release that the ledger wants to serve."""
    ledger = Ledger(workspace.ledger_url)
    slot = ledger.slot("champion")
    assert slot is not None
    return ledger.release(slot.digest).name


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Workspace, Workspace, RunningServer]]:
    """The workspaces alpha and beta on one port; the server of alpha has it."""
    port = free_port()
    alpha, beta = (a_workspace(tmp_path, name, port) for name in ("alpha", "beta"))
    command = [sys.executable, "-m", "mlops_workbench.cli.main", "serve", "-w", str(alpha.root)]
    log = tmp_path / "alpha.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    server = RunningServer(process, port, log)
    try:
        wait_until(lambda: (alpha.state / "serving.port").exists(), 60, "the port file")
        server.wait_ready()
        yield alpha, beta, server
    finally:
        if process.poll() is None:
            server.kill()


def service(workspace: Workspace, name: str) -> str:
    """What `mwb status` says of a service."""
    found = json.loads(mwb(workspace, "status", "--json").stdout)
    return next(str(row["state"]) for row in found["services"] if row["service"] == name)


def test_a_server_says_whose_it_is_and_tells_no_path(
    pair: tuple[Workspace, Workspace, RunningServer],
) -> None:
    alpha, beta, server = pair
    health = server.client().get("/health").body
    assert health["workspace"]["name"] == "alpha"
    assert re.fullmatch("[0-9a-f]{16}", health["workspace"]["id"])
    assert str(alpha.root) not in json.dumps(health)
    assert (find_server(alpha).kind, find_server(beta).kind) == ("ours", "another")


def test_everybody_is_told_that_the_port_is_anothers(
    pair: tuple[Workspace, Workspace, RunningServer], tmp_path: Path
) -> None:
    alpha, beta, server = pair
    words = (
        f"another workspace's server (alpha) answers on port {server.port}; "
        "set serving.port or stop it"
    )
    assert (service(alpha, "server"), service(beta, "server")) == ("answers", words)

    checks = json.loads(mwb(beta, "doctor", "--json").stdout)["checks"]
    port = next(check for check in checks if check["what"] == "port of serving")
    assert port["status"] == "taken" and "(alpha)" in port["found"]
    checks = json.loads(mwb(alpha, "doctor", "--json").stdout)["checks"]
    assert next(c for c in checks if c["what"] == "port of serving")["status"] == "ok"

    server.client().post("/predict", {"row": ROW, "id": "a"})
    sent = mwb(beta, "feedback", "-", text="id,label\na,late\n")
    assert sent.returncode == 1 and words in sent.stderr and "nothing was sent" in sent.stderr
    assert logged(alpha.predictions, "feedback") == []
    assert mwb(alpha, "feedback", "-", text="id,label\na,late\n").returncode == 0

    for command in (["serve"], ["up", "server"]):
        refused = mwb(beta, *command)
        assert refused.returncode == 1, refused.stdout
        assert "(alpha)" in refused.stderr and "Traceback" not in refused.stderr
    assert f"mwb serve --port {server.port + 1}" in mwb(beta, "serve").stderr
    again = mwb(alpha, "serve")
    assert again.returncode == 1 and "the server of this workspace answers" in again.stderr


def test_a_rollback_is_decided_and_says_that_nobody_serves_it(
    pair: tuple[Workspace, Workspace, RunningServer],
) -> None:
    alpha, beta, server = pair
    done = mwb(beta, "rollback", "-m", "a trial")
    assert done.returncode == 0, done.stderr
    assert "flights-r1 (flights@v1.0) is the champion again" in done.stdout
    assert "this workspace is not served: another workspace's server (alpha)" in done.stdout
    assert "first answer" not in done.stdout
    assert (champion(beta), champion(alpha)) == ("flights-r1", "flights-r2")
    assert server.client().get("/release").body["release"] == "flights-r2"

    ours = mwb(alpha, "rollback", "-m", "a trial")
    assert ours.returncode == 0 and "first answer of flights-r1" in ours.stdout
    assert server.client().get("/release").body["release"] == "flights-r1"


def test_a_copy_of_a_workspace_is_another_workspace(
    pair: tuple[Workspace, Workspace, RunningServer], tmp_path: Path
) -> None:
    alpha, _, _ = pair
    subprocess.run(["cp", "-a", str(alpha.root), str(tmp_path / "copy")], check=True)
    copied = find_server(Workspace.open(tmp_path / "copy"))
    assert (copied.kind, copied.name) == ("another", "alpha")


def test_a_copy_leaves_the_files_of_the_original_alone(tmp_path: Path) -> None:
    """It serves its own bundles, and what is recorded in it lies beside it."""
    original = a_workspace(tmp_path, "alpha", free_port())
    client = mlflow_client(original)
    run = client.create_run("0")
    client.log_text(run.info.run_id, "of the original", "note.txt")
    shutil.copytree(original.root, tmp_path / "copy")
    copy = Workspace.open(tmp_path / "copy")
    client = mlflow_client(copy)
    kept = client.get_run(run.info.run_id).info.artifact_uri
    assert kept.startswith(copy.artifacts.as_uri())
    client.log_text(client.create_run("0").info.run_id, "of the copy", "note.txt")
    notes = [{p.read_text() for p in w.root.rglob("note.txt")} for w in (original, copy)]
    assert notes == [{"of the original"}, {"of the original", "of the copy"}]
    pointer = write_projection(copy)
    assert pointer is not None
    assert all(Path(entry.path).parent == copy.bundles for entry in pointer.slots.values())
    model = copy.bundles / pointer.slots["champion"].digest / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    assert rollback(copy, actor="test", reason="x").name == "flights-r1"
    with pytest.raises(IntegrityError):
        deploy(copy, "flights-r2", actor="test")
    assert champion(original) == "flights-r2" and Ledger(copy.ledger_url).verify().ok


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b'{"status": "ok", "name": "flights-r2"}', "older version"),
        (b"<html>hello</html>", "another program"),
        (b"[1, 2]", "another program"),
    ],
)
def test_who_does_not_say_whose_it_is_gets_nothing(
    tmp_path: Path, answer: bytes, words: str
) -> None:
    posts = []

    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def do_POST(self) -> None:
            posts.append(self.path)
            self.send_error(500)

        def log_message(self, format: str, *arguments: object) -> None:
            """Keep the terminal quiet."""

    stranger = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=stranger.serve_forever, daemon=True).start()
    workspace = a_workspace(tmp_path, "alpha", stranger.server_port)
    sent = mwb(workspace, "feedback", "-", text="id,label\na,late\n")
    rolled = mwb(workspace, "rollback")
    stranger.shutdown()
    stranger.server_close()
    assert sent.returncode == 1 and words in sent.stderr and posts == []
    assert rolled.returncode == 0 and "this workspace is not served" in rolled.stdout
    assert words in rolled.stdout


def test_a_server_that_hangs_is_no_server_of_ours(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        workspace = a_workspace(tmp_path, "alpha", silent.getsockname()[1])
        sent = mwb(workspace, "feedback", "-", text="id,label\na,late\n")
    assert sent.returncode == 1 and "no answer within 2 s" in sent.stderr


def test_a_port_that_a_killed_server_left_behind_is_nobodys_concern(tmp_path: Path) -> None:
    """The file that tells the port outlives a server that is killed; another server may get that port."""
    alpha, beta = (a_workspace(tmp_path, name, free_port()) for name in ("alpha", "beta"))
    server = start_server(tmp_path, "--workspace", str(alpha.root))
    try:
        server.wait_ready()
        (beta.state / "serving.port").write_text(str(server.port))
        assert find_server(beta).kind == "none"
        assert service(beta, "server") == "not running"
        assert "no server runs in this workspace" in mwb(beta, "rollback").stdout
    finally:
        server.kill()


def test_status_knows_a_running_monitor_from_an_old_look(tmp_path: Path) -> None:
    workspace = a_workspace(tmp_path, "alpha", 0)
    assert service(workspace, "monitor") == "not running"
    assert mwb(workspace, "monitor", "once").returncode == 0
    assert re.fullmatch(r"not running, last looked \d+ s ago", service(workspace, "monitor"))
    command = [sys.executable, "-m", "mlops_workbench.cli.main", "monitor", "watch"]
    command += ["-w", str(workspace.root), "--interval", "0.2"]
    told = tmp_path / "told.txt"
    with told.open("w") as stream:
        watcher = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: service(workspace, "monitor").startswith("runs"), 60, "the monitor")
        wait_until(lambda: told.read_text().count("requests, ") >= 2, 60, "two looks")
    finally:
        watcher.kill()
        watcher.wait()
    assert service(workspace, "monitor").startswith("not running, last looked")


def test_waiting_messages_without_a_channel_say_what_is_missing(tmp_path: Path) -> None:
    workspace = a_workspace(tmp_path, "alpha", 0)
    assert "no channel is set; add one to [notify]" in mwb(workspace, "status").stdout
    sent = mwb(workspace, "notify", "send")
    assert "no channel is set; add one to [notify]" in sent.stderr
