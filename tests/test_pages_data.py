"""The data page without a browser: what it shows, what it asks for, and who carries that out."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest
from data_support import new_store, table
from pages_support import make_data, wait_until

from mlops_workbench.cli.main import main
from mlops_workbench.core.grants import grant
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.data.quarantine import review_list
from mlops_workbench.data.versions import DataStore
from mlops_workbench.pages import data_work, reader
from mlops_workbench.pages.data import DataPage
from mlops_workbench.pages.data_views import SAMPLED, diff_tables
from mlops_workbench.pages.difference import difference_html
from mlops_workbench.pages.read_models import model_mark, read_table
from mlops_workbench.pages.requests import ask, open_requests, read_answer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with versions, a quarantine and a diagnosis; the tests below leave it as it is."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def workspace(made: Workspace, tmp_path: Path) -> Workspace:
    """A copy of it that may be changed."""
    shutil.copytree(made.root, tmp_path / "workspace", symlinks=True)
    return Workspace.open(tmp_path / "workspace")


@contextlib.contextmanager
def reader_running(workspace: Workspace) -> Iterator[subprocess.Popen[bytes]]:
    """The process that feeds the pages; it is ended with SIGTERM."""
    command = [sys.executable, "-m", "mlops_workbench.pages.reader", "--workspace"]
    process = subprocess.Popen([*command, str(workspace.root), "--parent", str(os.getpid())])
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def data_page(workspace: Workspace, name: str = "digits") -> DataPage:
    """The page with one of the data sets."""
    page = DataPage(workspace.read_models)
    page.name.value = name
    assert page.problem.value == "" and page.reader_problem.value == ""
    return page


def test_versions_stand_on_their_lines_with_their_releases(made: Workspace) -> None:
    page = data_page(made)
    shown = page.timeline.value
    assert shown.index("<b>v1.3</b>") < shown.index("<b>v1.2</b>") < shown.index("<b>v1.0</b>")
    assert "digits-r2 SERVES" in shown and "digits-r1" in shown and "default" in shown
    assert "+300 added" in shown and "40 relabelled" in shown
    assert "+100 added, \u221220 removed" in shown and "from v1.1" in shown
    assert "<img src=x" not in shown and "&lt;img src=x" in shown
    assert "quarantine" not in shown


def test_the_newest_version_is_compared_with_its_parent(made: Workspace) -> None:
    page = data_page(made)
    assert (page.before.value, page.after.value) == ("digits@v1.1", "digits@v1.3")
    shown = page.difference.value
    assert "Pictures added (24 of 100)" in shown and "Pictures removed" in shown
    assert shown.count("data:image/png;base64,") == 44
    page.after.value = "digits@v1.2"
    shown = page.difference.value
    assert "Pictures relabelled (24 of 40)" in shown and "\u2192" in shown
    assert "<h3>Relabelled</h3>" in shown and "Pictures added" not in shown


def test_columns_are_drawn_over_each_other_with_what_moved_first(made: Workspace) -> None:
    page = data_page(made, "hours")
    shown = page.difference.value
    assert "gusts" in shown and "new column" in shown and "3 of " in shown
    wind = shown.index(">wind<")
    assert "moved right by" in shown[wind : wind + 300]
    assert wind < shown.index("1 other</summary>") < shown.index(">pressure<")
    assert 'class="was"' in shown and 'class="is"' in shown and "mwb-bars" in shown


def test_the_last_diagnosis_is_told_with_its_remedy(made: Workspace) -> None:
    shown = data_page(made).diagnosis.value
    assert "mwb data drop digits@v1.3" in shown and "+0.214 (95%: +0.181 to +0.247)" in shown
    assert "10 of 100" in shown and "runs/cycle-0001/diagnose-1/notebook.ipynb" in shown


def test_a_long_table_is_drawn_from_a_sample_and_counted_whole(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    names = {"key": "id", "label": "late"}
    before, later = table(60_000), table(12_000, first=60_000, seed=1)
    first = store.snapshot("flights", before, **names)
    warmer = later.assign(temperature=later["temperature"] + 40)
    second = store.snapshot("flights", pd.concat([before, warmer], ignore_index=True), **names)
    tables = diff_tables(store, first, second)
    model = {
        name: [dict(zip(columns, row, strict=True)) for row in rows]
        for name, (columns, rows) in tables.items()
    }
    shown = difference_html(model)
    assert "12,000" in shown and "60,000" in shown
    assert f"Drawn from {SAMPLED:,} rows of each version" in shown
    moved = [row["name"] for row in model["columns"] if row["moved"]]
    assert moved == ["temperature"]


def test_two_versions_that_are_no_neighbours_are_compared_when_asked(workspace: Workspace) -> None:
    page = data_page(workspace)
    with reader_running(workspace) as process:
        page.before.value = "digits@v1.0"
        assert "are being compared" in page.difference.value
        assert page.pause_seconds() == 0.5
        page.update()
        assert len(open_requests(workspace.read_models)) <= 1
        wait_until(lambda: page.update() or "Pictures added" in page.difference.value, 60)
        assert page.pause_seconds() == 1
        workers = []
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):  # the reader also asks git now and then
                workers += [child] if "data_work" in " ".join(child.cmdline()) else []
        assert len(workers) == 1
    assert not any(worker.is_running() for worker in workers)


def test_a_review_is_one_decision_and_one_version(workspace: Workspace) -> None:
    reader.refresh(workspace, {})
    page = data_page(workspace)
    assert "Rows 1 to 8 of 12" in page.review.head.value
    keys = [str(row["key"]) for row in page.review.rows]
    page.review.lines[0].radio.value = "reject"
    page.review.lines[2].radio.value = "accept"
    assert page.review.send.description == "Record 1 accepted, 1 rejected"
    page.review.send.click()
    assert "being recorded" in page.review_words.value and page.pause_seconds() == 0.5
    assert data_work.work_once(workspace) >= 1
    reader.refresh(workspace, {})
    page.update()
    assert "1 accepted; digits@v1.4 holds them and is the default" in page.review_words.value
    assert "10 still wait" in page.review_words.value and len(page.review.rows) == 10
    store = DataStore(workspace)
    assert keys[2] in set(store.load("digits@v1.4")["picture_id"])
    assert store.resolve("digits@v1.4").parent == "digits@v1.2"
    decision = Ledger(workspace.ledger_url).decisions(kind="review")[0]
    assert decision.evidence["rejected"] == [keys[0]] and decision.actor
    assert "<b>v1.4</b>" in page.timeline.value


def test_a_decision_asked_for_twice_changes_nothing_the_second_time(workspace: Workspace) -> None:
    key = str(review_list(DataStore(workspace), "digits")[0]["id"])
    values = {"dataset": "digits", "accept": [key], "reject": [], "token": "", "signature": ""}
    ids = [ask(workspace.read_models, "decide", **values) for _ in range(2)]
    data_work.answer_requests(workspace)
    answers = [read_answer(workspace.read_models, identity) for identity in ids]
    assert [answer is not None and answer.done for answer in answers] == [True, False]
    assert answers[1] is not None and "expected rows that wait" in answers[1].text
    assert [v.version for v in DataStore(workspace).versions("digits")][-1] == "v1.4"


def test_with_tokens_rows_are_decided_by_an_operator_under_their_name(workspace: Workspace) -> None:
    """A viewer may look; whoever leaves a request without a token, or signs as a viewer, is refused."""
    tokens = {
        role: grant(workspace, f"{role}-x", role, actor="root") for role in ("viewer", "operator")
    }
    reader.refresh(workspace, {})
    page = data_page(workspace)
    key = str(page.review.rows[0]["key"])
    said = []
    for role in (None, "viewer", "operator"):
        if role is not None:
            page.sign_in.field.value = tokens[role]
        assert (page.review.send.layout.display == "") == (role == "operator"), role
        page.on_record([key], [])  # as if the button were there
        data_work.answer_requests(workspace)
        page.update()
        said.append(page.review_words.value)
    assert "expected a token in force" in said[0] and "found viewer" in said[1]
    assert "1 accepted" in said[2]
    decision = Ledger(workspace.ledger_url).decisions(kind="review")[0]
    assert decision.actor.startswith("operator-x (token ") and decision.actor.endswith(
        " in the page"
    )


def test_a_file_that_is_no_request_is_answered_and_gone(workspace: Workspace) -> None:
    folder = workspace.read_models / "requests"
    folder.mkdir(exist_ok=True)
    contents = ("{ torn", "[]", '{"kind": "shell", "values": {"command": "true"}}')
    names = [f"{number:020d}-0123abcd" for number in range(4)]
    for name, content in zip(names, contents, strict=False):
        (folder / f"{name}.json").write_text(content)
    outside = {"before": "../../x@v1.0", "after": "digits@v1.0"}
    (folder / f"{names[3]}.json").write_text(json.dumps({"kind": "diff", "values": outside}))
    assert data_work.answer_requests(workspace) == 4
    answers = [read_answer(workspace.read_models, name) for name in names]
    assert all(answer is not None and not answer.done and answer.text for answer in answers)
    assert open_requests(workspace.read_models) == []


def test_a_lost_version_is_said_and_breaks_nothing_else(workspace: Workspace) -> None:
    (lost,) = (workspace.read_models / "diffs").glob("*..digits@v1.3.*.db")
    lost.unlink()
    for place in (workspace.root / ".dvc" / "cache", Path(workspace.remote)):
        shutil.rmtree(place)
    data_work.work_once(workspace)
    reader.refresh(workspace, {})
    page = data_page(workspace)
    assert "These versions cannot be compared" in page.difference.value
    assert "cannot be compared" in page.timeline.value and "+300 added" in page.timeline.value
    assert len(open_requests(workspace.read_models)) == 1  # whoever opens the page tries once more
    data_work.work_once(workspace)
    page.update()
    assert not data_work.work_waits(workspace)


def test_a_new_version_is_compared_without_being_asked(workspace: Workspace) -> None:
    store = DataStore(workspace)
    rows = store.load("hours")
    before = model_mark(workspace.read_models / "data.db")
    store.snapshot("hours", rows[:-5], key="hour", label="late", message="five fewer")
    with reader_running(workspace):
        model = workspace.read_models / "data.db"

        def is_compared() -> bool:
            found = {row["ref"]: row["counts"] for row in read_table(model, "versions")}
            return '"removed": 5' in str(found.get("hours@v1.2", ""))

        wait_until(is_compared, 60)
    assert model_mark(model) != before


def test_the_page_opens_on_the_data_set_of_the_recipe(workspace: Workspace) -> None:
    settings = workspace.root / "settings.ini"
    for recipe, opened in (("flights", "hours"), ("digits", "digits")):
        text = re.sub(r"(?m)^recipe = \w+", f"recipe = {recipe}", settings.read_text())
        settings.write_text(text)
        assert reader.refresh_once(Workspace.open(workspace.root)) == 0
        page = DataPage(workspace.read_models)
        assert page.name.value == opened  # of no recipe's own: the newest
    assert "100 labels of digits@v1.3" in page.diagnosis.value
    page.name.value = "hours"
    assert "No diagnosis of this data set yet" in page.diagnosis.value


def test_a_remedy_that_was_applied_is_no_longer_asked_for(workspace: Workspace) -> None:
    assert reader.refresh_once(workspace) == 0
    assert "What to do" in data_page(workspace).diagnosis.value
    ledger, words = Ledger(workspace.ledger_url), "100 rows left out of digits@v1.3"
    with ledger.decision(
        "data", actor="ada", subject="digits@v1.4", verdict="default", reason=words
    ):
        pass
    ledger.close()
    assert reader.refresh_once(workspace) == 0
    shown = data_page(workspace).diagnosis.value
    assert "What was done" in shown and "What to do" not in shown and "by ada" in shown


def test_a_tag_stands_beside_its_version_until_it_is_removed(workspace: Workspace) -> None:
    command = ["data", "tag", "digits@v1.1", "golden", "-w", str(workspace.root)]
    for more, count in (([], 1), (["--remove"], 0)):
        assert main([*command, *more]) == 0
        assert reader.refresh_once(workspace) == 0
        assert data_page(workspace).timeline.value.count(">golden</span>") == count
    decisions = Ledger(workspace.ledger_url).decisions(kind="tag")
    assert [decision.verdict for decision in decisions] == ["removed", "set"]
    assert main([*command, "--remove"]) == 2
