"""The gate before tests: clean notebooks, code in step, rules, layers, types, notebook checks.

    python tools/check.py            # everything
    python tools/check.py ruff mypy  # only these steps

Every step runs, then the failed ones are named; exit 1 when there is one.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def call(*command: str) -> bool:
    """Run a program of this environment in the project's root; True when it ended well."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PATH"] = f"{BIN}{os.pathsep}{environment['PATH']}"
    return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0


def tree_state() -> str:
    """What git sees as changed or new, with the content of the changes."""
    words = (["status", "--porcelain"], ["diff"])
    return "".join(
        subprocess.run(["git", *word], cwd=ROOT, capture_output=True, text=True).stdout
        for word in words
    )


def in_step() -> bool:
    """True when cleaning and exporting change nothing."""
    before = tree_state()
    done = all(
        [call("nbdev-clean"), call("nbdev-clean", "--fname", "voila_apps"), call("nbdev-export")]
    )
    after = tree_state()
    if before != after:
        print("notebooks and package were out of step; cleaned and exported now, see `git diff`:")
        call("git", "status", "--short")
    return done and before == after


STEPS: dict[str, Callable[[], bool]] = {
    "in-step": in_step,
    "notebooks": lambda: call(sys.executable, "tools/check_notebooks.py"),
    "ruff": lambda: call("ruff", "check", ".") and call("ruff", "format", "--check", "."),
    "layers": lambda: call("lint-imports", "--no-logo"),
    "mypy": lambda: call("mypy"),
    "workflow": lambda: call("actionlint"),
    "nbdev-test": lambda: call("nbdev-test", "--n-workers", "0"),
}


def main(names: list[str]) -> int:
    """Run the named steps (all without names)."""
    unknown = [name for name in names if name not in STEPS]
    if unknown:
        print(f"no such step: {', '.join(unknown)}; there are: {', '.join(STEPS)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or STEPS:
        start = time.monotonic()
        ok = STEPS[name]()
        print(
            f"{'ok    ' if ok else 'FAILED'} {name} ({time.monotonic() - start:.0f} s)", flush=True
        )
        if not ok:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
