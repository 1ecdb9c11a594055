"""Settings, files and workspaces: what must hold beyond the examples in their notebooks."""

import contextlib
import json
import os
import random
import signal
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.core.errors import (
    ConflictError,
    NotAWorkspaceError,
    SettingsError,
    UsageError,
    WorkbenchError,
    shorten,
)
from mlops_workbench.core.files import canonical_json, file_lock, safe_join, write_atomic
from mlops_workbench.core.settings import (
    FIXED_SECTIONS,
    Settings,
    find_workspace,
    load_settings,
    read_settings_file,
    section_keys,
    setting_origins,
)
from mlops_workbench.core.template import replace_values, settings_template
from mlops_workbench.core.workspace import Workspace, create_workspace, run_git

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "settings.ini").write_text(settings_template(name="airport"))
    return tmp_path


# --- errors ---------------------------------------------------------------------------------------


def test_every_error_has_a_documented_exit_code() -> None:
    kinds = [WorkbenchError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    assert {kind.exit_code for kind in kinds} == {1, 2, 3, 4, 5}


@given(st.recursive(st.text() | st.integers() | st.floats(), st.lists), st.integers(0, 200))
def test_shorten_keeps_its_limit(value: object, limit: int) -> None:
    assert len(shorten(value, limit)) <= limit


# --- settings -------------------------------------------------------------------------------------


def test_precedence_of_the_four_layers(root: Path) -> None:
    layers = {"environ": {"MWB_SERVING_PORT": "2"}, "overrides": {"serving.port": "3"}}
    assert load_settings(root, environ={}).serving.port == 8600
    assert load_settings(root, environ=layers["environ"]).serving.port == 2
    assert load_settings(root, **layers).serving.port == 3
    (root / "settings.ini").write_text("[serving]\nport = 1\n")
    assert load_settings(root, environ={}).serving.port == 1
    (root / "settings.ini").write_text("")
    assert load_settings(root, environ={}) == Settings()


@pytest.mark.parametrize(
    "key", [f"{section}.{key}" for section in FIXED_SECTIONS for key in section_keys(section) or ()]
)
def test_every_key_is_reached_by_each_layer(root: Path, key: str) -> None:
    section, name = key.split(".")
    value = getattr(getattr(Settings(), section), name)
    text = "x" if value == "" else str(value)
    text = "5, 50" if key == "rollout.steps" else text
    variable = f"MWB_{section}_{name}".upper()
    from_flag = setting_origins(root, environ={}, overrides={key: text})
    from_variable = setting_origins(root, environ={variable: text})
    origins = {
        rows[0].origin
        for rows in (
            [row for row in origin if (row.section, row.key) == (section, name)]
            for origin in (from_flag, from_variable)
        )
    }
    assert origins == {"flag", f"environment {variable}"}


@given(st.sampled_from(sorted(section_keys("serving") or ())), st.data())
def test_a_misspelt_key_is_never_taken(key: str, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from(string.ascii_lowercase + "_"))
    misspelt = key[:position] + letter + key[position + 1 :]
    if misspelt in (section_keys("serving") or ()):
        return
    with pytest.raises(SettingsError, match="unknown key"):
        load_settings(REPOSITORY, environ={}, overrides={f"serving.{misspelt}": "1"})
    with pytest.raises(SettingsError, match="unknown key"):
        load_settings(REPOSITORY, environ={f"MWB_SERVING_{misspelt.upper()}": "1"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[serving]\nprot = 1\n", "did you mean 'port'"),
        ("[servin]\nport = 1\n", "did you mean 'serving'"),
        ("[servin]\n", "did you mean 'serving'"),
        ("[gates]\nmetric = brier\n", "gates.<recipe>"),
        ("[gates.flights]\n", "is empty"),
        ("[alert.x]\nmetric = brier\noperator = over\nthreshold = 1\n", "'above' or 'below'"),
        ("[alert.x]\nmetric = brier\noperator = above\n", "add the line `threshold"),
        ("[serving]\nport = -1\n", "settings.ini:2"),
        ("[rollout]\nsteps = 50, 5\n", "rising percentages"),
        ("[rollout]\nsteps = a few\n", "rollout.steps"),
        ("[rollout]\nsteps = 5, shadow\n", "shadow before them"),
        ("[serving]\nport = 1.5\n", "serving.port"),
        ("[serving]\nport\n", "settings.ini"),
        ("[serving]\nport = 1\nport = 2\n", "already exists"),
        ("[serving]\nport = 1\n[serving]\nhost = x\n", "already exists"),
        ("[release]\nconfidence = nan\n", "finite"),
        ("[release]\nconfidence = 1\n", "less than 1"),
        ("[workspace]\nname = ../x\n", "workspace.name"),
        ("[update]\non_drift = perhaps\n", "update.on_drift"),
        ("\0", "settings.ini"),
    ],
)
def test_wrong_settings_say_what_and_where(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "settings.ini").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path, environ={})
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_wrong_token_is_not_shown_in_the_error(root: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(root, environ={}, overrides={"serving.tokn": "hunter2"})
    assert "hunter2" not in str(caught.value)


@settings(max_examples=200)
@given(st.text(max_size=400))
def test_no_text_makes_the_reader_fail_otherwise(text: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "settings.ini"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with contextlib.suppress(SettingsError):
            assert isinstance(load_settings(name, environ={}), Settings)


def test_the_settings_cannot_be_changed(root: Path) -> None:
    loaded = load_settings(root, environ={})
    with pytest.raises(ValueError, match="frozen"):
        loaded.serving.port = 1  # type: ignore[misc]


def test_origins_name_the_line_of_the_file(root: Path) -> None:
    lines = (root / "settings.ini").read_text().splitlines()
    from_file = [row for row in setting_origins(root, environ={}) if ":" in row.origin]
    assert len(from_file) > 60
    for row in from_file:
        assert lines[int(row.origin.split(":")[1]) - 1].startswith(f"{row.key} =")


def test_our_own_settings_are_the_template() -> None:
    own = read_settings_file(REPOSITORY / "settings.ini")
    template = settings_template(name="workbench")
    assert (REPOSITORY / "settings.ini").read_text() == template
    assert own["workspace", "recipe"][0] == "flights"


@given(st.dictionaries(st.sampled_from(["serving.port", "pages.port"]), st.integers(0, 65535)))
def test_replaced_values_are_read_back(values: dict[str, int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        text = replace_values(settings_template(), values)
        (Path(name) / "settings.ini").write_text(text)
        loaded = load_settings(name, environ={})
        for key, value in values.items():
            assert getattr(getattr(loaded, key.split(".")[0]), "port") == value  # noqa: B009
        assert text.count(" ;") == settings_template().count(" ;")


def test_a_workspace_is_found_from_inside_and_by_variable(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = root / "runs" / "cycle" / "1_prepare-1"
    inner.mkdir(parents=True)
    assert find_workspace(inner) == root
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    with pytest.raises(NotAWorkspaceError):
        find_workspace()
    monkeypatch.setenv("MWB_WORKSPACE", str(root))
    assert find_workspace() == root


# --- files ----------------------------------------------------------------------------------------

NASTY = st.sampled_from(
    [
        "..",
        ".",
        "/",
        "//",
        "",
        "a",
        "b",
        "link",
        "loop",
        "\0",
        "\\",
        "~",
        "etc",
        " ",
        "é",
        "...",
        "a/..",
    ]
)


@settings(max_examples=500)
@given(st.lists(NASTY, max_size=6).map("/".join) | st.text(max_size=30))
def test_safe_join_never_leaves_its_folder(relative: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve() / "inside"
        (folder / "a").mkdir(parents=True)
        (folder / "link").symlink_to("/etc")
        (folder / "loop").symlink_to("loop")
        (folder / "b").symlink_to("..")
        try:
            joined = safe_join(folder, relative)
        except UsageError:
            return
        assert joined != folder and joined.is_relative_to(folder)
        assert Path(os.path.realpath(joined)).is_relative_to(folder)


def test_safe_join_takes_ordinary_paths(tmp_path: Path) -> None:
    for relative in ("a", "a/b.json", "..a/b..", "x y/é", "./a"):
        assert safe_join(tmp_path, relative) == tmp_path.resolve() / relative


TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
SCALAR = st.none() | st.booleans() | st.integers() | TEXT
JSON = st.recursive(
    SCALAR | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@given(JSON)
def test_canonical_json_is_one_text_and_loses_nothing(value: object) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


WRITER = """
import sys
from pathlib import Path
from mlops_workbench.core.files import write_atomic
path, size = Path(sys.argv[1]), int(sys.argv[2])
print("ready", flush=True)
number = 0
while True:
    number += 1
    write_atomic(path, (str(number % 10) * size).encode())
"""


def test_a_killed_writer_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    size, path, randomness = 2_000_000, tmp_path / "pointer.json", random.Random(0)
    path.write_bytes(b"0" * size)
    seen = set()
    for _ in range(30):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(size)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(randomness.random() * 0.03)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        content = path.read_bytes()
        assert len(content) == size
        assert content == content[:1] * size
        seen.add(content[:1])
    assert len(seen) > 1, "the writers were killed before they wrote anything"


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    size, path = 500_000, tmp_path / "pointer.json"
    path.write_bytes(b"0" * size)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(size)], stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        contents = [path.read_bytes() for _ in range(300)]
    finally:
        writer.kill()
        writer.wait()
        assert writer.stdout is not None
        writer.stdout.close()
    assert {len(content) for content in contents} == {size}
    assert all(content == content[:1] * size for content in contents)
    assert len({content[:1] for content in contents}) > 1


def test_a_full_disk_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pointer.json"
    write_atomic(path, "old")
    code = (
        "import resource, signal, sys\n"
        "from mlops_workbench.core.files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_atomic(sys.argv[1], 'x' * 5000)\n"
        "except OSError as error:\n    print(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "27"  # EFBIG, as a full disk is ENOSPC
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["pointer.json"]


def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from mlops_workbench.core.files import file_lock\n"
        "with file_lock(sys.argv[1], 1):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    path = tmp_path / "locks" / "dvc.lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    with pytest.raises(ConflictError, match="another process"), file_lock(path, 0.1):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with file_lock(path, 1):
        pass


# --- workspace ------------------------------------------------------------------------------------


def test_a_workspace_without_a_git_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "GIT_AUTHOR_NAME",
        "GIT_AUTHOR_EMAIL",
        "GIT_COMMITTER_NAME",
        "GIT_COMMITTER_EMAIL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    made = create_workspace(tmp_path / "ws")
    assert run_git(made.root, "log", "--format=%an") in ("mlops workbench", "root")
    assert run_git(made.root, "status", "--porcelain") == ""


def test_a_workspace_inside_another_repository_has_its_own(tmp_path: Path) -> None:
    outer = create_workspace(tmp_path / "outer")
    inner = create_workspace(outer.root / "demo")
    assert run_git(inner.root, "rev-parse", "--show-toplevel") == str(inner.root)
    assert Workspace.open(inner.root / ".git").root == inner.root


def test_a_workspace_in_an_existing_repository_keeps_its_files(tmp_path: Path) -> None:
    tmp_path = tmp_path / "a name as long as the comment's column, and then some"
    tmp_path.mkdir()
    run_git(tmp_path, "init", "--quiet")
    (tmp_path / ".gitignore").write_text("mine\n")
    (tmp_path / "notes.md").write_text("mine")
    create_workspace(tmp_path)
    assert (tmp_path / ".gitignore").read_text() == "mine\n"
    assert run_git(tmp_path, "ls-files") == "settings.ini"


def test_a_workspace_is_never_overwritten(tmp_path: Path) -> None:
    made = create_workspace(tmp_path / "ws", settings={"serving.port": 1})
    with pytest.raises(ConflictError):
        create_workspace(tmp_path / "ws", settings={"serving.port": 2})
    assert Workspace.open(made.root).settings.serving.port == 1
