"""The notebook rules that nbdev lets pass; prints each broken one as `path: what`, then exits 1."""

import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = [
    path
    for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
    if path.relative_to(ROOT / "nbs").parts[0] not in ("stages", "tutorials")
    and path.name != "index.ipynb"
]
STAGES = sorted((ROOT / "nbs" / "stages").glob("*.ipynb"))
TUTORIALS = [*sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb")), ROOT / "nbs" / "index.ipynb"]
PAGES = sorted((ROOT / "voila_apps").glob("*.ipynb"))
MAXIMUM_CELLS, MAXIMUM_EXPORTED_LINES, MAXIMUM_OUTPUT_BYTES, MAXIMUM_PAGE_LINES = (
    60,
    550,
    20_000,
    20,
)


def cells(path: Path) -> list[dict]:
    """The cells of a notebook with their source as one string."""
    found = json.loads(path.read_text())["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found]


def is_export(cell: dict) -> bool:
    """True for a code cell that goes into the package."""
    return (
        cell["cell_type"] == "code"
        and re.search(r"^#\|\s*export", cell["source"], re.M) is not None
    )


def library_problems(path: Path, modules: dict[str, Path]) -> list[str]:
    """Rules of a library notebook: mirrored name, size, no magics, no star imports, no outputs."""
    found = cells(path)
    problems = []
    names = re.findall(
        r"^#\|\s*default_exp\s+(\S+)",
        "\n".join(c["source"] for c in found if c["cell_type"] == "code"),
        re.M,
    )
    relative = path.relative_to(ROOT / "nbs")
    mirrored = ".".join([*relative.parts[:-1], re.sub(r"^\d+_", "", relative.stem)])
    if names != [mirrored]:
        problems.append(f"expected exactly one `#| default_exp {mirrored}`, found {names}")
    for name in names:
        if name in modules:
            problems.append(f"module {name} is also written by {modules[name].relative_to(ROOT)}")
        modules[name] = path
    if not re.match(r"# \S.*\n\n> \S", found[0]["source"]):
        problems.append("the first cell must be `# name`, a blank line, `> one sentence`")
    if len(found) > MAXIMUM_CELLS:
        problems.append(f"{len(found)} cells, at most {MAXIMUM_CELLS}")
    exported = [cell["source"] for cell in found if is_export(cell)]
    lines = sum(len(source.splitlines()) for source in exported)
    if lines > MAXIMUM_EXPORTED_LINES:
        problems.append(f"{lines} exported lines, at most {MAXIMUM_EXPORTED_LINES}")
    for source in exported:
        if re.search(r"^\s*[%!]", source, re.M):
            problems.append("a magic or shell line stands in an export cell")
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                problems.append(f"star import of {node.module}")
    if any(cell.get("outputs") for cell in found):
        problems.append("holds outputs; commit it clean")
    return problems


def stage_problems(path: Path) -> list[str]:
    """Rules of a stage: exactly one cell tagged `parameters`, no outputs."""
    found = cells(path)
    tagged = [cell for cell in found if "parameters" in cell["metadata"].get("tags", [])]
    problems = (
        []
        if len(tagged) == 1
        else [f"expected exactly one cell tagged `parameters`, found {len(tagged)}"]
    )
    if any(cell.get("outputs") for cell in found):
        problems.append("holds outputs; commit it clean")
    return problems


def page_problems(path: Path) -> list[str]:
    """Rules of a page: at most 20 lines of code, no outputs, nbformat minor 5 (Voila needs it)."""
    found = cells(path)
    lines = sum(
        len([x for x in c["source"].splitlines() if x.strip()])
        for c in found
        if c["cell_type"] == "code"
    )
    problems = (
        []
        if lines <= MAXIMUM_PAGE_LINES
        else [f"{lines} lines of code, at most {MAXIMUM_PAGE_LINES}"]
    )
    if json.loads(path.read_text())["nbformat_minor"] < 5:
        problems.append("nbformat minor must be 5")
    if any(cell.get("outputs") for cell in found):
        problems.append("holds outputs; commit it clean")
    return problems


def tutorial_problems(path: Path) -> list[str]:
    """Rules of a tutorial: small text outputs at most."""
    size = sum(len(json.dumps(cell.get("outputs", []))) for cell in cells(path))
    return (
        []
        if size <= MAXIMUM_OUTPUT_BYTES
        else [f"{size} bytes of output, at most {MAXIMUM_OUTPUT_BYTES}"]
    )


def orphaned_modules(modules: dict[str, Path]) -> list[str]:
    """Python files of the package that no notebook writes."""
    package = ROOT / "mlops_workbench"
    known = {package / Path(*name.split(".")).with_suffix(".py") for name in modules}
    free = {"__init__.py", "__main__.py", "_modidx.py"}
    return [
        f"{path.relative_to(ROOT)}: no notebook exports it"
        for path in sorted(package.rglob("*.py"))
        if path not in known and path.name not in free
    ]


def main() -> int:
    """Check every notebook of the project."""
    modules: dict[str, Path] = {}
    problems = []
    for paths, rule in [
        (LIBRARY, lambda path: library_problems(path, modules)),
        (STAGES, stage_problems),
        (PAGES, page_problems),
        (TUTORIALS, tutorial_problems),
    ]:
        for path in paths:
            try:
                problems += [f"{path.relative_to(ROOT)}: {text}" for text in rule(path)]
            except (ValueError, KeyError, SyntaxError, OSError) as err:
                problems.append(f"{path.relative_to(ROOT)}: cannot be read: {err!r}")
    problems += orphaned_modules(modules)
    print(
        "\n".join(problems)
        or f"{len(LIBRARY)} library notebooks, {len(STAGES)} stages, {len(PAGES)} pages: rules kept"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
