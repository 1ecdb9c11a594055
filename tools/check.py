"""The gate before tests: clean notebooks, code in step, rules, layers, types, notebook checks.

    python tools/check.py            # everything
    python tools/check.py ruff mypy  # only these steps

Every step runs, two at a time, then the failed ones are named; exit 1 when there is one.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def call(*command: str) -> tuple[bool, str]:
    """Run a program of this environment in the project's root; whether it ended well, its words."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode == 0, done.stdout


def calls(*commands: tuple[str, ...]) -> tuple[bool, str]:
    """Run programs one after the other up to the first that fails."""
    said = ""
    for command in commands:
        ok, text = call(*command)
        said += text
        if not ok:
            return False, said
    return True, said


def tree_state() -> str:
    """What git sees as changed or new, with the content of the changes."""
    words = (["status", "--porcelain"], ["diff"])
    return "".join(
        subprocess.run(["git", *word], cwd=ROOT, capture_output=True, text=True).stdout
        for word in words
    )


def in_step() -> tuple[bool, str]:
    """Whether cleaning and exporting change nothing."""
    before = tree_state()
    cleaned = ("nbdev-clean",), ("nbdev-clean", "--fname", "voila_apps")
    ok, said = calls(*cleaned, ("nbdev-export",))
    if before == tree_state():
        return ok, said
    said += "notebooks and package were out of step; cleaned and exported now, see `git diff`:\n"
    return False, said + call("git", "status", "--short")[1]


FIRST_HALF = "data|experiment|pages|pipeline|recipes"  # about half of the time
SECOND_HALF = "cli|core|monitoring|release|serving|stages"


def notebook_tests(without: str) -> tuple[bool, str]:
    """Run the library notebooks, but for those of some rooms and the tutorials."""
    skipped = f"^[_.]|^(tutorials|{without})$"
    return call("nbdev-test", "--n-workers", "0", "--skip-folder-re", skipped)


STEPS: dict[str, Callable[[], tuple[bool, str]]] = {
    "in-step": in_step,
    "notebook-tests": lambda: notebook_tests(without=SECOND_HALF),
    "notebook-tests-2": lambda: notebook_tests(without=FIRST_HALF),
    "tutorials": lambda: call("nbdev-test", "--n-workers", "0", "nbs/tutorials"),
    "mypy": lambda: call("mypy"),
    "notebooks": lambda: call(sys.executable, "tools/check_notebooks.py"),
    "ruff": lambda: calls(("ruff", "check", "."), ("ruff", "format", "--check", ".")),
    "layers": lambda: call("lint-imports", "--no-logo"),
    "workflow": lambda: call("actionlint"),
}


def run_step(name: str) -> bool:
    """Run one step, print how it ended, and what it said where it failed."""
    start = time.monotonic()
    ok, said = STEPS[name]()
    verdict = "ok    " if ok else f"{said}\nFAILED"
    print(f"{verdict} {name} ({time.monotonic() - start:.0f} s)", flush=True)
    return ok


def main(names: list[str]) -> int:
    """Run the named steps (all without names)."""
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        print(f"no such step: {', '.join(unknown)}; there are: {', '.join(STEPS)}", file=sys.stderr)
        return 2
    chosen = list(names or STEPS)
    first = [name for name in chosen if name == "in-step"]  # it writes what the others read
    ended = {name: run_step(name) for name in first}
    with ThreadPoolExecutor(2) as pool:
        rest = [name for name in chosen if name not in ended]
        ended |= dict(zip(rest, pool.map(run_step, rest), strict=True))
    failed = [name for name in chosen if not ended[name]]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
