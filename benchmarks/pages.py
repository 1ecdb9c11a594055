"""What a visit of the pages costs, and what a comparison does: `python benchmarks/pages.py`.

1. Each page in a browser, in turns: seconds until its first figure stands, memory of its kernel. The
   peer is Voila showing a notebook of one line.
2. Two versions of a table compared by the process that feeds the pages: seconds from the request to
   the answer in a process that is there already, and its peak of memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from pages_support import (
    CHROMIUM,
    CHROMIUM_ARGUMENTS,
    free_port,
    kernels_of,
    make_data,
    monitor_once,
    pages_running,
    record_runs,
    refresh,
    wait_for_port,
)
from playwright.sync_api import Browser, sync_playwright

from mlops_workbench.core.workspace import Workspace, create_workspace
from mlops_workbench.data.versions import DataStore

READY = {
    "experiments": ".js-plotly-plot .scatterlayer .trace",
    "data": ".mwb-tile",
    "monitoring": ".mwb-page h1",
    "one line": ".jp-OutputArea-output",
}
COMPARE = """
import resource, sys, time
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.versions import DataStore
from mlops_workbench.pages.data_work import compare_pair
workspace = Workspace.open(sys.argv[1])
store = DataStore(workspace)
started = time.perf_counter()
compare_pair(workspace, store, "table@v1.0", "table@v1.1")
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@contextmanager
def one_line(folder: Path):  # type: ignore[no-untyped-def]
    """Voila with its own settings and a notebook that prints one line."""
    cell = nbformat.v4.new_code_cell("print('ready')")
    specification = {"name": "python3", "display_name": "python3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": specification})
    nbformat.write(notebook, folder / "one.ipynb")
    port = free_port()
    command = [sys.executable, "-m", "voila", "--no-browser", f"--port={port}", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port, process)
        yield f"http://127.0.0.1:{port}/voila/render/one.ipynb", process.pid
    finally:
        process.terminate()
        process.wait(20)


def visit(browser: Browser, address: str, ready: str, process: int) -> tuple[float, float]:
    """Seconds until a page is ready, and MB (proportional set size) of its kernel."""
    known = set(kernels_of(process))
    page = browser.new_context().new_page()
    started = time.perf_counter()
    page.goto(address)
    page.wait_for_selector(ready, timeout=90_000)
    seconds = time.perf_counter() - started
    (kernel,) = set(kernels_of(process)) - known
    memory = psutil.Process(kernel).memory_full_info().pss / 1e6
    page.close(run_before_unload=True)
    page.context.close()
    return seconds, memory


def measure_visits(workspace: Workspace, folder: Path, rounds: int) -> list[dict[str, object]]:
    """One row a page: medians over the rounds."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in READY}
    with (
        pages_running(workspace) as (address, pages),
        one_line(folder) as (other, voila),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=list(CHROMIUM_ARGUMENTS)
        )
        for _ in range(rounds):
            for name, ready in READY.items():
                own = name != "one line"
                place = f"{address}/voila/render/{name}.ipynb" if own else other
                process = pages.pid if own else voila
                found[name].append(visit(browser, place, ready, process))
        browser.close()
    return [
        {
            "page": name,
            "ready after s": f"{statistics.median(s for s, _ in rows):.2f}",
            "kernel MB": f"{statistics.median(m for _, m in rows):.0f}",
        }
        for name, rows in found.items()
    ]


def measure_comparison(folder: Path, rows: int) -> dict[str, object]:
    """One row: a table of 20 columns, 2 % of its cells of one column changed, 1 % of its rows new."""
    workspace = create_workspace(folder / f"table-{rows}", name="table")
    generator = np.random.default_rng(0)
    frame = pd.DataFrame(generator.normal(size=(rows, 18)).round(3)).add_prefix("x")
    frame.insert(0, "id", np.arange(rows))
    frame["label"] = generator.integers(0, 2, rows)
    store = DataStore(workspace)
    store.snapshot("table", frame, key="id", label="label")
    frame.loc[frame["id"] % 50 == 0, "x3"] += 1
    new = frame[: rows // 100].assign(id=lambda part: part["id"] + rows)
    store.snapshot("table", pd.concat([frame, new]), key="id", label="label")
    command = [sys.executable, "-c", COMPARE, str(workspace.root)]
    seconds, memory = map(float, subprocess.check_output(command, text=True).split())
    return {"rows": f"{rows:,}", "compared after s": f"{seconds:.2f}", "peak MB": f"{memory:.0f}"}


def print_rows(rows: list[dict[str, object]]) -> None:
    """Print rows as an aligned table."""
    print(pd.DataFrame(rows).to_string(index=False), end="\n\n")


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="visits of each page")
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pages-benchmark-") as name:
        folder = Path(name)
        workspace = make_data(folder)
        record_runs(workspace)
        monitor_once(workspace)
        refresh(workspace, {})
        tables = {"visits": measure_visits(workspace, folder, chosen.rounds)}
        tables["comparisons"] = [measure_comparison(folder, rows) for rows in chosen.rows]
    if chosen.json:
        print(json.dumps(tables, indent=2))
        return 0
    for rows in tables.values():
        print_rows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
