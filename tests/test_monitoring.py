"""The monitoring room with files, processes, kills, a ledger and a browser."""

import contextlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from monitoring_support import (
    FLIGHTS,
    add_release,
    draw_labels,
    draw_rows,
    flights_profile,
    killed_at,
    label_records,
    make_workspace,
    point_to,
    prediction_records,
    shuffled,
    write_log,
)

from mlops_workbench.cli.monitor import monitor, watch_once
from mlops_workbench.core.errors import ConflictError, DataError, IntegrityError, SettingsError
from mlops_workbench.core.features import Feature, FeatureSchema
from mlops_workbench.core.journal import JournalWriter
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.pointer import read_pointer
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.versions import DataStore
from mlops_workbench.monitoring import partitions
from mlops_workbench.monitoring.alerts import RequestedAction, read_book, write_book
from mlops_workbench.monitoring.champion import read_champion
from mlops_workbench.monitoring.decide_update import UpdateDecision, decide_update, gather_inputs
from mlops_workbench.monitoring.drift import drift
from mlops_workbench.monitoring.estimates import NOT_ENOUGH_DATA
from mlops_workbench.monitoring.monitor import monitor_once
from mlops_workbench.monitoring.partitions import compact, read_catalogue
from mlops_workbench.monitoring.prediction_store import Window, read_window
from mlops_workbench.monitoring.profile import build_profile
from mlops_workbench.monitoring.quality import window_quality
from mlops_workbench.monitoring.report import render_report, report_tables
from mlops_workbench.monitoring.service import window_service
from mlops_workbench.serving.prediction_log import PredictionLog

START = 1364803200.0  # 2013-04-01 08:00 UTC
HOUR = 3600.0


def april(
    count: int = 600, *, seed: int = 0, shift: float = 0.0, **where: Any
) -> list[dict[str, Any]]:
    """Two hours of predictions with labels for the first half, some repeated or corrected."""
    generator = np.random.default_rng(seed)
    rows = draw_rows(generator, count)
    labels = draw_labels(generator, rows, shift)
    where = {"release": "a" * 64, "since": START, "until": START + 2 * HOUR, **where}
    records = prediction_records(rows, rows_per_request=3, **where)
    half = count // 2
    feedback = label_records(records[:half], labels[:half])
    corrected = label_records(records[: half // 10], 1 - labels[: half // 10], delay=10.0)
    orphans = [{**feedback[0], "id": f"orphan{number}"} for number in range(7)]
    clicks = [
        {"kind": "feedback", "id": record["id"], "time": record["time"] + 5, "click": True}
        for record in records[:20]
    ]
    errors = [
        {"kind": "error", "time": START + n * 60.0, "status": s, "reason": "x", "route": "/predict"}
        for n, s in enumerate([422, 422, 500])
    ]
    return [*records, *feedback, *feedback[:50], *corrected, *orphans, *clicks, *errors]


def figures_of(window: Window) -> dict[str, Any]:
    """Everything that is told about a window."""
    return {
        "quality": window_quality(window.predictions, FLIGHTS.classes).to_json(),
        "service": window_service(window).to_json(),
        "feedback": asdict(window.feedback),
        "predictions": window.predictions.drop(columns="probabilities").to_dict("list"),
        "damaged": window.damaged,
        "newest": window.newest,
    }


def same(first: Any, second: Any) -> bool:
    """Equal, NaN being equal to itself."""
    return repr(first) == repr(second)


# ---------------------------------------------------------------------------------------------
# the log


def test_any_order_any_split_and_repeated_lines_give_the_same_figures(tmp_path: Path) -> None:
    records = april()
    write_log(tmp_path / "plain", records)
    expected = figures_of(read_window(tmp_path / "plain", START, START + HOUR))
    assert expected["quality"]["labels"] == 300
    assert expected["feedback"]["conflicting"] == 30
    assert expected["feedback"]["orphans"] == 7
    repeated = expected["feedback"].pop("repeated")  # grows with repeated lines: its meaning
    for seed in range(12):
        chance = random.Random(seed)
        again = shuffled([*records, *chance.sample(records, 100)], seed)
        folder = tmp_path / f"replay{seed}"
        cut = chance.randrange(len(again))
        write_log(folder, again[:cut], segments=chance.randrange(1, 5), tag="a")
        if chance.random() < 0.7:
            compact(folder, older_than_seconds=0, merge_files=chance.choice([2, 100]))
        write_log(folder, again[cut:], segments=chance.randrange(1, 5), tag="b")
        if chance.random() < 0.5:
            compact(folder, older_than_seconds=0)
        found = figures_of(read_window(folder, START, START + HOUR))
        assert found["feedback"].pop("repeated") >= repeated
        assert same(found, expected), seed


def test_orphans_are_told_from_late_labels(tmp_path: Path) -> None:
    """Neither is a label of yesterday's prediction an orphan, nor one that comes before its own."""
    generator = np.random.default_rng(0)
    old = prediction_records(
        draw_rows(generator, 5), release="a", since=START - 20 * HOUR, until=START - 19 * HOUR
    )
    new = prediction_records(
        draw_rows(generator, 5), release="a", since=START, until=START + 60, prefix="n"
    )
    late = label_records(old, [1] * 5, delay=20 * HOUR)
    early = label_records(new, [0] * 5, delay=-3.0)
    write_log(tmp_path, [*late, *early, *new, *old])
    window = read_window(tmp_path, START, START + HOUR)
    assert window.feedback.orphans == 0
    assert window.predictions["label"].tolist() == ["on time"] * 5
    yesterday = read_window(tmp_path, START - 24 * HOUR, START)
    assert yesterday.predictions["label"].tolist() == ["late"] * 5


def counted(predictions: Path) -> Counter[str]:
    """How often each prediction stands in the log as a whole: Parquet and what compaction left."""
    catalogue = read_catalogue(predictions)
    counts: Counter[str] = Counter()
    for file in catalogue.files:
        if file.kind == "prediction":
            path = str(predictions / "parquet" / file.path)
            found = duckdb.sql(f"SELECT id FROM read_parquet('{path}')").fetchall()
            counts.update(row[0] for row in found)
    for segment in (predictions / "segments").glob("*.log"):
        page = partitions.read_journal(segment, catalogue.segments.get(segment.name, 0))
        counts.update(r["id"] for r in page.records if r["kind"] == "prediction")
    return counts


@pytest.mark.parametrize("attempts", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_a_compaction_killed_anywhere_loses_and_doubles_nothing(
    tmp_path: Path, attempts: int
) -> None:
    generator = np.random.default_rng(0)
    rows = draw_rows(generator, 12)
    chance = random.Random(0)
    interrupted = 0
    for attempt in range(attempts):
        folder = tmp_path / str(attempt)
        for part in range(3):
            records = prediction_records(
                rows, release="a", since=START, until=START + 3 * HOUR, prefix=f"{part}-"
            )
            write_log(folder, records, tag=f"s{part}")

            def compact_parts(place: Path = folder) -> None:
                compact(place, older_than_seconds=0, merge_files=2)

            interrupted += killed_at(chance.randrange(1, 2500), compact_parts)
            seen = read_window(folder, START, START + 3 * HOUR)
            assert len(seen.predictions) == 12 * (part + 1)  # while it lies there broken
        compact(folder, older_than_seconds=0, merge_files=2)
        counts = counted(folder)
        assert len(counts) == 36 and set(counts.values()) == {1}
        assert not list((folder / "segments").glob("*.log"))
    assert attempts < interrupted < 3 * attempts  # some were killed, some came through


def test_readers_see_every_answer_once_while_writers_write_and_compaction_runs(
    tmp_path: Path,
) -> None:
    generator = np.random.default_rng(0)
    row = prediction_records(draw_rows(generator, 1), release="a", since=START, until=START + 1)[0]
    written, looked, stop = [0], threading.Event(), threading.Event()

    def write() -> None:
        for part in range(12):
            if part == 6:
                assert looked.wait(60)
            path = tmp_path / "segments" / f"20130401T080000000-1-{part:06d}.log"
            with JournalWriter(path) as journal:
                for number in range(40):
                    journal.append({**row, "id": f"{part}-{number}", "time": START + written[0]})
                    written[0] += 1
                    time.sleep(0.001)
        stop.set()

    def compact_again() -> None:
        while not stop.is_set():
            compact(tmp_path, older_than_seconds=0, merge_files=3)

    threads = [threading.Thread(target=work) for work in (write, compact_again)]
    for thread in threads:
        thread.start()
    looks = 0
    while not stop.is_set():
        before = written[0]
        window = read_window(tmp_path, START, START + HOUR)
        assert before <= len(window.predictions) <= written[0] + 1
        assert window.predictions["id"].is_unique
        assert len(window.requests) <= 1  # they all bear the same request's name
        looks += 1
        if looks > 3:
            looked.set()
    for thread in threads:
        thread.join()
    compact(tmp_path, older_than_seconds=0)
    assert len(counted(tmp_path)) == 480 and looks > 3


def test_a_silent_server_keeps_its_segment(tmp_path: Path) -> None:
    """A segment that nobody has written to for long, but that is still open, is not taken away."""
    records = april(30)
    path = tmp_path / "segments" / "20130401T080000000-1-000001.log"
    with JournalWriter(path) as journal:
        journal.append_many(records[:10])
        os.utime(path, (0, 0))
        assert compact(tmp_path, older_than_seconds=60).segments_removed == 0
        journal.append_many(records[10:30])
        assert path.exists()
    assert len(read_window(tmp_path, START, START + 2 * HOUR).predictions) == 30
    assert compact(tmp_path, older_than_seconds=0).segments_removed == 1


def test_damaged_lines_and_torn_tails_are_counted_and_kept_aside(tmp_path: Path) -> None:
    write_log(tmp_path, april(30))
    path = next((tmp_path / "segments").glob("*.log"))
    lines = path.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b'"release"', b'"releaze"', 1)
    path.write_bytes(b"".join(lines) + b"12345678 {half a li")
    assert read_window(tmp_path, START, START + 2 * HOUR).damaged == 1
    compact(tmp_path, older_than_seconds=0)
    window = read_window(tmp_path, START, START + 2 * HOUR)
    assert (len(window.predictions), window.damaged) == (29, 1)
    assert [kept.name for kept in (tmp_path / "damaged").iterdir()] == [path.name]


def test_two_compactions_at_once_wait_for_each_other(tmp_path: Path) -> None:
    write_log(tmp_path, april(300), segments=6)
    threads = [
        threading.Thread(target=compact, args=(tmp_path,), kwargs={"older_than_seconds": 0})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(counted(tmp_path).values()) == {1}


def test_hostile_rows_do_not_break_the_window(tmp_path: Path) -> None:
    """What clients send may change its type, hold quotes, or be named like the log's own fields."""
    good = april(3)[0]
    odd = [
        {"temp": "warm", "carrier": 3, "id": "'; DROP TABLE prediction; --"},
        {"temp": [1, 2], "time": None, "carrier": "ÄÖ\u2028\x00"},
        {"label": "late", "probabilities": 7},
    ]
    records = [{**good, "id": f"'{n}\"", "row": row} for n, row in enumerate(odd)]
    write_log(tmp_path, [good, *records])
    for _ in range(2):
        window = read_window(tmp_path, START, START + HOUR)
        assert len(window.predictions) == 4
        assert window.predictions["label"].isna().all()
        assert window.predictions["row.label"].tolist().count("late") == 1
        compact(tmp_path, older_than_seconds=0)
    report = drift(flights_profile(0), window.predictions, FLIGHTS, minimum_rows=2)
    assert report.rows == 4


def test_the_log_of_the_real_server_is_read(tmp_path: Path) -> None:
    """Its segments are closed by size; the open one is read where it lies and left to it."""
    records = april(300)
    log = PredictionLog(tmp_path, sync_interval_ms=0, segment_bytes=65_536)
    for start in range(0, len(records), 50):
        log.append(records[start : start + 50])
    for _ in range(200):  # closed segments are synced by a thread of their own
        if compact(tmp_path, older_than_seconds=0).segments_removed == 0 and (
            len(list((tmp_path / "segments").iterdir())) == 1
        ):
            break
        time.sleep(0.05)
    assert len(list((tmp_path / "segments").iterdir())) == 1
    log.append([{**records[0], "id": "one more"}])
    window = read_window(tmp_path, START, START + 2 * HOUR)
    log.close()
    assert len(window.predictions) == 301 and len(window.errors) == 3


# ---------------------------------------------------------------------------------------------
# the monitor


@pytest.fixture(scope="module")
def profile() -> dict[str, Any]:
    return flights_profile(0)


BAD = {
    "alert.quality.metric": "brier",
    "alert.quality.operator": "above",
    "alert.quality.threshold": 0.25,
    "alert.quality.action": "rollback",
    "alert.quality.severity": "critical",
    "alert.second.metric": "calibration_gap",
    "alert.second.operator": "above",
    "alert.second.threshold": 0.2,
    "alert.second.action": "rollback",
}


def rules_workspace(folder: Path, rules: dict[str, Any]) -> Workspace:
    """A workspace with these alert rules and no others."""
    workspace = make_workspace(folder)
    text = (workspace.root / "settings.ini").read_text()
    kept = text[: text.index("[alert.")]
    sections: dict[str, list[str]] = {}
    for name, value in rules.items():
        section, _, key = name.rpartition(".")
        sections.setdefault(section, []).append(f"{key} = {value}")
    body = "\n".join(f"[{name}]\n" + "\n".join(lines) for name, lines in sections.items())
    (workspace.root / "settings.ini").write_text(kept + body + "\n")
    return Workspace.open(workspace.root)


class Traffic:
    """Hours of traffic, one after the other, and the monitor's look at each."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.hours = 0

    def hour(self, release: str, *, shift: float = 0.0, count: int = 300) -> tuple[float, float]:
        """One more hour of requests; its begin and end."""
        since = START + self.hours * HOUR
        generator = np.random.default_rng(self.hours)
        rows = draw_rows(generator, count)
        records = prediction_records(
            rows, release=release, since=since, until=since + HOUR, prefix=f"h{self.hours}-"
        )
        labels = label_records(records, draw_labels(generator, rows, shift))
        write_log(self.workspace.predictions, [*records, *labels], tag=f"h{self.hours}")
        self.hours += 1
        return since, since + HOUR

    def look(self, span: tuple[float, float], **options: Any) -> Any:
        return monitor_once(self.workspace, since=span[0], until=span[1], **options)


def alert_messages(workspace: Workspace) -> list[str]:
    ledger = Ledger(workspace.ledger_url)
    titles = [message.title for message in ledger.messages()]
    ledger.close()
    return [title for title in reversed(titles) if ":" in title]


def test_a_release_that_fails_is_rolled_back_once_after_two_bad_hours(
    tmp_path: Path, profile: dict[str, Any]
) -> None:
    workspace = rules_workspace(tmp_path, BAD)
    first = add_release(workspace, "flights-r1", profile)
    second = add_release(workspace, "flights-r2", {**profile, "note": "r2"})
    traffic, asked = Traffic(workspace), []

    def roll_back(action: RequestedAction) -> None:
        asked.append(action)
        point_to(workspace, first)

    good = traffic.look(traffic.hour(second), on_action=roll_back)
    assert {alert["state"] for alert in good.alerts} == {"ok"}
    pending = traffic.look(traffic.hour(second, shift=0.5), on_action=roll_back)
    assert {alert["state"] for alert in pending.alerts} == {"pending"} and not asked
    assert {tile.name: tile.state for tile in pending.tiles}["accuracy"] == "warning"
    fired = traffic.look(traffic.hour(second, shift=0.5), on_action=roll_back)
    assert [(event.rule, event.kind) for event in fired.events] == [
        ("quality", "firing"),
        ("second", "firing"),
    ]
    assert [action.release for action in asked] == [second]  # two rules, one rollback
    assert all(action.done for action in fired.actions)
    assert {tile.name: tile.state for tile in fired.tiles}["accuracy"] == "critical"
    after = traffic.look(traffic.hour(first), on_action=roll_back)
    assert after.champion is not None and after.champion.name == "flights-r1"
    assert [event.kind for event in after.events] == ["closed", "closed"]
    assert {alert["state"] for alert in after.alerts} == {"ok"} and len(asked) == 1
    ledger = Ledger(workspace.ledger_url)
    decisions = ledger.decisions(kind="alert")
    assert len(decisions) == 4 and ledger.verify().ok
    assert decisions[-1].evidence["value"] > 0.25
    assert alert_messages(workspace) == [
        "quality: firing",
        "second: firing",
        "quality: closed",
        "second: closed",
    ]


def test_a_failed_rollback_is_asked_for_again(tmp_path: Path, profile: dict[str, Any]) -> None:
    workspace = rules_workspace(tmp_path, {**BAD, "alert.quality.for_windows": 1})
    digest = add_release(workspace, "flights-r1", profile)
    traffic, asked = Traffic(workspace), []

    def fail(action: RequestedAction) -> None:
        asked.append(action.rule)
        raise ConflictError("there is no earlier release")

    snapshot = traffic.look(traffic.hour(digest, shift=0.5), on_action=fail)
    assert [(a.done, a.problem) for a in snapshot.actions] == [
        (False, "there is no earlier release")
    ]
    traffic.look(traffic.hour(digest, shift=0.5), on_action=fail)
    alone = traffic.look(traffic.hour(digest, shift=0.5))
    assert asked[:2] == ["quality", "quality"]
    assert {a.problem for a in alone.actions} == {"nobody was there to carry it out"}
    over = [traffic.look(traffic.hour(digest), on_action=fail) for _ in range(2)][-1]
    assert {event.kind for event in over.events} == {"over"} and not over.actions
    assert alert_messages(workspace).count("quality: firing") == 1


def test_a_monitor_that_dies_behind_the_ledger_tells_an_alarm_once(
    tmp_path: Path, profile: dict[str, Any]
) -> None:
    workspace = rules_workspace(tmp_path, {**BAD, "alert.quality.for_windows": 1})
    digest = add_release(workspace, "flights-r1", profile)
    traffic, path = Traffic(workspace), workspace.monitoring / "alerts.json"
    traffic.look(traffic.hour(digest))
    before = read_book(path)
    bad = traffic.hour(digest, shift=0.5)
    traffic.look(bad)
    write_book(path, before)  # as if it had died before the book reached the disk
    traffic.look((bad[0], bad[1] + 1))
    assert alert_messages(workspace).count("quality: firing") == 1
    path.unlink()  # a lost book begins anew, and must not swallow the next alarm
    traffic.look((bad[0], bad[1] + 2))
    assert alert_messages(workspace).count("quality: firing") == 2


def test_missing_data_is_shown_and_decides_nothing(tmp_path: Path, profile: dict[str, Any]) -> None:
    workspace = rules_workspace(tmp_path, BAD)
    digest = add_release(workspace, "flights-r1", profile)
    traffic = Traffic(workspace)
    for _ in range(2):
        traffic.look(traffic.hour(digest, shift=0.5))
    lost = traffic.look(traffic.hour(digest, count=40))
    assert [(e.rule, e.kind) for e in lost.events] == [
        ("quality", "no data"),
        ("second", "no data"),
    ]
    assert [(a["state"], a["firing"]) for a in lost.alerts] == [("no data", True)] * 2
    for _ in range(3):
        silent = traffic.look(traffic.hour(digest, count=40))
        assert not silent.events and all(alert["firing"] for alert in silent.alerts)
    assert silent.measured.drift.verdict == NOT_ENOUGH_DATA
    assert silent.figures["drift"] is None and silent.figures["brier"] is None
    assert silent.figures["rate_per_second"] > 0
    empty = monitor_once(workspace, since=START - 20 * HOUR, until=START - 19 * HOUR)
    states = {tile.name: (tile.state, tile.value) for tile in empty.tiles}
    assert states["accuracy"] == ("critical", None)  # still firing, and nothing to show for it
    assert states["drift"] == states["errors"] == ("no data", None)


def test_only_the_champion_is_judged(tmp_path: Path, profile: dict[str, Any]) -> None:
    """What the release before it did in the same window is shown, not blamed on it."""
    workspace = rules_workspace(tmp_path, BAD)
    first = add_release(workspace, "flights-r1", profile)
    second = add_release(workspace, "flights-r2", {**profile, "note": "r2"})
    traffic = Traffic(workspace)
    bad, good = traffic.hour(first, shift=0.5), traffic.hour(second)
    snapshot = traffic.look((bad[0], good[1]))
    assert snapshot.figures["brier"] < 0.2
    by_release = snapshot.to_json()["quality_by_release"]
    assert by_release[first]["figures"]["brier"]["value"] > 0.3


def test_the_snapshot_is_strict_json_and_tells_what_moved(
    tmp_path: Path, profile: dict[str, Any]
) -> None:
    workspace = make_workspace(tmp_path)
    digest = add_release(workspace, "flights-r1", profile)
    rows = draw_rows(np.random.default_rng(9), 1200, warmer=1.5)
    records = prediction_records(rows, release=digest, since=START, until=START + HOUR)
    labels = draw_labels(np.random.default_rng(9), rows, 0.15)
    write_log(workspace.predictions, [*records, *label_records(records, labels)])
    snapshot = monitor_once(workspace, since=START, until=START + HOUR)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in JSON")

    stored = json.loads((workspace.monitoring / "latest.json").read_text(), parse_constant=refuse)
    assert stored == snapshot.to_json() and len(list(workspace.monitoring.glob("2*.json"))) == 1
    moved = {row["column"]: row["direction"] for row in stored["drift"]["columns"] if row["moved"]}
    assert list(moved) == ["temp"] and "moved right by 1" in moved["temp"]
    changed = {row["figure"] for row in stored["comparison"]["changes"] if row["moved"]}
    assert {"label_share", "calibration_bias"} <= changed and "auc" not in changed
    assert {len(column) for column in stored["series"].values()} == {30}
    assert stored["release"]["data_version"] == "flights@v1.0"
    assert stored["old"] and stored["age_seconds"] > 1e6
    from mlops_workbench.monitoring import figures

    for name in ("tiles", "series", "reliability", "drift", "shapes"):
        assert getattr(figures, f"{name}_figure")(stored)._repr_png_()[:4] == b"\x89PNG"


def test_parts_of_a_window_are_judged_one_after_the_other(
    tmp_path: Path, profile: dict[str, Any]
) -> None:
    """A window that is looked at once can still show two bad windows in a row."""
    workspace = rules_workspace(tmp_path, BAD)
    digest = add_release(workspace, "flights-r1", profile)
    traffic = Traffic(workspace)
    span = traffic.hour(digest, shift=0.5, count=800)
    assert not traffic.look((span[0], span[1] - 1)).events
    (workspace.monitoring / "alerts.json").unlink()
    assert len(traffic.look(span, windows=2).events) == 2


def test_the_command_rolls_back_by_itself_and_bars_the_release(
    tmp_path: Path, profile: dict[str, Any]
) -> None:
    workspace = rules_workspace(tmp_path, {**BAD, "alert.quality.for_windows": 1})
    first = add_release(workspace, "flights-r1", profile)
    second = add_release(workspace, "flights-r2", {**profile, "note": "r2"})
    span = Traffic(workspace).hour(second, shift=0.5)
    options = ["-w", str(workspace.root), "--since", str(span[0]), "--until", str(span[1])]
    answer = CliRunner().invoke(monitor, ["once", *options])
    assert answer.exit_code == 0 and "rollback: done" in answer.output, answer.output
    ledger = Ledger(workspace.ledger_url)
    slot, releases = ledger.slot("champion"), {row.digest: row for row in ledger.releases()}
    assert slot is not None and slot.digest == first
    assert releases[second].status == "barred"
    assert "brier" in ledger.decisions(kind="rollback")[0].reason
    pointer = read_pointer(workspace.pointer_path)
    assert pointer is not None and pointer.slots["champion"].digest == first


def test_pictures_that_grow_dark_are_noticed(tmp_path: Path) -> None:
    features = FeatureSchema(
        features=(Feature(name="image", kind="image", maximum=16, shape=(1, 8, 8)),),
        classes=tuple("0123456789"),
        label="digit",
        key=None,
    )
    generator = np.random.default_rng(0)

    def pictures(count: int, light: float) -> pd.DataFrame:
        raw = generator.integers(0, 17, (count, 1, 8, 8)) * light
        sure = generator.dirichlet(np.full(10, 0.2), count)
        return pd.DataFrame({"image": raw.tolist(), "probabilities": list(sure)})

    held_out = pictures(500, 1.0)
    made = build_profile(pictures(900, 1.0), features, np.array(held_out["probabilities"].tolist()))
    quiet, dark = (drift(made, pictures(300, light), features) for light in (1.0, 0.7))
    assert quiet.verdict == "not moved" and len(quiet.everything) == 5
    moved = {column.column: column.direction for column in dark.everything if column.moved}
    assert "left" in moved["image brightness"] and "prediction" not in moved
    tables = report_tables(made, pictures(300, 0.7), features)
    names = ["image brightness", "image contrast", "image sharpness", "prediction", "confidence"]
    assert list(tables[0].columns) == list(tables[1].columns) == names


def test_the_decision_to_train_again_knows_what_is_new(
    tmp_path: Path, profile: dict[str, Any]
) -> None:
    workspace = make_workspace(tmp_path, update__minimum_new_rows=50)
    rows = draw_rows(np.random.default_rng(0), 150).drop(columns="probabilities")
    rows["late"], rows["flight"] = np.arange(150) % 2, [f"f{number}" for number in range(150)]
    store = DataStore(workspace)
    store.snapshot("flights", rows.head(100), key="flight", label="late", message="winter")
    assert decide(workspace).summary == "retrain: no release serves yet"
    digest = add_release(workspace, "flights-r1", profile)
    span = Traffic(workspace).hour(digest, shift=0.3)
    monitor_once(workspace, since=span[0], until=span[1])
    waiting = decide(workspace)
    assert (
        not waiting.retrain and "nothing new to learn from beyond flights@v1.0" in waiting.summary
    )
    assert {reason.name for reason in waiting.reasons if reason.speaks} >= {"schedule", "quality"}
    assert decide(workspace, waiting_rows=60).verdict == "retrain"
    champion = read_champion(workspace)
    assert champion is not None
    began = {"cycle-0001": champion.since - 1, "cycle-0002": champion.since + 1}
    answered = gather_inputs(workspace, waiting_rows=10, begun=began)
    assert "cycle-0002 has answered" in decide_update(answered, workspace.settings.update).summary
    assert gather_inputs(workspace, begun={"cycle-0001": champion.since - 1}).answered == ""
    store.snapshot("flights", rows, key="flight", label="late", message="April")
    now = decide(workspace)
    assert now.retrain and "50 labelled rows" in now.summary
    assert "late" not in {reason["name"] for reason in now.trigger["reasons"]}
    ledger = Ledger(workspace.ledger_url)
    with ledger.decision("data", actor="t", subject="x", verdict="v", reason="back") as change:
        change.set_slot("data:flights", "flights@v1.0", 0)
    assert decide(workspace).verdict == "wait"  # after a rollback the next cycle begins with v1.0


def decide(workspace: Workspace, waiting_rows: int = 0) -> UpdateDecision:
    inputs = gather_inputs(workspace, waiting_rows=waiting_rows)
    return decide_update(inputs, workspace.settings.update)


def test_a_rule_about_an_unknown_figure_is_refused(tmp_path: Path) -> None:
    rule = {"alert.x.metric": "acuracy", "alert.x.operator": "below", "alert.x.threshold": 0.5}
    workspace = rules_workspace(tmp_path, rule)
    with pytest.raises(SettingsError, match="did you mean 'accuracy'"):
        monitor_once(workspace)


def test_an_edited_profile_is_not_believed(tmp_path: Path, profile: dict[str, Any]) -> None:
    workspace = make_workspace(tmp_path)
    add_release(workspace, "flights-r1", profile)
    path = workspace.bundles / "flights-r1" / "profile.json"
    path.write_text(path.read_text().replace('"rows"', '"rowz"', 1))
    with pytest.raises(IntegrityError, match=r"profile\.json"):
        monitor_once(workspace)


# ---------------------------------------------------------------------------------------------
# the report


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory, profile: dict[str, Any]) -> Path:
    rows = draw_rows(np.random.default_rng(4), 800, warmer=1.0)
    found = drift(profile, rows, FLIGHTS)
    out = tmp_path_factory.mktemp("report") / "report.html"
    return render_report(*report_tables(profile, rows, FLIGHTS), found, out)


def test_the_report_bears_our_verdicts_and_is_sealed(report_page: Path) -> None:
    html = report_page.read_text()
    assert 1_000_000 < len(html) < 8_000_000
    assert "default-src 'none'" in html and "Holm over columns" in html
    assert "effect against the null of this window size" in html
    assert "evidently" not in sys.modules  # it lives in a process of its own


def test_an_empty_window_gives_no_report(tmp_path: Path, profile: dict[str, Any]) -> None:
    rows = draw_rows(np.random.default_rng(4), 3)
    found = drift(profile, rows, FLIGHTS)
    window, reference = report_tables(profile, rows.head(0), FLIGHTS)
    with pytest.raises(DataError, match="found 0 in the window"):
        render_report(window, reference, found, tmp_path / "x.html")
    window.to_csv(tmp_path / "window.csv")
    reference.to_csv(tmp_path / "reference.csv")
    command = [sys.executable, "-m", "mlops_workbench.monitoring.report"]
    for name in ("window", "reference"):
        command += [f"--{name}", str(tmp_path / f"{name}.csv")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "x.html")], capture_output=True, text=True
    )
    assert done.returncode == 1 and "found 0 in the window" in done.stderr
    assert not (tmp_path / "x.html").exists()


@pytest.mark.browser
def test_the_report_opens_without_a_network(report_page: Path) -> None:
    from playwright.sync_api import sync_playwright

    asked, problems = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        page.goto(report_page.as_uri())
        page.get_by_text("temp", exact=True).first.wait_for(timeout=60_000)
        text = page.inner_text("body")
        browser.close()
    assert "Holm over columns" in text and "Detected" in text
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert not [text for text in problems if "Content Security Policy" in text], problems


# ---------------------------------------------------------------------------------------------
# the command


def test_the_watch_survives_what_passes(
    tmp_path: Path, profile: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = make_workspace(tmp_path)
    add_release(workspace, "flights-r1", profile)
    path = workspace.bundles / "flights-r1" / "profile.json"
    content = path.read_text()
    path.write_text("{}")
    assert watch_once(workspace, None, False) is False
    path.write_text(content)
    assert watch_once(workspace, None, True) is True
    shown = capsys.readouterr()
    assert "profile.json" in shown.err and json.loads(shown.out)["alerts"]


def test_figures_of_a_champion_without_evaluation_are_still_measured(
    tmp_path: Path, profile: dict[str, Any]
) -> None:
    workspace = make_workspace(tmp_path)
    digest = add_release(workspace, "flights-r1", {**profile, "quality": None})
    span = Traffic(workspace).hour(digest)
    snapshot = monitor_once(workspace, since=span[0], until=span[1])
    assert snapshot.measured.comparison is None and snapshot.figures["brier"] is not None
    champion = read_champion(workspace)
    assert champion is not None and champion.since > START
    with contextlib.suppress(FileNotFoundError):
        workspace.pointer_path.unlink()
    assert monitor_once(workspace, since=span[0], until=span[1]).champion is None
