"""What an answer to "is it the model or the data?" costs: `python benchmarks/why.py [--seeds 5]` prints the table.

Six versions of 600 to 1,100 digits; in one of the last five, 300 labels are off by one, 81 are random, or nothing is wrong. The limits
are three minutes and 2 log2(versions) + 2 log2(change-sets) + 4 retrains; the cases take turns, medians over the seeds are shown.
"""

import argparse
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mlops_workbench.pipeline.culprit import Culprit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from why_support import score, search

LIMIT_SECONDS = 180.0
CASES = {"off by one": "300 labels off by one", "noise": "81 random labels", "": "nothing wrong"}


@dataclass(frozen=True)
class Answer:
    """One search and whether it was right."""

    found: Culprit
    right: bool
    precision: float  # of the rows that are named
    recall: float


def ask(fault: str, seed: int) -> Answer:
    """Plant a fault, or none, in a new workspace and search for it."""
    with tempfile.TemporaryDirectory() as folder:
        planted, found = search(Path(folder), seed, fault)
    right = found.version == planted.guilty_version
    return Answer(found, right, *score(found.guilty_keys, planted.wrong))


def line(name: str, answers: list[Answer]) -> str:
    """The medians of one case."""
    seconds = statistics.median(answer.found.seconds for answer in answers)
    most = max(answer.found.retrains for answer in answers)
    limit = answers[0].found.limit
    rows = "-"
    if name != CASES[""]:
        precision = statistics.median(answer.precision for answer in answers)
        recall = statistics.median(answer.recall for answer in answers)
        rows = f"{precision:.3f} / {recall:.3f}"
    kept = seconds <= LIMIT_SECONDS and most <= limit
    return (
        f"{name:<22} {sum(answer.right for answer in answers):>3} of {len(answers):<3}"
        f"{rows:>18} {most:>6} of {limit:<4} {seconds:>7.1f} s  {'kept' if kept else 'NOT KEPT'}"
    )


def main() -> None:
    """Run the cases in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    answers: dict[str, list[Answer]] = {fault: [] for fault in CASES}
    for seed in range(arguments.seeds):
        for fault in CASES:
            answers[fault].append(ask(fault, seed))
    print(
        f"{'case':<22} {'right':>10}{'precision/recall':>18} {'retrains':>13} {'median':>9}  limits"
    )
    for fault, name in CASES.items():
        print(line(name, answers[fault]))


if __name__ == "__main__":
    main()
