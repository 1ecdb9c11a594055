"""The pages in a real browser: nothing leaves the machine, mouse, keyboard, themes, small screens, closed tabs."""

import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
import psutil
import pytest
from pages_support import (
    CHROMIUM,
    CHROMIUM_ARGUMENTS,
    CONTRAST,
    Factory,
    kernels_of,
    lab_running,
    make_data,
    make_factory,
    pages_running,
    record_run,
    spoil,
    wait_until,
)
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from mlops_workbench.core.ledger import Ledger
from mlops_workbench.core.workspace import Workspace, create_workspace
from mlops_workbench.pages.voila_server import apps_folder

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser: {CHROMIUM} is not installed"),
]
PATIENCE_MS = 60_000
LAB_TOKEN = "a-token-of-this-test"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's Chromium without its own calls home."""
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=list(CHROMIUM_ARGUMENTS)
        )
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Factory, str, int]]:
    """A workspace with runs and traffic, the address of its pages, and their process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        factory = make_factory(tmp_path_factory.mktemp("browser"), pages__idle_seconds=15)
    with pages_running(factory.workspace) as (address, process):
        yield factory, address, process.pid


@pytest.fixture(autouse=True)
def closed_afterwards(browser: Browser) -> Iterator[None]:
    """Close what a failed test left open, so that it does not keep a kernel alive for the next one."""
    yield
    for context in browser.contexts:
        context.close()


def open_page(
    browser: Browser, address: str, name: str, *, scheme: str = "light", width: int = 1280
) -> tuple[Page, list[str]]:
    """Open a page and wait until it is drawn; the page and every address that it asked for."""
    context = browser.new_context(
        color_scheme="dark" if scheme == "dark" else "light",
        viewport={"width": width, "height": 900},
    )
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url.replace("ws:", "http:", 1)))
    page.goto(f"{address}/voila/render/{name}.ipynb", timeout=PATIENCE_MS)
    page.wait_for_selector(".mwb-page h1", timeout=PATIENCE_MS)
    if name == "experiments":
        page.wait_for_selector("tr.selected", timeout=PATIENCE_MS)
        page.wait_for_selector(".js-plotly-plot .scatterlayer .trace", timeout=PATIENCE_MS)
    elif name == "data":
        page.wait_for_selector(".mwb-timeline", timeout=PATIENCE_MS)
        page.wait_for_selector(".mwb-tile", timeout=PATIENCE_MS)
    else:
        page.wait_for_selector(".mwb-tile", timeout=PATIENCE_MS)
    return page, asked


def assert_readable(page: Page, selectors: list[str]) -> None:
    """Every text that is found has a contrast of at least 4.5 to its ground (WCAG 2.2, 1.4.3)."""
    for selector in selectors:
        found = page.evaluate(CONTRAST, selector)
        assert found, f"nothing is found by {selector}"
        worst = min(found, key=lambda entry: entry["ratio"])
        assert worst["ratio"] >= 4.5, (selector, worst)


def assert_no_sideways_scroll(page: Page) -> None:
    """The document is no wider than the window, and nothing below it is hidden at the side."""
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(700)
    widths = page.evaluate(
        "[document.scrollingElement.scrollWidth, document.scrollingElement.clientWidth]"
    )
    assert widths[0] <= widths[1] == 390
    cut = page.evaluate(
        """() => [...document.querySelectorAll('.mwb h1, .mwb h2, .mwb-tile, .mwb-banner, .mwb-chart, .mwb-card, .mwb-version, .mwb-thumb, .mwb-choice label, button, select, nav a')]
        .filter(e => e.getClientRects().length && e.getBoundingClientRect().right > 390.5).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert cut == []


FOCUSED = """wanted => {
    const at = document.activeElement, style = getComputedStyle(at);
    return at.matches(wanted) ? [style.outlineStyle, parseFloat(style.outlineWidth)] : null;
}"""


def focus_by_tab(page: Page, wanted: str, presses: int = 40) -> None:
    """Press Tab until an element that matches has the focus, and look whether one sees it."""
    for _ in range(presses):
        page.keyboard.press("Tab")
        shown = page.evaluate(FOCUSED, wanted)  # at once: the page may be drawn anew meanwhile
        if shown is not None:
            assert shown[0] == "solid" and shown[1] >= 2, shown
            return
    raise AssertionError(f"Tab never reached {wanted}")


def test_experiments_are_selected_compared_and_drawn(
    browser: Browser, served: tuple[Factory, str, int]
) -> None:
    factory, address, _ = served
    page, asked = open_page(browser, address, "experiments")
    comparison = page.get_by_role("region", name="what differs between the selected runs")
    expect(comparison).to_contain_text("flights@v1.1")

    page.locator("table.dataTable tbody tr", has_text="2013-04-03/train").click()
    expect(comparison).to_contain_text("2013-04-03/train", timeout=15_000)
    expect(page.locator("tr.selected")).to_have_count(3)
    expect(page.locator(".js-plotly-plot").first.locator(".scatterlayer .trace")).to_have_count(3)
    for name in ("<img src=x", "2013-04-05/train"):
        page.locator("table.dataTable tbody tr", has_text=name).click()
    expect(page.get_by_text("Select a second run")).to_be_visible(timeout=15_000)
    page.locator("table.dataTable tbody tr", has_text="2013-04-01/train").click()
    expect(comparison).to_contain_text("+0.009", timeout=15_000)
    expect(comparison).not_to_contain_text("batch_size")

    page.get_by_label("Metric", exact=True).select_option("train_loss")
    expect(page.locator(".js-plotly-plot .ytitle").first).to_have_text("train_loss", timeout=15_000)
    page.get_by_label("Search").fill("2013-04-02")
    expect(page.locator("table.dataTable tbody tr")).to_have_count(1)
    page.get_by_label("Search").fill("")
    page.get_by_label("learning_rate: Activate to sort").click()
    expect(page.locator("table.dataTable tbody tr").first).to_contain_text("2013-04-04/train")

    record_run(factory.workspace, cycle="2013-07-01", seed=40)
    expect(page.get_by_text("7 runs of")).to_be_visible(timeout=15_000)
    expect(page.locator("tr.selected")).to_have_count(2)

    assert page.title() != "owned" and page.locator("img[src=x]").count() == 0
    assert [url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))] == []
    assert sum("/channels" in url for url in asked) == 1
    assert_no_sideways_scroll(page)
    page.context.close()


def test_the_keyboard_reaches_and_works_everything(
    browser: Browser, served: tuple[Factory, str, int]
) -> None:
    page, _ = open_page(browser, served[1], "experiments", scheme="dark")
    focus_by_tab(page, "nav a[aria-current=page]")
    focus_by_tab(page, ".dt-search input")
    focus_by_tab(page, "table.dataTable tbody tr")
    before = page.locator("tr.selected").count()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("tr.selected")).to_have_count(before + 1)
    page.wait_for_timeout(800)  # the answer of the kernel must not take the focus away
    assert page.evaluate("document.activeElement.tagName") == "TR"
    focus_by_tab(page, ".widget-dropdown select")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("t")
    expect(page.locator(".js-plotly-plot .ytitle").first).to_have_text("train_loss", timeout=15_000)

    rows = ["table.dataTable tbody td", "tr.selected td", "table.dataTable thead .dt-column-title"]
    assert_readable(page, [*rows, ".mwb h1", ".mwb h2", ".mwb p", ".mwb td", ".mwb th", "nav a"])
    page.emulate_media(color_scheme="light")
    assert_readable(page, [*rows, ".mwb h1", ".mwb h2", ".mwb p", ".mwb td", ".mwb th", "nav a"])
    page.context.close()


def accept_dialogs(page: Page) -> list[str]:
    """Press the last button of each dialog that JupyterLab opens; returns what they say, as they come."""
    told: list[str] = []

    def accept(dialog: Locator) -> None:
        told.append(dialog.inner_text())
        dialog.get_by_role("button").last.click()

    page.add_locator_handler(page.locator("dialog.jp-Dialog"), accept)
    return told


def run_cell(page: Page, number: int) -> None:
    """Run a cell of the open notebook; JupyterLab loses what comes before its kernel is ready."""
    cell = page.locator(".jp-CodeCell").nth(number)
    for _ in range(60):  # on a busy machine a kernel takes its time
        cell.locator(".cm-content").click()
        page.keyboard.press("Control+Enter")
        page.wait_for_timeout(1000)
        if cell.locator(".jp-InputPrompt").inner_text().strip() != "[ ]:":
            return
    raise AssertionError("the cell was never run")


def test_pages_work_as_cells_in_jupyterlab(
    browser: Browser, served: tuple[Factory, str, int]
) -> None:
    factory, _, _ = served
    notebook = nbformat.read(apps_folder() / "experiments.ipynb", as_version=4)
    notebook.cells = [
        nbformat.v4.new_code_cell(
            f"from mlops_workbench.pages.{name} import {name}_page\n\n{name}_page()"
        )
        for name in ("experiments", "monitoring")
    ]
    nbformat.write(notebook, factory.workspace.root / "look.ipynb")
    with lab_running(factory.workspace, LAB_TOKEN) as address:
        page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        told = accept_dialogs(page)
        page.goto(f"{address}/lab/tree/look.ipynb?token={LAB_TOKEN}", timeout=PATIENCE_MS)
        idle = '.jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status="idle"]'
        page.wait_for_selector(idle, timeout=PATIENCE_MS)
        run_cell(page, 1)
        expect(page.locator(".mwb-tile").first).to_be_visible(timeout=PATIENCE_MS)
        assert page.locator(".mwb-chart svg .line").count() >= 5
        run_cell(page, 0)
        expect(page.locator("tr.selected")).to_have_count(2, timeout=PATIENCE_MS)
        page.locator("table.dataTable tbody tr", has_text="2013-04-03/train").click()
        comparison = page.get_by_role("region", name="what differs between the selected runs")
        expect(comparison).to_contain_text("2013-04-03/train", timeout=15_000)
        lines = page.locator(".js-plotly-plot").first.locator(".scatterlayer .trace")
        expect(lines).to_have_count(3)
        assert_readable(page, ["table.dataTable tbody td", ".mwb h1", ".mwb td", ".mwb th"])
        expect(page.locator(".Toastify__toast")).to_have_count(0)
        outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
        assert outside == []
        # a busy machine may keep JupyterLab waiting; anything else that it asks would be news
        assert [text for text in told if "Server Connection" not in text] == []
        page.context.close()


def test_tiles_turn_while_the_page_is_open(
    browser: Browser, served: tuple[Factory, str, int]
) -> None:
    factory, address, _ = served
    page, asked = open_page(browser, address, "monitoring")
    accuracy = page.get_by_role("group", name="Accuracy")
    expect(accuracy).to_contain_text("OK")
    expect(page.locator(".mwb-banner")).to_contain_text("Nothing is wrong")
    assert page.locator(".mwb-chart svg .line").count() >= 5
    page.get_by_label("Show").select_option("all looks so far")
    expect(page.locator(".mwb-chart svg .dot").first).to_be_attached(timeout=15_000)

    spoil(factory)
    expect(accuracy).to_contain_text("CRITICAL", timeout=20_000)
    calibration = page.get_by_role("group", name="Calibration gap")
    expect(calibration).to_contain_text("WARNING")
    colour = "e => getComputedStyle(e).borderTopColor"
    assert accuracy.evaluate(colour) != calibration.evaluate(colour)
    shapes = [tile.locator("i").inner_text() for tile in (accuracy, calibration)]
    assert len(set(shapes)) == 2
    expect(page.locator(".mwb-banner")).to_contain_text("quality_lost")
    expect(page.get_by_role("region", name="columns that moved")).to_contain_text("temp")
    expect(page.get_by_role("region", name="last decisions")).to_contain_text("firing")

    texts = [".mwb-tile b", ".mwb-tile em", ".mwb-tile span", ".mwb-banner *", ".mwb-card dd"]
    texts += [
        ".mwb td",
        ".mwb td em",
        ".mwb th",
        ".mwb-chart footer span",
        ".widget-dropdown select",
    ]
    assert_readable(page, texts)
    page.emulate_media(color_scheme="dark")
    assert_readable(page, texts)
    focus_by_tab(page, ".widget-dropdown select")
    focus_by_tab(page, ".mwb-scroll")
    assert [url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))] == []
    assert_no_sideways_scroll(page)
    page.context.close()


def test_a_closed_tab_ends_its_kernel_and_a_lost_one_is_culled(
    browser: Browser, served: tuple[Factory, str, int]
) -> None:
    _, address, process = served
    # the contexts of the tests above were closed without a goodbye, like a browser that crashed
    wait_until(lambda: not kernels_of(process), seconds=40)
    page, _ = open_page(browser, address, "monitoring")
    (kernel,) = kernels_of(process)
    threads = psutil.Process(kernel).num_threads()
    page.wait_for_timeout(3500)  # three or four times read again
    assert psutil.Process(kernel).num_threads() <= threads
    page.close(run_before_unload=True)
    wait_until(lambda: not psutil.pid_exists(kernel), seconds=20)
    page.context.close()


def test_a_page_with_nothing_to_show_says_so(browser: Browser, tmp_path: Path) -> None:
    workspace = create_workspace(tmp_path / "w", name="new", settings={"pages.refresh_seconds": 1})
    with pages_running(workspace) as (address, _):
        context = browser.new_context(viewport={"width": 390, "height": 844})
        page = context.new_page()
        page.goto(address)
        page.get_by_role("link", name="Experiments").last.click()
        expect(page.get_by_text("No run yet")).to_be_visible(timeout=PATIENCE_MS)
        started = time.perf_counter()
        page.get_by_role("link", name="Monitoring").click()
        expect(page.get_by_text("Nothing has been measured yet")).to_be_visible(timeout=PATIENCE_MS)
        assert time.perf_counter() - started < 30
        assert_no_sideways_scroll(page)
        context.close()


@pytest.fixture(scope="module")
def data_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workspace, str]]:
    """A workspace with data versions and a quarantine, and the address of its pages."""
    workspace = make_data(tmp_path_factory.mktemp("data"))
    with pages_running(workspace) as (address, _):
        yield workspace, address


DATA_TEXTS = [".mwb h1", ".mwb h2", ".mwb h3", ".mwb-version b", ".mwb-version p", ".mwb-mark"]
DATA_TEXTS += [".mwb-version code", ".mwb-tile b", ".mwb-tile small", ".mwb-tile span", ".mwb td"]
DATA_TEXTS += [".mwb-thumb figcaption", ".mwb-chart span", ".mwb-chart p.words", ".mwb-chart b"]
DATA_TEXTS += [
    ".mwb-bars span",
    ".mwb-bars em",
    ".mwb-legend span",
    ".mwb-waiting p",
    ".mwb summary",
]
DATA_TEXTS += [".mwb-choice label", ".jupyter-button", ".mwb-command", ".mwb-state", "select"]


def test_data_versions_are_compared_by_keyboard(
    browser: Browser, data_served: tuple[Workspace, str]
) -> None:
    _, address = data_served
    page, asked = open_page(browser, address, "data", scheme="dark")
    focus_by_tab(page, "select")
    expect(page.get_by_label("Data set")).to_be_focused()
    page.keyboard.press("d")
    expect(page.locator(".mwb-version")).to_have_count(4, timeout=15_000)
    expect(page.locator(".mwb-thumb img").first).to_be_visible(timeout=15_000)
    focus_by_tab(page, ".mwb-pair .widget-dropdown:first-child select")
    page.keyboard.press("End")  # v1.0, which is no neighbour of v1.3
    expect(page.get_by_text("are being compared")).to_be_visible()
    added = page.get_by_role("group", name="added")
    expect(added).to_contain_text("400 rows", timeout=30_000)
    focus_by_tab(page, ".mwb details:has(.mwb-chart) summary")
    page.keyboard.press("Enter")
    expect(page.get_by_role("img", name="image brightness", exact=False)).to_be_visible()
    assert_readable(page, DATA_TEXTS)
    page.emulate_media(color_scheme="light")
    assert_readable(page, DATA_TEXTS)
    assert [url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))] == []
    assert page.title() != "owned"
    assert_no_sideways_scroll(page)
    page.context.close()


def test_rows_in_quarantine_are_decided_by_keyboard(
    browser: Browser, data_served: tuple[Workspace, str]
) -> None:
    workspace, address = data_served
    page, _ = open_page(browser, address, "data", width=390)
    page.get_by_label("Data set").select_option("digits")
    expect(page.get_by_text("Rows 1 to 8 of 12")).to_be_visible(timeout=15_000)
    focus_by_tab(page, ".mwb-choice input[type=radio]")
    page.keyboard.press("ArrowRight")  # later -> accept
    record = page.get_by_role("button", name="Record 1 accepted, 0 rejected")
    expect(record).to_be_enabled(timeout=15_000)
    focus_by_tab(page, ".mod-primary")
    page.keyboard.press("Enter")
    expect(page.get_by_text("11 still wait")).to_be_visible(timeout=40_000)
    expect(page.get_by_text("Rows 1 to 8 of 11")).to_be_visible(timeout=15_000)
    expect(page.locator(".mwb-version b").first).to_have_text("v1.4", timeout=15_000)
    decision = Ledger(workspace.ledger_url).decisions(kind="review")[0]
    assert len(decision.evidence["accepted"]) == 1
    assert_no_sideways_scroll(page)
    page.context.close()
