"""A person's clone: the commands of README.md are run as they stand there, and what they promise is looked at."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


README = (ROOT / "README.md").read_text()


def blocks() -> list[str]:
    """Every bash block of the README."""
    return re.findall(r"```bash\n(.*?)```", README, re.S)


def commands(block: str) -> list[str]:
    """The commands of a block without comments."""
    return [line.split("  #")[0].strip() for line in block.splitlines() if line.strip()]


def run(
    command: str, folder: Path, seconds: float = 900, exit_code: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run one command as a person would; fail with what it printed."""
    done = subprocess.run(
        shlex.split(command),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=seconds,
        env={**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "120"},
    )
    assert done.returncode == exit_code, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh clone beside the environment that is already there."""
    folder = tmp_path_factory.mktemp("clone") / "mlops-workbench"
    run(f"git clone --quiet {ROOT} {folder}", ROOT)
    (folder / ".venv").symlink_to(BIN.parent)
    return folder


@pytest.fixture(scope="module")
def demo(clone: Path) -> Path:
    """The workspace that `make demo` leaves behind."""
    assert commands(blocks()[0]) == ["make demo"]
    run("make --old-file=.venv/.installed demo", clone)
    return clone / "demo"


@pytest.mark.timeout(900)
def test_the_demo_keeps_every_promise(demo: Path) -> None:
    board = json.loads((demo / "board.json").read_text())["promises"]
    assert len(board) >= 11
    assert [promise for promise in board if not promise["met"]] == []


def test_the_demo_leaves_readable_notebooks_with_pictures(demo: Path) -> None:
    notebooks = sorted(demo.glob("runs/*/*/notebook.ipynb"))
    assert len(notebooks) >= 15
    pictures = {}
    for path in notebooks:
        cells = json.loads(path.read_text())["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        assert not [output for output in outputs if output["output_type"] == "error"], path
        shown = sum("image/png" in output.get("data", {}) for output in outputs)
        pictures[path.parent.name.rsplit("-", 1)[0]] = shown
    assert pictures["2_explore"] == pictures["3_train"] == pictures["4_evaluate"] == 1
    assert pictures["6_monitor"] == 2


def test_the_serving_release_is_the_good_one_again(demo: Path) -> None:
    rows = json.loads(run("mwb release list --json", demo).stdout)
    status = {row["name"]: row["status"] for row in rows}
    approved = dict.fromkeys(("flights-r1", "flights-r2", "flights-r3"), "approved")
    assert status == {**approved, "flights-r4": "barred"}
    assert [row["name"] for row in rows if row["serves"]] == ["flights-r2"]
    again = subprocess.run(
        [str(BIN / "mwb"), "run", "deploy", "-p", "deploy.release=flights-r4"],
        cwd=demo,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 4 and "barred" in again.stdout + again.stderr


def test_the_demo_shows_a_better_an_equal_and_a_worse_release(demo: Path) -> None:
    """Three rollouts, three words of the controller, each with its interval, by the ordinary rules; no request failed."""
    board = json.loads((demo / "board.json").read_text())["promises"]
    measured = {promise["promise"]: promise["measured"] for promise in board}
    better = measured["a better release takes over by itself"]
    assert re.match(
        r"flights-r2 better: brier -0\.\d+ \(from -\S+ to -\S+\), [\d,]+ labelled rows", better
    )
    assert measured["what was not shown does not take over"].startswith("flights-r3 not yet: ")
    worse = measured["a worse release goes back by itself, data and model"]
    assert (
        worse.startswith("flights-r4 worse: brier +")
        and "flights-r2 and flights@v1.1 again" in worse
    )
    assert measured["no request failed"].startswith("0 of ")
    found = measured["what made it worse is found, down to the rows"]
    assert found.startswith("data: flights@v1.2; 2,000 rows named, 1,000 of the 1,000 turned")
    audit = json.loads(run("mwb audit list --json --limit 1000", demo).stdout)
    moves = [
        (row["subject"], row["verdict"]) for row in reversed(audit) if row["kind"] == "rollout"
    ]
    assert [verdict for name, verdict in moves if name == "flights-r2"] == [
        "started", "advanced", "advanced", "promoted"
    ]  # fmt: skip
    assert moves[-1] == ("flights-r4", "aborted")
    notebooks = list(demo.glob("runs/rollouts/*/*.ipynb"))
    assert len(notebooks) == len(moves) - 2, (
        "two were started by the stage, which is its own record"
    )


def test_the_commands_for_looking_around(clone: Path, demo: Path) -> None:
    looking = [line for line in commands(blocks()[2]) if line.startswith("mwb")]
    assert len(looking) >= 5
    for command in looking:
        assert run(command, clone).stdout.strip()


@pytest.mark.timeout(600)
def test_the_commands_of_the_time_machine(clone: Path, demo: Path) -> None:
    """They are run in their order, after the others: the last one is a roll-back to the default, which changes nothing."""
    machine = commands(blocks()[4])
    assert len(machine) >= 6 and all(line.startswith("mwb") for line in machine)
    said = {command: run(command, clone).stdout for command in machine}
    used = next(text for command, text in said.items() if "used-by" in command)
    assert "flights-r2" in used and "flights-r1" not in used
    why = next(text for command, text in said.items() if command.startswith("mwb why"))
    assert "data by elimination" in why
    assert "validation had refused 2,000 rows of flights@v1.2" in why
    listed = json.loads(run("mwb data list --json", demo).stdout)
    assert [row["ref"] for row in listed if row["state"] == "default"] == ["flights@v1.1"]


def test_make_test_is_the_gate_and_the_tests(clone: Path) -> None:
    assert commands(blocks()[1]) == ["make test"]
    plan = run("make --old-file=.venv/.installed --dry-run test", clone).stdout
    assert "tools/check.py" in plan and "pytest" in plan


@pytest.fixture(scope="module")
def own_table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of somebody's own: rows without a name, gaps, words and numbers, and a label that follows from them."""
    path = tmp_path_factory.mktemp("own") / "customers.csv"
    customers(1500, seed=3).to_csv(path, index=False)
    return path


def customers(rows: int, seed: int) -> pd.DataFrame:
    """Customers of one month, and who left."""
    generator = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "since": pd.date_range("2024-01-01", periods=rows, freq="3h").strftime("%Y-%m-%d"),
            "age": generator.integers(18, 80, rows).astype(float),
            "plan": generator.choice(["basic", "plus", "team"], rows),
            "minutes": generator.gamma(2.0, 60.0, rows).round(1),
        }
    )
    score = 0.06 * (frame.age - 45) - 0.02 * (frame.minutes - 120) + (frame.plan == "basic") * 1.5
    chance = 1 / (1 + np.exp(-2 * score))
    frame["left"] = np.where(generator.random(rows) < chance, "yes", "no")
    frame.loc[generator.random(rows) < 0.05, "age"] = np.nan
    return frame


@pytest.fixture(scope="module")
def served(own_table: Path) -> Iterator[tuple[Path, str]]:
    """The README's four commands on that table; the last one is a server, which is stopped at the end."""
    folder = own_table.parent
    init, enter, start, serve = commands(blocks()[3])
    assert (enter, start, serve) == ("cd mine", "mwb run", "mwb serve")
    run(init.replace("FILE.csv", str(own_table)).replace("COLUMN", "left"), folder)
    run(start, folder / "mine")
    arguments = [str(BIN / "mwb"), "-s", "serving.port=0", "serve"]
    server = subprocess.Popen(arguments, cwd=folder / "mine", stderr=subprocess.PIPE)
    try:
        port_file = folder / "mine" / ".mwb" / "serving.port"
        deadline = time.monotonic() + 60
        while not port_file.exists() and time.monotonic() < deadline:
            assert server.poll() is None
            time.sleep(0.1)
        yield folder / "mine", f"http://127.0.0.1:{port_file.read_text().strip()}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)


@pytest.mark.timeout(600)
def test_a_persons_own_table_becomes_a_service(served: tuple[Path, str]) -> None:
    _, url = served
    row = {"age": 70, "plan": "basic", "minutes": 10.0}
    body = {"rows": [row], "ids": ["ask-1"]}
    answer = httpx.post(f"{url}/predict", json=body, timeout=30)
    for _ in range(100):
        if answer.status_code == 200:
            break
        time.sleep(0.1)
        answer = httpx.post(f"{url}/predict", json=body, timeout=30)
    prediction = answer.json()["predictions"][0]
    assert prediction["prediction"] == "yes"
    assert prediction["probabilities"]["yes"] > 0.7
    told = httpx.post(f"{url}/feedback", json={"feedback": [{"id": "ask-1", "label": "yes"}]})
    assert told.json()["accepted"] == 1
    wrong = httpx.post(f"{url}/predict", json={"rows": [{**row, "age": "old"}]})
    assert wrong.status_code == 422 and "age" in wrong.text


@pytest.mark.timeout(300)
def test_the_next_month_and_the_answered_requests_join_the_data(
    served: tuple[Path, str], own_table: Path
) -> None:
    folder, url = served
    line = re.search(r"`(mwb run --cycle new -p prepare\.batch_file=)NEXT\.csv`", README)
    assert line is not None
    following = own_table.with_name("next.csv")
    customers(500, seed=4).to_csv(following, index=False)
    said = run(f"{line[1]}{following} prepare", folder).stdout
    assert "mine@v1.1: 2,000 rows, 500 of them new, accepted" in said
    renamed = own_table.with_name("renamed.csv")
    customers(500, seed=5).rename(columns={"minutes": "minute"}).to_csv(renamed, index=False)
    refused = run(f"{line[1]}{renamed} prepare", folder, exit_code=4)
    assert "minutes: the column is missing; is 'minute' meant?" in refused.stderr
    begun = time.time()
    asked = customers(300, seed=6)
    rows = json.loads(asked.drop(columns=["since", "left"]).to_json(orient="records"))
    answers = httpx.post(f"{url}/predict", json={"rows": rows}, timeout=30).json()["predictions"]
    truth = [{"id": a["id"], "label": left} for a, left in zip(answers, asked.left, strict=True)]
    assert httpx.post(f"{url}/feedback", json={"feedback": truth}).json()["accepted"] == 300
    window = f"-p prepare.log_since={begun - 1} -p prepare.log_until={time.time() + 1}"
    said = run(f"mwb run prepare --cycle new {window}", folder).stdout
    assert "mine@v1.2: 2,300 rows, 300 of them new, accepted" in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_forced_batch_that_was_taken_back_is_not_forced_in_again(
    served: tuple[Path, str], own_table: Path
) -> None:
    folder, _ = served
    before = default_version(folder)
    turned = customers(400, seed=7)
    turned["left"] = np.where(turned["left"] == "yes", "no", "yes")
    wrong = own_table.with_name("wrong.csv")
    turned.to_csv(wrong, index=False)
    batch = f"mwb run prepare --cycle new -p prepare.batch_file={wrong}"
    said = run(batch, folder, exit_code=4).stderr
    assert "labels look wrong" in said and "prepare.force=true" in said
    run("mwb run prepare -p prepare.force=true", folder)
    forced = default_version(folder)
    assert forced != before
    run(f"mwb data rollback {before} -m mistaken", folder)
    again = run("mwb run prepare", folder).stdout
    assert default_version(folder) == before, again
    said = run(f"{batch} -p prepare.force=true", folder).stdout
    assert default_version(folder) == forced and "forced although the checks refuse it" in said


def default_version(folder: Path) -> str:
    """The version that the next delivery joins."""
    listed = json.loads(run("mwb data list --json", folder).stdout)
    return next(row["ref"] for row in listed if row["state"].startswith("default"))
