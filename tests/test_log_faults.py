"""The prediction log while servers and compactions are killed all the time: nothing acknowledged is lost, nothing counts twice."""

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import duckdb
import pytest
from serving_support import ROW, Client, build_bundle, make_workspace, point_at, start_server

from mlops_workbench.core.workspace import Workspace
from mlops_workbench.monitoring.partitions import compact, read_catalogue
from mlops_workbench.monitoring.prediction_store import read_window
from mlops_workbench.serving.prediction_log import recover_segments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KILLS, LANES = 200, 2


def compact_until_killed(predictions: Path, seed: int) -> None:
    """Let a process compact without a pause, and kill it in the middle."""
    child = os.fork()
    if child == 0:
        while True:
            compact(predictions, older_than_seconds=0, merge_files=4, grace_seconds=2)
    time.sleep(random.Random(seed).uniform(0.02, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def killed_compactions(predictions: Path, told: Connection) -> None:
    """Kill compactions until somebody asks how many."""
    kills = 0
    while not told.poll():
        compact_until_killed(predictions, kills)
        kills += 1
    told.send(kills)


class Lane:
    """A server that is killed and started again, and clients that remember what they were told."""

    def __init__(self, workspace: Workspace, number: int) -> None:
        self.workspace, self.number = workspace, number
        self.answered: list[str] = []  # ids
        self.labelled: list[str] = []
        self.problems: list[str] = []
        self.torn = self.kills = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        """One round after the other."""
        for turn in range(KILLS // LANES):
            try:
                self.one_round(turn, random.Random(1000 * self.number + turn))
            except Exception as error:  # noqa: BLE001 - told by the test
                self.problems.append(repr(error))
                return

    def one_round(self, turn: int, draw: random.Random) -> None:
        """Start, ask, kill; sometimes leave the half line that a kill inside of a write leaves."""
        server = start_server(self.workspace.root.parent, "--workspace", str(self.workspace.root))
        server.wait_ready()
        clients = [
            threading.Thread(target=self.ask, args=(server.port, f"{self.number}-{turn}-{client}"))
            for client in range(2)
        ]
        for client in clients:
            client.start()
        time.sleep(draw.uniform(0.05, 0.4))
        server.kill()
        self.kills += 1
        for client in clients:
            client.join()
        if draw.random() < 0.3:
            own = (self.workspace.predictions / "segments").glob(f"*-{server.process.pid}-*.log")
            for segment in sorted(own)[-1:]:
                with contextlib.suppress(FileNotFoundError), segment.open("r+b") as file:
                    file.seek(0, os.SEEK_END)
                    file.write(b'0123abcd {"kind":"prediction","id":"torn')
                    self.torn += 1
        words = server.log.read_text()
        if "Traceback" in words:
            self.problems.append(words)

    def ask(self, port: int, prefix: str) -> None:
        """Ask and label without a pause until the server dies."""
        client = Client(port)
        for number in range(100_000):
            ids = [f"{prefix}-{number}-{row}" for row in range(1 + number % 3)]
            try:
                said = client.post("/predict", {"rows": [ROW] * len(ids), "ids": ids})
                with self._lock:
                    self.answered += ids if said.status == 200 else []
                if said.status != 200:
                    self.problems.append(str(said))
                labels = [{"id": ids[0], "label": "late"}]
                if client.post("/feedback", {"feedback": labels}).status == 200:
                    with self._lock:
                        self.labelled.append(ids[0])
            except Exception:  # noqa: BLE001 - the server is dead: nothing was acknowledged
                return


def stored(predictions: Path, kind: str, columns: str) -> Counter[tuple[str, ...]]:
    """How often each record stands in the partitions."""
    paths = [
        str(predictions / "parquet" / file.path)
        for file in read_catalogue(predictions).files
        if file.kind == kind
    ]
    rows = duckdb.execute(f"SELECT {columns} FROM read_parquet($paths)", {"paths": paths})
    return Counter(rows.fetchall())


def test_two_hundred_kills_under_load_lose_nothing_and_count_nothing_twice(tmp_path: Path) -> None:
    """Two servers share the log and are killed 100 times each while compactions are killed and readers read."""
    workspace = make_workspace(tmp_path / "w", segment_bytes=65_536)
    point_at(workspace.pointer_path, build_bundle(workspace.bundles), epoch=1)
    predictions, begun = workspace.predictions, time.time()
    ours, theirs = multiprocessing.Pipe()
    compactor = multiprocessing.get_context("fork").Process(
        target=killed_compactions, args=(predictions, theirs)
    )
    compactor.start()
    lanes = [Lane(workspace, number) for number in range(LANES)]
    threads = [threading.Thread(target=lane.run) for lane in lanes]
    for thread in threads:
        thread.start()
    looks = 0
    while any(thread.is_alive() for thread in threads):
        known = sum(len(lane.answered) for lane in lanes)
        window = read_window(predictions, begun - 60, time.time() + 60, columns=[])
        assert len(window.predictions) >= known, "a reader misses what was acknowledged"
        assert window.predictions["id"].is_unique
        looks += 1
        time.sleep(1)
    ours.send("stop")
    compactions = ours.recv()
    compactor.join()
    problems = [problem for lane in lanes for problem in lane.problems]
    assert not problems, problems[:3]
    kills, torn = sum(lane.kills for lane in lanes), sum(lane.torn for lane in lanes)
    assert kills == KILLS and torn > 20 and compactions > 100 and looks > 10
    recover_segments(predictions)
    for _ in range(2):
        compact(predictions, older_than_seconds=0)
    assert not [path for path in (predictions / "segments").glob("*.log") if path.stat().st_size]
    assert read_window(predictions, 0, time.time() + 60, columns=[]).damaged == 0, (
        "no torn tail left"
    )
    counts = stored(predictions, "prediction", "request, id")
    assert max(counts.values()) == 1, "a row stands in the log twice"
    kept = Counter(row_id for _, row_id in counts)
    answered = [row_id for lane in lanes for row_id in lane.answered]
    assert len(answered) > 5_000
    assert not [row_id for row_id in answered if kept[row_id] != 1]
    labels = stored(predictions, "feedback", "id, label")
    said = [row_id for lane in lanes for row_id in lane.labelled]
    assert not [row_id for row_id in said if labels[row_id, "late"] != 1]
    # what was never acknowledged is what the clients had under way when their server died
    assert len(kept) - len(answered) <= 3 * 2 * KILLS
    print(
        f"{kills} servers and {compactions} compactions killed, {torn} torn tails cut, {len(answered):,} rows and "
        f"{len(said):,} labels acknowledged, all of them once in the log; {looks} looks meanwhile"
    )
