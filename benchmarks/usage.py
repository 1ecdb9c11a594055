"""How long it takes to find who used a row, and what served at a moment: `python benchmarks/usage.py [--releases 10000]` prints the table.

The ledger holds so many releases, each of one of four data versions of 20,000 rows and each deployed once; asked for
are 30 rows. The limit is one second for the call, imports and page cache warm; the median of five calls is shown.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from core_support import many_releases

from mlops_workbench.core.asof import as_of
from mlops_workbench.core.clock import now
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import create_workspace
from mlops_workbench.data.usage import used_by
from mlops_workbench.data.versions import DataStore

LIMIT_SECONDS = 1.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--releases", type=int, default=10_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = DataStore(create_workspace(Path(folder) / "w", name="usage"))
        generator = np.random.default_rng(0)
        frame = pd.DataFrame(
            {
                "id": [f"row {number:07d}" for number in range(20_000)],
                "value": generator.normal(size=20_000),
                "late": generator.integers(0, 2, 20_000),
            }
        )
        refs = [
            store.snapshot("flights", frame[: 5000 * part], key="id", label="late").ref
            for part in (1, 2, 3, 4)
        ]
        many_releases(Ledger(store.workspace.ledger_url), options.releases, refs)
        keys = frame["id"][10_000:10_030].tolist()
        used_by(store, "flights", keys)
        seconds, asof = [], []
        ledger = Ledger(store.workspace.ledger_url)
        for _ in range(5):
            begun = time.perf_counter()
            found = used_by(store, "flights", keys)
            seconds.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            served = as_of(ledger, now().timestamp())["release"]
            asof.append(time.perf_counter() - begun)
        assert served["name"] == f"flights-r{options.releases}", served
    print(f"releases in the ledger    {options.releases:>8,}")
    print(f"releases that had the rows{len(found.releases):>8,}")
    for title, taken in (("used-by", seconds), ("audit asof", asof)):
        print(
            f"{title + ', seconds':26}{statistics.median(taken):>8.2f}   median of 5, limit {LIMIT_SECONDS:g}"
        )


if __name__ == "__main__":
    main()
