"""What the monitor claims about chance, and what it costs: `python benchmarks/monitoring.py`.

1. False alarms: windows in which nothing has changed, 14 columns like those of the flights
   recipe (17 tests: gaps of two columns and the prediction count too), profile and window drawn
   anew each time, once without the practical minimum (the bare test) and once with it.
2. Power: the temperature moves by 0.3 standard deviations.
3. Cost: CPU time of a drift report, bytes and time of a profile, time to read a window.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from monitoring_support import (
    FLIGHTS,
    draw_rows,
    flights_profile,
    label_records,
    prediction_records,
    write_log,
)

from mlops_workbench.monitoring.drift import drift
from mlops_workbench.monitoring.partitions import compact
from mlops_workbench.monitoring.prediction_store import read_window

RATE = 0.05


def chance(rows: int, windows: int) -> None:
    """Print false alarms, power and CPU time at one window size."""
    generator = np.random.default_rng(rows)
    bare = practical = found = 0
    seconds, thresholds = 0.0, []
    for window in range(windows):
        profile = flights_profile(10_000 * rows + window)
        quiet, warmer = draw_rows(generator, rows), draw_rows(generator, rows, warmer=0.3)
        started = time.process_time()
        report = drift(profile, quiet, FLIGHTS, minimum_effect=0.0, seed=window)
        seconds += time.process_time() - started
        bare += any(column.moved for column in report.everything)
        practical += any(column.moved and column.effect >= 0.1 for column in report.everything)
        moved = drift(profile, warmer, FLIGHTS, seed=window)
        temperature = next(column for column in moved.columns if column.column == "temp")
        found += temperature.moved
        thresholds.append(temperature.threshold)
    print(
        f"{rows:>7,} {windows:>8} {bare / windows:>12.1%} {practical / windows:>12.1%} "
        f"{found / windows:>8.1%} {np.mean(thresholds):>10.3f} {1000 * seconds / windows:>9.0f} ms",
        flush=True,
    )


def cost() -> None:
    """Print bytes and times of a profile and of a window."""
    started = time.process_time()
    profile = flights_profile(0, training_rows=20_000)
    print(
        f"profile of 20,000 rows: {len(json.dumps(profile)) / 1000:.0f} KB, "
        f"{time.process_time() - started:.2f} s with drawing the rows"
    )
    rows = pd.concat([draw_rows(np.random.default_rng(0), 10_000)] * 10)
    records = prediction_records(rows, release="a", since=0.0, until=3600.0)
    labels = label_records(records[:50_000], [0] * 50_000)
    with tempfile.TemporaryDirectory() as folder:
        predictions = Path(folder)
        write_log(predictions, [*records, *labels], segments=4)
        for place, prepare in (("open segments", False), ("Parquet", True)):
            if prepare:
                started = time.perf_counter()
                compact(predictions, older_than_seconds=0)
                print(f"compaction of 150,000 records: {time.perf_counter() - started:.1f} s")
            started = time.perf_counter()
            found = len(read_window(predictions, 0.0, 3600.0).predictions)
            print(f"window of {found:,} rows, {place}: {time.perf_counter() - started:.1f} s")


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=200, help="windows of each size")
    windows = parser.parse_args().windows
    print(f"stated false alarm rate {RATE:.0%}, practical minimum 0.1")
    print("   rows  windows  false, bare  with minimum  found   threshold   CPU a window")
    for rows in (200, 2_000, 20_000):
        chance(rows, windows)
    cost()
    return 0


if __name__ == "__main__":
    sys.exit(main())
