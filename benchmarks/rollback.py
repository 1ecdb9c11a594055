"""How long people get answers of a release that was sent back: `python benchmarks/rollback.py [--rounds 100] [--per-second 200]`.

A real server under steady requests from eight connections, the controller in another process on the same machine. Each
way back is timed from the decision's moment in the ledger to the first answer that the former release gives to somebody
whom the other one had answered (p50, p99, max), and to the last answer of the release that was left. The limits: p99
under 100 ms with the former release in memory, which it is in every rollout, and no failed request.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from rollback_support import HEAD, KINDS, measure_rollbacks

LIMIT_MS = 100.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--per-second", type=float, default=200.0)
    arguments = parser.parse_args()
    print(HEAD, flush=True)
    failed = False
    for what in KINDS:
        with tempfile.TemporaryDirectory() as scratch:
            _, found = measure_rollbacks(
                Path(scratch), what, arguments.rounds, arguments.per_second
            )
        print(found.line(), flush=True)
        in_memory = "not in memory" not in what
        late = in_memory and float(np.quantile(found.first, 0.99)) >= LIMIT_MS
        failed |= late or bool(found.callers.failed)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
