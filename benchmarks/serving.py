"""Requests a second and latency of the prediction server, alone or against its peers.

    python benchmarks/serving.py [--bundle DIR] [--connections 1 16 64] [--seconds 5] [--rows 1] [--workers 1]
    python benchmarks/serving.py --peers all [--kinds tabular picture] [--rounds 3] [--seconds 1]
    python benchmarks/serving.py --peers mlflow echo

The server is the real process with its prediction log; the client here shares the machine with it.
Alone, without a bundle, a small logistic release is built (three numbers, two categories), and the
server is then overrun: twice as many requests as it answered at 64 connections come at random moments, and a client
in a process of its own that asks 100 times a second tells what those wait who are let in.

With peers every server answers one row a request for the same weights: a table like the flights'
(TabularNetwork) and pictures of 28 x 28 (PictureNetwork). Ours has log, figures, token and a 10 %
canary switched on. All are up at once and are asked in turn, `--rounds` times over, so that a busy
moment of the machine falls on all of them; a figure is the median of the rounds. Environments of
the peers are made once, with pip, below `--environments`. Figures depend on the machine: compare
within one run.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from peers.compare import PEERS, compare
from peers.load import Arrivals, figures, measure, request_bytes
from serving_support import build_bundle, serving

from mlops_workbench.serving.models import load_model, warm_up_rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peers", nargs="+", choices=["all", *PEERS], help="compare with these")
    parser.add_argument(
        "--kinds", nargs="+", choices=["tabular", "picture"], default=["tabular", "picture"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path.home() / ".cache" / "mlops-workbench" / "serving-peers",
        help="where the peers' own environments are made and kept",
    )
    arguments = parser.parse_args()
    if arguments.peers:
        chosen = PEERS if "all" in arguments.peers else arguments.peers
        seconds = min(arguments.seconds, 1.0)
        return compare(chosen, arguments.kinds, arguments.rounds, seconds, arguments.environments)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        bundle = arguments.bundle or build_bundle(Path(scratch))
        row = warm_up_rows(load_model(bundle).schema)[0]
        request = request_bytes(json.dumps({"rows": [row] * arguments.rows}).encode())
        began = time.perf_counter()
        count = str(arguments.workers)
        with serving(Path(scratch), "--bundle", str(bundle), "--workers", count) as server:
            server.wait_ready()
            start_seconds = time.perf_counter() - began
            uvloop.run(measure(server.port, request, 4, 1.0))
            for connections in arguments.connections:
                latencies = uvloop.run(
                    measure(server.port, request, connections, arguments.seconds)
                )
                results.append(figures(latencies, connections, arguments.seconds))
            overrun = overload(server.port, request, arguments.seconds)
    if arguments.json:
        told = {"start_seconds": start_seconds, "rows": arguments.rows, "runs": results}
        print(json.dumps({**told, "overload": overrun}))
        return 0
    print(f"ready after {start_seconds:.2f} s; {arguments.rows} row(s) a request")
    print(
        f"{'connections':>11} {'req/s':>8} {'p50 ms':>8} {'p95 ms':>8} {'p99 ms':>8} {'max ms':>8}"
    )
    for run in results:
        connections, rate, *rest = run.values()
        print(f"{connections:>11.0f} {rate:>8.0f}" + "".join(f" {each:>8.2f}" for each in rest))
    print(
        "twice the rate of 64 connections: {sent:.0f}/s came, {accepted:.0f}/s let in, {refused:.0f}/s turned away, "
        "{errors:.0f} errors; p99 of a client beside it who is let in {p99_ms:.1f} ms, at capacity {capacity_p99_ms:.1f} ms: {times:.2f} x".format(
            **overrun
        )
    )
    return 0


PROBES = 100.0  # a second, from this process, while another one loads the server
CROWD = 1024  # connections of the flood


def crowd(port: int, request: bytes, rate: float, seconds: float) -> dict[str, float]:
    """Requests at a rate that does not wait for answers: how many a second came, were let in and turned away."""
    arrivals = Arrivals(port, request, rate, seconds, from_due=False)
    uvloop.run(arrivals.run(CROWD))
    counts = {
        "sent": arrivals.sent,
        "accepted": len(arrivals.latencies),
        "refused": arrivals.refused,
    }
    return {**{name: count / seconds for name, count in counts.items()}, "errors": arrivals.errors}


def full_house(port: int, request: bytes, seconds: float) -> dict[str, float]:
    """64 clients in a closed loop."""
    return figures(uvloop.run(measure(port, request, 64, seconds)), 64, seconds)


def probed_p99_ms(port: int, request: bytes, seconds: float) -> float:
    """What a client beside the load waits, who is not busy itself; those who are told to come again are left out."""
    probes = Arrivals(port, request, PROBES, seconds, from_due=False, seed=11)
    uvloop.run(probes.run(32))
    found = sorted(probes.latencies)
    return found[len(found) * 99 // 100] * 1000


def overload(port: int, request: bytes, seconds: float) -> dict[str, float]:
    """What becomes of requests that come twice as fast as they can be answered; three rounds, the medians."""
    rounds, length = [], max(seconds, 3.0)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        capacity = other.submit(full_house, port, request, seconds).result()
        for _ in range(3):
            full = other.submit(full_house, port, request, length + 1)
            time.sleep(0.5)
            at_capacity = probed_p99_ms(port, request, length - 1)
            full.result()
            flood = other.submit(
                crowd, port, request, 2 * capacity["requests_per_second"], length + 1
            )
            time.sleep(0.5)
            beyond = probed_p99_ms(port, request, length - 1)
            told = {"p99_ms": beyond, "capacity_p99_ms": at_capacity, "times": beyond / at_capacity}
            rounds.append({**flood.result(), **told})
            time.sleep(1.2)  # until everybody is let in again
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


if __name__ == "__main__":
    sys.exit(main())
