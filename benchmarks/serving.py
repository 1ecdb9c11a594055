"""Requests a second and latency of the prediction server, closed loop, at several connections.

    python benchmarks/serving.py [--bundle DIR] [--connections 1 16 64] [--seconds 5] [--rows 1]

The server is the real process with its prediction log; the client here shares the machine with it.
Without a bundle a small logistic release is built (three numbers, two categories). Figures depend
on the machine: compare within one run.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from serving_support import build_bundle, serving

from mlops_workbench.serving.models import load_model, warm_up_rows


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
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(body) < length:
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


def request_bytes(body: bytes) -> bytes:
    """A POST /predict as it goes over the wire."""
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        bundle = arguments.bundle or build_bundle(Path(scratch))
        row = warm_up_rows(load_model(bundle).schema)[0]
        request = request_bytes(json.dumps({"rows": [row] * arguments.rows}).encode())
        began = time.perf_counter()
        with serving(Path(scratch), "--bundle", str(bundle)) as server:
            server.wait_ready()
            start_seconds = time.perf_counter() - began
            uvloop.run(measure(server.port, request, 4, 1.0))
            for connections in arguments.connections:
                latencies = uvloop.run(
                    measure(server.port, request, connections, arguments.seconds)
                )
                results.append(figures(latencies, connections, arguments.seconds))
    if arguments.json:
        print(json.dumps({"start_seconds": start_seconds, "rows": arguments.rows, "runs": results}))
        return 0
    print(f"ready after {start_seconds:.2f} s; {arguments.rows} row(s) a request")
    print(
        f"{'connections':>11} {'req/s':>8} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8} {'max ms':>8}"
    )
    for run in results:
        connections, rate, *rest = run.values()
        print(f"{connections:>11.0f} {rate:>8.0f}" + "".join(f" {each:>8.2f}" for each in rest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
