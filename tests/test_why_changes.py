"""`mwb why` where the data stayed: parameters that break the training, a recipe that forgot a column, two dates with a release each."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest
from monitoring_support import write_log
from pipeline_support import clean_environment, mwb

from mlops_workbench.core.ledger import Ledger, ReleaseRow
from mlops_workbench.core.workspace import Workspace


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace for a table of one's own: one good release, mine-r1."""
    folder = tmp_path_factory.mktemp("why")
    generator = np.random.default_rng(5)
    rows = 2_000
    frame = pd.DataFrame(
        {
            "customer": [f"c{n:05d}" for n in range(rows)],
            "age": generator.integers(18, 80, rows).astype(float),
            "minutes": generator.gamma(2.0, 60.0, rows).round(1),
            "plan": generator.choice(["basic", "plus", "team"], rows),
        }
    )
    score = 0.1 * (frame["minutes"] - 100) + 0.02 * (frame["age"] - 45)
    frame["left"] = np.where(generator.random(rows) < 1 / (1 + np.exp(-score)), "yes", "no")
    frame.to_csv(folder / "customers.csv", index=False)
    command = [sys.executable, "-m", "mlops_workbench.cli.main", "init", "mine"]
    command += ["--csv", "customers.csv", "--label", "left"]
    subprocess.run(command, cwd=folder, env=clean_environment(), check=True, capture_output=True)
    workspace = Workspace.open(folder / "mine")
    done = mwb(workspace, "run", "prepare", "train", "evaluate")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [release.name for release in releases(workspace)] == ["mine-r1"]
    return workspace


def releases(workspace: Workspace) -> list[ReleaseRow]:
    """All releases, the first one first."""
    return sorted(Ledger(workspace.ledger_url).releases(), key=lambda row: row.created_at)


def new_release(workspace: Workspace, cycle: str, *words: str) -> ReleaseRow:
    """Train and judge once more on the same data version; the gate may refuse what comes of it."""
    version = releases(workspace)[0].data_version
    known = {release.digest for release in releases(workspace)}
    command = ["run", "train", "evaluate", "--cycle", cycle, "-p", f"data_version={version}"]
    done = mwb(workspace, *command, *words)
    assert done.returncode in (0, 4), done.stdout + done.stderr
    made = [release for release in releases(workspace) if release.digest not in known]
    assert len(made) == 1, done.stdout + done.stderr
    assert made[0].data_version == version
    return made[0]


def asked_why(workspace: Workspace, good: str, bad: str) -> dict[str, object]:
    """The record of one diagnosis."""
    done = mwb(workspace, "why", good, bad, "--json")
    assert done.returncode == 0, done.stderr
    record: dict[str, object] = json.loads(done.stdout)
    return record


def verdicts(record: dict[str, object]) -> dict[str, str]:
    """Suspect -> verdict."""
    findings = record["findings"]
    assert isinstance(findings, list)
    return {finding["suspect"]: finding["verdict"] for finding in findings}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_learning_rate_that_breaks_the_training_is_the_parameters(mine: Workspace) -> None:
    broken = new_release(mine, "fast", "-p", 'train.parameters={"learning_rate": 5.0}')
    record = asked_why(mine, "mine-r1", broken.name)
    assert record["verdict"] == "parameters", record["summary"]
    assert re.search(r"learning_rate 0\.\d+ -> 5\.0", str(record["summary"]))
    said = verdicts(record)
    assert said["data"] == said["code"] == "innocent", said
    remedy = record["remedy"]
    assert isinstance(remedy, dict) and remedy["command"] == "mwb rollback --to mine-r1"


@pytest.mark.timeout(600)
def test_a_recipe_that_forgot_a_column_is_the_code_by_releases_and_by_dates(
    mine: Workspace,
) -> None:
    """The strongest column is taken out of the recipe: same data, same parameters, a worse model."""
    recipe = mine.root / "recipe.py"
    whole = recipe.read_text()
    without = re.sub(r"\n[^\n]*\"minutes\"[^\n]*", "", whole, count=1)
    assert without != whole
    try:
        recipe.write_text(without)
        worse = new_release(mine, "forgot")
        record = asked_why(mine, "mine-r1", worse.name)
        assert record["verdict"] == "code", record["summary"]
        assert "recipe" in str(record["summary"])
        said = verdicts(record)
        assert said["code"] == "changed" and said["data"] == said["parameters"] == "innocent"
        remedy = record["remedy"]
        assert isinstance(remedy, dict) and remedy["command"] == "mwb rollback --to mine-r1"
        days = {"2026-01-05": releases(mine)[0], "2026-01-12": worse}
        for number, (day, release) in enumerate(days.items()):
            write_log(mine.predictions, requests(day, release), tag=f"day{number}")
        by_dates = asked_why(mine, *days)
        assert by_dates["verdict"] == "code", by_dates["summary"]
        assert by_dates["good"]["name"] == "mine-r1"  # type: ignore[index]
        assert by_dates["bad"]["name"] == worse.name  # type: ignore[index]
    finally:
        recipe.write_text(whole)


def requests(day: str, release: ReleaseRow) -> list[dict[str, object]]:
    """A few answers of a release on one day."""
    start = datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()
    row = {"age": 40.0, "minutes": 100.0, "plan": "basic"}
    return [
        {
            "kind": "prediction", "id": f"{day}-{n}", "request": f"{day}-{n}", "time": start + 60 * n, "release": release.digest,
            "name": release.name, "slot": "champion", "row": row, "probabilities": [0.5, 0.5], "prediction": 0, "latency_ms": 2.0,
        }
        for n in range(30)
    ]  # fmt: skip


def test_a_release_beside_itself_accuses_nobody(mine: Workspace) -> None:
    assert asked_why(mine, "mine-r1", "mine-r1")["verdict"] == "nobody"
