"""Clients that cost little: a closed loop of keep-alive connections, and arrivals at a rate."""

import asyncio
import random
import time
from collections import deque
from typing import cast

from mlops_workbench.release.load import body_length, closed_loop, request_bytes

__all__ = ["Arrivals", "figures", "measure", "request_bytes"]


async def measure(port: int, request: bytes, connections: int, seconds: float) -> list[float]:
    """Latencies in seconds, sorted; RuntimeError with the first answer that is no 200."""
    tally = await closed_loop(port, [request], connections, seconds)
    if tally.failures:
        raise RuntimeError(tally.failures[0])
    return sorted(tally.seconds)


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
        if not self.from_due:  # what this client had no connection left for never came
            self.sent -= len(self.due)
            self.due.clear()
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
