"""How long it takes to find who used a row, and what served at a moment: `python benchmarks/usage.py [--releases 10000]` prints the table.

The ledger holds so many releases, each of one of four data versions of 20,000 rows and each deployed once; asked for
are 30 rows. The limit is one second for the call, imports and page cache warm; the median of five calls is shown.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlops_workbench.core.asof import as_of
from mlops_workbench.core.audit import seal_record
from mlops_workbench.core.clock import iso, now
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.ledger_schema import audit, audit_head, decisions, releases, slots
from mlops_workbench.core.workspace import create_workspace
from mlops_workbench.data.usage import used_by
from mlops_workbench.data.versions import DataStore

LIMIT_SECONDS = 1.0


def many_releases(ledger: Ledger, count: int, refs: list[str]) -> None:
    """Put releases on record as `Ledger.decision` would, each deployed once, in one transaction."""
    with ledger.decision(
        "start", actor="test", subject="ledger", verdict="made", reason="creates the tables"
    ):
        pass
    previous_digest: str | None = None
    with ledger._engine.begin() as connection:
        head = connection.execute(audit_head.select()).one()
        previous, first = head.hash, head.records + 1
        rows: dict[str, list[dict[str, Any]]] = {"releases": [], "decisions": [], "audit": []}
        for number in range(count):
            sequence, digest, moment = first + number, f"{number:064x}", iso(now())
            release = {
                "digest": digest,
                "name": f"flights-r{number + 1}",
                "recipe": "flights",
                "data_version": refs[number % len(refs)],
                "run_id": f"run{number}",
                "path": f"/bundles/{digest}",
                "status": "approved",
                "created_at": moment,
                "decision_id": sequence,
            }
            slot = {
                "name": "champion",
                "digest": digest,
                "previous_digest": previous_digest,
                "epoch": number + 1,
                "updated_at": moment,
            }
            decision = {
                "id": sequence,
                "at": moment,
                "kind": "deploy",
                "actor": "test",
                "subject": release["name"],
                "verdict": "deployed",
                "reason": "all gates passed",
                "evidence": {"gates": ["quality", "latency", "parity"] * 10},
                "cycle": None,
                "record_path": None,
            }
            changes = [
                {"table": "releases", "key": digest, "row": release},
                {"table": "slots", "key": "champion", "row": slot},
            ]
            record, seal = seal_record(sequence, previous, decision, changes)
            rows["releases"].append(release)
            rows["decisions"].append({**decision, "evidence": json.dumps(decision["evidence"])})
            rows["audit"].append({"sequence": sequence, "record": record, "hash": seal})
            previous, previous_digest = seal, digest
        connection.execute(releases.insert(), rows["releases"])
        connection.execute(decisions.insert(), rows["decisions"])
        connection.execute(audit.insert(), rows["audit"])
        connection.execute(slots.insert().values(**slot))
        connection.execute(audit_head.update().values(records=sequence, hash=seal))


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
