"""Clients that cost little: a closed loop of keep-alive connections, and arrivals at a rate."""

import asyncio
import random
import time
from collections import deque
from typing import cast


class Asker(asyncio.Protocol):
    """One keep-alive connection that asks again as soon as it is answered."""

    def __init__(self, request: bytes, latencies: list[float], end: float) -> None:
        self.request = request
        self.latencies = latencies
        self.end = end
        self.received = b""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.ask()

    def ask(self) -> None:
        self.asked = time.perf_counter()
        if self.asked < self.end:
            self.transport.write(self.request)
        elif not self.done.done():
            self.transport.close()
            self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, separator, body = self.received.partition(b"\r\n\r\n")
        if not separator:
            return
        if len(body) < body_length(head):
            return
        self.latencies.append(time.perf_counter() - self.asked)
        if not self.received.startswith(b"HTTP/1.1 200"):
            self.transport.close()
            self.done.set_exception(RuntimeError(self.received.decode()))
            return
        self.received = b""
        self.ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed the connection"))


async def measure(port: int, request: bytes, connections: int, seconds: float) -> list[float]:
    """Latencies in seconds, sorted."""
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    askers = [
        (await loop.create_connection(lambda: Asker(request, latencies, end), "127.0.0.1", port))[1]
        for _ in range(connections)
    ]
    await asyncio.gather(*[asker.done for asker in askers])
    return sorted(latencies)


def request_bytes(body: bytes, path: str = "/predict", token: str = "") -> bytes:
    """A POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    if token:
        head += f"Authorization: Bearer {token}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def figures(latencies: list[float], connections: int, seconds: float) -> dict[str, float]:
    """Requests a second and percentiles in milliseconds."""
    percentiles = {
        f"p{share}_ms": latencies[min(len(latencies) - 1, len(latencies) * share // 100)] * 1000
        for share in (50, 95, 99)
    }
    return {
        "connections": connections,
        "requests_per_second": len(latencies) / seconds,
        **percentiles,
        "maximum_ms": latencies[-1] * 1000,
    }


class Arrivals:
    """Requests that come when they come, whether or not the earlier ones are answered.

    A latency counts from the moment the request was due, so a server that falls behind cannot hide it; with more
    requests than the client itself can send in time, from the moment it was sent. One that is told to come again (429)
    is counted as refused and has no latency.
    """

    def __init__(
        self,
        port: int,
        request: bytes,
        rate: float,
        seconds: float,
        seed: int = 7,
        *,
        from_due: bool = True,
    ) -> None:
        self.port, self.request, self.seconds = port, request, seconds
        self.gaps = random.Random(seed)
        self.rate = rate
        self.latencies: list[float] = []
        self.errors = self.refused = self.sent = 0
        self.from_due = from_due
        self.due: deque[float] = deque()
        self.idle: list[Slot] = []

    async def run(self, connections: int = 64) -> None:
        """Send for the time, then wait up to a second for what is still under way."""
        loop = asyncio.get_running_loop()
        for _ in range(connections):
            _, slot = await loop.create_connection(lambda: Slot(self), "127.0.0.1", self.port)
            self.idle.append(slot)
        start = moment = time.perf_counter()
        while moment < start + self.seconds:
            moment += self.gaps.expovariate(self.rate)
            wait = moment - time.perf_counter()
            if wait > 0 or self.sent % 16 == 0:  # who is behind has to read answers all the same
                await asyncio.sleep(max(0, wait))
            self.sent += 1
            if self.idle:
                self.idle.pop().ask(moment)
            else:
                self.due.append(moment)
        end = time.perf_counter() + 1
        while self.answered < self.sent and time.perf_counter() < end:
            await asyncio.sleep(0.01)
        self.errors += self.sent - self.answered  # no answer in time is an error

    @property
    def answered(self) -> int:
        """How many requests were answered in one way or another."""
        return len(self.latencies) + self.refused + self.errors


class Slot(asyncio.Protocol):
    """One keep-alive connection of `Arrivals`."""

    def __init__(self, arrivals: Arrivals) -> None:
        self.arrivals = arrivals
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, due: float) -> None:
        self.due = due if self.arrivals.from_due else time.perf_counter()
        self.transport.write(self.arrivals.request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, separator, body = self.received.partition(b"\r\n\r\n")
        if not separator or len(body) < body_length(head):
            return
        if self.received.startswith(b"HTTP/1.1 200"):
            self.arrivals.latencies.append(time.perf_counter() - self.due)
        elif self.received.startswith(b"HTTP/1.1 429"):
            self.arrivals.refused += 1
        else:
            self.arrivals.errors += 1
        self.received = b""
        if self.arrivals.due:
            self.ask(self.arrivals.due.popleft())
        else:
            self.arrivals.idle.append(self)


def body_length(head: bytes) -> int:
    """The length that the head of an answer declares."""
    return int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
