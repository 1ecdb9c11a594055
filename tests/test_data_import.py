"""Rows from what a team has already: tables, pictures, DVC and git-lfs trees, the dataset of an MLflow run."""

import io
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from data_support import files_under, flip_byte, new_store, table
from PIL import Image

from mlops_workbench.cli.main import main
from mlops_workbench.core.errors import IntegrityError
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.dvc import run_dvc
from mlops_workbench.data.quarantine import quarantined
from mlops_workbench.data.sources import real_file
from mlops_workbench.data.versions import DataStore
from mlops_workbench.recipes.pictures import digits

PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}


@pytest.fixture
def store(tmp_path: Path) -> DataStore:
    return new_store(tmp_path)


def git(folder: Path, *words: str, **environment: str) -> None:
    """Run git as a person would."""
    identity = ["-c", "user.name=ana", "-c", "user.email=ana@localhost"]
    command = ["git", "-C", str(folder), *identity, *words]
    subprocess.run(command, check=True, capture_output=True, env=PLAIN | environment)


def draw(folder: Path, count: int = 6) -> dict[str, np.ndarray]:
    """Pictures of two labels in folders."""
    numbers, drawn = np.random.default_rng(0), {}
    for n in range(count):
        name = f"{('cat', 'dog')[n % 2]}/{n}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        drawn[name] = numbers.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(drawn[name]).save(folder / name)
    return drawn


def pixels(file: Path | io.BytesIO) -> np.ndarray:
    """The values of a picture, [height, width, 3]."""
    with Image.open(file) as picture:
        return np.asarray(picture)


def taken(store: DataStore, source: Path | str, *words: str, name: str = "pets") -> int:
    """Exit code of an import."""
    return main(["data", "import", name, str(source), *words, "-w", str(store.root)])


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".parquet"])
def test_tables(store: DataStore, tmp_path: Path, ending: str) -> None:
    frame = table(120)
    path = tmp_path / f"january{ending}"
    frame.to_parquet(path) if ending == ".parquet" else frame.to_csv(path, index=False)
    assert taken(store, path) == 2
    assert taken(store, path, "--key", "id", "--label", "late") == 0
    pd.testing.assert_frame_equal(store.load("pets"), frame, check_exact=False)
    assert store.resolve("pets").message == f"imported from {path}"


def test_a_folder_of_tables_is_one_table(store: DataStore, tmp_path: Path) -> None:
    frame = table(100)
    (tmp_path / "parts").mkdir()
    frame[:60].to_parquet(tmp_path / "parts" / "a.parquet")
    frame[60:].to_parquet(tmp_path / "parts" / "b.parquet")
    assert taken(store, tmp_path / "parts", "--key", "id", "--label", "late") == 0
    assert store.resolve("pets").rows == 100


def test_pictures_come_back_as_they_were(store: DataStore, tmp_path: Path) -> None:
    drawn = draw(tmp_path / "pets")
    assert taken(store, tmp_path / "pets") == 0
    rows = store.load("pets").set_index("path")
    assert set(rows.index) == set(drawn)
    assert rows.loc["dog/1.png", "label"] == "dog"
    assert all(rows.loc[name, "image"] == (tmp_path / "pets" / name).read_bytes() for name in drawn)
    store.checkout("pets", tmp_path / "back")
    assert all(np.array_equal(pixels(tmp_path / "back" / name), drawn[name]) for name in drawn)
    draw(tmp_path / "more" / "late", 2)
    assert taken(store, tmp_path / "more", "--append") == 0
    assert store.resolve("pets").rows == 8


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n truncated"])
def test_a_broken_picture_is_named(
    store: DataStore, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """It waits for a person, and the others come in; where most of a folder is broken, nothing does."""
    drawn = draw(tmp_path / "pets")
    (tmp_path / "pets" / "dog" / "broken.png").write_bytes(content)
    assert taken(store, tmp_path / "pets") == 0
    assert store.resolve("pets").rows == len(drawn) and "1 row held back" in capsys.readouterr().out
    waiting = quarantined(store, "pets").iloc[0]
    assert waiting["quarantine_id"] == "dog/broken.png"
    assert "a whole picture" in waiting["quarantine_reason"]
    for number in range(2 * len(drawn)):
        (tmp_path / "pets" / "dog" / f"more {number}.png").write_bytes(content)
    assert taken(store, tmp_path / "pets") == 4
    assert "dog/more 0.png" in capsys.readouterr().err


@pytest.fixture
def dvc_tree(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A repository in which DVC tracks a folder of pictures."""
    root = tmp_path / "theirs"
    root.mkdir()
    git(root, "init", "-q")
    run_dvc(root, "init")
    drawn = draw(root / "pets")
    run_dvc(root, "add", "pets")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "pets")
    return root, drawn


def test_what_dvc_tracks(
    store: DataStore,
    dvc_tree: tuple[Path, dict[str, np.ndarray]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, drawn = dvc_tree
    assert taken(store, root / "pets") == 0
    shutil.rmtree(root / "pets")  # not checked out: by the pointer file, and by the path
    assert taken(store, root / "pets.dvc", name="cats") == 0
    assert taken(store, root / "pets", name="dogs") == 0
    digests = {len(store.load(name)) for name in ("pets", "cats", "dogs")}
    assert digests == {len(drawn)} and not (root / "pets").exists()
    assert taken(store, root / "elsewhere", name="cats") == 2  # nothing tracks it
    shutil.rmtree(root / ".dvc" / "cache")
    assert taken(store, root / "pets", name="dogs") == 1
    assert "dvc get" in capsys.readouterr().err


def test_a_git_lfs_tree_that_was_not_fetched(store: DataStore, tmp_path: Path) -> None:
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    theirs.mkdir()
    git(theirs, "init", "-q", "-b", "main")
    git(theirs, "lfs", "install", "--local")
    git(theirs, "lfs", "track", "*.png")
    drawn = draw(theirs / "pets")
    git(theirs, "add", "-A")
    git(theirs, "commit", "-qm", "pets")
    git(tmp_path, "clone", "-q", str(theirs), str(mine), GIT_LFS_SKIP_SMUDGE="1")
    pointers = [path for path in files_under(mine / "pets")]
    assert all(path.stat().st_size < 200 for path in pointers)
    assert taken(store, mine / "pets") == 0
    rows = store.load("pets").set_index("path")
    assert all(
        np.array_equal(pixels(io.BytesIO(rows.loc[name, "image"])), drawn[name]) for name in drawn
    )
    assert all(path.stat().st_size < 200 for path in pointers), "the tree was changed"
    flip_byte(real_file(pointers[0]))
    with pytest.raises(IntegrityError, match="git lfs fetch"):
        real_file(pointers[0])


def test_the_dataset_of_a_run(
    store: DataStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow.data
    from mlflow.entities import DatasetInput

    from mlops_workbench.experiment.store import mlflow_client

    frame = table(80)
    frame.to_csv(tmp_path / "january.csv", index=False)
    client = mlflow_client(store.workspace)
    run = client.create_run(client.create_experiment("theirs")).info.run_id
    dataset = mlflow.data.from_pandas(frame, source=str(tmp_path / "january.csv"), name="january")
    client.log_inputs(run, [DatasetInput(dataset._to_mlflow_entity())])
    assert taken(store, f"runs:/{run}", "--key", "id", "--label", "late", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["rows"] == 80 and "january" in said["source"] and said["kind"] == "table"
    assert taken(store, f"runs:/{run}/june", "--key", "id", "--label", "late") == 2
    assert "january" in capsys.readouterr().err


def scans(folder: Path, selection: str, shift: int = 0) -> Path:
    """The digits as picture files of 16 x 16 colour pixels, one folder a class; `shift` moves them into the next class' folder."""
    for key, image, label in digits.source(selection).itertuples(index=False):
        target = folder / f"class-{(label + shift) % 10}" / f"{key}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((image.reshape(8, 8) * 15).astype(np.uint8))
        grey.resize((16, 16)).convert("RGB").save(target)
    return folder


def test_pictures_of_ones_own_are_learned_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, next_, odd = (tmp_path / name for name in ("first", "next", "odd"))
    root = tmp_path / "mine"
    assert main(["init", str(root), "--pictures", str(scans(first, "0:900"))]) == 0
    assert main(["run", "prepare", "train", "-w", str(root)]) == 0
    store = DataStore(Workspace.open(root))
    assert [version.rows for version in store.versions("mine")] == [900]
    assert "accuracy 0.9" in capsys.readouterr().out
    more = ["--append", "-w", str(root)]
    assert main(["data", "import", "mine", str(scans(next_, "900:1000")), *more]) == 0
    rows = store.load("mine")
    assert len(rows) == 1000 and set(rows["label"]) == set(range(10))
    assert {image.shape for image in rows["image"]} == {(256,)}
    capsys.readouterr()
    # the same pictures again change nothing, and wrongly filed ones are refused as a whole
    assert main(["data", "import", "mine", str(next_), *more]) == 0
    assert "unchanged" in capsys.readouterr().out
    assert main(["data", "import", "mine", str(scans(odd, "1000:1300", 1)), *more]) == 4
    said = capsys.readouterr().err
    assert "labels look wrong" in said and "--force" in said
    (odd / "class-3").rename(odd / "clas-3")
    assert main(["data", "import", "mine", str(odd), *more]) == 1
    assert "did you mean 'class-3'" in capsys.readouterr().err
    assert len(store.load("mine")) == 1000
    # written as files, they are the same rows again
    out = tmp_path / "out"
    assert main(["data", "checkout", "mine", str(out), "--png", "-w", str(root)]) == 0
    assert len(list(out.glob("class-3/*.png"))) == (rows["label"] == 3).sum()
    assert main(["data", "import", "mine", str(out), *more]) == 0
    assert "unchanged" in capsys.readouterr().out
