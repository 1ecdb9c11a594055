"""The executed notebook of every decision on a rollout: there after it, never waited for, told when it fails."""

import base64
import json
import re
from pathlib import Path

import pytest
from rollout_support import release_pair
from serving_support import wait_until
from test_rollout import QUICK, Traffic, begin, in_force, mostly, serve, split

from mlops_workbench.cli.main import main
from mlops_workbench.core.files import sha256_file
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.pipeline.decision_record import missing_records, write_records
from mlops_workbench.pipeline.loop import tend


def outputs(path: Path) -> tuple[str, list[bytes]]:
    """The texts and the pictures of an executed notebook."""
    texts, pictures = [], []
    for cell in json.loads(path.read_text())["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            texts.append("".join(data.get("text/plain", "")))
            if "image/png" in data:
                pictures.append(base64.b64decode("".join(data["image/png"])))
    return "\n".join(texts), pictures


def test_every_move_leaves_its_notebook(tmp_path: Path) -> None:
    """Start, advance, promote by the loop's own look, then roll back by hand: notebooks with figures, named in audit and message, hashed in the audit."""
    workspace, old, new = release_pair(tmp_path / "w", bias=1.5, **QUICK)
    said: list[str] = []
    with serve(workspace) as server:
        traffic = Traffic(server, mostly("on time", 0.95))
        begin(workspace, traffic, new, (0.2, 0.5))
        for _ in range(30):
            traffic.send(10)
            kind = tend(workspace, said.append)
            if kind == "advance":  # made, and its notebook is not there yet: nobody waits for it
                decided = Ledger(workspace.ledger_url).decisions(kind="rollout")[0]
                assert decided.record_path and not Path(decided.record_path).exists()
            if kind == "promote" or not kind:
                break
            wait_until(lambda: in_force(traffic, split(workspace)), 10, "the split")
        assert main(["rollback", "-m", "a wish", "--bar", "-w", str(workspace.root)]) == 0
    ledger = Ledger(workspace.ledger_url)
    wait_until(lambda: not missing_records(workspace), 90, "the notebooks")
    found = {d.verdict: d for d in ledger.decisions(kind="rollout")}
    assert set(found) == {"started", "advanced", "promoted"}
    written = {d.evidence["decision"]: d for d in ledger.decisions(kind="record")}
    for decision in found.values():
        path = Path(decision.record_path or "")
        assert path.parent == workspace.runs / "rollouts" / "rollout-1"
        record = written[decision.id]
        assert (record.verdict, record.evidence["sha256"]) == ("written", sha256_file(path))
    text, pictures = outputs(Path(found["promoted"].record_path or ""))
    assert len(pictures) == 2  # the confidence sequence and the split
    assert "better: accuracy +" in text and "fine" in text and "controller" in text
    assert not outputs(Path(found["started"].record_path or ""))[1]
    [back] = ledger.decisions(kind="rollback")
    assert written[back.id].verdict == "written"
    text, pictures = outputs(Path(back.record_path or ""))
    assert f"{new} was replaced by {old} by" in text and "barred" in text and len(pictures) == 1
    rows = dict(re.findall(r"(?m)^(flights-r\d) +([\d,]+) ", text))
    assert set(rows) == {old, new}
    assert sum(int(count.replace(",", "")) for count in rows.values()) == traffic.asked
    bodies = [message.body for message in ledger.messages()]
    assert any(body.endswith("why: runs/rollouts/rollout-1/03_promoted.ipynb") for body in bodies)
    assert ledger.verify().ok


def test_a_notebook_that_fails_is_told_and_the_decision_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, old, new = release_pair(
        tmp_path / "w", record_url="https://lab.example.org/lab/tree/", **QUICK
    )
    own = workspace.root / "nbs" / "stages" / "rollout_decision.ipynb"
    own.parent.mkdir(parents=True, exist_ok=True)
    cells = [("decision = 0", ["parameters"]), ("raise ValueError('no ink')", [])]
    own.write_text(
        json.dumps(
            {
                "cells": [
                    {
                        "cell_type": "code",
                        "id": f"cell{n}",
                        "metadata": {"tags": tags},
                        "source": source,
                        "outputs": [],
                        "execution_count": None,
                    }
                    for n, (source, tags) in enumerate(cells)
                ],
                "metadata": {
                    "kernelspec": {
                        "name": "python3",
                        "display_name": "Python 3",
                        "language": "python",
                    }
                },
                "nbformat": 4,
                "nbformat_minor": 5,
            }
        )
    )
    here = ["-w", str(workspace.root)]
    assert main(["release", "start", new, "--steps", "5", *here]) == 0
    assert main(["release", "abort", "-m", "a test", *here]) == 0
    ledger = Ledger(workspace.ledger_url)
    wait_until(lambda: not missing_records(workspace), 90, "the notebooks")
    assert ledger.rollouts()[0].status == "aborted"
    record = ledger.decisions(kind="record")[0]
    assert record.verdict == "failed" and "no ink" in record.reason
    assert "no ink" in Path(record.record_path or "").read_text()
    told = {message.title: message.body for message in ledger.messages()}
    assert any("no ink" in body and "mwb release record" in body for body in told.values())
    link = "why: https://lab.example.org/lab/tree/runs/rollouts/rollout-1/02_aborted.ipynb"
    assert any(link in body for body in told.values())
    assert write_records(workspace) == {}  # told once, not again and again
    own.unlink()
    assert main(["release", "record", str(record.evidence["decision"]), *here]) == 0
    assert ledger.decisions(kind="record")[0].verdict == "written"
