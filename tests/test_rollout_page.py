"""The rollout panel in a real browser: the comparison is drawn, and those who may move it by mouse and keyboard."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pages_support import CHROMIUM, CHROMIUM_ARGUMENTS, pages_running
from playwright.sync_api import Browser, Page, expect, sync_playwright
from rollout_support import decisions, release_pair
from test_pages_browser import assert_no_sideways_scroll, assert_readable, focus_by_tab

from mlops_workbench.core.clock import timestamp
from mlops_workbench.core.grants import grant, revoke
from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace
from mlops_workbench.pages.data_work import answer_requests
from mlops_workbench.pages.monitoring import MonitoringPage, monitoring_page
from mlops_workbench.pages.reader import refresh
from mlops_workbench.pages.requests import ask, read_answer
from mlops_workbench.release.rollout_judge import looks_file
from mlops_workbench.release.rollouts import start_rollout, the_rollout

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser: {CHROMIUM} is not installed"),
]
TEXTS = [
    ".mwb h2",
    ".mwb-banner strong",
    ".mwb-banner span",
    ".mwb-chart span",
    ".mwb-chart b",
    ".mwb td",
    ".jupyter-button",
]


def write_looks(workspace: Workspace, count: int) -> None:
    """Looks at the rollout as the controller keeps them: the interval closes in on +0.03."""
    path = looks_file(workspace, "rollout-1")
    path.parent.mkdir(parents=True, exist_ok=True)
    side = {"entities": 900, "labelled": {"rows": 880}, "latency_p99_ms": 4.2}
    for number in range(1, count + 1):
        reach, value = 0.5 / number**0.5, 0.03 + 0.05 * (-1) ** number / number
        look = {
            "at_seconds": timestamp() - 60 * (count - number),
            "step": 0,
            "share": 0.2,
            "value": value,
            "low": value - reach,
            "high": value + reach,
            "old": {
                **side,
                "name": "flights-r1",
                "rows": 900,
                "mean": 0.84,
                "judged": {"rows": 810},
            },
            "new": {**side, "name": "flights-r2", "rows": 910, "mean": 0.87},
            "failed": 0,
            "left_out": 42,
            "ratio": "as planned",
            "word": "not yet",
            "why": f"accuracy {value:+.4f}",
            "move": "wait",
            "reason": "not yet: accuracy",
            "copied": None,
            "covariate": "belief explains 12% of the variance",
        }
        with path.open("a") as stream:
            stream.write(json.dumps(look) + "\n")


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, str]]:
    """A workspace whose rollout goes on and may be moved in the page, and the address of its pages."""
    workspace, _, new = release_pair(tmp_path_factory.mktemp("page") / "w")
    path = workspace.root / "settings.ini"
    text = path.read_text().replace("rollout_buttons = no", "rollout_buttons = yes")
    path.write_text(text.replace("refresh_seconds = 5", "refresh_seconds = 1"))
    workspace = Workspace.open(workspace.root)
    start_rollout(workspace, new, actor="ana", shares=(0.2, 0.5))
    write_looks(workspace, 40)
    with pages_running(workspace) as (address, _):
        yield workspace, address


@pytest.fixture
def page(moving: tuple[Workspace, str]) -> Iterator[Page]:
    """The monitoring page with the rollout on it."""
    with sync_playwright() as playwright:
        browser: Browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=list(CHROMIUM_ARGUMENTS)
        )
        context = browser.new_context(viewport={"width": 1280, "height": 1100})
        opened = context.new_page()
        opened.goto(f"{moving[1]}/voila/render/monitoring.ipynb", timeout=60_000)
        opened.wait_for_selector("h2:has-text('Rollout')", timeout=60_000)
        yield opened
        browser.close()


def test_the_comparison_is_drawn_and_the_rollout_is_moved_by_keyboard(
    moving: tuple[Workspace, str], page: Page, tmp_path: Path
) -> None:
    workspace, _ = moving
    chart = page.get_by_role("img", name="New minus old", exact=False)
    expect(chart).to_be_visible(timeout=20_000)
    assert page.locator(".mwb-chart path.area").count() >= 1
    expect(page.get_by_text("belief explains 12%")).to_be_visible()
    expect(page.get_by_text("42 rows of flights-r1 are left out")).to_be_visible()
    expect(page.get_by_text("880, the word and the mean on the first 810")).to_be_visible()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        assert_readable(page, TEXTS)
        page.screenshot(path=tmp_path / f"rollout-{scheme}.png", full_page=True)
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_text("Say why first")).to_be_visible(timeout=10_000)
    assert the_rollout(Ledger(workspace.ledger_url)).status == "running"
    focus_by_tab(page, "input[placeholder='stands in the audit']")
    page.keyboard.type("a look at the figures")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_text("keeps its share and waits")).to_be_visible(timeout=60_000)
    expect(page.get_by_role("button", name="Resume")).to_be_visible(timeout=20_000)
    said = Ledger(workspace.ledger_url).decisions(kind="rollout")[0]
    assert (said.verdict, said.reason) == ("paused", "a look at the figures")
    expect(page.get_by_label("Why")).to_have_value("")
    expect(page.get_by_role("button", name="Pause")).to_be_hidden()
    assert_no_sideways_scroll(page)
    page.screenshot(path=tmp_path / "rollout-narrow.png", full_page=True)
    page.get_by_label("Why").fill("wrong currency in the answers")
    page.get_by_role("button", name="Abort").click()
    expect(page.get_by_text("gets no traffic any more").first).to_be_visible(timeout=60_000)
    expect(page.get_by_role("button", name="Abort")).to_be_hidden(timeout=20_000)
    assert decisions(workspace) == ["started", "paused", "aborted"]
    last = Ledger(workspace.ledger_url).decisions(kind="rollout")[0]
    assert last.actor.endswith(" in the page") and last.reason == "wrong currency in the answers"


def buttons(page: Page) -> set[str]:
    """The buttons below the rollout that are shown."""
    shown = page.locator(".mwb-moves button:visible").all_inner_texts()
    return {text for text in shown if not text.startswith("Sign")}


def sign_in(page: Page, token: str) -> None:
    """Type a token and go on."""
    page.get_by_label("Token").fill(token)
    page.keyboard.press("Tab")


def test_each_role_sees_its_buttons_and_a_revoked_token_loses_them(
    moving: tuple[Workspace, str], page: Page, tmp_path: Path
) -> None:
    """A viewer may look, an operator pause and abort, a deployer promote too; what is done stands under the person's name."""
    workspace, _ = moving
    ledger = Ledger(workspace.ledger_url)
    if ledger.open_rollout() is None:  # the other test ended it
        start_rollout(workspace, "flights-r2", actor="ana", shares=(0.2, 0.5))
    people = {
        role: grant(workspace, f"{role}-x", role, actor="root")
        for role in ("viewer", "operator", "deployer")
    }
    expect(page.get_by_label("Token")).to_be_visible(timeout=20_000)
    assert buttons(page) == set()
    sign_in(page, "mwb_00000000_guessed")
    expect(page.get_by_text("This token is not in force")).to_be_visible(timeout=10_000)
    for role, allowed in {
        "viewer": set(),
        "deployer": {"Pause", "Promote to all", "Abort"},
        "operator": {"Pause", "Abort"},
    }.items():
        sign_in(page, people[role])
        expect(page.get_by_text(f"Signed in as {role}-x, {role}")).to_be_visible(timeout=10_000)
        page.wait_for_timeout(300)  # one button after the other comes
        assert buttons(page) == allowed, role
        if role != "operator":
            page.get_by_role("button", name="Sign out").click()
            expect(page.get_by_label("Token")).to_be_visible(timeout=10_000)
    page.screenshot(path=tmp_path / "signed-in.png", full_page=True)
    assert_readable(
        page, [".mwb h2", ".mwb-banner strong", ".mwb p", ".mwb p strong", ".jupyter-button"]
    )
    page.get_by_label("Why").fill("complaints from JFK")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible(timeout=60_000)
    said = ledger.decisions(kind="rollout")[0]
    assert said.actor.startswith("operator-x (token ") and said.actor.endswith(" in the page")
    files = [p for p in workspace.state.rglob("*.json") if people["operator"] in p.read_text()]
    assert files == [], "a token was left in a file"
    revoke(workspace, people["operator"].split("_")[1], actor="root", reason="left the team")
    expect(page.get_by_role("button", name="Abort")).to_be_hidden(timeout=5_000)
    expect(page.get_by_text("Your token is not in force any more")).to_be_visible(timeout=5_000)


def test_nobody_moves_a_rollout_where_the_settings_do_not_allow_it(tmp_path: Path) -> None:
    """No buttons; and whoever leaves the request all the same is refused."""
    workspace, _, new = release_pair(tmp_path / "w")
    start_rollout(workspace, new, actor="ana", shares=(0.2,))
    refresh(workspace, {})
    assert pressable(monitoring_page(workspace.read_models)) == []
    stranger = {"token": "", "signature": ""}
    asked = {"verb": "promote", "rollout": "rollout-1", "seen": "1", "reason": "mine", **stranger}
    request = ask(workspace.read_models, "move", **asked)
    answer_requests(workspace)
    answer = read_answer(workspace.read_models, request)
    assert answer is not None and not answer.done and "rollout_buttons" in answer.text
    assert decisions(workspace) == ["started"]


def pressable(page: MonitoringPage) -> list[str]:
    """The buttons that a page shows."""
    return [verb for verb, button in page.moves.buttons.items() if button.layout.display != "none"]


def test_the_second_person_approves_in_the_page(tmp_path: Path) -> None:
    """Where four eyes are asked for, a deployer approves; promoting it is then for somebody else."""
    workspace, _, new = release_pair(tmp_path / "w")
    place = workspace.root / "settings.ini"
    place.write_text(place.read_text().replace("four_eyes = no ", "four_eyes = yes "))
    workspace = Workspace.open(workspace.root)
    start_rollout(workspace, new, actor="ana", shares=(0.2,))
    token = grant(workspace, "dora", "deployer", actor="root")
    said = []
    known: dict[str, str] = {}
    for verb, seen in (
        ("approve", ["pause", "approve", "abort"]),
        ("promote", ["pause", "promote", "abort"]),
    ):
        known = refresh(workspace, known)
        shown = monitoring_page(workspace.read_models)
        shown.moves.sign_in.field.value = token
        shown.moves.tick()
        assert pressable(shown) == seen
        shown.moves.reason.value = "looked at the slices"
        shown.moves.on_press(verb)
        answer_requests(workspace)
        shown.moves.tick()
        said.append(shown.moves.words.value)
    assert f"{new} is approved" in said[0]
    assert "only the approval of dora" in said[1]
    approval = Ledger(workspace.ledger_url).decisions(kind="approval")[0]
    assert approval.actor.startswith("dora (token ") and approval.reason == "looked at the slices"
    assert decisions(workspace) == ["started"]
