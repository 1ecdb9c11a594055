"""More small requests than the server can answer: some are turned away at once, the others do not wait, nothing is left over."""

import asyncio
import contextlib
import json
import re
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from serving_support import (
    ROW,
    RunningServer,
    build_bundle,
    logged,
    make_workspace,
    point_at,
    serving,
    wait_until,
)

from mlops_workbench.core.workspace import Workspace
from mlops_workbench.release.load import measure_load

BODY = json.dumps({"row": ROW}).encode()
HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
REQUEST = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A workspace whose server lets nobody wait for more than 20 ms if it can help it."""
    made = make_workspace(tmp_path / "w", maximum_wait_ms=20)
    point_at(made.pointer_path, build_bundle(made.bundles), epoch=1)
    return made


@pytest.fixture
def server(tmp_path: Path, workspace: Workspace) -> Iterator[RunningServer]:
    """A ready server of that workspace."""
    with serving(tmp_path, "--workspace", str(workspace.root)) as running:
        running.wait_ready()
        yield running


class Flood(asyncio.Protocol):
    """One connection that asks again as soon as it is answered, whatever it is told."""

    def __init__(self, told: Counter[int], refusals: set[bytes], end: asyncio.Event) -> None:
        self.told, self.refusals, self.end = told, refusals, end
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the first time."""
        self.transport = cast(asyncio.Transport, transport)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport.write(REQUEST)

    def data_received(self, data: bytes) -> None:
        """Count the answer and ask again."""
        self.received += data
        while (answer := first_answer(self.received)) is not None:
            status, head, body, self.received = answer
            self.told[status] += 1
            if status == 429:
                self.refusals.add(re.sub(rb"date: [^\r]*\r\n", b"", head) + b"\r\n\r\n" + body)
            if not self.end.is_set():
                self.transport.write(REQUEST)
            elif not self.done.done():
                self.transport.close()
                self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail when it was the server that hung up."""
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed the connection"))


def first_answer(received: bytes) -> tuple[int, bytes, bytes, bytes] | None:
    """Status, head and body of the first whole answer, and the bytes behind it; None when it is not whole."""
    head, separator, rest = received.partition(b"\r\n\r\n")
    found = re.search(rb"content-length: (\d+)", head)
    if not separator or found is None or len(rest) < int(found[1]):
        return None
    length = int(found[1])
    return int(head.split(b" ", 2)[1]), head, rest[:length], rest[length:]


async def flood(
    port: int, connections: int, seconds: float, end: asyncio.Event | None = None
) -> tuple[Counter[int], set[bytes]]:
    """How often each status was told, and the different refusals; over after these seconds or at the event `end`."""
    loop = asyncio.get_running_loop()
    told: Counter[int] = Counter()
    refusals: set[bytes] = set()
    end = end or asyncio.Event()
    floods = [
        (await loop.create_connection(lambda: Flood(told, refusals, end), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    loop.call_later(seconds, end.set)
    await asyncio.gather(*[each.done for each in floods])
    return told, refusals


def figure(server: RunningServer, name: str) -> float:
    """One figure of /metrics, 0 when it is not there yet."""
    text = server.client().get("/metrics").body.decode()
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_flood_is_turned_away_and_those_let_in_do_not_wait(
    server: RunningServer, workspace: Workspace
) -> None:
    """2,000 callers who never pause: everybody is answered, nobody who is let in waits for a second, and then all is as before."""
    told, refusals = asyncio.run(flood(server.port, 2000, 2.0))
    print(dict(told))
    assert set(told) == {200, 429} and told[429] > 1000, told
    [refusal] = refusals
    assert b"\r\nretry-after: 1\r\n" in refusal
    assert json.loads(refusal.partition(b"\r\n\r\n")[2])["error"].startswith("expected fewer")
    # what was let in was answered in its turn, and is the only thing on record
    turns = figure(server, "mwb_wait_seconds_count")
    assert figure(server, 'mwb_wait_seconds_bucket{le="1.0"}') == turns > 0
    assert len(logged(workspace.predictions)) == told[200] >= 64
    assert figure(server, 'mwb_requests_total{route="/predict",status="429"}') == told[429]
    assert figure(server, 'mwb_requests_total{route="/predict",status="200"}') == told[200]
    calm, _ = asyncio.run(flood(server.port, 30, 0.3))
    assert set(calm) == {200}, calm


def test_somebody_may_look_while_others_are_turned_away(server: RunningServer) -> None:
    async def look() -> tuple[Counter[int], list[int]]:
        asking = asyncio.create_task(flood(server.port, 300, 1.5))
        loop = asyncio.get_running_loop()
        seen = []
        for _ in range(20):
            seen.append((await loop.run_in_executor(None, server.client().get, "/health")).status)
        told, _ = await asking
        return told, seen

    told, seen = asyncio.run(look())
    assert told[429] > 0 and seen == [200] * 20


def test_pipelined_requests_are_answered_in_order_and_hold_up_nobody(
    server: RunningServer, workspace: Workspace
) -> None:
    """A client that sends 3,000 rows without reading an answer gets each, in order; another one is answered meanwhile."""
    rows = [json.dumps({"row": ROW, "id": f"p{number}"}).encode() for number in range(3000)]
    requests = [HEAD + b"Content-Length: %d\r\n\r\n" % len(row) + row for row in rows]
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.setblocking(False)
        asking, received = memoryview(b"".join(requests)), b""
        statuses, ids, beside = [], [], []
        while len(statuses) < len(rows):
            try:
                asking = asking[connection.send(asking[:262_144]) :] if asking else asking
                received += connection.recv(262_144)
            except BlockingIOError:
                beside.append(server.client().post("/predict", {"row": ROW}).status)
            while (answer := first_answer(received)) is not None:
                status, _, body, received = answer
                statuses.append(status)
                if status == 200:
                    ids.append(json.loads(body)["predictions"][0]["id"])
    assert set(statuses) <= {200, 429} and set(beside) == {200}, (Counter(statuses), beside)
    assert ids == [f"p{number}" for number, status in enumerate(statuses) if status == 200]
    assert len(logged(workspace.predictions)) == len(ids) + len(beside)


@pytest.mark.slow
def test_a_refusal_does_not_wait_for_a_long_body(server: RunningServer) -> None:
    """Who is turned away before a body of megabytes is told at once, and the connection ends."""

    async def ask_once() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(HEAD + b"Content-Length: 9000000\r\n\r\n" + b" " * 100)
        head = b""
        with contextlib.suppress(TimeoutError):  # let in, so the server waits for the body
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 1)
        writer.close()
        return head

    async def ask() -> list[bytes]:
        enough = asyncio.Event()
        asking = asyncio.create_task(flood(server.port, 400, 60, enough))
        refused: list[bytes] = []
        while len(refused) < 3 and not asking.done():
            heads = await asyncio.gather(*[ask_once() for _ in range(10)])
            refused += [head for head in heads if head.startswith(b"HTTP/1.1 429")]
        enough.set()
        await asking
        return refused

    heads = asyncio.run(ask())
    assert len(heads) >= 3 and all(b"connection: close" in head for head in heads)
    wait_until(lambda: server.client().post("/predict", {"row": ROW}).status == 200, 5, "calm")


def test_the_load_proof_counts_who_is_turned_away_as_no_error(server: RunningServer) -> None:
    """200 clients of the proof that is taken before a release: some are told to come again, and do."""
    figures = measure_load(server.port, server.process.pid, [BODY], connections=200, seconds=1.5)
    assert figures.errors == 0 and figures.refused > 0 and figures.requests > 100, figures.words
