"""The control plane: a real server, every route against every role, revoked tokens, guessing, rollouts and roll-backs by HTTP."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import httpx
import pandas as pd
import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from rollout_support import decisions, release_pair, split
from serving_support import ROW, serving

from mlops_workbench.cli.main import main
from mlops_workbench.core.access import MOVE_ROLES, ROLES
from mlops_workbench.core.clock import iso, now
from mlops_workbench.core.errors import GateRefusedError, IntegrityError
from mlops_workbench.core.grants import access_path, grant, revoke
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.versions import DataStore
from mlops_workbench.pipeline.control import OPEN_ROUTES, create_control, needed_role
from mlops_workbench.release.approvals import approve_release
from mlops_workbench.release.deployment import clear_release, deploy
from mlops_workbench.release.regime_watch import tend_regimes
from mlops_workbench.release.regimes import Regime, register_regime
from mlops_workbench.release.rollout_judge import Move, seen_by_two
from mlops_workbench.release.rollouts import abort_rollout, promote_rollout, start_rollout


@contextmanager
def control_plane(workspace: Workspace) -> Iterator[str]:
    """The address of a running `mwb control`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mlops_workbench.cli.main", "control", "--port", "0"]
        + ["-w", str(workspace.root)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        assert "control plane on http://127.0.0.1:" in line, line + process.stderr.read()
        address = line.split(" on ")[1].strip()
        until = time.monotonic() + 30
        while time.monotonic() < until:
            try:
                assert httpx.get(f"{address}/health").json() == {"status": "ok"}
                break
            except httpx.TransportError:
                time.sleep(0.05)
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def bearer(token: str) -> dict[str, str]:
    """The header of a token."""
    return {"Authorization": f"Bearer {token}"}


def test_every_route_lets_in_whom_it_names_and_nobody_else(tmp_path: Path) -> None:
    """The live table of routes times the roles: strangers 401, lower roles 403, the others are not refused for who they are."""
    workspace, _, _ = release_pair(tmp_path / "w")
    tokens = {role: grant(workspace, role, role, actor="test") for role in ROLES}
    routes = [route for route in create_control(workspace).routes if isinstance(route, APIRoute)]
    assert len(routes) >= 20
    with control_plane(workspace) as address, httpx.Client(base_url=address) as client:
        for route in routes:
            path = route.path.replace("{name}", "none").replace("{identity}", "none")
            for method in route.methods:
                needed = needed_role(route)
                if route.path in OPEN_ROUTES:
                    assert client.request(method, path).status_code == 200
                    continue
                assert needed is not None, f"{path} asks for no role"
                content = {} if method == "GET" else {"json": {"wrong": 1}}
                for role, token in tokens.items():
                    status = client.request(
                        method, path, headers=bearer(token), **content
                    ).status_code
                    allowed = ROLES.index(role) >= ROLES.index(needed)
                    assert (status != 403) == allowed, (method, path, role, status)
                    assert status not in (401, 500), (method, path, role, status)
        stranger = client.post("/api/rollback", json={"reason": "x"})
        assert stranger.status_code == 401 and "mwb access add" in stranger.json()["detail"]
    assert decisions(workspace) == [], "nothing of this changed anything"
    asked = {route.path.rpartition("/")[2]: needed_role(route) for route in routes}
    assert MOVE_ROLES.items() <= asked.items(), "a button of the page takes the role of its route"


def test_a_revoked_token_is_refused_at_the_next_request(tmp_path: Path) -> None:
    workspace, _, _ = release_pair(tmp_path / "w")
    admin = grant(workspace, "boss", "admin", actor="test")
    with control_plane(workspace) as address, httpx.Client(base_url=address) as client:
        made = client.post(
            "/api/tokens", headers=bearer(admin), json={"owner": "ann", "role": "viewer"}
        )
        token = made.json()["token"]
        assert client.get("/api/me", headers=bearer(token)).json()["owner"] == "ann"
        identity = token.split("_")[1]
        begun = time.monotonic()
        assert main(["access", "revoke", identity, "-m", "left", "-w", str(workspace.root)]) == 0
        assert client.get("/api/me", headers=bearer(token)).status_code == 401
        assert time.monotonic() - begun < 1.0
        listed = client.get("/api/tokens", headers=bearer(admin)).json()
        assert {row["owner"]: bool(row["revoked_at"]) for row in listed} == {
            "ann": True,
            "boss": False,
        }
        assert all("hash" not in row for row in listed)
        short = grant(workspace, "bob", "admin", actor="test", days=0.5 / 86_400)
        assert client.get("/api/me", headers=bearer(short)).status_code == 200
        time.sleep(0.6)
        assert client.get("/api/me", headers=bearer(short)).status_code == 401
    assert Ledger(workspace.ledger_url).verify().ok


def test_who_guesses_has_to_wait_and_the_others_do_not(tmp_path: Path) -> None:
    workspace, _, _ = release_pair(tmp_path / "w")
    token = grant(workspace, "ann", "viewer", actor="test")
    with control_plane(workspace) as address, httpx.Client(base_url=address) as client:
        seen = [
            client.get("/api/me", headers=bearer(f"mwb_{n:08x}_guess")).status_code
            for n in range(30)
        ]
        assert seen == [401] * 10 + [429] * 20
        assert client.get("/api/me").status_code == 401, "who shows no token has guessed nothing"
        told = client.get("/api/me", headers=bearer("mwb_00000000_guess"))
        assert told.status_code == 429 and 1 <= int(told.headers["retry-after"]) <= 61
        assert client.get("/api/me", headers=bearer(token)).status_code == 200


def test_a_token_changed_behind_the_ledgers_back_is_found(tmp_path: Path) -> None:
    """Whoever edits the table to make himself an admin is told of by the audit."""
    import sqlite3

    workspace, _, _ = release_pair(tmp_path / "w")
    grant(workspace, "mallory", "viewer", actor="test")
    with sqlite3.connect(workspace.ledger_url.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE tokens SET role = 'admin' WHERE owner = 'mallory'")
    report = Ledger(workspace.ledger_url).verify()
    assert not report.ok and "role of" in report.problems[0].detail


def test_a_rollout_by_http_and_back(tmp_path: Path) -> None:
    """Started, paused, resumed, aborted; promoted and rolled back; each with its person in the audit."""
    workspace, old, new = release_pair(tmp_path / "w")
    ann = bearer(grant(workspace, "ann", "deployer", actor="test"))
    with control_plane(workspace) as address, httpx.Client(base_url=address) as client:

        def post(path: str, **body: object) -> httpx.Response:
            return client.post(path, headers=ann, json={"reason": "by test", **body})

        wrong = post("/api/rollout", release=new, steps="50,5")
        assert wrong.status_code == 422 and "rising percentages" in wrong.json()["detail"]
        assert post("/api/rollout", release=new, steps="10,50").json()["status"] == "running"
        assert split(workspace) == {"champion": 0.9, "challenger": 0.1}
        assert client.get("/api/rollout", headers=ann).json()["next"]["kind"] == "wait"
        assert post("/api/rollout", release=new, steps="10").status_code == 409
        assert post("/api/rollout/pause").json()["status"] == "paused"
        assert post("/api/rollout/resume").json()["status"] == "running"
        assert post("/api/rollout/abort", bar=True).json()["status"] == "aborted"
        assert post("/api/rollout", release=new, steps="10").status_code == 409, "barred"
        assert post(f"/api/releases/{new}/clear").status_code == 200
        assert post("/api/rollout", release=new, steps="10").status_code == 200
        assert post("/api/rollout/promote").json()["status"] == "promoted"
        assert client.get("/api/status", headers=ann).json()["champion"] == new
        assert post("/api/rollback", to=old).json()["name"] == old
        assert client.get("/api/status", headers=ann).json()["champion"] == old
        document = client.get("/openapi.json", headers=ann).json()
        assert "/api/rollback" in document["paths"]
    verdicts = ["started", "paused", "resumed", "aborted", "started", "promoted"]
    assert decisions(workspace) == verdicts
    rows = Ledger(workspace.ledger_url).decisions(limit=100)
    assert {row.actor.partition(" (token")[0] for row in rows if row.kind == "rollout"} == {"ann"}


def test_an_operator_leads_data_back_and_not_forward(tmp_path: Path) -> None:
    """What was taken back comes in again by a deployer."""
    workspace, _, _ = release_pair(tmp_path / "w")
    store = DataStore(workspace)
    for rows in (10, 20):
        table = pd.DataFrame({"key": range(rows), "late": [0, 1] * (rows // 2)})
        store.snapshot("own", table, key="key", label="late")
    tokens = {
        role: bearer(grant(workspace, "ann", role, actor="test"))
        for role in ("operator", "deployer")
    }
    asked = [("operator", "own@v1.0"), ("operator", "own@v1.1"), ("deployer", "own@v1.1")]
    with TestClient(create_control(workspace)) as client:
        told = [
            client.post(
                "/api/data/rollback", headers=tokens[role], json={"version": ref, "reason": "x"}
            )
            for role, ref in asked
        ]
    assert [answer.status_code for answer in told] == [200, 403, 200]
    assert "found own@v1.1; the role deployer may" in told[1].json()["detail"]


def test_without_a_file_of_tokens_nobody_gets_in(tmp_path: Path) -> None:
    """The file that the server reads is lost or damaged: everybody is a stranger, and the next start writes it again."""
    workspace, _, _ = release_pair(tmp_path / "w")
    ann = bearer(grant(workspace, "ann", "admin", actor="test"))
    with control_plane(workspace) as address, httpx.Client(base_url=address) as client:
        kept = access_path(workspace).read_bytes()
        for content in (b"", b"{", b"[1]", b'[{"id": 1}]'):
            access_path(workspace).write_bytes(content)
            assert client.get("/api/me", headers=ann).status_code == 401
        access_path(workspace).unlink()
        assert client.get("/api/me", headers=ann).status_code == 401
        access_path(workspace).write_bytes(kept)
        assert client.get("/api/me", headers=ann).status_code == 200
        access_path(workspace).unlink()
    with control_plane(workspace) as address:
        assert httpx.get(f"{address}/api/me", headers=ann).status_code == 200


def with_four_eyes(workspace: Workspace) -> Workspace:
    """The workspace, opened again with the setting."""
    place = workspace.root / "settings.ini"
    place.write_text(place.read_text().replace("four_eyes = no ", "four_eyes = yes "))
    return Workspace.open(workspace.root)


def test_four_eyes_are_two_persons_and_the_same_files(tmp_path: Path) -> None:
    """Neither who asks nor a second token of theirs; an artefact swapped after the approval is refused."""
    workspace, _, new = release_pair(tmp_path / "w")
    workspace = with_four_eyes(workspace)
    with pytest.raises(GateRefusedError, match="found none; nothing was promoted"):
        deploy(workspace, new, actor="ann")
    approve_release(workspace, new, actor="ann (token 00000001)", reason="mine")
    with pytest.raises(GateRefusedError, match="only the approval of ann"):
        deploy(workspace, new, actor="ann (token 00000002)")
    approve_release(workspace, new, actor="bob", reason="looked at the slices")
    ledger = Ledger(workspace.ledger_url)
    model = Path(ledger.release(new).path) / "model.onnx"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IntegrityError):
        deploy(workspace, new, actor="ann")
    assert split(workspace) == {"champion": 1.0}
    model.write_bytes(content)
    later = {"passed": True, "reason": "measured again", "results": []}
    with ledger.decision(
        "gate", actor="x", subject=new, verdict="approved", reason="again", evidence=later
    ):
        pass
    with pytest.raises(GateRefusedError, match="expected the approval of a second person"):
        deploy(workspace, new, actor="ann")
    approve_release(workspace, new, actor="bob", reason="looked at the new report")
    assert deploy(workspace, new, actor="ann").name == new


def test_who_started_a_rollout_is_not_its_second_person(tmp_path: Path) -> None:
    """Although a controller promotes it; and an approval does not outlive a bar."""
    workspace, _, new = release_pair(tmp_path / "w")
    workspace = with_four_eyes(workspace)
    ledger = Ledger(workspace.ledger_url)
    rollout = start_rollout(workspace, new, actor="ann (token 00000001)", shares=(0.5,))
    approve_release(workspace, new, actor="ann", reason="mine")
    with pytest.raises(GateRefusedError, match="only the approval of ann"):
        promote_rollout(workspace, rollout, actor="controller 1", reason="better")
    approve_release(workspace, new, actor="bob", reason="looked at the slices")
    abort_rollout(workspace, rollout, actor="controller 1", reason="worse", bar=True)
    clear_release(workspace, new, actor="ann", reason="it was the traffic")
    rollout = start_rollout(workspace, new, actor="ann", shares=(0.5,))
    with pytest.raises(GateRefusedError, match="second person for flights-r2, found none"):
        promote_rollout(workspace, rollout, actor="controller 1", reason="better")
    approve_release(workspace, new, actor="bob", reason="looked again")
    promote_rollout(workspace, rollout, actor="controller 1", reason="better")
    assert split(workspace) == {"champion": 1.0}
    assert ledger.verify().ok


def test_the_loop_waits_for_a_person_and_calls_once(tmp_path: Path) -> None:
    """A rollout that is better is promoted as soon as somebody has approved it, not before."""
    workspace, _, new = release_pair(tmp_path / "w")
    workspace = with_four_eyes(workspace)
    ledger = Ledger(workspace.ledger_url)
    release = ledger.release(new)
    rollout = start_rollout(workspace, new, actor="loop", shares=(0.5,))
    better = Move("promote", "better: accuracy +0.03")
    for _ in range(2):
        move = seen_by_two(workspace, ledger, rollout, better, "controller 1")
        assert move.kind == "wait" and f"mwb release approve {new}" in move.reason
    asked = [m for m in ledger.messages() if "second person" in m.title]
    assert len(asked) == 1
    approve_release(workspace, new, actor="ann", reason="fine")
    assert seen_by_two(workspace, ledger, rollout, better, "controller 1") == better
    model = Path(release.path) / "model.onnx"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # swapped after the approval
    with pytest.raises(IntegrityError):
        promote_rollout(workspace, rollout, actor="controller 1", reason="better")
    assert split(workspace) == {"champion": 0.5, "challenger": 0.5}
    assert ledger.release(release.digest).status == "approved"


def test_a_special_needs_its_approval_at_the_moment_of_each_switch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was registered before the settings asked for a second person: by hand, over HTTP and by the calendar it waits for one."""
    workspace, old, new = release_pair(tmp_path / "w")
    begin = now() - timedelta(hours=1)
    window = Regime("hand", new, since=iso(begin), until=iso(begin + timedelta(days=1)))
    register_regime(workspace, window, actor="ann (token 00000001)", reason="a test")
    workspace, ledger = with_four_eyes(workspace), Ledger(workspace.ledger_url)
    special = ledger.release(new)
    with ledger.decision(
        "rehearsal", actor="x", subject="hand", verdict="passed", reason="", evidence={"digest": special.digest}
    ):  # fmt: skip
        pass
    assert main(["release", "switch", "hand", "-w", str(workspace.root)]) == 4
    told = capsys.readouterr().err
    assert f"second person for {new}, found none; nothing was switched" in told, told
    with TestClient(create_control(workspace)) as client:
        operator = bearer(grant(workspace, "cal", "operator", actor="test"))
        asked = {"regime": "hand", "reason": "a storm"}
        answer = client.post("/api/switch", headers=operator, json=asked)
    assert answer.status_code == 409 and f"mwb release approve {new}" in answer.json()["detail"]

    def look() -> tuple[str, str] | None:
        found = tend_regimes(workspace, actor="controller 1")
        return found and (found.verdict, found.reason)

    first = look()
    assert first is not None and first[0] == "refused" and f"{new}, found none" in first[1]
    assert look() is None and look() is None  # on record and told, not at each look
    approve_release(workspace, new, actor="ann", reason="mine")
    own = look()
    assert own is not None and "only the approval of ann, who asks for it" in own[1]
    approve_release(workspace, new, actor="bob", reason="looked at the slices")
    model = Path(special.path) / "model.onnx"
    content = model.read_bytes()
    model.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    swapped = look()
    assert swapped is not None and swapped[0] == "refused" and "sha256" in swapped[1], swapped
    assert look() is None
    serving = ledger.slot("champion")
    assert serving is not None and serving.digest == ledger.release(old).digest
    titles = [m.title for m in ledger.messages() if m.title == f"{new} does not serve for hand"]
    assert len(titles) == 3
    model.write_bytes(content)
    there = look()
    assert there is not None and there[0] == "switched"
    assert main(["release", "switch", "hand", "-w", str(workspace.root)]) != 0
    assert f"found {new}, the special of hand" in capsys.readouterr().err
    assert ledger.verify().ok


def test_the_data_plane_by_roles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `token = roles` every program has a token of its own, and a revoked one is refused at once."""
    workspace, old, new = release_pair(tmp_path / "w")
    deploy(workspace, new, actor="test")
    monkeypatch.delenv("MWB_TOKEN", raising=False)
    place = workspace.root / "settings.ini"
    head, rest = place.read_text().split("[serving]\n", 1)
    rest = rest.replace("token =      ", "token = roles", 1)
    place.write_text(f"{head}[serving]\n{rest}")
    workspace = Workspace.open(workspace.root)
    assert workspace.settings.serving.token == "roles"
    shop = grant(workspace, "shop", "caller", actor="test")
    with serving(tmp_path, "--workspace", str(workspace.root)) as server:
        server.wait_ready()
        (workspace.state / "serving.port").write_text(str(server.port))
        ask = server.client(shop)
        assert ask.post("/predict", {"row": ROW}).status == 200
        assert main(["rollback", "-w", str(workspace.root)]) == 0, (
            "it was done, without a token too"
        )
        told = capsys.readouterr().out
        assert f"{old} (flights@v1.0) serves again" in told and "follows by itself" in told, told
        assert server.client().post("/predict", {"row": ROW}).status == 401
        assert server.client("roles").post("/predict", {"row": ROW}).status == 401
        revoke(workspace, shop.split("_")[1], actor="test", reason="left")
        assert ask.post("/predict", {"row": ROW}).status == 401
        seen = [server.client("x" * 40).post("/predict", {"row": ROW}).status for _ in range(12)]
        assert seen[-1] == 429
    with control_plane(workspace) as address:
        status = httpx.get(f"{address}/api/status", headers=bearer(shop)).status_code
        assert status == 401
