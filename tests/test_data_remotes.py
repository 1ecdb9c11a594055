"""Versions to real remotes and back: a folder, S3 and SSH; broken off, refused, expired."""

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from data_support import files_under, flip_byte, kill_group, new_store, table
from remotes_support import (
    BUCKET,
    ExpiringProxy,
    S3Server,
    SSHServer,
    start_command,
    start_s3,
    start_ssh,
    wait_for,
)

from mlops_workbench.cli.main import main
from mlops_workbench.core.workspace import create_workspace
from mlops_workbench.data.dvc import object_is_whole
from mlops_workbench.data.remotes import RemoteError
from mlops_workbench.data.transfer import pull, push
from mlops_workbench.data.versions import DataStore

NAMES = {"key": "id", "label": "late"}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = start_s3(tmp_path_factory.mktemp("s3") / "server")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHServer]:
    server = start_ssh(tmp_path_factory.mktemp("ssh") / "server")
    yield server
    server.stop()


def use_key(store: DataStore, ssh: SSHServer, name: str, address: str) -> None:
    """Let DVC use one of the server's keys, as `dvc remote modify --local` would."""
    (store.root / ".dvc").mkdir(exist_ok=True)
    text = f"['remote \"far\"']\n    url = {address}\n    keyfile = {ssh.folder / name}\n"
    (store.root / ".dvc" / "config.local").write_text(text)


def two_versions(store: DataStore, rows: int = 3000) -> pd.DataFrame:
    """The rows of the second of two versions."""
    frame = table(rows)
    store.snapshot("flights", frame[: rows // 2], **NAMES)
    store.snapshot("flights", frame, **NAMES)
    return frame


def forget_all_copies(store: DataStore) -> None:
    """Lose everything here but git: as a fresh clone on another machine."""
    for folder in (store.dvc.cache, store.workspace.state / "remote"):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=[pytest.param("folder", marks=pytest.mark.slow), "s3", "ssh"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A remote of each kind, and what a person needs in the environment."""
    if request.param == "folder":
        return str(tmp_path / "far")
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        return f"s3://{BUCKET}/{tmp_path.name}"
    return request.getfixturevalue("ssh").address() + f"/{tmp_path.name}"


def test_there_and_back(
    address: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = new_store(tmp_path)
    if address.startswith("ssh"):
        use_key(store, request.getfixturevalue("ssh"), "me", address)
    frame = two_versions(store)
    here = ["-w", str(store.root)]
    assert main(["data", "push", "--to", address, "--json", *here]) == 0
    sent = json.loads(capsys.readouterr().out)
    assert sent["moved"] == sent["objects"] > 4 and len(sent["versions"]) == 2
    assert main(["data", "push", "--to", address, *here]) == 0
    assert " 0 objects moved" in capsys.readouterr().out
    forget_all_copies(store)
    assert main(["data", "pull", "--from", address, *here]) == 0
    pd.testing.assert_frame_equal(store.load("flights"), frame)
    assert store.verify("flights", repair=True) is not None


@pytest.mark.slow
def test_the_remote_of_the_settings_is_written_by_snapshots(s3: S3Server, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        remote = {"data.remote": f"s3://{BUCKET}/settings"}
        store = DataStore(create_workspace(tmp_path / "w", recipe="flights", settings=remote))
        frame = two_versions(store)
        assert len(s3.objects("settings")) > 4
        assert push(store).moved == 0
        shutil.rmtree(store.dvc.cache)
        assert pull(store, ["flights@v1.1"]).moved > 0
        pd.testing.assert_frame_equal(store.load("flights"), frame)


# --- broken off -----------------------------------------------------------------------------------


def heavy_version(store: DataStore, parts: int = 1) -> pd.DataFrame:
    """Versions of many megabytes that do not shrink."""
    numbers = np.random.default_rng(0)
    rows = 40_000
    frame = pd.DataFrame(numbers.normal(size=(rows, 24)), columns=[f"c{n}" for n in range(24)])
    frame.insert(0, "id", [f"row {n:07}" for n in range(rows)])
    frame["late"] = numbers.integers(0, 2, rows)
    for part in range(1, parts + 1):
        store.snapshot("flights", frame[: rows * part // parts], **NAMES)
    return frame


def environment_of(address: str, request: pytest.FixtureRequest) -> dict[str, str]:
    """The variables for a remote."""
    return request.getfixturevalue("s3").environment if address.startswith("s3") else {}


def far_bytes(address: str, request: pytest.FixtureRequest) -> Callable[[], int]:
    """How many bytes have arrived at the other end."""
    if address.startswith("s3"):
        server: S3Server = request.getfixturevalue("s3")
        prefix = address.removeprefix(f"s3://{BUCKET}/")
        return lambda: sum(server.objects(prefix).values())
    folder = Path("/" + address.split("/", 3)[3]) if "://" in address else Path(address)
    return lambda: sum(_size(path) for path in folder.rglob("*"))


def _size(path: Path) -> int:
    """The bytes of a file that may vanish meanwhile."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def break_off(
    root: Path, words: list[str], environment: dict[str, str], count: Callable[[], int], after: int
) -> bool:
    """Kill a push or a pull once so many bytes have arrived; False when it was faster."""
    process = start_command(root, *words, environment=environment)
    while process.poll() is None and count() < after:
        time.sleep(0.002)
    return kill_group(process)


@pytest.mark.slow
def test_an_interrupted_push_and_pull_go_on(
    address: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = new_store(tmp_path)
    if address.startswith("ssh"):
        use_key(store, request.getfixturevalue("ssh"), "me", address)
    frame = heavy_version(store)
    environment, count = environment_of(address, request), far_bytes(address, request)
    killed = break_off(store.root, ["push", "--to", address], environment, count, 1_000_000)
    arrived = count()
    sent = push(store, remote=address)
    whole = count()
    assert killed and arrived < whole
    assert 0 < sent.moved <= sent.objects
    forget_all_copies(store)
    cache = store.dvc.cache
    killed = break_off(
        store.root,
        ["pull", "--from", address],
        environment,
        lambda: sum(_size(path) for path in cache.rglob("*")),
        1_000_000,
    )
    fetched = pull(store, remote=address)
    assert killed and fetched.objects == sent.objects
    for path in files_under(cache):
        if path.name.startswith("."):
            continue  # what DVC was writing when it was killed; never under an object's name
        assert object_is_whole(cache, path.parent.name + path.name), path
    pd.testing.assert_frame_equal(store.load("flights"), frame)
    assert push(store, remote=address).moved == 0


def kill_at_random(
    start: Callable[[], "subprocess.Popen[str]"], times: int, moments: random.Random
) -> int:
    """Start a command again and again and kill it at a random moment of the time that it takes; how often it was killed."""
    kills, longest = 0, 6.0  # seconds; shorter as soon as one ran to its end
    for _ in range(times):
        begun, process = time.monotonic(), start()
        moment = begun + moments.uniform(0.1, longest)
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.005)
        if process.poll() is not None:
            longest = time.monotonic() - begun
        kills += kill_group(process)
    return kills


@pytest.mark.slow
def test_kills_at_random_moments_lose_nothing(
    address: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store = new_store(tmp_path)
    if address.startswith("ssh"):
        use_key(store, request.getfixturevalue("ssh"), "me", address)
    frame = heavy_version(store)
    environment, moments = environment_of(address, request), random.Random(1)
    kills = kill_at_random(
        lambda: start_command(store.root, "push", "--to", address, environment=environment),
        12,
        moments,
    )
    push(store, remote=address)
    forget_all_copies(store)
    kills += kill_at_random(
        lambda: start_command(store.root, "pull", "--from", address, environment=environment),
        6,
        moments,
    )
    pull(store, remote=address)
    assert kills > 6
    pd.testing.assert_frame_equal(store.load("flights"), frame)


@pytest.mark.slow
def test_an_object_that_arrived_in_half_is_sent_again(ssh: SSHServer, tmp_path: Path) -> None:
    store = new_store(tmp_path)
    address = ssh.address() + "/half"
    use_key(store, ssh, "me", address)
    frame = two_versions(store)
    push(store, remote=address)
    largest = max(files_under(ssh.remote / "half"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    assert push(store, remote=address).mended == 1
    forget_all_copies(store)
    pull(store, remote=address)
    pd.testing.assert_frame_equal(store.load("flights"), frame)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "access key 'KEYONE' of the environment"),
        ({"AWS_ACCESS_KEY_ID": "NOBODY"}, "access key 'NOBODY' of the environment"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no access key in"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "to answer at http://127.0.0.1:9"),
    ],
)
def test_s3_refuses_in_words_that_help(
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    said: str,
) -> None:
    store = new_store(tmp_path)
    store.snapshot("flights", table(50), **NAMES)
    for name, value in {**s3.environment, **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    for verb, option in (("push", "--to"), ("pull", "--from")):
        words = ["data", verb, option, f"s3://{BUCKET}/refused", "-w", str(store.root)]
        assert main(words) == 1
        text = capsys.readouterr().err
        assert said in text and f"s3://{BUCKET}/refused" in text and "run the same command" in text
        assert "secretone" not in text and len(text.splitlines()) == 1
    assert store.load("flights") is not None


def test_ssh_refuses_in_words_that_help(
    ssh: SSHServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = new_store(tmp_path)
    store.snapshot("flights", table(50), **NAMES)
    address = ssh.address() + "/refused"
    here = ["--to", "far", "-w", str(store.root)]
    use_key(store, ssh, "stranger", address)
    assert main(["data", "push", *here]) == 1
    text = capsys.readouterr().err
    assert (
        "refused" in text and str(ssh.folder / "stranger") in text and ".dvc/config.local" in text
    )
    use_key(store, ssh, "nobody", address)
    assert main(["data", "push", *here]) == 1
    assert "expected the key file" in capsys.readouterr().err
    use_key(store, ssh, "me", address)
    assert main(["data", "push", *here]) == 0


@pytest.mark.slow
def test_a_bucket_that_is_not_there(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = new_store(tmp_path)
    store.snapshot("flights", table(50), **NAMES)
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RemoteError, match="create it"):
        push(store, remote="s3://elsewhere/data")


@pytest.mark.slow
def test_expired_credentials_pause_and_go_on(
    s3: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = new_store(tmp_path)
    frame = two_versions(store, 20_000)
    proxy = ExpiringProxy(s3.port, writes=2).start()
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    words = ["data", "push", "--to", f"s3://{BUCKET}/expired", "-w", str(store.root)]
    assert main(words) == 1
    text = capsys.readouterr().err
    assert "paused: access key 'KEYONE'" in text and "goes on where it stopped" in text
    arrived = s3.objects("expired")
    assert 0 < len(arrived) <= 2
    proxy.renewed = True
    assert main(words) == 0
    assert f"{len(arrived)} there already" in capsys.readouterr().out
    assert main(words) == 0
    assert " 0 objects moved" in capsys.readouterr().out
    forget_all_copies(store)
    pull(store, remote=f"s3://{BUCKET}/expired")
    pd.testing.assert_frame_equal(store.load("flights"), frame)


def test_what_is_damaged_here_is_not_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = new_store(tmp_path)
    two_versions(store)
    flip_byte(max(files_under(store.dvc.cache), key=lambda path: path.stat().st_size))
    here = ["-w", str(store.root)]
    assert main(["data", "push", "--to", str(tmp_path / "far"), *here]) == 1
    assert "mwb data verify flights@v1" in capsys.readouterr().err
    assert main(["data", "verify", *here]) == 0
    assert main(["data", "push", "--to", str(tmp_path / "far"), *here]) == 0
    assert main(["data", "push", "--to", "ftp://far/away", *here]) == 2
    wait_for(lambda: (tmp_path / "far").is_dir(), "the folder")
