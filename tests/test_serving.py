"""The prediction server as a process: answers, swaps, crashes, broken releases, a full disk."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_support import (
    ROW,
    SCHEMA,
    Answer,
    Load,
    RunningServer,
    build_bundle,
    can_mount,
    doubled_model,
    endless_model,
    herd_model,
    late_model,
    logged,
    make_workspace,
    picture_model,
    point_at,
    serving,
    serving_bundle,
    start_on_small_disk,
    start_server,
    wait_until,
)

from mlops_workbench.cli.main import main
from mlops_workbench.core.features import Feature, FeatureSchema
from mlops_workbench.core.pointer import Pointer, SlotEntry, write_pointer
from mlops_workbench.serving.models import load_model


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """One release."""
    return build_bundle(tmp_path / "bundles")


@pytest.fixture
def server(tmp_path: Path, bundle: Path) -> Iterator[RunningServer]:
    """A ready server of that release, its log in tmp_path/predictions."""
    with serving_bundle(tmp_path, bundle) as running:
        yield running


# ---- answers


def test_one_row_and_many_are_answered_logged_and_labelled(
    server: RunningServer, bundle: Path, tmp_path: Path
) -> None:
    client = server.client()
    one = client.post("/predict", {"row": ROW})
    many = client.post(
        "/predict",
        {
            "rows": [{**ROW, "hour": 5}, {**ROW, "carrier": "new", "temp": None}],
            "ids": ["first", "second"],
        },
    )
    assert (one.status, many.status) == (200, 200)
    assert {k: one.body[k] for k in ("release", "digest", "slot")} == {
        "release": "flights-r1",
        "digest": bundle.name,
        "slot": "champion",
    }
    expected = load_model(bundle).probabilities([{**ROW, "hour": 5}])[0]
    said = many.body["predictions"][0]
    assert list(said["probabilities"]) == ["on time", "late"]
    assert list(said["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert said["prediction"] == max(said["probabilities"], key=said["probabilities"].get)
    assert [each["id"] for each in many.body["predictions"]] == ["first", "second"]

    records = logged(tmp_path / "predictions")
    assert [record["id"] for record in records[1:]] == ["first", "second"]
    assert records[1]["request"] == records[2]["request"] != records[0]["request"]
    assert records[0]["row"] == ROW
    assert records[2]["row"]["temp"] is None
    assert set(records[0]) == {
        "kind",
        "id",
        "request",
        "time",
        "release",
        "name",
        "slot",
        "row",
        "probabilities",
        "prediction",
        "latency_ms",
    }
    assert abs(records[0]["time"] - time.time()) < 60
    assert 0 < records[0]["latency_ms"] < 1000


def test_feedback_is_idempotent_also_after_a_restart(
    tmp_path: Path, server: RunningServer, bundle: Path
) -> None:
    client = server.client()
    client.post("/predict", {"rows": [ROW, ROW], "ids": ["a", "b"]})
    label = {"feedback": [{"id": "a", "label": "late"}, {"id": "b", "click": True}]}
    counts = {"accepted": 2, "duplicate": 0, "changed": 0, "orphan": 0}
    assert client.post("/feedback", label).body == counts
    again = {"accepted": 0, "duplicate": 2, "changed": 0, "orphan": 0}
    assert client.post("/feedback", label).body == again
    other = {"feedback": [{"id": "a", "label": "on time"}, {"id": "stranger", "label": "late"}]}
    mixed = {"accepted": 2, "duplicate": 0, "changed": 1, "orphan": 1}
    assert client.post("/feedback", other).body == mixed
    assert client.post("/feedback", {"feedback": [{"id": "a", "label": "no"}]}).status == 422
    server.kill()
    with serving_bundle(tmp_path, bundle) as next_server:
        client = next_server.client()
        assert client.post("/feedback", other).body == {**again}
        changed_back = {"feedback": [{"id": "a", "label": "late"}]}
        assert client.post("/feedback", changed_back).body["changed"] == 1
        assert client.post("/feedback", {"feedback": [{"id": "b", "label": "late"}]}).body == {
            "accepted": 1,
            "duplicate": 0,
            "changed": 0,
            "orphan": 0,
        }
    written = [
        (record["id"], record.get("label", record.get("click")))
        for record in logged(tmp_path / "predictions", "feedback")
    ]
    assert written == [
        ("a", "late"),
        ("b", True),
        ("a", "on time"),
        ("stranger", "late"),
        ("a", "late"),
        ("b", "late"),
    ]


REFUSALS: list[tuple[object, int, str | None, int | None]] = [
    ({"rows": [ROW, {**ROW, "hour": "noon"}]}, 422, "hour", 1),
    ({"rows": [ROW, ROW, {**ROW, "hour": None}]}, 422, "hour", 2),
    ({"row": {key: value for key, value in ROW.items() if key != "origin"}}, 422, "origin", 0),
    ({"row": {**ROW, "distance": True}}, 422, "distance", 0),
    ({"row": {**ROW, "distance": 10**400}}, 422, "distance", 0),
    ({"row": {**ROW, "distance": 1e39}}, 422, "distance", 0),
    ({"row": {**ROW, "carrier": ["UA"]}}, 422, "carrier", 0),
    ({"row": {**ROW, "flight_id": {"a": 1}}}, 422, "flight_id", 0),
    ({"rows": [ROW, 3]}, 422, "rows", 1),
    ({"rows": []}, 422, "rows", None),
    ({"instances": [ROW]}, 422, "instances", None),
    ({"rows": [ROW, ROW], "ids": ["a", "a"]}, 422, "ids", 1),
    ({"rows": [ROW], "ids": ["a", "b"]}, 422, "ids", None),
    ({"row": ROW, "id": "x" * 201}, 422, "id", None),
    ([], 422, None, None),
    ([ROW], 422, None, None),
    (ROW, 422, "flight_id", None),
    ({"row": {**ROW, "distanc": 1400}}, 422, "distanc", 0),
    ({"rows": [ROW, {**ROW, "": 1}]}, 422, "", 1),
    ({"rows": [{}] * 10_001}, 413, None, None),
]


def test_bad_input_is_refused_by_field_and_row(server: RunningServer, tmp_path: Path) -> None:
    client = server.client()
    for body, status, name, row in REFUSALS:
        answer = client.post("/predict", body)
        found = answer.status, answer.body.get("field"), answer.body.get("row")
        assert found == (status, name, row), (str(body)[:200], answer.body)
        assert answer.body["error"]
    assert not logged(tmp_path / "predictions")
    errors = logged(tmp_path / "predictions", "error")
    assert [record["status"] for record in errors] == [status for _, status, _, _ in REFUSALS]
    assert errors[0]["route"] == "/predict"
    assert "hour" in errors[0]["reason"]


def test_a_misspelt_field_is_named_with_the_nearest_known_one(
    server: RunningServer, tmp_path: Path
) -> None:
    client = server.client()
    row = {name: value for name, value in ROW.items() if name != "distance"}
    said = client.post("/predict", {"row": {**row, "distanc": 1400}})
    assert said.status == 422
    assert said.body["error"] == (
        "expected known fields in row 0, found 'distanc'; did you mean 'distance'?"
    )
    for body in (ROW, [ROW]):
        said = client.post("/predict", body)
        assert said.status == 422 and '{"row": {...}}' in said.body["error"], said.body
    # a gap is no mistake, and neither is a key or the label that a whole row of a table brings along
    assert client.post("/predict", {"row": row}).status == 200
    assert client.post("/predict", {"row": {**ROW, "late": 1}}).status == 200
    assert len(logged(tmp_path / "predictions")) == 2


def test_a_column_that_the_recipe_knows_may_come_along(tmp_path: Path) -> None:
    schema = SCHEMA.ignoring(["scheduled", "hour"])
    assert schema.ignored == ("scheduled",)
    bundle = build_bundle(tmp_path, schema=schema)
    with serving(tmp_path, "--bundle", str(bundle)) as server:
        server.wait_ready()
        client = server.client()
        assert client.post("/predict", {"row": {**ROW, "scheduled": "17:05"}}).status == 200
        assert client.post("/predict", {"row": {**ROW, "schedule": "17:05"}}).status == 422


def test_every_error_is_json(server: RunningServer) -> None:
    json_type = {"Content-Type": "application/json"}
    cases: list[tuple[str, str, bytes | None, dict[str, str], int]] = [
        ("GET", "/predict", None, {}, 405),
        ("PUT", "/feedback", b"{}", json_type, 405),
        ("POST", "/health", b"{}", json_type, 405),
        ("OPTIONS", "/predict", None, {}, 405),
        ("GET", "/", None, {}, 404),
        ("GET", "/predict/", None, {}, 404),
        ("GET", "/..%2f..%2fetc/passwd", None, {}, 404),
        ("POST", "/predict", b"{", json_type, 400),
        ("POST", "/predict", b"", json_type, 400),
        ("POST", "/predict", b'{"row": {"hour": NaN}}', json_type, 400),
        ("POST", "/predict", b"\xff\xfe", json_type, 400),
        ("POST", "/predict", b"{}", {"Content-Type": "text/plain"}, 415),
        ("POST", "/predict", b"{}", {}, 415),
        ("POST", "/predict", b"{}", {**json_type, "Content-Encoding": "gzip"}, 415),
        ("POST", "/predict", b" " * 11_000_000, json_type, 413),
        ("GET", "/release", None, {"Host": "rebound.example:8600"}, 403),
    ]
    for method, path, body, headers, status in cases:
        answer = server.client().send(method, path, body, headers)
        assert answer.status == status, (method, path, answer)
        assert answer.body["error"], (method, path)
    allowed = server.client().send("GET", "/predict")
    assert allowed.headers["allow"] == "POST"


def test_what_the_server_says_of_itself(server: RunningServer, bundle: Path) -> None:
    client = server.client()
    client.post("/predict", {"rows": [ROW] * 3})
    client.post("/predict", {"rows": []})
    about = client.get("/release").body
    assert (about["digest"], about["slot"], about["data_version"]) == (
        bundle.name,
        "champion",
        "flights@v1.0",
    )
    assert [feature["name"] for feature in about["schema"]["features"]][:2] == ["hour", "distance"]
    health = client.get("/health").body
    assert (health["status"], health["name"], health["problem"]) == ("ok", "flights-r1", None)
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.body.decode()
    for line in (
        'mwb_requests_total{route="/predict",status="200"} 1.0',
        'mwb_requests_total{route="/predict",status="422"} 1.0',
        f'mwb_predictions_total{{digest="{bundle.name}",slot="champion"}} 3.0',
        f'mwb_release{{digest="{bundle.name}",name="flights-r1",slot="champion"}} 1.0',
        "mwb_log_records_total 4.0",
        "mwb_ready 1.0",
    ):
        assert line in text, line
    assert client.send("HEAD", "/health").status == 200


def test_a_large_question_does_not_hold_up_small_ones(server: RunningServer) -> None:
    large, small = server.client(), server.client()
    rows = [{**ROW, "hour": number % 24} for number in range(10_000)]
    done: list[Answer] = []
    thread = threading.Thread(target=lambda: done.append(large.post("/predict", {"rows": rows})))
    thread.start()
    waited = []
    while thread.is_alive():
        before = time.perf_counter()
        assert small.get("/health").status == 200
        waited.append(time.perf_counter() - before)
    thread.join()
    assert done[0].status == 200
    assert len(done[0].body["predictions"]) == 10_000
    assert len(waited) >= 3
    assert sorted(waited)[len(waited) // 2] < 0.1


def test_a_picture_is_answered(tmp_path: Path) -> None:
    image = Feature(name="image", kind="image", nullable=False, maximum=16, shape=(1, 4, 4))
    schema = FeatureSchema(
        features=(image,), classes=tuple("0123456789"), label="digit", key="picture_id"
    )
    bundle = build_bundle(
        tmp_path,
        name="digits-r1",
        model=picture_model(),
        schema=schema,
        inputs=("image",),
    )
    with serving(tmp_path, "--bundle", str(bundle)) as server:
        server.wait_ready()
        client = server.client()
        picture = [[[16, 0, 0, 16]] * 1 + [[0, 8, 8, 0]] * 3]
        answer = client.post("/predict", {"row": {"image": picture, "picture_id": 7}})
        assert answer.status == 200, answer.body
        answer_id = answer.body["predictions"][0]["id"]
        assert client.post("/feedback", {"feedback": [{"id": answer_id, "label": 7}]}).body == {
            "accepted": 1,
            "duplicate": 0,
            "changed": 0,
            "orphan": 0,
        }
        wrong = client.post("/predict", {"row": {"image": [[1, 2], [3, 4]]}})
        assert (wrong.status, wrong.body["field"]) == (422, "image")


# ---- who may ask


def test_another_address_than_loopback_needs_a_token(tmp_path: Path, bundle: Path) -> None:
    workspace = make_workspace(tmp_path / "open", host="0.0.0.0")
    command = [sys.executable, "-m", "mlops_workbench.serving.server", "--port", "0"]
    refused = subprocess.run(
        [*command, "--workspace", str(workspace.root)], capture_output=True, timeout=60
    )
    assert refused.returncode == 2
    assert b"serving.token" in refused.stderr
    short = make_workspace(tmp_path / "short", host="0.0.0.0", token="secret://MWB_TEST_TOKEN")
    refused = subprocess.run(
        [*command, "--workspace", str(short.root)],
        capture_output=True,
        timeout=60,
        env={**os.environ, "MWB_TEST_TOKEN": "short"},
    )
    assert refused.returncode == 2
    assert b"at least 16" in refused.stderr


def test_with_a_token_only_those_who_know_it(tmp_path: Path, bundle: Path) -> None:
    token = "a-token-nobody-can-guess"
    workspace = make_workspace(tmp_path / "w", host="0.0.0.0", token="secret://MWB_TEST_TOKEN")
    point_at(workspace.pointer_path, bundle, epoch=1)
    with serving(
        tmp_path, "--workspace", str(workspace.root), environment={"MWB_TEST_TOKEN": token}
    ) as server:
        server.wait_ready()
        for wrong in (None, "", token[:-1], token + "x", "ä"):
            client = server.client(wrong)
            for method, path in (
                ("POST", "/predict"),
                ("POST", "/feedback"),
                ("GET", "/release"),
                ("GET", "/metrics"),
            ):
                headers = {"Content-Type": "application/json"}
                if wrong == "ä":
                    headers["Authorization"] = "Bearer \xe4"
                answer = client.send(method, path, b"{}" if method == "POST" else None, headers)
                assert answer.status in (401, 429), (wrong, path)  # after ten it has to wait
                assert answer.status == 429 or answer.headers["www-authenticate"] == "Bearer"
            stranger = client.get("/health").body
            assert (stranger["status"], set(stranger)) == ("ok", {"status", "workspace"})
            # a name is for those who know the token
            assert set(stranger["workspace"] or {}) <= {"id"}
            assert client.get("/ready").body == {"ready": True}
        client = server.client(token)
        assert client.post("/predict", {"row": ROW}).status == 200
        assert client.get("/health").body["digest"] == bundle.name
        assert token.encode() not in server.log.read_bytes()
    assert len(logged(workspace.predictions)) == 1
    assert not logged(workspace.predictions, "error")


# ---- swapping


def test_swaps_under_load_fail_no_request(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w")
    releases = [
        build_bundle(workspace.bundles, name=f"flights-r{number}", bias=number / 10)
        for number in range(6)
    ]
    expected = {
        release.name: load_model(release).probabilities([{**ROW, "hour": 1, "carrier": "B6"}])[0, 1]
        for release in releases
    }
    point_at(workspace.pointer_path, releases[0], epoch=1)
    with serving(tmp_path, "--workspace", str(workspace.root)) as server:
        server.wait_ready()
        control = server.client()
        load = Load(server.port).start(4)
        swapped: list[tuple[float, str, float]] = []
        order = [1, 2, 3, 4, 5, 4, 5, 0, 1, 0, 1, 2]
        for epoch, number in enumerate(order, start=2):
            wanted = point_at(workspace.pointer_path, releases[number], epoch=epoch)
            began = time.monotonic()
            wait_until(lambda e=epoch: control.get("/health").body["epoch"] == e, 10, "swap")
            swapped.append((time.monotonic(), wanted, time.monotonic() - began))
            time.sleep(0.2)
        load.stop()
    assert not load.failures, load.failures[:3]
    assert len(load.answers) > 200
    said = {
        each["id"]: body["digest"] for _, _, body in load.answers for each in body["predictions"]
    }
    assert said == {record["id"]: record["release"] for record in logged(workspace.predictions)}
    ends = [begin for begin, _, _ in swapped[1:]] + [float("inf")]
    for (begin, wanted, seconds), end in zip(swapped, ends, strict=True):
        # between the moment a swap was seen and the next wish only one release may answer
        within = [
            body["digest"]
            for began, _, body in load.answers
            if begin < began < min(end, begin + 0.15)
        ]
        assert within, "no request in this window"
        assert set(within) == {wanted}
        assert seconds < 5
    for _, _, body in load.answers:  # release and probabilities always belong together
        first = body["predictions"][0]
        number, asked, _ = first["id"].split("-")
        if int(asked) % 24 == 1 and int(asked) % 4 == 1:
            assert first["probabilities"]["late"] == pytest.approx(
                expected[body["digest"]], abs=1e-5
            )


def test_going_back_is_answered_within_a_second(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w")
    old, new = (build_bundle(workspace.bundles, name=f"flights-r{n}", bias=n / 5) for n in (1, 2))
    point_at(workspace.pointer_path, new, epoch=1)
    with serving(tmp_path, "--workspace", str(workspace.root)) as server:
        server.wait_ready()
        client = server.client()
        times = []
        for epoch in range(2, 12):
            wanted = point_at(workspace.pointer_path, (old, new)[epoch % 2], epoch=epoch)
            began = time.monotonic()
            wait_until(
                lambda w=wanted: client.post("/predict", {"row": ROW}).body["digest"] == w,
                5,
                "the other release",
            )
            times.append(time.monotonic() - began)
    print("seconds from pointer to first answer:", [round(seconds, 3) for seconds in times])
    assert max(times) < 1.0


def break_bit(folder: Path) -> None:
    """Flip one bit in the middle of the model."""
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)


def add_file(folder: Path) -> None:
    """Put a file into the bundle that the manifest does not know."""
    (folder / "extra.py").write_text("raise SystemExit")


def make_link(folder: Path) -> None:
    """Replace a file by a link to an equal one outside."""
    outside = folder.parent / "outside.onnx"
    shutil.move(folder / "model.onnx", outside)
    (folder / "model.onnx").symlink_to(outside)


def change_manifest(folder: Path) -> None:
    """Change a recorded metric."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["metrics"]["brier"] = 0.0
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace_model(folder: Path, make: Callable[[Path], None]) -> None:
    """Put something else where the model stood."""
    (folder / "model.onnx").unlink()
    make(folder / "model.onnx")


BREAKERS: list[tuple[str, Callable[[Path], None]]] = [
    ("bit flip", break_bit),
    ("truncated model", lambda folder: os.truncate(folder / "model.onnx", 200)),
    ("emptied model", lambda folder: os.truncate(folder / "model.onnx", 0)),
    ("missing model", lambda folder: (folder / "model.onnx").unlink()),
    ("missing manifest", lambda folder: (folder / "manifest.json").unlink()),
    ("manifest is no JSON", lambda folder: (folder / "manifest.json").write_text("{")),
    ("changed manifest", change_manifest),
    ("extra file", add_file),
    ("link", make_link),
    ("changed schema", lambda folder: (folder / "features.json").write_text("{}")),
    ("model is a folder", lambda folder: replace_model(folder, os.mkdir)),
    ("model is a pipe without end", lambda folder: replace_model(folder, os.mkfifo)),
    ("gone", shutil.rmtree),
]


def well_hashed_but_broken(root: Path) -> list[tuple[str, Path]]:
    """Releases whose hashes are right and whose models cannot serve."""
    wider = SCHEMA.model_copy(update={"features": (*SCHEMA.features[:3],)})
    more_classes = SCHEMA.model_copy(update={"classes": ("a", "b", "c")})
    whole = late_model()
    return [
        ("answers NaN", build_bundle(root, name="nan", model=late_model(nan=True))),
        ("torn before hashing", build_bundle(root, name="torn", model=whole[: len(whole) // 2])),
        ("no model at all", build_bundle(root, name="noise", model=os.urandom(4096))),
        ("empty model", build_bundle(root, name="empty", model=b"")),
        ("other inputs", build_bundle(root, name="inputs", schema=wider)),
        ("other classes", build_bundle(root, name="classes", schema=more_classes)),
        ("sums to two", build_bundle(root, name="sums", model=doubled_model())),
        ("hangs", build_bundle(root, name="endless", model=endless_model())),
        ("mixes its rows", build_bundle(root, name="herd", model=herd_model())),
    ]


def test_a_broken_release_never_answers(tmp_path: Path) -> None:
    """More than twenty kinds of it, one after the other, under load: no request fails."""
    workspace = make_workspace(tmp_path / "w", open_seconds=1)
    good = build_bundle(workspace.bundles, name="flights-good")
    broken: list[tuple[str, Path]] = []
    for number, (what, breaker) in enumerate(BREAKERS):
        folder = build_bundle(workspace.bundles, name=f"broken-{number}", bias=1 + number / 10)
        breaker(folder)
        broken.append((what, folder))
    broken += well_hashed_but_broken(workspace.bundles)
    assert len(broken) >= 20
    point_at(workspace.pointer_path, good, epoch=1)
    with serving(tmp_path, "--workspace", str(workspace.root)) as server:
        server.wait_ready()
        control = server.client()
        load = Load(server.port).start(2)
        for epoch, (what, folder) in enumerate(broken, start=2):
            point_at(workspace.pointer_path, folder, epoch=epoch, name=f"broken-{epoch}")

            def problem() -> dict[str, Any] | None:
                return control.get("/health").body["problem"]

            wait_until(
                lambda f=folder: (problem() or {}).get("digest") == f.name, 10, f"refusal: {what}"
            )
            health = control.get("/health").body
            assert health["status"] == "degraded", what
            assert (health["digest"], health["epoch"]) == (good.name, 1), what
            assert health["problem"]["reason"], what
            assert "mwb_release_problem{" in control.get("/metrics").body.decode(), what
        other = SlotEntry(digest="0" * 64, path=str(good), name="other")
        pointer = Pointer(epoch=90, slots={"champion": other}, split={"champion": 1.0})
        write_pointer(workspace.pointer_path, pointer)
        wait_until(lambda: (problem() or {}).get("digest") == "0" * 64, 10, "digest mismatch")
        workspace.pointer_path.write_text("{ half a poin")
        wait_until(lambda: (problem() or {}).get("digest") == "", 10, "broken pointer")
        workspace.pointer_path.unlink()
        time.sleep(0.1)
        point_at(workspace.pointer_path, good, epoch=99)
        wait_until(lambda: control.get("/health").body["status"] == "ok", 10, "healthy again")
        load.stop()
        failures = len(broken) + 2
        assert f"mwb_release_failures_total {failures}.0" in control.get("/metrics").body.decode()
    assert not load.failures, load.failures[:3]
    assert {body["digest"] for _, _, body in load.answers} == {good.name}


def test_not_ready_until_a_champion_is_loaded(
    tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = make_workspace(tmp_path / "w")
    with serving(tmp_path, "--workspace", str(workspace.root)) as server:
        client = server.client()
        assert client.get("/ready").status == 503
        assert client.get("/health").body["status"] == "starting"
        answer = client.post("/predict", {"row": ROW})
        assert answer.status == 503
        assert "deploy" in answer.body["error"]
        (workspace.state / "serving.port").write_text(str(server.port))
        broken = build_bundle(tmp_path / "b", model=late_model(nan=True))
        point_at(workspace.pointer_path, broken, epoch=1)
        wait_until(lambda: client.get("/health").body["status"] == "no release", 10, "refusal")
        assert main(["status", "-w", str(workspace.root)]) == 0
        assert "answers nobody: it could not load the release" in capsys.readouterr().out
        assert "warm-up" in client.post("/predict", {"row": ROW}).body["error"]
        assert client.get("/ready").status == 503
        point_at(workspace.pointer_path, bundle, epoch=2)
        server.wait_ready()
        assert client.post("/predict", {"row": ROW}).status == 200


# ---- the log


@pytest.mark.parametrize("seed", range(2))  # tests/test_log_faults.py kills 200 times
def test_what_was_acknowledged_is_in_the_log_once_after_sigkill(tmp_path: Path, seed: int) -> None:
    workspace = make_workspace(tmp_path / "w", segment_bytes=65_536)
    point_at(workspace.pointer_path, build_bundle(workspace.bundles), epoch=1)
    acknowledged: list[str] = []
    for repetition in range(3):
        server = start_server(tmp_path, "--workspace", str(workspace.root))
        try:
            server.wait_ready()
            load = Load(server.port, expect_death=True).start(4)
            time.sleep(0.3 + 0.13 * seed + 0.07 * repetition)
        finally:
            server.kill()
        load.stop()
        assert not load.failures, load.failures[:3]
        answered = [
            f"{repetition}:{each['id']}"
            for _, _, body in load.answers
            for each in body["predictions"]
        ]
        assert len(answered) > 20
        acknowledged += answered
        pid = server.process.pid
        segments = sorted((workspace.predictions / "segments").glob(f"*-{pid}-*.log"))
        with segments[-1].open("ab") as torn:  # what a kill in the middle of a write leaves
            torn.write(b'0123abcd {"kind":"prediction","id":"torn')
    server = start_server(tmp_path, "--workspace", str(workspace.root))
    try:
        server.wait_ready()
        wait_until(
            lambda: all(
                path.read_bytes()[-1:] in (b"", b"\n")
                for path in (workspace.predictions / "segments").iterdir()
            ),
            10,
            "recovery",
        )
    finally:
        assert server.stop() == 0
    assert b"cut a half-written line" in server.log.read_bytes()
    # ids of the load repeat in each repetition: count them by the server that answered
    records = Counter(record["id"] for record in logged(workspace.predictions))
    wanted = Counter(each.partition(":")[2] for each in acknowledged)
    assert not [each for each, times in wanted.items() if records[each] < times]
    assert not [each for each, times in records.items() if times > 3]
    by_request = Counter(
        (record["request"], record["id"]) for record in logged(workspace.predictions)
    )
    assert max(by_request.values()) == 1
    segments = list((workspace.predictions / "segments").iterdir())
    assert len(segments) > 3, "segments rotate by size"
    most = max(path.stat().st_size for path in segments)
    assert most < 65_536 + 4 * 4_096, "one write of four callers beyond the limit, no more"


def test_sigterm_finishes_what_was_begun(tmp_path: Path, bundle: Path) -> None:
    predictions = tmp_path / "predictions"
    server = start_server(tmp_path, "--bundle", str(bundle), "--predictions", str(predictions))
    try:
        server.wait_ready()
        client = server.client()
        client.get("/health")
        done: list[Answer] = []
        rows = [ROW] * 10_000
        thread = threading.Thread(
            target=lambda: done.append(client.post("/predict", {"rows": rows}))
        )
        thread.start()
        time.sleep(0.15)
        assert server.stop() == 0
        thread.join()
    finally:
        if server.process.poll() is None:
            server.kill()
    assert done[0].status == 200
    assert len(logged(predictions)) == 10_000
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


def test_sigterm_while_starting_ends_it(tmp_path: Path, bundle: Path) -> None:
    command = [sys.executable, "-m", "mlops_workbench.serving.server", "--bundle", str(bundle)]
    for delay in (0.5, 0.8, 1.1):
        process = subprocess.Popen(
            [*command, "--port", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(delay)
        process.terminate()
        assert process.wait(15) in (0, -15)


@pytest.mark.skipif(not can_mount(), reason="needs a private mount namespace")
def test_a_full_disk_is_said_aloud_and_recovered_from(tmp_path: Path, bundle: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    port_file, log = tmp_path / "port", tmp_path / "server.log"
    options = ("--bundle", bundle, "--predictions", disk / "predictions")
    server, inside = start_on_small_disk(disk, 100_000, port_file, log, *options)
    try:
        client = server.client()
        acknowledged = []
        for number in range(2_000):
            ids = [f"before-{number}-{row}" for row in range(1 + number % 20)]
            answer = client.post("/predict", {"rows": [ROW] * len(ids), "ids": ids})
            if answer.status != 200:
                break
            acknowledged += ids
        assert answer.status == 503
        assert "Errno 28" in answer.body["error"]
        assert "prediction log" in answer.body["error"]
        assert answer.headers["retry-after"]
        with contextlib.suppress(OSError), (inside / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"x"):  # what the refused rows gave back is taken too
                pass
        for number in range(100):  # the page that the refusal was written to has room for some
            answer = client.post("/predict", {"row": ROW, "id": f"last-{number}"})
            if answer.status != 200:
                break
            acknowledged.append(f"last-{number}")
        assert answer.status == 503
        refused = client.post("/feedback", {"feedback": [{"id": "before-1-0", "label": "late"}]})
        assert refused.status == 503
        health = client.get("/health").body
        assert health["status"] == "degraded"
        assert "No space left on device" in health["log"]["last_failure"]
        metrics = client.get("/metrics").body.decode()
        failed = next(
            line for line in metrics.splitlines() if line.startswith("mwb_log_failures_t")
        )
        assert float(failed.split()[1]) >= 2
        (inside / "ballast").unlink()
        for number in range(50):
            answer = client.post("/predict", {"row": ROW, "id": f"after-{number}"})
            assert answer.status == 200, answer.body
            acknowledged.append(f"after-{number}")
        accepted = client.post("/feedback", {"feedback": [{"id": "before-1-0", "label": "late"}]})
        assert accepted.body["accepted"] == 1, "the refused try was not remembered"
        assert client.get("/health").body["status"] == "ok"
        from mlops_workbench.core.journal import read_journal

        found = [
            record["id"]
            for segment in sorted((inside / "predictions" / "segments").iterdir())
            for record in read_journal(segment).records
            if record["kind"] == "prediction"
        ]
        assert found == acknowledged, "a refused request left nothing behind"
        assert len(list((inside / "predictions" / "segments").iterdir())) <= 4
    finally:
        server.kill()


def test_a_slow_or_vanishing_client_costs_the_others_nothing(server: RunningServer) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    slow = []
    for number in range(50):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(head + b'Content-Length: 100\r\n\r\n{"row": {')
        slow.append(connection)
        if number % 2:
            connection.close()
    client = server.client()
    for _ in range(50):
        assert client.post("/predict", {"row": ROW}).status == 200
    for connection in slow:
        connection.close()


def test_a_body_without_end_is_cut_off(server: RunningServer) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(head + b"Content-Length: 1000000000\r\n\r\n")
    assert connection.recv(4096).startswith(b"HTTP/1.1 413")
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
    chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
    sent = 0
    try:
        for _ in range(1000):
            connection.sendall(chunk)
            sent += len(chunk)
    except OSError:
        pass
    assert sent < 200 * 1024 * 1024
    assert server.client().post("/predict", {"row": ROW}).status == 200


def test_the_process_stays_thin(server: RunningServer) -> None:
    import psutil

    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    for heavy in ("torch", "pandas", "pyarrow", "mlflow", "sklearn", "scipy"):
        assert f"/{heavy}/" not in maps, heavy
    client = server.client()
    for _ in range(200):
        client.post("/predict", {"rows": [ROW] * 10})
    resident = psutil.Process(server.process.pid).memory_info().rss / 1e6
    print(f"resident memory {resident:.0f} MB")
    assert resident < 250


# ---- the command


def test_mwb_serve_becomes_the_server_and_mwb_feedback_finds_it(
    tmp_path: Path, bundle: Path
) -> None:
    workspace = make_workspace(tmp_path / "w")
    point_at(workspace.pointer_path, bundle, epoch=1)
    mwb = [sys.executable, "-m", "mlops_workbench.cli.main"]
    here = ["-w", str(workspace.root)]
    log = tmp_path / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*mwb, "serve", "--port", "0", *here], stdout=output, stderr=output
        )
    try:
        port_file = workspace.state / "serving.port"
        wait_until(lambda: port_file.exists() or process.poll() is not None, 60, "the port file")
        server = RunningServer(process, int(port_file.read_text()), log)
        server.wait_ready()
        assert server.client().post("/predict", {"row": ROW, "id": "a"}).status == 200
        assert "/sqlalchemy/" not in Path(f"/proc/{process.pid}/maps").read_text()
        sent = subprocess.run(
            [*mwb, "feedback", "-", "--json", *here],
            input=b"id,label\na,1\n",  # as the tables of this workspace write "late"
            capture_output=True,
            timeout=60,
        )
        assert sent.returncode == 0, sent.stderr
        assert json.loads(sent.stdout) == {
            "accepted": 1,
            "duplicate": 0,
            "changed": 0,
            "orphan": 0,
        }
        assert server.stop() == 0
        assert not port_file.exists()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
