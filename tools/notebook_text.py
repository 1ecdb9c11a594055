"""Edit a notebook as plain text: `open` writes .nbwork/<path>.py, `save` brings it back.

    python tools/notebook_text.py open nbs/core/00_errors.ipynb
    $EDITOR .nbwork/nbs/core/00_errors.py
    python tools/notebook_text.py save nbs/core/00_errors.ipynb

The text is jupytext's percent format. `save` keeps the ids of cells that still match, cleans the
notebook, formats it with ruff and exports its module.
A path that does not exist yet becomes a new notebook.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
from fastcore.nbio import read_nb, write_nb
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.export import nb_export

ROOT = Path(__file__).resolve().parent.parent
METADATA = {
    "language_info": {"name": "python"},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}


def text_path(notebook: Path) -> Path:
    """The place of a notebook's text under .nbwork/."""
    return ROOT / ".nbwork" / notebook.resolve().relative_to(ROOT).with_suffix(".py")


def open_text(notebook: Path) -> None:
    """Write the notebook as percent text."""
    text = text_path(notebook)
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(jupytext.writes(nbformat.read(notebook, as_version=4), fmt="py:percent"))
    print(text.relative_to(ROOT))


def keep_cell_ids(fresh: nbformat.NotebookNode, old: nbformat.NotebookNode) -> None:
    """Give each cell the id of the old cell with the same text, or else with the same beginning."""
    by_source: dict[tuple[str, str], list[str]] = {}
    for cell in old.cells:
        by_source.setdefault((cell.cell_type, cell.source), []).append(cell.id)
    used: set[str] = set()
    open_cells = []
    for cell in fresh.cells:
        known = by_source.get((cell.cell_type, cell.source), [])
        if known:
            cell.id = known.pop(0)
            used.add(cell.id)
        else:
            open_cells.append(cell)
    spare = [cell for cell in old.cells if cell.id not in used]
    for cell in open_cells:
        match = next(
            (
                s
                for s in spare
                if s.cell_type == cell.cell_type
                and s.source.split("\n")[:2] == cell.source.split("\n")[:2]
            ),
            None,
        )
        if match is not None:
            cell.id = match.id
            spare.remove(match)


def save_text(notebook: Path) -> None:
    """Bring the text back into the notebook, clean, format, export."""
    fresh = jupytext.reads(text_path(notebook).read_text(), fmt="py:percent")
    fresh.nbformat, fresh.nbformat_minor = 4, 5
    fresh.metadata = nbformat.from_dict(METADATA)
    for cell in fresh.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
    if notebook.exists():
        keep_cell_ids(fresh, nbformat.read(notebook, as_version=4))
    notebook.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(fresh, notebook)
    subprocess.run(
        [sys.executable, "-m", "ruff", "format", "-q", str(notebook)], check=True, cwd=ROOT
    )
    nb = read_nb(notebook)
    clean_nb(nb, allowed_cell_metadata_keys=["tags"])
    write_nb(nb, notebook)
    parts = notebook.resolve().relative_to(ROOT).parts
    if (
        parts[0] == "nbs"
        and parts[1] not in ("stages", "tutorials")
        and notebook.name != "index.ipynb"
    ):
        nb_export(str(notebook), lib_path=str(get_config().lib_path))
    print(f"saved {notebook}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=["open", "save"])
    parser.add_argument("notebooks", nargs="+", type=Path)
    arguments = parser.parse_args()
    for notebook in arguments.notebooks:
        (open_text if arguments.verb == "open" else save_text)(notebook)
    return 0


if __name__ == "__main__":
    sys.exit(main())
