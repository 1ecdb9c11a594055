"""Helpers of the monitoring tests: releases with profiles, traffic as the server writes it."""

import os
import random
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlops_workbench.core.bundle import BundleManifest, manifest_digest
from mlops_workbench.core.features import Feature, FeatureSchema
from mlops_workbench.core.files import sha256_file, write_json
from mlops_workbench.core.journal import JournalWriter
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.pointer import Pointer, SlotEntry, write_pointer
from mlops_workbench.core.workspace import Workspace, create_workspace
from mlops_workbench.monitoring import partitions
from mlops_workbench.monitoring.profile import build_profile

CATEGORIES = {"carrier": 16, "origin": 3, "dest": 100}
NUMBERS = (
    "month",
    "day",
    "hour",
    "distance",
    "temp",
    "dewp",
    "humid",
    "wind_speed",
    "precip",
    "pressure",
    "visib",
)
FLIGHTS = FeatureSchema(
    features=(
        *(
            Feature(
                name=name,
                kind="category",
                categories=tuple(f"{name}{index}" for index in range(count)),
            )
            for name, count in CATEGORIES.items()
        ),
        *(Feature(name=name, kind="number") for name in NUMBERS),
    ),
    classes=("on time", "late"),
    label="late",
    key=None,
)


def draw_rows(
    generator: np.random.Generator,
    count: int,
    *,
    warmer: float = 0.0,  # standard deviations of the temperature
) -> pd.DataFrame:
    """Rows like those of the flights recipe: 14 columns, skewed, rounded, with gaps."""
    columns: dict[str, Any] = {}
    for name, size in CATEGORIES.items():
        chance = 1 / np.arange(1, size + 1)
        codes = generator.choice(size, count, p=chance / chance.sum())
        columns[name] = np.array([f"{name}{index}" for index in range(size)], dtype=object)[codes]
    columns["month"] = generator.integers(1, 4, count)
    columns["day"] = generator.integers(1, 31, count)
    columns["hour"] = generator.integers(5, 23, count)
    columns["distance"] = np.round(generator.gamma(2, 500, count))
    temperature = generator.normal(38, 9, count) + warmer * 9
    columns["temp"] = np.where(generator.random(count) < 0.01, np.nan, temperature)
    columns["dewp"] = generator.normal(28, 10, count)
    columns["humid"] = generator.beta(5, 3, count) * 100
    columns["wind_speed"] = np.round(generator.gamma(3, 4, count))
    wet = generator.exponential(0.05, count)
    columns["precip"] = np.where(generator.random(count) < 0.93, 0.0, wet)
    gaps = generator.random(count) < 0.1
    columns["pressure"] = np.where(gaps, np.nan, generator.normal(1017, 7, count))
    clear = generator.random(count) < 0.8
    columns["visib"] = np.where(clear, 10.0, generator.uniform(0, 10, count))
    chance = generator.beta(2, 6, count)
    columns["probabilities"] = list(np.column_stack([1 - chance, chance]))
    return pd.DataFrame(columns)


def draw_labels(
    generator: np.random.Generator, rows: pd.DataFrame, shift: float = 0.0
) -> np.ndarray:
    """Whether each flight was late: as promised, or more often by `shift`."""
    chance = np.array(rows["probabilities"].tolist())[:, 1]
    return (generator.random(len(rows)) < np.clip(chance + shift, 0, 1)).astype(np.int64)


def flights_profile(
    seed: int, training_rows: int = 4200, held_out_rows: int = 1500
) -> dict[str, Any]:
    """A profile of such rows."""
    generator = np.random.default_rng(seed)
    held_out = draw_rows(generator, held_out_rows)
    return build_profile(
        draw_rows(generator, training_rows),
        FLIGHTS,
        np.array(held_out["probabilities"].tolist()),
        labels=draw_labels(generator, held_out),
    )


def make_workspace(folder: Path, **settings: object) -> Workspace:
    """A workspace with these settings ("section.key" with dots written as two underscores)."""
    named = {name.replace("__", "."): value for name, value in settings.items()}
    return create_workspace(folder / "workspace", settings=named)


def add_release(
    workspace: Workspace,
    name: str,
    profile: Mapping[str, Any],
    data_version: str = "flights@v1.0",
) -> str:
    """Put a release with this profile on record and into the champion slot; its digest."""
    folder = workspace.bundles / name
    folder.mkdir(parents=True)
    write_json(folder / "features.json", FLIGHTS.model_dump(mode="json"))
    write_json(folder / "profile.json", dict(profile))
    files = {part: sha256_file(folder / part) for part in ("features.json", "profile.json")}
    draft = BundleManifest(
        digest="0" * 64,
        name=name,
        recipe="flights",
        created_at="2013-04-01T00:00:00+00:00",
        data_version=data_version,
        data_digest="d",
        code_commit="c",
        dirty_hash="",
        run_id="r",
        cycle="1",
        parameters={},
        thresholds={},
        metrics={},
        lock_digest="l",
        files=files,
        inputs=("numbers",),
    )
    digest = manifest_digest(draft)
    manifest = draft.model_copy(update={"digest": digest})
    write_json(folder / "manifest.json", manifest.model_dump(mode="json"))
    ledger = Ledger(workspace.ledger_url)
    with ledger.decision(
        "gate", actor="test", subject=name, verdict="approved", reason="test"
    ) as change:
        change.add_release(manifest, status="approved", path=folder)
    ledger.close()
    point_to(workspace, digest)
    return digest


def point_to(workspace: Workspace, digest: str) -> None:
    """Put a release into the champion slot, as the release room does."""
    ledger = Ledger(workspace.ledger_url)
    slot, release = ledger.slot("champion"), ledger.release(digest)
    with ledger.decision(
        "deploy",
        actor="test",
        subject=release.name,
        verdict="deployed",
        reason="test",
        evidence={"digest": digest},
    ) as change:
        epoch = change.set_slot("champion", digest, slot.epoch if slot else 0)
    ledger.close()
    entry = SlotEntry(digest=digest, path=release.path, name=release.name)
    write_pointer(
        workspace.pointer_path,
        Pointer(epoch=epoch, slots={"champion": entry}, split={"champion": 1.0}),
    )


def prediction_records(
    rows: pd.DataFrame,
    *,
    release: str,
    name: str = "flights-r1",
    since: float,
    until: float,
    prefix: str = "q",
    rows_per_request: int = 1,
) -> list[dict[str, Any]]:
    """The log's records of these rows, spread evenly over the time."""
    fields = rows.drop(columns="probabilities")
    plain = fields.astype(object).where(fields.notna(), None).to_dict("records")
    times = np.linspace(since, until, len(rows), endpoint=False)
    return [
        {
            "kind": "prediction",
            "id": f"{prefix}{number}",
            "request": f"{prefix}r{number // rows_per_request}",
            "time": float(times[number // rows_per_request * rows_per_request]),
            "release": release,
            "name": name,
            "slot": "champion",
            "row": row,
            "probabilities": [float(share) for share in shares],
            "prediction": int(shares[1] > 0.5),
            "latency_ms": 2.0 + number % 7,
        }
        for number, (row, shares) in enumerate(zip(plain, rows["probabilities"], strict=True))
    ]


def label_records(
    records: Sequence[Mapping[str, Any]], labels: Sequence[int], *, delay: float = 30.0
) -> list[dict[str, Any]]:
    """Feedback with the true label of each prediction, `delay` seconds later."""
    return [
        {
            "kind": "feedback",
            "id": record["id"],
            "time": record["time"] + delay,
            "label": FLIGHTS.classes[label],
        }
        for record, label in zip(records, labels, strict=True)
    ]


def write_log(
    predictions: Path, records: Sequence[Mapping[str, Any]], *, segments: int = 1, tag: str = "a"
) -> None:
    """Write records into so many closed segments, in the order given."""
    for part in range(segments):
        path = predictions / "segments" / f"20130401T0000000{part:02d}-{tag}-{part:06d}.log"
        with JournalWriter(path) as journal:
            journal.append_many(records[part::segments])


def shuffled(records: Sequence[Mapping[str, Any]], seed: int) -> list[Mapping[str, Any]]:
    """The records in a random order."""
    mixed = list(records)
    random.Random(seed).shuffle(mixed)
    return mixed


def killed_at(steps: int, work: Callable[[], object]) -> bool:
    """Run `work` in a process that is killed at the n-th line of the partitions module."""
    child = os.fork()
    if child == 0:
        seen = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal seen
            if frame.f_code.co_filename != partitions.__file__:
                return None
            if event == "line":
                seen += 1
                if seen >= steps:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)
