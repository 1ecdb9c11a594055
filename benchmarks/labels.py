"""How often the label check is right: `python benchmarks/labels.py` prints the table.

Batches of real flights (the shipped rows of 2013) are judged by the months before them, as they
are and with labels turned round. "Refused" on clean batches is the false alarm rate; precision
and recall are those of the rows that are flagged. Without the month the check sees what a model
would see; the delay that gives the label is left out.
"""

import argparse
import time
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import pandas as pd

from mlops_workbench.data.labels import check_labels

FEATURES = [
    "hour", "carrier", "origin", "dest", "distance", "temp", "dewp", "humid", "wind_speed",
    "precip", "pressure", "visib",
]  # fmt: skip
KINDS = {
    "clean": 0.0,
    "a quarter turned": 0.25,
    "half turned": 0.5,
    "half called late": 0.5,
}


@dataclass(frozen=True)
class Verdict:
    """What the check said of one batch, beside the truth."""

    kind: str
    rows: int
    refused: bool
    estimated: float  # share of wrong labels
    wrong: float  # share of wrong labels, truly
    precision: float  # of the flagged rows; NaN where no row is wrong
    recall: float
    promised: float  # precision that the report promises
    seconds: float
    cpu_seconds: float  # of all threads


def read_flights() -> pd.DataFrame:
    """The shipped flights in the order of time, with key and label."""
    frame = pd.read_parquet(str(files("mlops_workbench.recipes") / "flights.parquet"))
    frame["flight_id"] = [f"{row:06}" for row in range(len(frame))]
    frame["late"] = (frame["arr_delay"] >= 15).astype(int)
    return frame


def falsify(batch: pd.DataFrame, kind: str, numbers: np.random.Generator) -> pd.DataFrame:
    """The batch with wrong labels of that kind."""
    changed = batch.reset_index(drop=True)
    chosen = numbers.permutation(len(changed))[: int(KINDS[kind] * len(changed))]
    late = changed["late"].to_numpy().copy()
    late[chosen] = 1 if kind == "half called late" else 1 - late[chosen]
    return changed.assign(late=late)


def judge(batch: pd.DataFrame, accepted: pd.DataFrame, kind: str, seed: int) -> Verdict:
    """One batch falsified and judged."""
    given = falsify(batch, kind, np.random.default_rng(seed))
    wrong = set(batch["flight_id"].to_numpy()[given["late"].to_numpy() != batch["late"].to_numpy()])
    started, used = time.perf_counter(), time.process_time()
    check = check_labels(given, accepted, features=FEATURES, label="late", key="flight_id")
    seconds, used = time.perf_counter() - started, time.process_time() - used
    flagged = set(check.report.flagged)
    hits = len(flagged & wrong)
    return Verdict(
        kind,
        len(batch),
        not check.fits,
        check.share,
        len(wrong) / len(batch),
        hits / len(flagged) if wrong and flagged else np.nan,
        hits / len(wrong) if wrong else np.nan,
        check.report.promised if wrong else np.nan,
        seconds,
        used,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--halves", type=int, default=2, help="random batches of 1,000 a month")
    arguments = parser.parse_args()
    flights = read_flights()
    verdicts = []
    for month in range(2, 13):
        accepted = flights[flights["month"] < month]
        whole = flights[flights["month"] == month]
        halves = [whole.sample(1000, random_state=seed) for seed in range(arguments.halves)]
        for seed, batch in enumerate([whole, *halves]):
            for kind in KINDS:
                if kind == "clean" or seed == 0:
                    verdicts.append(judge(batch, accepted, kind, seed))
    table = pd.DataFrame([vars(verdict) for verdict in verdicts])
    grouped = table.groupby(["rows", "kind"])
    means = grouped.mean().round(3)
    means.insert(0, "batches", grouped.size())
    print(means.to_string())


if __name__ == "__main__":
    main()
