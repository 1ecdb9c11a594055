"""Several processes at one port: killed, labelled across, counted together, drained."""

import contextlib
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from serving_support import (
    ROW,
    Client,
    Load,
    RunningServer,
    build_bundle,
    logged,
    make_workspace,
    point_at,
    serving,
    start_server,
    wait_until,
)

from mlops_workbench.core.pointer import Pointer, SlotEntry, write_pointer
from mlops_workbench.core.workspace import Workspace


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace with one release and two workers."""
    made = make_workspace(tmp_path / "w", workers=2, segment_bytes=65_536)
    point_at(made.pointer_path, build_bundle(made.bundles), epoch=1)
    return made


@pytest.fixture
def server(tmp_path: Path, workspace: Workspace) -> Iterator[RunningServer]:
    """A ready server of two workers."""
    with serving(tmp_path, "--workspace", str(workspace.root)) as running:
        clients(running)
        yield running


def clients(server: RunningServer, count: int = 2) -> dict[int, Client]:
    """A connection to each worker, once all have a release."""
    found: dict[int, Client] = {}
    end = time.monotonic() + 30
    while len(found) < count and time.monotonic() < end:
        client = server.client()
        health = client.get("/health").body
        if health["status"] == "ok":
            found.setdefault(health["worker"], client)
        else:
            time.sleep(0.02)
    assert len(found) == count, found
    return found


def worker_processes(server: RunningServer) -> list[psutil.Process]:
    """The workers, which are the keeper's only children."""
    return psutil.Process(server.process.pid).children()


def test_feedback_finds_its_request_whichever_worker_takes_it(
    server: RunningServer, workspace: Workspace
) -> None:
    first, second = clients(server).values()
    ids = [f"p{number}" for number in range(20)]
    assert first.post("/predict", {"rows": [ROW] * 20, "ids": ids}).status == 200
    own = second.post("/predict", {"row": ROW}).body["predictions"][0]["id"]
    labels = {"feedback": [{"id": each, "label": "late"} for each in ids]}
    nothing = {"accepted": 0, "duplicate": 0, "changed": 0, "orphan": 0}
    assert second.post("/feedback", labels).body == {**nothing, "accepted": 20}
    assert first.post("/feedback", labels).body == {**nothing, "duplicate": 20}
    changed = {"feedback": [{"id": "p3", "label": "on time"}, {"id": own, "click": True}]}
    assert first.post("/feedback", changed).body == {**nothing, "accepted": 2, "changed": 1}
    assert second.post("/feedback", changed).body == {**nothing, "duplicate": 2}
    stranger = {"feedback": [{"id": "nobody", "label": "late"}]}
    assert second.post("/feedback", stranger).body == {**nothing, "accepted": 1, "orphan": 1}
    writers = {path.name.split("-")[1] for path in (workspace.predictions / "segments").iterdir()}
    assert writers == {str(process.pid) for process in worker_processes(server)}
    assert len(logged(workspace.predictions, "feedback")) == 23


def test_the_figures_of_all_workers_stand_on_every_page(server: RunningServer) -> None:
    by_number = clients(server)
    for number, client in by_number.items():
        for _ in range(10 * number):
            client.post("/predict", {"row": ROW})
    time.sleep(1.5)  # a page tells what the other did up to a second ago
    for client in by_number.values():
        text = client.get("/metrics").body.decode()
        found = re.findall(r'mwb_predictions_total{.*worker="(\d)"} (\S+)', text)
        assert {worker: float(value) for worker, value in found} == {"1": 10.0, "2": 20.0}
        assert text.count("# TYPE mwb_requests_total counter") == 1
        assert text.count("mwb_ready{") == 2


def shadow_processes(server: RunningServer) -> list[psutil.Process]:
    """The processes below the keeper that answer a copy of the traffic."""
    found = []
    for each in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
            if "mlops_workbench.serving.shadow" in each.cmdline():
                found.append(each)
    return found


def shadow_rows(client: Client) -> dict[str, float]:
    """Rows by what became of them, over all workers."""
    found: Counter[str] = Counter()
    text = client.get("/metrics").body.decode()
    for outcome, value in re.findall(r'mwb_shadow_rows_total{outcome="(\w+)".*} (\S+)', text):
        found[outcome] += float(value)
    return dict(found)


def test_all_workers_share_one_copy_of_the_traffic(
    server: RunningServer, workspace: Workspace
) -> None:
    """One process answers what both workers send, each row once; it comes back when it dies, and ends with its release."""
    entries = {}
    for slot, name, bias in (("champion", "flights-r3", 0.5), ("shadow", "flights-r2", 1.0)):
        bundle = build_bundle(workspace.bundles, name=name, bias=bias)
        entries[slot] = SlotEntry(digest=bundle.name, path=str(bundle), name=name)
    alone = Pointer(epoch=3, slots={"champion": entries["champion"]}, split={"champion": 1.0})
    write_pointer(workspace.pointer_path, Pointer(epoch=2, slots=entries, split={"champion": 1.0}))
    both = list(clients(server).values())
    for client in both:
        wait_until(lambda c=client: c.get("/health").body["epoch"] == 2, 10, "the shadow")

    def ask(turn: int) -> None:
        for number, client in enumerate(both):
            ids = [f"{turn}-{number}-{row}" for row in range(50)]
            assert client.post("/predict", {"rows": [ROW] * 50, "ids": ids}).status == 200

    def told(rows: int) -> bool:
        return all(
            shadow_rows(each) == {"copied": rows, "dropped": 0, "compared": rows, "failed": 0}
            for each in both
        )

    ask(1)
    wait_until(lambda: told(100), 20, "the figures of the first rows")
    [process] = shadow_processes(server)
    process.kill()
    process.wait(5)
    ask(2)  # waits for the one that follows
    wait_until(lambda: told(200), 20, "the figures of all rows")
    assert [each.pid != process.pid for each in shadow_processes(server)] == [True]
    copied = Counter(record["id"] for record in logged(workspace.predictions, "shadow"))
    assert len(copied) == 200 and set(copied.values()) == {1}
    write_pointer(workspace.pointer_path, alone)
    wait_until(lambda: not shadow_processes(server), 10, "the end of the copy")
    assert both[0].post("/predict", {"row": ROW}).status == 200 and told(200)


def test_an_entity_gets_the_same_release_from_every_worker(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / "w", workers=2)
    entries = {}
    for slot, name, bias in (("champion", "flights-r1", 0.0), ("challenger", "flights-r2", 1.0)):
        bundle = build_bundle(workspace.bundles, name=name, bias=bias)
        entries[slot] = SlotEntry(digest=bundle.name, path=str(bundle), name=name)
    split = {"champion": 0.9, "challenger": 0.1}
    write_pointer(workspace.pointer_path, Pointer(epoch=1, slots=entries, split=split, salt="s"))
    with serving(tmp_path, "--workspace", str(workspace.root)) as server:
        first, second = clients(server).values()
        for client in (first, second):
            wait_until(
                lambda each=client: len(each.get("/health").body["arms"]) == 2, 10, "two arms"
            )
        rows = [{**ROW, "flight_id": f"F{number}"} for number in range(500)]
        said = [
            [
                each["release"]
                for each in client.post("/predict", {"rows": rows}).body["predictions"]
            ]
            for client in (first, second)
        ]
        assert said[0] == said[1]
        assert 20 < said[0].count("flights-r2") < 90


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_worker_loses_no_acknowledged_row(
    tmp_path: Path, workspace: Workspace, seed: int
) -> None:
    server = start_server(tmp_path, "--workspace", str(workspace.root))
    try:
        clients(server)
        load = Load(server.port).start(6)
        time.sleep(0.5 + 0.1 * seed)
        before = {process.pid for process in worker_processes(server)}
        victim = sorted(before)[seed % 2]
        os.kill(victim, signal.SIGKILL)
        killed = time.monotonic()

        def replaced() -> bool:
            now = {process.pid for process in worker_processes(server)}
            return len(now) == 2 and victim not in now

        wait_until(replaced, 10, "a new worker")
        clients(server)
        back = time.monotonic() - killed
        time.sleep(0.5)
        load.stop()
        print(f"two workers again after {back:.2f} s; {len(load.failures)} requests failed")
        # at most what the six clients had under way fails, and not one connection is refused
        assert len(load.failures) <= 6, load.failures
        assert not [each for each in load.failures if "refused" in each.lower()], load.failures
        assert server.stop() == 0
    finally:
        if server.process.poll() is None:
            server.kill()
    asked = Counter(each["id"] for _, _, body in load.answers for each in body["predictions"])
    assert len(asked) > 200
    records = Counter(record["id"] for record in logged(workspace.predictions))
    assert not [each for each in asked if not records[each]], (
        "an acknowledged row is not in the log"
    )
    assert max(records.values()) == 1
    # a row beyond the acknowledged ones is one whose client was cut off between log and answer
    assert len(records) - len(asked) <= 3 * len(load.failures)
    assert "ended with -9; it is started again" in server.log.read_text()


def test_sigterm_drains_every_worker(server: RunningServer, workspace: Workspace) -> None:
    processes = worker_processes(server)
    load = Load(server.port, expect_death=True).start(4)
    time.sleep(0.5)
    began = time.monotonic()
    assert server.stop() == 0
    print(f"drained in {time.monotonic() - began:.2f} s")
    load.stop()
    assert not [process for process in processes if process.is_running()]
    asked = [each["id"] for _, _, body in load.answers for each in body["predictions"]]
    assert len(asked) > 100
    assert Counter(record["id"] for record in logged(workspace.predictions)) == Counter(asked)


def test_workers_end_when_their_keeper_is_killed(server: RunningServer) -> None:
    processes = worker_processes(server)
    server.kill()
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not alive


def test_the_keeper_stays_small_and_a_worker_too(server: RunningServer) -> None:
    for client in clients(server).values():
        for _ in range(100):
            client.post("/predict", {"rows": [ROW] * 10})
    keeper = psutil.Process(server.process.pid)
    for heavy in ("onnxruntime", "uvicorn", "uvloop", "numpy"):
        assert f"/{heavy}/" not in Path(f"/proc/{keeper.pid}/maps").read_text(), heavy
    sizes = [each.memory_info().rss / 1e6 for each in (keeper, *keeper.children())]
    print("resident MB of keeper and workers:", [round(size) for size in sizes])
    assert sizes[0] < 80
    assert max(sizes[1:]) < 150


def test_the_number_of_workers_is_checked(tmp_path: Path) -> None:
    bundle = build_bundle(tmp_path)
    with pytest.raises(AssertionError, match="expected 1 to 64 workers, found 0"):
        start_server(tmp_path, "--bundle", str(bundle), "--workers", "0")
