"""Nothing that comes in as a parameter is ever executed: by hand-picked cases, by random ones, and by real runs."""

import ast
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pipeline_support import (
    cell,
    clean_environment,
    make_workspace,
    mwb,
    notebook,
    run_folders,
    share_kernels,
    stage_cells,
)

from mlops_workbench.core.errors import StageParameterError
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.pipeline.contract import (
    ParameterSchema,
    check_injected,
    from_text,
    parse_parameters,
)
from mlops_workbench.pipeline.execution import import_papermill
from mlops_workbench.pipeline.runner import run_stages

DECLARED = """\
text = "a"
count = 1
rate = 0.5
fast = False
columns = []
table = {}
anything: any = None
choice: Literal["auto", "cpu"] = "auto"
maybe: int | None = None
"""
SCHEMA = parse_parameters(DECLARED, "3_train.ipynb")
CANARY = "__import__('pathlib').Path('canary').write_text('executed')"


class EvilText(str):
    """A text that shows itself as code."""

    def __repr__(self) -> str:
        return CANARY

    def __str__(self) -> str:
        return CANARY

    def encode(self, *_: object) -> bytes:  # type: ignore[override]
        return f'"; {CANARY}; "'.encode()


class EvilNumber(int):
    """A number that shows itself as code."""

    def __repr__(self) -> str:
        return CANARY

    def __str__(self) -> str:
        return CANARY

    def __format__(self, _: str) -> str:
        return CANARY


class EvilList(list[Any]):
    """A list that shows itself as code."""

    def __repr__(self) -> str:
        return CANARY


class EvilFloat(float):
    """A number that shows itself as code."""

    def __repr__(self) -> str:
        return CANARY

    def __str__(self) -> str:
        return CANARY


class Unshowable:
    """A thing whose repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError(CANARY)


def injected_source(schema: ParameterSchema, checked: dict[str, Any]) -> str:
    """The cell that papermill itself writes for these values."""
    import_papermill()
    import nbformat
    from papermill.parameterize import parameterize_notebook

    text = notebook([cell(DECLARED, "parameters"), cell("pass")])
    parsed = nbformat.reads(text, as_version=4)
    parsed.metadata["papermill"] = {}
    for entry in parsed.cells:
        entry.metadata.setdefault("papermill", {})
    made = parameterize_notebook(parsed, checked, kernel_name="python3", language="python")
    return str(
        next(c.source for c in made.cells if "injected-parameters" in c.metadata.get("tags", []))
    )


def assert_harmless(values: dict[Any, Any]) -> bool:
    """Check what would be injected for these values; False when they were refused with the parameter named."""
    try:
        checked = SCHEMA.check(values)
    except StageParameterError as error:
        assert "parameter" in str(error)
        return False
    source = injected_source(SCHEMA, checked)
    check_injected(source, checked)
    tree = ast.parse(source)
    for statement in tree.body:
        assert isinstance(statement, ast.Assign) and len(statement.targets) == 1
        assert (
            isinstance(statement.targets[0], ast.Name) and statement.targets[0].id in SCHEMA.names
        )
        ast.literal_eval(statement.value)
    assert not [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    ]
    space: dict[str, Any] = {"__builtins__": {}}
    exec(compile(tree, "injected", "exec"), space)
    found = {name: space[name] for name in SCHEMA.names}
    assert json.dumps(found, sort_keys=True) == json.dumps(checked, sort_keys=True)
    return True


# %% the table: 19 hand-picked cases
REFUSED: list[tuple[str, dict[Any, Any]]] = [
    ("an unknown name", {"epochs": 3}),
    ("a name that is code", {f"x = 1; {CANARY}; y": 1}),
    ("a name with a line break", {f"text\n{CANARY}": 1}),
    ("a keyword", {"import": 1}),
    ("a name that is no text", {1: 2}),
    ("a name of another class", {EvilText("text"): "a"}),
    ("a wrong type", {"count": "three"}),
    ("truth for a number", {"count": True}),
    ("a tuple that shows itself as code", {"columns": (EvilText("a"), 1)}),
    ("a set", {"columns": {1, 2}}),
    ("bytes", {"text": b'" ; import os'}),
    ("a path", {"text": Path("a")}),
    ("a mapping with a key that is code", {"table": {EvilText("a"): 1}}),
    ("a mapping with a number for a key", {"table": {1: 2}}),
    ("a number that shows itself as code", {"count": EvilNumber(3)}),
    ("a text that shows itself as code", {"text": EvilText("a")}),
    ("not a number", {"rate": math.nan}),
    ("a thing that cannot be shown", {"anything": Unshowable()}),
    ("half a surrogate", {"text": "\ud800"}),
]
ACCEPTED: list[dict[str, Any]] = [
    {"text": f'"; {CANARY}; "'},
    {"text": "\\"},
    {"text": '\\"' + CANARY + '#"'},
    {"text": "'''\n" + CANARY + "\n'''"},
    {"text": '"""' + CANARY + '"""'},
    {"text": "line one\nline two\r\n\x00\x1b\u2028"},
    {"text": "{x.__class__}{0}%s$HOME`id`"},
    {"text": "\\N{LATIN SMALL LETTER A}\\x41\\u0041 ü 🙂"},
    {"columns": [f'"]; {CANARY}; ["', ["a", {"b": None}]]},
    {"table": {f'"}}; {CANARY}; {{"': 1}},
    {"anything": {"deep": [[[["x"]]]]}, "rate": -0.0, "count": 1 - 2**63},
    {"rate": 1e308, "fast": True, "choice": "cpu", "maybe": None},
]


def test_the_table_has_nineteen_cases() -> None:
    assert len(REFUSED) == 19


@pytest.mark.parametrize("case", REFUSED, ids=[name for name, _ in REFUSED])
def test_a_value_that_could_execute_is_refused(case: tuple[str, dict[Any, Any]]) -> None:
    assert not assert_harmless(case[1])


@pytest.mark.parametrize("values", ACCEPTED)
def test_a_text_that_looks_like_code_stays_a_text(values: dict[str, Any]) -> None:
    assert assert_harmless(values)


@pytest.mark.parametrize(
    "value",
    [
        EvilList([1]),
        EvilFloat(1.0),
        [EvilText("a")],
        {"a": EvilNumber(1)},
        [[(1,)]],
        {"a": {1}},
        2**64,
        complex(1),
    ],
)
def test_what_hides_inside_is_found(value: object) -> None:
    assert not assert_harmless({"anything": value})


def test_what_is_too_deep_is_refused() -> None:
    value: list[Any] = []
    for _ in range(10_000):
        value = [value]
    assert not assert_harmless({"anything": value})


# %% random ones
hostile_text = st.text(max_size=30) | st.sampled_from(
    [
        CANARY,
        f'"; {CANARY}; "',
        "\\",
        '"',
        "'",
        '"""',
        "\\\n",
        "\x00",
        "\r",
        "{",
        "}",
        "#",
        "\ud800",
        "\u2028",
    ]
).flatmap(
    lambda piece: st.tuples(st.text(max_size=5), st.text(max_size=5)).map(
        lambda ends: ends[0] + piece + ends[1]
    )
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), hostile_text, hostile_text.map(EvilText), st.integers(-9, 9).map(EvilNumber),
    st.binary(max_size=5), st.just(Path("x")), st.complex_numbers(), st.floats(-1, 1).map(EvilFloat),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.lists(inner, max_size=3).map(EvilList),
        st.dictionaries(hostile_text | st.integers() | hostile_text.map(EvilText), inner, max_size=3),
        st.sets(st.integers(), max_size=2), st.frozensets(hostile_text, max_size=2),
    ),
    max_leaves=8,
)  # fmt: skip
names = st.sampled_from(SCHEMA.names) | hostile_text | hostile_text.map(EvilText) | st.integers()
tame = st.fixed_dictionaries(
    {},
    optional={
        "text": hostile_text, "count": st.integers(), "rate": st.floats() | st.integers(), "fast": st.booleans(),
        "columns": st.lists(hostile_text, max_size=3), "table": st.dictionaries(hostile_text, hostile_text, max_size=3),
        "anything": values, "choice": st.sampled_from(["auto", "cpu", "gpu"]), "maybe": st.none() | st.integers(),
    },
)  # fmt: skip


@settings(max_examples=700, deadline=None, suppress_health_check=list(HealthCheck))
@example({"text": '\\"' + CANARY})
@given(st.dictionaries(names, values, max_size=3) | tame)
def test_nothing_random_executes(given_values: dict[Any, Any]) -> None:
    assert_harmless(given_values)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(SCHEMA.parameters), hostile_text)
def test_nothing_typed_on_the_command_line_executes(parameter: Any, text: str) -> None:
    try:
        value = from_text(parameter, text)
    except StageParameterError as error:
        assert repr(parameter.name) in str(error)
        return
    assert assert_harmless({parameter.name: value})


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=80))
def test_no_parameters_cell_is_ever_run(source: str) -> None:
    try:
        schema = parse_parameters(source, "x.ipynb")
    except StageParameterError:
        return
    for parameter in schema.parameters:
        json.dumps(parameter.default)


@pytest.mark.parametrize(
    "source",
    ["import os", "x = open('canary', 'w')", "x = 1; print(x)", "def f(): pass", "x: print('a') = 1", "x = [y for y in [1]]", "x += 1",
     "x = f'{1}'", "x = 1 if True else 2", "x = (1, 2)", "x = b'a'", "x, y = 1, 2", "x = y = 1", "x = ...", "x = 1e999", "x.y = 1"],
)  # fmt: skip
def test_a_parameters_cell_holds_only_literals(source: str) -> None:
    with pytest.raises(StageParameterError):
        parse_parameters(source, "x.ipynb")


# %% real runs
@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace in a folder with braces in its name, one stage that takes a text."""
    folder = tmp_path_factory.mktemp("contract") / "{x.__class__} {0}"
    made = make_workspace(folder, {"1_say": stage_cells("say", 'text = "a"\ntable = {}')})
    return share_kernels(made)


@pytest.mark.parametrize(
    "text", [f'"; {CANARY}; "', "\\", "'''\n" + CANARY, "{x.__class__}", "ü 🙂 \u2028"]
)
def test_a_hostile_text_arrives_unchanged_in_a_real_run(workspace: Workspace, text: str) -> None:
    given_values = {"say": {"text": text, "table": {text: [text]}}}
    result = run_stages(workspace, ["say"], parameters=given_values, force=True)
    assert result.ok
    assert (
        json.loads((result.stages[0].folder / "outputs" / "out.json").read_text())
        == given_values["say"]
    )
    assert not list(workspace.root.rglob("canary"))


def test_refusals_come_before_a_kernel_and_name_the_parameter(workspace: Workspace) -> None:
    before = run_folders(workspace)
    for arguments, said in (
        (("-p", "txt=a"), "'txt'"), (("-p", "table=1"), "'table'"), (("-p", "say.nothing=1"), "'say.nothing'"),
        (("-p", "text"), "name=value"), (("nowhere",), "'nowhere'"), (("../x.ipynb",), "'../x.ipynb'"),
        (("http://127.0.0.1/x.ipynb",), "http"), (("s3://bucket/x.ipynb",), "s3"), (("--cycle", "../../x"), "cycle name"),
    ):  # fmt: skip
        done = mwb(workspace, "run", *arguments)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert run_folders(workspace) == before


def test_a_parameter_file_is_checked_like_the_command_line(workspace: Workspace) -> None:
    file = workspace.root / "params.yaml"
    file.write_text("say: {text: 3}")
    done = mwb(workspace, "run", "-f", "params.yaml")
    assert (done.returncode, "'text'" in done.stderr) == (2, True)
    file.write_text("text: from the file\nsay: {table: {a: 1}}")
    done = mwb(workspace, "run", "say", "-f", "params.yaml", "-p", "text=from the line", "--json")
    found = json.loads(done.stdout)["stages"][0]["notebook"]
    assert json.loads((Path(found).parent / "outputs" / "out.json").read_text()) == {
        "text": "from the line",
        "table": {"a": 1},
    }
    file.write_text("!!python/object/apply:pathlib.Path.touch [canary]")
    assert mwb(workspace, "run", "-f", "params.yaml").returncode == 2
    assert not list(workspace.root.rglob("canary"))


def test_papermill_alone_would_have_executed_it(tmp_path: Path) -> None:
    """The guard is not idle: papermill itself writes this name into the notebook as code."""
    program = (
        "import papermill, sys\n"
        f"papermill.execute_notebook('in.ipynb', 'out.ipynb', {{\"x = {CANARY} #\": 1}}, prepare_only=True, progress_bar=False)"
    )
    (tmp_path / "in.ipynb").write_text(notebook([cell("x = 1", "parameters")]))
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=clean_environment(),
        check=True,
        capture_output=True,
    )
    made = json.loads((tmp_path / "out.ipynb").read_text())
    sources = [
        "".join(entry["source"])
        for entry in made["cells"]
        if "injected-parameters" in entry["metadata"]["tags"]
    ]
    exec(
        compile(sources[0].replace("'canary'", repr(str(tmp_path / "canary"))), "injected", "exec"),
        {},
    )
    assert (tmp_path / "canary").exists()
