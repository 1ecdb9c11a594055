"""Helpers of the page tests: a workspace with real runs and real traffic, and the pages' server."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from monitoring_support import (
    add_release,
    draw_labels,
    draw_rows,
    flights_profile,
    label_records,
    make_workspace,
    prediction_records,
    write_log,
)

from mlops_workbench.core.clock import timestamp
from mlops_workbench.core.files import sha256_file, write_json
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.quarantine import WAITING, hold_rows
from mlops_workbench.data.versions import DataStore
from mlops_workbench.experiment.recorder import Recorder
from mlops_workbench.experiment.tracking import finish_run, ship_journal, start_run
from mlops_workbench.monitoring.monitor import MonitorSnapshot, monitor_once
from mlops_workbench.pages.reader import refresh, refresh_once
from mlops_workbench.pipeline.kernels import stop_parents
from mlops_workbench.pipeline.manifest import MANIFEST_FILE, Manifest, OutputFile, write_record
from mlops_workbench.recipes.pictures import read_digits

HOSTILE = "<img src=x onerror=document.title='owned'>"
MINUTE = 60.0


def record_run(
    workspace: Workspace,
    *,
    cycle: str,
    name: str | None = None,
    learning_rate: float = 0.001,
    data_version: str = "flights@v1.0",
    status: str = "FINISHED",
    epochs: int = 12,
    seed: int = 0,
) -> str:
    """Log a training run with curves through the recorder and the tracker; its id."""
    generator = np.random.default_rng(seed)
    folder = workspace.runs / cycle / f"3_train-{seed}"
    parameters = {"learning_rate": learning_rate, "epochs": epochs, "hidden": 64, "seed": seed}
    run_id = start_run(
        workspace,
        stage="3_train",
        cycle=cycle,
        tags={"data_version": data_version, "recipe": "flights"},
        parameters={**parameters, "batch_size": 256, "embedding": 8},
        folder=folder,
        name=name,
    )
    speed = min(1.0, learning_rate * 250)
    with Recorder(folder) as recorder:
        for step in range(1, epochs + 1):
            loss = 0.44 + 0.25 * np.exp(-speed * step) + generator.normal(0, 0.003)
            recorder.metrics({"train_loss": loss, "validation_loss": loss + 0.01 * speed}, step)
        figures = {"brier": loss * 0.33, "accuracy": 1.22 - loss, "auc": 0.68 + 0.02 * speed}
        recorder.metrics(figures)
    ship_journal(workspace, run_id, folder)
    finish_run(workspace, run_id, status)
    return run_id


def record_runs(workspace: Workspace) -> list[str]:
    """A handful of runs that differ in one or two things, one of them named to do harm."""
    rates = (0.001, 0.003, 0.01, 0.0003, 0.02)
    ids = [
        record_run(
            workspace,
            cycle=f"2013-04-{number + 1:02d}",
            learning_rate=rate,
            data_version="flights@v1.0" if number < 3 else "flights@v1.1",
            status="FAILED" if number == 3 else "FINISHED",
            seed=number,
        )
        for number, rate in enumerate(rates)
    ]
    return [*ids, record_run(workspace, cycle="2013-04-06", name=HOSTILE, seed=7)]


def serve_traffic(
    workspace: Workspace,
    release: str,
    *,
    name: str,
    count: int = 1500,
    shift: float = 0.0,  # how much more often flights are late than promised
    warmer: float = 0.0,
    seed: int = 1,
    ended_ago: float = 1.0,  # seconds
    minutes: float = 50.0,
) -> None:
    """Write the log of predictions and of their labels, as the server does."""
    generator = np.random.default_rng(seed)
    rows = draw_rows(generator, count, warmer=warmer)
    until = timestamp() - ended_ago
    records = prediction_records(
        rows,
        release=release,
        name=name,
        since=until - minutes * MINUTE,
        until=until,
        prefix=f"s{seed}-",
    )
    labels = draw_labels(generator, rows, shift=shift)
    feedback = label_records(records, labels, delay=0.5)
    write_log(workspace.predictions, [*records, *feedback], tag=f"{seed}")


@dataclass(frozen=True)
class Factory:
    """A workspace with runs, two releases and traffic."""

    workspace: Workspace
    champion: str  # digest
    runs: list[str]


def make_factory(folder: Path, **settings: object) -> Factory:
    """A workspace in which everything is well, with the pages' read models written."""
    workspace = make_workspace(folder, **{"pages__refresh_seconds": 1, **settings})
    runs = record_runs(workspace)
    profile = flights_profile(1)
    add_release(workspace, "flights-r1", profile)
    champion = add_release(workspace, "flights-r2", {**profile, "note": "second"})
    serve_traffic(workspace, champion, name="flights-r2")
    monitor_once(workspace)
    refresh(workspace, {})
    return Factory(workspace, champion, runs)


def make_data(folder: Path, **settings: object) -> Workspace:
    """Digits with four versions on two lines, a table whose numbers moved, doubtful rows, releases, a diagnosis."""
    workspace = make_workspace(folder, **{"pages__refresh_seconds": 1, **settings})
    store, rows = DataStore(workspace), read_digits()
    named = {"key": "picture_id", "label": "label"}
    store.snapshot("digits", rows[:600], **named, message="the first 600 digits")
    more = rows[:900]
    store.snapshot("digits", more, **named, message="300 digits from the second office")
    corrected = more.copy()
    corrected.loc[40:79, "label"] = (corrected.loc[40:79, "label"] + 1) % 10
    store.snapshot("digits", corrected, **named, message="40 labels corrected " + HOSTILE)
    turned = rows[900:1000].assign(label=(rows[900:1000]["label"] + 1) % 10)
    line = pd.concat([more[20:], turned])
    store.snapshot("digits", line, **named, message="another line", parent="digits@v1.1")
    hold_digits(store, rows[1000:1012])
    make_hours(store)
    ledger = Ledger(workspace.ledger_url)
    for name, ref in (("digits-r1", "digits@v1.0"), ("digits-r2", "digits@v1.2")):
        add_release(workspace, name, flights_profile(1), data_version=ref)
    with ledger.decision("data", actor="t", subject="d", verdict="default", reason="r") as change:
        change.set_slot("data:digits", "digits@v1.2", 0)
    ledger.close()
    write_diagnosis(workspace)
    assert refresh_once(workspace) == 0
    return workspace


def hold_digits(store: DataStore, rows: pd.DataFrame) -> None:
    """Digits with wrong labels in quarantine."""
    given = (rows["label"] + 1) % 10
    marks = {"id": rows["picture_id"], "state": WAITING, "label": given.astype(str)}
    marks |= {
        "likely": rows["label"].astype(str),
        "probability": np.linspace(0.999, 0.7, len(rows)),
    }
    marks |= {"reason": "label: expected one that the model believes", "batch": "office 3"}
    marks["at"] = "2026-11-25T02:00:00+00:00"
    named = {f"quarantine_{name}": value for name, value in marks.items()}
    hold_rows(store, "digits", rows.assign(label=given, **named), key="picture_id")


def make_hours(store: DataStore) -> None:
    """A table in which one column's peak moves from 30 to 50 and a word becomes more frequent."""
    generator = np.random.default_rng(5)
    words = np.array(["dry", "wet", "snow"], dtype=object)
    parts = []
    for count, centre, spread, chance in ((900, 30, 10, 0.1), (600, 50, 15, 0.5)):
        parts.append(
            pd.DataFrame(
                {
                    "hour": [f"{centre}-{number:04d}" for number in range(count)],
                    "wind": generator.normal(centre, spread, count).round(1),
                    "pressure": generator.normal(1013, 8, count).round(1),
                    "weather": words[(generator.random(count) < chance).astype(int)],
                    "late": (generator.random(count) < chance).astype(int),
                }
            )
        )
    store.snapshot("hours", parts[0], key="hour", label="late", message="January")
    later = pd.concat([parts[0][100:], parts[1]]).assign(gusts=1.5)
    store.snapshot("hours", later, key="hour", label="late", message="February, with gusts")


def write_diagnosis(workspace: Workspace) -> None:
    """A finished run of the stage that `mwb why` runs."""
    folder = workspace.runs / "cycle-0001" / "diagnose-1"
    (folder / "outputs").mkdir(parents=True)
    effect = {"difference": 0.214, "low": 0.181, "high": 0.247}
    effect |= {"accuracy_before": 0.957, "accuracy_after": 0.861}
    guilty = [
        {"key": f"digit-{n:04d}", "label": "4", "likely": "3", "belief": 0.99, "guilty": True}
        for n in range(900, 1000)
    ]
    suspects = (("service", "innocent", "no error, p95 4 ms as before"), ("data", "guilty", "v1.3"))
    record = {
        "format": 1,
        "good": {"name": "digits-r1", "data_version": "digits@v1.1"},
        "bad": {"name": "digits-r3", "data_version": "digits@v1.3"},
        "verdict": "data",
        "summary": "data: 100 labels of digits@v1.3 are off by one",
        "findings": [dict(zip(("suspect", "verdict", "text"), s, strict=True)) for s in suspects],
        "data": {
            "guilty_version": "digits@v1.3",
            "last_good_version": "digits@v1.1",
            "guilty_change": "100 rows added by batch v1.3",
            "effect": effect,
            "rows": guilty,
            "guilty_keys": [row["key"] for row in guilty],
            "retrains": 9,
            "retrain_limit": 12,
            "seconds": 41.0,
            "judged_by": "180 held-out rows of digits@v1.1",
            "found_by": "retraining",
        },
        "remedy": {
            "command": "mwb data drop digits@v1.3 --keys-from guilty_keys.json",
            "reason": "a new version without the guilty rows",
        },
    }
    write_json(folder / "outputs" / "diagnosis.json", record)
    place = folder / "outputs" / "diagnosis.json"
    output = OutputFile(
        path="outputs/diagnosis.json", sha256=sha256_file(place), bytes=place.stat().st_size
    )
    manifest = Manifest(
        stage="diagnose",
        cycle="cycle-0001",
        attempt=1,
        run_id="r",
        parameters={},
        reuse_key="k",
        outputs={"diagnosis.json": output},
        metrics={},
        verdict="data",
        summary=record["summary"],
        started_at="2026-11-25T02:00:00+00:00",
        finished_at="2026-11-25T02:01:00+00:00",
        seconds=60.0,
    )
    write_record(folder, MANIFEST_FILE, manifest)


def spoil(factory: Factory) -> MonitorSnapshot:
    """Let flights be late far more often than promised, and let the monitor look twice."""
    serve_traffic(
        factory.workspace,
        factory.champion,
        name="flights-r2",
        shift=0.55,
        warmer=1.5,
        count=4000,
        seed=2,
        minutes=20,
    )
    monitor_once(factory.workspace)
    return monitor_once(factory.workspace)


def free_port() -> int:
    """A port that nobody uses just now."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


@contextlib.contextmanager
def pages_running(
    workspace: Workspace, *, environment: dict[str, str] | None = None
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`mwb pages` on a free port: its address and process; it is ended with SIGTERM."""
    port = free_port()
    command = [sys.executable, "-m", "mlops_workbench.cli.main", "pages", "-w", str(workspace.root)]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
    )
    try:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@contextlib.contextmanager
def lab_running(workspace: Workspace, token: str) -> Iterator[str]:
    """`mwb lab` on a free port: its address; it is ended with SIGTERM."""
    port = free_port()
    command = [sys.executable, "-m", "mlops_workbench.cli.main", "lab", "-w", str(workspace.root)]
    command += ["--port", str(port), "--no-browser", f"--IdentityProvider.token={token}"]
    process = subprocess.Popen(
        command + (["--allow-root"] if os.geteuid() == 0 else []),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        stop_parents(workspace.kernels)


def wait_for_port(port: int, process: subprocess.Popen[Any], seconds: float = 60) -> None:
    """Return when something listens there; AssertionError when the process ends before."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        assert process.poll() is None, process.communicate()[0]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port}")


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> None:
    """Return when the condition holds; AssertionError when it does not in time."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.1)


CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)

# For each element with text of its own: its text, and the contrast of its colour to the ground below it.
CONTRAST = """selector => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const ground = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  return [...document.querySelectorAll(selector)]
    .filter(e => e.getClientRects().length && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || e.tagName === 'SELECT')
    .map(e => {
      const below = ground(e), [a, b] = [light(over(parse(getComputedStyle(e).color), below)), light(below)];
      return { text: e.innerText.slice(0, 40), ratio: (Math.max(a, b) + .05) / (Math.min(a, b) + .05) };
    });
}"""


def kernels_of(process: int) -> list[int]:
    """The kernels below a process of `mwb pages`."""
    found = []
    for child in psutil.Process(process).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ipykernel_launcher" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found
