"""What stands in the prediction log, and for how long: private columns, large rows, a full disk, retention."""

import contextlib
import json
import shutil
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
from monitoring_support import killed_at
from rollout_support import add_release, release_pair
from serving_support import (
    CARRIERS,
    ROW,
    SCHEMA,
    build_bundle,
    can_mount,
    make_workspace,
    picture_model,
    point_at,
    serving,
    start_on_small_disk,
    wait_until,
)

from mlops_workbench.cli.main import main
from mlops_workbench.core.errors import DataError
from mlops_workbench.core.features import Feature, FeatureSchema
from mlops_workbench.core.journal import JournalWriter
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.settings import AlertRule, ServingSettings
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.monitoring.alerts import AlertBook, evaluate_rules
from mlops_workbench.monitoring.champion import read_champion
from mlops_workbench.monitoring.drift import drift
from mlops_workbench.monitoring.partitions import compact, drop_partitions, read_catalogue
from mlops_workbench.monitoring.prediction_store import read_window
from mlops_workbench.monitoring.profile import build_profile
from mlops_workbench.monitoring.retention import retire_log
from mlops_workbench.monitoring.snapshot import build_tiles, measure_window
from mlops_workbench.pipeline.prepare import labelled_requests
from mlops_workbench.recipes.tabular import TabularRecipe
from mlops_workbench.release import rollouts
from mlops_workbench.release.deployment import deploy
from mlops_workbench.serving.feedback import FeedbackItem
from mlops_workbench.serving.requests import Question
from mlops_workbench.serving.service import PredictionService

# ---- private columns

PRIVATE = {"flight_id": "hash", "carrier": "hash", "temp": "drop"}
DISCREET = FeatureSchema.model_validate({**SCHEMA.model_dump(), "private": PRIVATE})
SECRETS = ("Mallory-4711", "Eve-and-Co", "81234.5625", "Trudy-0815")


def plain_text(folder: Path) -> str:
    """Everything that stands in the files of a folder, Parquet spelled out."""
    parts = []
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".parquet":
            parts.append(duckdb.read_parquet(str(path)).df().to_csv())
        elif path.is_file():
            parts.append(path.read_bytes().decode("latin-1"))
    return "\n".join(parts)


def test_nothing_of_a_private_value_is_found_anywhere(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w")
    bundle = build_bundle(workspace.bundles, schema=DISCREET)
    point_at(workspace.pointer_path, bundle, epoch=1)
    who, airline, warm, wrong = SECRETS
    row = {**ROW, "flight_id": who, "carrier": airline, "temp": float(warm)}
    records = {"dataframe_records": [row]}
    with serving(tmp_path, "--workspace", str(workspace.root)) as server:
        server.wait_ready()
        client = server.client()
        for number in range(3):
            body = {"rows": [row, {**row, "flight_id": "somebody else"}]}
            assert client.post("/predict", body).status == 200, number
        assert client.post("/invocations", records).status == 200
        refused = client.post("/predict", {"row": {**row, "temp": wrong}})
        assert refused.status == 422 and wrong in refused.body["error"], "the client may read it"
        unknown = client.post("/predict", {"row": {**row, wrong: 1}})
        assert unknown.status == 422
        assert server.stop() == 0
    window = read_window(workspace.predictions, 0, time.time() + 1)
    assert len(window.predictions) == 7 and len(window.errors) == 2
    entities = window.predictions["flight_id"].value_counts()
    assert sorted(entities) == [3, 4], "rows of one entity still belong together"
    assert set(window.predictions["hour"]) == {ROW["hour"]}, "other columns stand as they came"
    assert "temp" not in window.predictions
    assert all("what was found is not logged" in reason for reason in window.errors["reason"])
    compact(workspace.predictions, older_than_seconds=0)
    assert list(workspace.predictions.rglob("*.parquet"))
    for part in (plain_text(workspace.root), plain_text(tmp_path)):
        assert "somebody else" not in part
        assert not [secret for secret in SECRETS if secret in part]


def test_a_roll_back_does_not_make_private_columns_public_again(tmp_path: Path) -> None:
    """The recipe learned that a column is private; the release before it did not know, serves again, and keeps the secret."""
    workspace, old, _ = release_pair(tmp_path / "w")
    new = "flights-r3"
    add_release(workspace, new, schema=DISCREET)
    deploy(workspace, new, actor="test")
    assert main(["rollback", "--to", old, "-w", str(workspace.root)]) == 0
    who, airline, warm, _ = SECRETS
    row = {**ROW, "flight_id": who, "carrier": airline, "temp": float(warm)}
    with serving(tmp_path, "--workspace", str(workspace.root)) as server:
        server.wait_ready()
        answer = server.client().post("/predict", {"row": row})
        assert answer.status == 200 and answer.body["release"] == old
        assert server.stop() == 0
    window = read_window(workspace.predictions, 0, time.time() + 1)
    assert window.predictions["hour"].tolist() == [ROW["hour"]]
    assert not [secret for secret in SECRETS if secret in plain_text(workspace.root)]
    champion = read_champion(workspace)
    assert champion is not None and champion.features.unlogged == ("temp", "carrier")


def test_a_private_column_is_called_not_logged_and_nothing_breaks(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    service = private_service(tmp_path, DISCREET)
    rows = [
        {
            "flight_id": f"F{number % 40}",
            "hour": int(generator.integers(0, 24)),
            "distance": float(generator.integers(80, 5000)),
            "temp": float(generator.normal(50, 9)),
            "carrier": CARRIERS[number % 4],
            "origin": "EWR",
        }
        for number in range(300)
    ]
    service.answer(service.arms(), Question(rows, []), 0.0)
    service.close()
    window = read_window(tmp_path / "predictions", 0, time.time() + 1)
    frame = pd.DataFrame(rows)
    answers = np.array(window.predictions["probabilities"].tolist())
    found = drift(build_profile(frame, DISCREET, answers), window.predictions, DISCREET)
    assert found.not_logged == ("temp", "carrier")
    assert found.verdict == "not moved" and found.summary.endswith("not logged: temp, carrier")
    before = drift(build_profile(frame, SCHEMA, answers), window.predictions, DISCREET)
    assert before.verdict == "not moved", "nor with the profile of an older release"
    recipe = TabularRecipe(
        name="flights", source=lambda: frame, label="late", classes=("on time", "late"),
        numbers=("hour", "distance", "temp"), private={"temp": "drop"},
    )  # fmt: skip
    workspace = make_workspace(tmp_path / "w")
    with pytest.raises(DataError, match="temp private: not logged"):
        labelled_requests(workspace, recipe, 0, time.time())


def private_service(
    folder: Path, schema: FeatureSchema, bundle: Path | None = None, **settings: Any
) -> PredictionService:
    """The part of a server that answers, without HTTP."""
    bundle = bundle or build_bundle(folder / "bundles", schema=schema)
    point_at(folder / "pointer.json", bundle, epoch=1)
    service = PredictionService(
        pointer_path=folder / "pointer.json",
        predictions=folder / "predictions",
        settings=ServingSettings(**settings),
    )
    service.slots.look()
    wait_until(lambda: service.slots.champion is not None, 10, "the release")
    return service


# ---- large rows


def test_of_large_rows_a_share_keeps_its_inputs_and_says_which_share(tmp_path: Path) -> None:
    schema = FeatureSchema(
        features=(Feature(name="image", kind="image", shape=(1, 4, 4)),),
        classes=tuple("0123456789"),
        label="digit",
        key=None,
        entity="writer",
    )
    bundle = build_bundle(
        tmp_path / "bundles", schema=schema, model=picture_model(), inputs=("image",)
    )
    service = private_service(tmp_path, schema, bundle, large_row_bytes=100, large_row_share=0.2)
    generator = np.random.default_rng(0)
    pictures = generator.random((2000, 1, 4, 4)).round(3).tolist()
    rows = [{"image": picture, "writer": f"w{n % 30}"} for n, picture in enumerate(pictures)]
    ids = [f"p{number}" for number in range(len(rows))]
    for _ in range(2):  # a repeated request keeps what the first one kept
        service.answer(service.arms(), Question(rows, ids), 0.0)
    service.feedback([FeedbackItem(each, "label", "3") for each in ids])
    service.close()
    predictions = tmp_path / "predictions"
    for _ in range(2):
        window = read_window(predictions, 0, time.time() + 1)
        assert len(window.predictions) == len(window.labelled) == 2000
        assert set(window.predictions["row_share"]) == {0.2}
        assert window.predictions["writer"].notna().all()
        kept = window.with_inputs
        assert 340 < len(kept) < 460 and kept["image"].notna().all()
        assert abs((1 / kept["row_share"]).sum() - 2000) < 250, "weighed they stand for all"
        compact(predictions, older_than_seconds=0)
    answers = np.array(window.predictions["probabilities"].tolist())
    profile = build_profile(pd.DataFrame({"image": pictures}), schema, answers)
    found = drift(profile, window.predictions, schema)
    assert (found.verdict, found.rows) == ("not moved", len(kept)), found.summary
    records = [
        json.loads(line)
        for line in window.predictions.head(1).to_json(orient="records", lines=True).splitlines()
    ]
    assert records[0]["row_share"] == 0.2


# ---- a full disk


@pytest.mark.skipif(not can_mount(), reason="needs a private mount namespace")
def test_whoever_wants_to_be_answered_on_a_full_disk_is_and_the_gap_is_told(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w", full_disk="count")
    point_at(workspace.pointer_path, build_bundle(workspace.bundles), epoch=1)
    disk, port_file, log = workspace.predictions, tmp_path / "port", tmp_path / "server.log"
    disk.mkdir(parents=True)
    server, inside = start_on_small_disk(
        disk, 150_000, port_file, log, "--workspace", workspace.root
    )
    try:
        client = server.client()
        answered = 10
        assert client.post("/predict", {"rows": [ROW] * 10}).status == 200
        with contextlib.suppress(OSError), (inside / "filler").open("wb", buffering=0) as filler:
            while filler.write(b"x" * 4096):
                pass
        while unlogged(client) == 0:
            body = {"rows": [ROW] * 50}
            assert client.post("/predict", body).status == 200, "answered all the same"
            answered += 50
            assert answered < 20_000
        for _ in range(100):
            assert client.post("/predict", {"rows": [ROW] * 20}).status == 200
            answered += 20
        missing = unlogged(client)
        assert missing >= 2000
        assert client.get("/health").body["status"] == "degraded"
        assert client.get("/health").body["log"]["unlogged"] == missing
        label = {"feedback": [{"id": "x", "label": "late"}]}
        assert client.post("/feedback", label).status == 503, "feedback is kept or refused"
        answered += 1  # the refusal, too, has no record
        (inside / "ballast").unlink()
        time.sleep(0.6)
        while client.get("/health").body["status"] != "ok":
            assert client.post("/predict", {"row": ROW}).status == 200
            answered += 1
        missing = unlogged(client)
        shutil.copytree(inside / "segments", tmp_path / "copy" / "segments")
        assert server.process.poll() is None
    finally:
        server.kill()
    assert log.read_text().count("answers are given without a record") == 1
    window = read_window(tmp_path / "copy", 0, time.time() + 1)
    assert window.unlogged == missing
    assert len(window.predictions) + missing == answered, "each answer is logged or counted"
    measured = measure_window(window, None, workspace.settings.monitoring)
    assert measured.figures["unlogged_share"] == missing / answered
    rule = AlertRule(metric="unlogged_share", operator="above", threshold=0, for_windows=1)
    events, book = evaluate_rules({"unlogged": rule}, measured.figures, AlertBook(), until=1.0)
    assert [event.kind for event in events] == ["firing"]
    [tile] = [t for t in build_tiles(measured, {"unlogged": rule}, book) if t.name == "errors"]
    assert tile.state == "warning" and f"{missing:,} answers without a record" in tile.detail


def unlogged(client: Any) -> int:
    """The server's own count of answers without a record."""
    lines = client.get("/metrics").body.decode().splitlines()
    return int(float(next(x for x in lines if x.startswith("mwb_log_unlogged_total")).split()[1]))


# ---- retention

DAY = 86_400.0


def keep_days(workspace: Workspace, days: float) -> Workspace:
    """The workspace with this retention."""
    return Workspace.open(workspace.root, {"monitoring.log_days": str(days)})


def traffic(predictions: Path, days: list[float]) -> None:
    """One prediction at each of these moments, in partitions."""
    name = f"20130401T000000000-1-{len(list(predictions.glob('*'))):06d}.log"
    with JournalWriter(predictions / "segments" / name) as journal:
        for number, moment in enumerate(days):
            journal.append(
                {
                    "kind": "prediction", "id": f"d{number}", "request": f"d{number}", "time": moment, "release": "a1",
                    "name": "flights-r1", "slot": "champion", "latency_ms": 3.5, "row": {}, "probabilities": [0.75, 0.25],
                    "prediction": 0,
                }
            )  # fmt: skip
    compact(predictions, older_than_seconds=0)


def test_old_days_go_but_not_those_that_a_rollout_rests_on(tmp_path: Path) -> None:
    workspace, _, new = release_pair(tmp_path / "w")
    workspace = keep_days(workspace, 3)
    rollouts.start_rollout(workspace, new, actor="test", shares=(0.5,), reason="a test")
    ledger = Ledger(workspace.ledger_url)
    rollout = ledger.open_rollout()
    assert rollout is not None
    begun = datetime.fromisoformat(rollout.started_at).timestamp()
    predictions = workspace.predictions
    traffic(predictions, [begun + day * DAY for day in range(-5, 10)])
    later = begun + 10 * DAY
    gone = retire_log(workspace, actor="monitor", moment=later)
    assert gone is not None and 4 <= gone.rows <= 5, "only what was there before the rollout"
    left = read_window(predictions, 0, later).predictions["time"]
    assert sum(left >= begun) == 10
    assert retire_log(workspace, actor="monitor", moment=later) is None
    [decision] = ledger.decisions(kind="retention")
    assert rollout.name in decision.evidence["kept_for"]
    rollouts.abort_rollout(workspace, rollout, actor="test", reason="over")
    gone = retire_log(workspace, actor="monitor", moment=later)
    assert gone is not None and gone.rows >= 6
    assert min(read_window(predictions, 0, later).predictions["time"]) >= later - 4 * DAY
    assert ledger.verify().ok and len(ledger.decisions(kind="retention")) == 2


def drop_before(predictions: Path, end: float) -> None:
    """Remove the partitions that end before a moment."""
    drop_partitions(predictions, lambda file: file.last < end)


def test_a_retention_killed_anywhere_takes_nothing_that_is_to_stay(tmp_path: Path) -> None:
    now, killed = 1_400_000_000.0, 0
    end = now - 2.5 * DAY
    traffic(tmp_path / "log", [now - day * DAY for day in range(6)])
    for attempt in range(6):
        folder = tmp_path / str(attempt)
        shutil.copytree(tmp_path / "log", folder)
        killed += killed_at(5 + 14 * attempt, partial(drop_before, folder, end))
        found = read_window(folder, 0, now + 1).predictions["time"]
        assert sum(found >= end) == 3 and len(found) in (3, 6), "an old day is there or gone"
        drop_before(folder, end)
        compact(folder, older_than_seconds=0, grace_seconds=0)
        assert len(read_window(folder, 0, now + 1).predictions) == 3
        known = {file.path for file in read_catalogue(folder).files}
        files = {p.relative_to(folder / "parquet").as_posix() for p in folder.rglob("*.parquet")}
        assert files == known, "no left-over stays"
    assert 2 < killed < 6, "some were killed, some came through"


def test_raw_segments_stay_as_long_as_they_are_wanted(tmp_path: Path) -> None:
    traffic(tmp_path, [1_400_000_000.0])
    assert not list((tmp_path / "segments").iterdir())
    (tmp_path / "segments").mkdir(exist_ok=True)
    raw = tmp_path / "segments" / "20130401T010000000-1-000001.log"
    with JournalWriter(raw) as journal:
        journal.append({"kind": "error", "time": 1_400_000_000.0, "status": 500, "reason": "x"})
    for _ in range(3):
        compact(tmp_path, older_than_seconds=0, keep_seconds=3600)
        assert raw.exists()
        assert len(read_window(tmp_path, 0, 2e9).errors) == 1, "and count once"
    assert compact(tmp_path, older_than_seconds=0).segments_removed == 1
    assert len(read_window(tmp_path, 0, 2e9).errors) == 1
