"""Requests a second and latency of the prediction server, alone or against its peers.

    python benchmarks/serving.py [--bundle DIR] [--connections 1 16 64] [--seconds 5] [--rows 1] [--workers 1]
    python benchmarks/serving.py --peers all [--kinds tabular picture] [--rounds 3] [--seconds 1]
    python benchmarks/serving.py --peers mlflow echo

The server is the real process with its prediction log; the client here shares the machine with it.
Alone, without a bundle, a small logistic release is built (three numbers, two categories).

With peers every server answers one row a request for the same weights: a table like the flights'
(TabularNetwork) and pictures of 28 x 28 (PictureNetwork). Ours has log, figures, token and a 10 %
canary switched on. All are up at once and are asked in turn, `--rounds` times over, so that a busy
moment of the machine falls on all of them; a figure is the median of the rounds. Environments of
the peers are made once, with pip, below `--environments`. Figures depend on the machine: compare
within one run.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from peers.compare import PEERS, compare
from peers.load import figures, measure, request_bytes
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
