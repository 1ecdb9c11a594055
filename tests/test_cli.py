"""The command line: help, exit codes, what is loaded, and the commands about workspaces."""

import ast
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
from importlib import import_module
from pathlib import Path

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlops_workbench.cli import main as main_module
from mlops_workbench.cli.init import recipe_source
from mlops_workbench.cli.main import COMMANDS, installed_commands, main, mwb
from mlops_workbench.cli.options import cell_text, format_table, to_plain
from mlops_workbench.cli.starter import guess_table
from mlops_workbench.core.errors import (
    ConflictError,
    GateRefusedError,
    IntegrityError,
    NotAWorkspaceError,
    UsageError,
    WorkbenchError,
)
from mlops_workbench.core.workspace import Workspace, create_workspace, run_git

REPOSITORY = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-m", "mlops_workbench.cli.main"]
HEAVY = ("torch", "mlflow", "evidently", "papermill", "sklearn", "onnxruntime", "apprise", "duckdb")
NEVER_FOR_HELP = (*HEAVY, "pandas", "numpy", "sqlalchemy", "pydantic", "rich", "httpx", "msgspec")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    quiet = {"serving.port": 0, "pages.port": 0}
    return create_workspace(tmp_path / "airport", settings=quiet)


def run_mwb(*arguments: str, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, **options
    )


def every_command() -> list[tuple[str, ...]]:
    """Every command and every command in a group, as the words that call it."""
    found: list[tuple[str, ...]] = []
    context = click.Context(mwb, info_name="mwb")
    for name in installed_commands():
        command = mwb.get_command(context, name)
        found.append((name,))
        if isinstance(command, click.Group):
            found.extend((name, verb) for verb in command.list_commands(context))
    return found


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", every_command(), ids=" ".join)
def test_help_of_every_command(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"Usage: mwb {' '.join(words)}")
    assert len(text.splitlines()) > 3
    assert len(words) > 1 or f"mwb {words[0]}" in text.partition("\n")[2], "no example"


def test_help_lists_every_installed_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in installed_commands():
        assert f"\n  {name} " in text
    assert "mwb init churn --csv" in text


def test_every_command_module_is_on_the_list() -> None:
    shared = {
        "__init__",
        "main",
        "options",
        "starter",
        "run_report",
        "rollout",
        "rollout_plan",
        "regime",
    }
    shared |= {
        "data_support",
        "data_history",
        "data_transfer",
        "data_import",
        "data_quality",
        "drop",
    }
    modules = {path.stem for path in (REPOSITORY / "mlops_workbench" / "cli").glob("*.py")}
    assert modules - shared - {entry.module for entry in COMMANDS.values()} == set()


def test_help_loads_click_and_little_else() -> None:
    code = (
        "import sys\n"
        "from mlops_workbench.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        f"print([name for name in {NEVER_FOR_HELP} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("name", installed_commands())
def test_no_command_loads_heavy_packages_for_its_help(name: str) -> None:
    code = (
        "import sys\n"
        "from mlops_workbench.cli.main import main\n"
        f"assert main([{name!r}, '--help']) == 0\n"
        f"print([heavy for heavy in {HEAVY} if heavy in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_both_names_of_the_program_lead_here() -> None:
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"mwb", "mlops-workbench"}
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert getattr(import_module(module), function) is main
    for name in scripts:
        program = Path(sys.executable).parent / name
        done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("mlops-workbench ")
        usage = subprocess.run([program, "--help"], capture_output=True, text=True, check=True)
        assert usage.stdout.startswith(f"Usage: {name} ")


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [("mwb conf", 1, "config"), ("mwb config --show", 2, "--show-origin")],
)
def test_completion_in_bash(words: str, position: int, expected: str) -> None:
    environment = {
        **os.environ,
        "_MWB_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(position),
    }
    program = Path(sys.executable).parent / "mwb"
    done = subprocess.run([program], capture_output=True, text=True, check=True, env=environment)
    assert f"plain,{expected}" in done.stdout


# --- exit codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (WorkbenchError("x"), 1),
        (IntegrityError("x"), 1),
        (UsageError("x"), 2),
        (NotAWorkspaceError("x"), 3),
        (GateRefusedError("x"), 4),
        (ConflictError("x"), 5),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_refusal_is_one_line_and_its_exit_code(
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @click.command()
    def fails() -> None:
        raise error

    monkeypatch.setattr(main_module, "mwb", fails)
    assert main([]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert "Traceback" not in captured.err


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def fails() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(main_module, "mwb", fails)
    with pytest.raises(ZeroDivisionError):
        main([])


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["confg"], 2, "did you mean 'config'"),
        (["config", "--jsn"], 2, "--json"),
        (["--set", "serving.port", "config"], 2, "section.key=value"),
        (["config", "-w", "/proc"], 3, "mwb init"),
        (["status", "-w", "/proc"], 3, "mwb init"),
        (["config", "-w", "{workspace}", "nonsense"], 2, "no setting or section"),
        (["--set", "serving.prt=1", "config", "-w", "{workspace}"], 2, "did you mean 'port'"),
        (["init", "{workspace}"], 5, "choose another folder"),
        (["init", "x", "--recipe", "flight"], 2, "did you mean 'flights'"),
        (["init", "x", "--csv", "/absent.csv", "--label", "y"], 2, "/absent.csv"),
    ],
)
def test_exit_codes_of_the_process(
    arguments: list[str], code: int, words: str, workspace: Workspace, tmp_path: Path
) -> None:
    filled = [argument.format(workspace=workspace.root) for argument in arguments]
    done = run_mwb(*filled, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_a_closed_pipe_is_nobodys_fault(workspace: Workspace) -> None:
    command = " ".join([*COMMAND, "config", "--json", "-w", f"'{workspace.root}'"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -c 1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "[", "")


# --- tables ---------------------------------------------------------------------------------------

ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text())


@given(ANYTHING)
def test_a_cell_is_one_printable_line(value: object) -> None:
    assert cell_text(value).isprintable()


@given(st.lists(st.dictionaries(st.sampled_from("abc"), ANYTHING, min_size=1), min_size=1))
def test_a_table_has_one_line_a_row(rows: list[dict[str, object]]) -> None:
    lines = format_table(rows, width=40).split("\n")
    assert len(lines) == len(rows) + 2
    assert all(len(line) <= 40 for line in lines)


@given(st.recursive(ANYTHING, lambda inner: st.dictionaries(st.text(), inner) | st.lists(inner)))
def test_what_goes_to_scripts_is_always_json(value: object) -> None:
    plain = to_plain(value)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


# --- config ---------------------------------------------------------------------------------------


def test_a_flag_reaches_the_processes_that_a_command_starts(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def starts() -> None:
        subprocess.run([*COMMAND, "config", "serving.port", "--show-origin"], check=True)

    class Group(main_module.LazyGroup):
        def list_commands(self, context: click.Context) -> list[str]:
            return ["starts"]

        def get_command(self, context: click.Context, name: str) -> click.Command | None:
            return starts

    group = Group(params=mwb.params, callback=mwb.callback)
    monkeypatch.setattr(main_module, "mwb", group)
    monkeypatch.chdir(workspace.root)
    assert main(["--set", "serving.port=7777", "starts"]) == 0
    row = capfd.readouterr().out.splitlines()[-1].split()
    assert row == ["serving.port", "7777", "flag"]
    assert "MWB_FLAGS" not in os.environ


def test_config_never_shows_a_secret(workspace: Workspace) -> None:
    text = (workspace.root / "settings.ini").read_text()
    text = text.replace("\ntoken =  ", "\ntoken = hunter2 ")
    text += "\n[alert.extra]\nmetric = auc\noperator = below\nthreshold = 0.5\n"
    text = text.replace("; team = secret://TEAM_CHANNEL", "team = mailto://me:hunter2@host ")
    (workspace.root / "settings.ini").write_text(text)
    for extra in ([], ["--json"], ["--show-origin"], ["serving.token"], ["notify"]):
        done = run_mwb("config", *extra, "-w", str(workspace.root))
        assert done.returncode == 0, done.stderr
        assert "hunter2" not in done.stdout + done.stderr
    shown = run_mwb("config", "notify.team", "-w", str(workspace.root))
    assert shown.stdout.strip() == "mailto://********"


# --- doctor ---------------------------------------------------------------------------------------


def test_doctor_says_what_is_wrong_and_what_to_do(workspace: Workspace) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        flag = f"pages.port={port}"
        done = run_mwb("--set", flag, "doctor", "-w", str(workspace.root), "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (1, False)
    wrong = [check for check in found["checks"] if check["status"] not in ("ok", "optional")]
    assert [check["what"] for check in wrong] == ["port of pages"]
    assert "settings.ini" in wrong[0]["advice"]
    done = run_mwb("doctor", "-w", str(workspace.root), "--json")
    assert (done.returncode, json.loads(done.stdout)["ok"]) == (0, True)


def test_doctor_finds_a_broken_ledger(workspace: Workspace) -> None:
    workspace.state.mkdir()
    (workspace.state / "ledger.db").write_bytes(b"this is no database" * 100)
    done = run_mwb("doctor", "-w", str(workspace.root), "--json")
    found = {check["what"]: check for check in json.loads(done.stdout)["checks"]}
    assert (done.returncode, found["ledger"]["status"]) == (1, "broken")
    assert run_mwb("status", "-w", str(workspace.root)).returncode == 0


def test_doctor_works_outside_a_workspace(tmp_path: Path) -> None:
    done = run_mwb("doctor", cwd=tmp_path)
    assert done.returncode == 0
    assert "mwb init DIR" in done.stdout


def test_doctor_misses_programs(workspace: Workspace, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PATH": str(empty)}
    done = run_mwb("doctor", "-w", str(workspace.root), "--json", env=environment)
    found = {check["what"]: check for check in json.loads(done.stdout)["checks"]}
    assert (found["git"]["status"], found["chromium"]["status"]) == ("missing", "optional")
    assert "install git" in found["git"]["advice"]
    assert done.returncode == 1


# --- status ---------------------------------------------------------------------------------------


def test_status_of_an_empty_workspace_changes_nothing(workspace: Workspace) -> None:
    done = run_mwb("status", "-w", str(workspace.root))
    assert done.returncode == 0, done.stderr
    assert "nothing serves yet" in done.stdout
    assert not workspace.state.exists()
    found = json.loads(run_mwb("status", "--json", "-w", str(workspace.root)).stdout)
    assert found["slots"] == found["decisions"] == found["leases"] == []
    assert {row["state"] for row in found["services"]} == {"not running"}


# --- init -----------------------------------------------------------------------------------------


def write_customers(path: Path, rows: int = 600) -> None:
    """A table in which young customers with the basic plan leave."""
    lines = ["customer_id;age;plan;vip;remark;since;churned"]
    for row in range(rows):
        age, plan = 18 + row * 7 % 60, ("basic", "plus", "gold")[row % 3]
        leaves = "yes" if age < 35 and plan == "basic" else "no"
        shown = "" if row % 19 == 0 else f"{age}.0"
        vip = ("TRUE", "false", "?")[row % 3]
        lines.append(f'{row};{shown};{plan};{vip};"r; {row}";2013-0{1 + row % 9}-01;{leaves}')
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")


def test_init_from_a_csv_makes_a_recipe_that_works(tmp_path: Path) -> None:
    write_customers(tmp_path / "customers.csv")
    done = run_mwb(
        "init", "churn", "--csv", "customers.csv", "--label", "churned", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    uses = {column["name"]: column["use"] for column in json.loads(done.stdout)["columns"]}
    assert uses == {
        "customer_id": "key",
        "age": "number",
        "plan": "category",
        "vip": "category",
        "remark": "left out",
        "since": "time",
        "churned": "label",
    }
    (tmp_path / "customers.csv").unlink()
    code = (
        "from pathlib import Path\n"
        "from mlops_workbench.core.workspace import Workspace\n"
        "from mlops_workbench.recipes.conformance import check_recipe\n"
        "from mlops_workbench.recipes.protocol import encode, load_recipe\n"
        "workspace = Workspace.open()\n"
        "recipe = load_recipe(workspace.settings.workspace.recipe, workspace.root)\n"
        "frame = recipe.source('all')\n"
        "recipe.schema().validate(frame, lazy=True)\n"
        "assert check_recipe(recipe) == []\n"
        "arrays, labels = encode(recipe, frame)\n"
        "print(recipe.name, len(frame), int(labels.sum()), arrays['categories'].min(axis=0))\n"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        cwd=tmp_path / "churn",
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split()[:2] == ["churn", "600"]
    assert loaded.stdout.strip().endswith("[1 0]"), (
        "plan is always known, vip is missing in a third"
    )


def test_init_with_the_file_in_git_and_the_data_out_of_it(tmp_path: Path) -> None:
    write_customers(tmp_path / "customers.csv")
    arguments = ["init", str(tmp_path / "churn"), "--csv", str(tmp_path / "customers.csv")]
    assert main([*arguments, "--label", "churned"]) == 0
    root = tmp_path / "churn"
    assert run_git(root, "ls-files").split() == [".gitignore", "recipe.py", "settings.ini"]
    assert run_git(root, "status", "--porcelain") == ""
    assert (root / "source" / "customers.csv").is_file()
    before = (root / "recipe.py").read_text()
    assert main([*arguments, "--label", "plan"]) == 5
    assert (root / "recipe.py").read_text() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "first line"),
        ("a,churned\n", "at least 20 rows"),
        ("a,churned\n" + "1,yes\n" * 30, "found 1"),
        ("a,churned\n" + "1,yes\n2,no\n3\n" * 10, "record 4"),
        ("a,churned\n" + "1,yes\n2,\n" * 20, "20 of 40 rows without one"),
        ("a,churned\n" + "".join(f"x,{i}\n" for i in range(200)), "found 200"),
        ("a,churned\n" + "x,yes\nx,no\n" * 20, "always the same value"),
        ("a,a,churned\n" + "1,2,yes\n" * 30, "'a' twice"),
    ],
)
def test_init_refuses_a_file_that_cannot_teach(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text(text)
    folder = str(tmp_path / "new")
    assert main(["init", folder, "--csv", str(tmp_path / "t.csv"), "--label", "churned"]) == 2
    assert words in capsys.readouterr().err
    assert not Path(folder).exists()


NAMES = st.text(
    alphabet=st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"]), min_size=1
)


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES, min_size=3, max_size=5, unique=True), st.data())
def test_no_name_or_value_becomes_code(names: list[str], data: st.DataObject) -> None:
    values = data.draw(st.lists(NAMES, min_size=2, max_size=4, unique=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.csv"
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
            writer.writerow(names)
            for row in range(40):
                cells = [values[(row + column) % len(values)] for column in range(len(names) - 1)]
                writer.writerow([*cells, "ab"[row % 2]])
        try:
            table = guess_table(path, label=names[-1].strip())
        except UsageError:
            return
        tree = ast.parse(recipe_source(table, "name", "source/t.csv"))
    assert [type(node).__name__ for node in tree.body] == ["ImportFrom", "Assign"]
    call = tree.body[1].value
    written = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert set(written["categories"]) == {column.name for column in table.used_as("category")}
    assert set(written["numbers"]) == {column.name for column in table.used_as("number")}


def test_an_interrupted_init_leaves_nothing(tmp_path: Path) -> None:
    write_customers(tmp_path / "customers.csv", rows=20_000)
    arguments = ["init", "churn", "--csv", "customers.csv", "--label", "churned"]
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.4)
    process.send_signal(signal.SIGINT)
    process.communicate()
    interrupted = process.returncode in (130, -signal.SIGINT)
    assert interrupted != (tmp_path / "churn").exists()  # all or nothing, whichever came first


def test_an_interrupt_that_python_drops_stops_the_command(tmp_path: Path) -> None:
    """In the callback of a weak reference no error can be raised; the import system has one for every module."""
    script = tmp_path / "work.py"
    script.write_text(
        "import signal, sys, time, weakref\n"
        "from mlops_workbench.cli import main as program\n"
        "class Thing: pass\n"
        "def work(**_):\n"
        "    thing = Thing()\n"
        "    seen = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))\n"
        "    del thing\n"
        "    time.sleep(50)\n"
        "program.mwb.main = work\n"
        "sys.exit(program.main([]))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stderr) == (130, "mwb: stopped\n")
