"""A workspace with two releases of the sample recipe: the first serves, the second waits to take over."""

import json
import re
from pathlib import Path
from typing import Any

from serving_support import build_bundle

from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace, create_workspace
from mlops_workbench.release.deployment import deploy, record_release

PASSED = {"passed": True, "reason": "all gates passed", "results": []}


def release_pair(
    root: Path, bias: float = 0.5, ledger: str = "", **settings: object
) -> tuple[Workspace, str, str]:
    """The workspace, and the names of the release that serves and of the new one, whose logits are moved by `bias`."""
    workspace = create_workspace(root, name="example", recipe="flights")
    text = workspace.root.joinpath("settings.ini").read_text()
    for name, value in settings.items():
        text = replace_setting(text, name, value)
    if ledger:
        text = re.sub(r"(?m)^ledger =[^;\n]*", f"ledger = {ledger} ", text, count=1)
    workspace.root.joinpath("settings.ini").write_text(text)
    workspace = Workspace.open(workspace.root)
    names = []
    for number, moved in enumerate((0.0, bias), start=1):
        names.append(f"flights-r{number}")
        add_release(workspace, names[-1], bias=moved)
    deploy(workspace, names[0], actor="test")
    return workspace, names[0], names[1]


def add_release(workspace: Workspace, name: str, bias: float = 0.9, **contents: Any) -> Path:
    """Put one more release on record that passed its gates; the folder of its bundle."""
    bundle = build_bundle(workspace.bundles, name=name, bias=bias, **contents)
    record_release(workspace, bundle, PASSED, actor="test", cycle="cycle-0001", record_path="")
    return bundle


def replace_setting(text: str, name: str, value: object) -> str:
    """The settings with one value of the section [rollout] changed."""
    head, rest = text.split("[rollout]\n", 1)
    lines = rest.split("\n")
    place = next(n for n, line in enumerate(lines) if line.startswith(f"{name} "))
    lines[place] = f"{name} = {value}"
    return head + "[rollout]\n" + "\n".join(lines)


def decisions(workspace: Workspace) -> list[str]:
    """The verdicts of the rollout decisions, oldest first."""
    found = Ledger(workspace.ledger_url).decisions(limit=100_000, kind="rollout")
    return [each.verdict for each in reversed(found)]


def split(workspace: Workspace) -> dict[str, float]:
    """The shares in the pointer file."""
    shares: dict[str, float] = json.loads(workspace.pointer_path.read_text())["split"]
    return shares
