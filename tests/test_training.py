"""The training loop: same seed same bytes, killed and continued, stopped early; and no pickle anywhere."""

import io
import json
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from recipes_support import judge, train
from training_process import __file__ as PROCESS

from mlops_workbench.core.errors import StageError, UsageError
from mlops_workbench.core.journal import read_journal
from mlops_workbench.experiment.checkpoints import CHECKPOINT
from mlops_workbench.experiment.trials import NOT_SHOWN, choose, run_grid
from mlops_workbench.recipes.flights import flights
from mlops_workbench.recipes.pictures import digits
from mlops_workbench.recipes.protocol import Recipe
from mlops_workbench.recipes.tabular import TabularRecipe

WINTER = "2013-01..2013-03"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
OUTPUTS = ("out/model.onnx", "out/model.safetensors", "history.json")


def command(
    folder: Path, recipe: str, selection: str, seed: int = 0, **parameters: object
) -> list[str]:
    """The command of a training process."""
    folder.mkdir(exist_ok=True)
    options = [f"{name}={json.dumps(value)}" for name, value in parameters.items()]
    return [sys.executable, PROCESS, recipe, selection, str(seed), str(folder), *options]


def outputs(folder: Path) -> dict[str, bytes]:
    """The bytes to compare."""
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


def recorded(folder: Path) -> Counter[tuple[str, int]]:
    """How often each metric was recorded at each step."""
    records = read_journal(folder / "journal.log").records
    return Counter(
        (name, record["step"])
        for record in records
        if record["kind"] == "metrics"
        for name in record["values"]
    )


def is_pickle(path: Path) -> bool:
    """True for a pickle, alone or in the zip that torch.save makes."""
    content = path.read_bytes()
    if zipfile.is_zipfile(io.BytesIO(content)):
        return any(
            name.endswith(".pkl") for name in zipfile.ZipFile(io.BytesIO(content)).namelist()
        )
    return content[:1] == b"\x80" and content[1:2] <= b"\x05"


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device of this machine."""
    return str(request.param)


@pytest.fixture(scope="module")
def undisturbed(device: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training of flights that nobody disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(winter(folder, device), check=True)
    return folder


def winter(folder: Path, device: str, seed: int = 0) -> list[str]:
    """The command of eight epochs of flights."""
    return command(folder, "flights", WINTER, seed, epochs=8, patience=8, device=device)


def test_same_seed_same_bytes_another_seed_other_bytes(
    undisturbed: Path, device: str, tmp_path: Path
) -> None:
    again, other = tmp_path / "again", tmp_path / "other"
    subprocess.run(winter(again, device), check=True)
    assert outputs(again) == outputs(undisturbed)
    subprocess.run(winter(other, device, 1), check=True)
    assert outputs(other)["out/model.safetensors"] != outputs(undisturbed)["out/model.safetensors"]


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    undisturbed: Path, device: str, tmp_path: Path
) -> None:
    generator = random.Random(3)
    folder = tmp_path / "killed"
    kills = 0
    for _ in range(4):
        process = subprocess.Popen(winter(folder, device))
        begun = (folder / CHECKPOINT).stat().st_mtime_ns if (folder / CHECKPOINT).exists() else 0
        while process.poll() is None:  # wait for one more epoch, then a moment
            now = (folder / CHECKPOINT).stat().st_mtime_ns if (folder / CHECKPOINT).exists() else 0
            if now > begun:
                time.sleep(generator.uniform(0, 0.15))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        if process.wait() == 0:
            break
        kills += 1
    else:
        subprocess.run(winter(folder, device), check=True)
    assert kills >= 2
    assert outputs(folder) == outputs(undisturbed)
    told = recorded(folder)
    assert {key: count for key, count in told.items() if count > 1} == {}
    assert set(told) == set(recorded(undisturbed))


@pytest.mark.slow
def test_pictures_go_on_with_the_same_bytes_too(device: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    told = {"epochs": 4, "device": device}
    subprocess.run(command(whole, "digits", "0:600", **told), check=True)
    process = subprocess.Popen(command(killed, "digits", "0:600", **told))
    while not (killed / CHECKPOINT).exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (killed / "history.json").exists()
    subprocess.run(command(killed, "digits", "0:600", **told), check=True)
    assert outputs(killed) == outputs(whole)


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU that torch can use")
@pytest.mark.parametrize(
    ("recipe", "selection", "metric"), [(flights, WINTER, "brier"), (digits, "all", "accuracy")]
)
def test_a_gpu_learns_as_well_as_the_cpu(recipe: Recipe, selection: str, metric: str) -> None:
    """Mixed precision on the GPU and full precision on the CPU: held-out figures within one point, the GPU really used."""
    rows = recipe.source(selection)
    held_out = rows[recipe.split(rows) == "test"]
    found = {}
    for place in DEVICES:
        before = torch.cuda.max_memory_allocated()
        result = train(recipe, rows, device=place)
        assert (torch.cuda.max_memory_allocated() > before) == (place == "cuda")
        found[place] = judge(result.model, recipe, held_out)[metric]
        print(f"{recipe.name} on {place}: {metric} {found[place]:.4f}, {result.seconds:.1f} s")
    assert found["cuda"] == pytest.approx(found["cpu"], abs=0.01)


def test_a_checkpoint_of_another_training_is_not_continued(tmp_path: Path) -> None:
    rows = flights.source("0:1500")
    first = train(flights, rows, tmp_path, epochs=2)
    changed = rows.copy()
    changed.loc[0, "late"] = 1 - changed.loc[0, "late"]
    for frame, seed, parameters in ((changed, 0, {}), (rows, 1, {}), (rows, 0, {"dropout": 0.1})):
        other = train(flights, frame, tmp_path, seed, epochs=2, **parameters)
        assert other.history[0]["train_loss"] != first.history[0]["train_loss"]


def test_it_stops_early_and_keeps_the_best_epoch() -> None:
    rows = flights.source(WINTER)
    result = train(flights, rows, epochs=200, patience=4, learning_rate=0.01, refit=False)
    briers = [entry["validation_brier"] for entry in result.history]
    assert len(briers) == result.best_epoch + 1 + 4 < 200
    assert briers[result.best_epoch] == min(briers) == result.metrics["brier"]
    held_out = rows[flights.split(rows) == "validation"]
    assert judge(result.model, flights, held_out)["brier"] == pytest.approx(min(briers), abs=1e-6)


def test_refit_learns_from_the_validation_rows_too() -> None:
    rows = flights.source("0:3000")
    short = train(flights, rows, epochs=3, refit=False)
    full = train(flights, rows, epochs=3, refit=True)
    assert full.history[0]["train_loss"] == short.history[0]["train_loss"]
    counted = [sum(map(sum, result.statistics["counts"])) for result in (short, full)]
    part = flights.split(rows)
    assert counted[0] == 3 * (part == "train").sum()
    assert counted[1] == 3 * (part != "test").sum()


def test_a_lost_loss_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(StageError, match="smaller learning_rate"):
        train(flights, flights.source("0:1500"), learning_rate=1e20)
    with pytest.raises(UsageError, match="did you mean 'epochs'"):
        train(flights, flights.source("0:1500"), epoch=3)


def test_the_callers_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1).item(), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    train(flights, flights.source("0:1500"), epochs=1)
    assert (torch.rand(1).item(), np.random.rand()) == expected
    assert not torch.are_deterministic_algorithms_enabled()


def test_no_file_holds_a_pickle(undisturbed: Path, tmp_path: Path) -> None:
    written = [path for path in undisturbed.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} == {".safetensors", ".onnx", ".json", ".log"}
    assert [path for path in written if is_pickle(path)] == []
    torch.save({"a": torch.zeros(1)}, tmp_path / "torch.pt")  # the check itself can fail
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"a": 1}))
    assert is_pickle(tmp_path / "torch.pt") and is_pickle(tmp_path / "plain.pkl")


def test_no_code_of_ours_loads_pickles() -> None:
    package = Path(__file__).resolve().parent.parent / "mlops_workbench"
    for room in ("recipes", "experiment"):
        for path in (package / room).glob("*.py"):
            source = path.read_text().replace("safetensors.torch.", "")
            for word in ("import pickle", "torch.load", "torch.save", "read_pickle", "joblib"):
                assert word not in source, f"{word} in {path}"


def small_table(root: Path) -> dict[str, pd.DataFrame]:
    """The parts of a small problem whose recipe stands in a module of `root`."""
    generator = np.random.default_rng(0)
    size = generator.normal(size=500)
    wobbly = (size + generator.normal(size=500) > 0).astype(int)
    pd.DataFrame({"size": size, "lost": wobbly}).to_csv(root / "parcels.csv", index=False)
    (root / f"parcels_{root.name}.py").write_text(
        "from mlops_workbench.recipes.tabular import TabularRecipe\n"
        "recipe = TabularRecipe(name='parcels', source='parcels.csv', label='lost',\n"
        "                       classes=('kept', 'lost'), numbers=['size'])\n"
    )
    recipe = TabularRecipe(
        name="parcels",
        source=root / "parcels.csv",
        label="lost",
        classes=("kept", "lost"),
        numbers=["size"],
    )
    rows = recipe.source("all")
    part = recipe.split(rows)
    return {name: rows[part == name] for name in ("train", "validation")}


def test_trials_run_in_other_processes_and_are_not_repeated(tmp_path: Path) -> None:
    parts = small_table(tmp_path)
    seen: list[tuple[int, int]] = []
    reference = f"parcels_{tmp_path.name}:recipe"

    def explore() -> object:
        return run_grid(
            reference,
            tmp_path,
            parts,
            grid={"dropout": [0.3, 0.30001]},
            repeats=3,
            epochs=4,
            folder=tmp_path / "trials",
            processes=2,
            device="cpu",
            progress=lambda done, total: seen.append((done, total)),
        )

    table = explore()
    assert len(table.trials) == 6
    assert all(not trial.error and trial.seconds > 0 for trial in table.trials)
    assert seen[-1][1] == 6
    assert choose(table).verdict == NOT_SHOWN  # practically the same setting twice
    assert choose(table).parameters == {"dropout": 0.3}
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "trials").rglob("result.json")}
    assert explore() == table
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "trials").rglob("result.json")} == before


def test_a_trial_whose_process_dies_is_a_failed_trial(tmp_path: Path) -> None:
    parts = small_table(tmp_path)
    module = tmp_path / f"parcels_{tmp_path.name}.py"
    module.write_text(
        module.read_text() + "\nusual = recipe.model\n"
        "def model(parameters, statistics):\n"
        "    if parameters['hidden'] == 48:\n"
        "        import os; os.kill(os.getpid(), 9)\n"
        "    return usual(parameters, statistics)\n"
        "recipe.with_root = lambda root: recipe\n"
        "recipe.model = model\n"
    )
    table = run_grid(
        f"parcels_{tmp_path.name}:recipe",
        tmp_path,
        parts,
        grid={"hidden": [32, 48, 64]},
        repeats=2,
        epochs=2,
        folder=tmp_path / "trials",
        processes=2,
        device="cpu",
    )
    failed = {trial.parameters["hidden"] for trial in table.trials if trial.error}
    assert failed == {48}
    assert all("process ended with -9" in trial.error for trial in table.trials if trial.error)
    assert choose(table).evidence["failed"] == 1
