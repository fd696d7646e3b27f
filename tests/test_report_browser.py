"""The page of ``crnet report`` in a real browser: Chromium without a window.

Nothing is asked of the network, nothing is complained about, and what a reader clicks works.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crnet.report.page import page

webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1280,1600"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # the driver's own
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver"),
]


@pytest.fixture(scope="module")
def browser(gathered: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """With the page of two runs open."""
    folder: Path = tmp_path_factory.mktemp("browser")
    (folder / "report.html").write_text(page(gathered), encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS.split(), f"--user-data-dir={folder / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        driver.get((folder / "report.html").as_uri())
        yield driver
    finally:
        driver.quit()


def test_no_error_and_no_request(browser: Any) -> None:
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
        and event["params"]["documentURL"].startswith("file:")  # the browser's own start page asks
    ]
    assert [url for url in asked if not url.startswith("data:")] == [browser.current_url]
    assert browser.get_log("browser") == []


def test_every_curve_is_drawn(browser: Any, gathered: dict[str, Any]) -> None:
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map((chart) => [chart.dataset.chart,"
        " [...chart.querySelectorAll('path.line, path.valid')].map((at) => at.getAttribute('d'))"
        "])"
    )
    found = dict(drawn)
    assert next(iter(found)) == "loss"
    assert {"val_perplexity", "lr", "grad_norm", "tokens_per_s"} <= set(found)
    assert len(found["loss"]) == 4  # training and validation of two runs
    for key, paths in found.items():
        assert paths, key
        assert all(path.startswith("M") and "NaN" not in path for path in paths), key
    points = found["lr"][0].count("L") + 1
    assert points == len(gathered["runs"][0]["training"]["lr"])


def test_a_table_sorts_on_click(browser: Any) -> None:
    def column() -> list[str]:
        return browser.execute_script(
            "const column = arguments[0];"
            "return [...document.querySelectorAll('#runs tbody tr')]"
            ".map((row) => row.cells[column].dataset.value)",
            at,
        )

    heads = browser.find_elements("css selector", "#runs thead th")
    at = [head.text.split()[0] for head in heads].index("parameters")
    button = heads[at].find_element("css selector", "button")
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", button
    )
    button.click()
    up = column()
    assert up == sorted(up, key=float)
    assert heads[at].get_attribute("aria-sort") == "ascending"
    button.click()
    assert column() == up[::-1] != up
    assert heads[at].get_attribute("aria-sort") == "descending"


def test_a_curve_zooms_and_resets(browser: Any) -> None:
    def shown() -> list[str]:
        return browser.execute_script(
            "const place = document.getElementById('curves');"
            "return [place.dataset.from || '', place.dataset.to || '',"
            " document.querySelector('[data-chart=lr] path.line').getAttribute('d')]"
        )

    chart = browser.find_element("css selector", "[data-chart=loss] svg")
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", chart
    )
    before = shown()
    mouse = webdriver.ActionChains(browser).move_to_element(chart).click_and_hold()
    mouse.move_by_offset(200, 0).release().perform()
    low, high, path = shown()
    assert 0 < float(low) < float(high) <= 12
    assert path != before[2]  # every curve shows the same part
    browser.find_element("id", "reset").click()
    assert shown() == ["", "", before[2]]


def test_the_keyboard_reads_and_zooms(browser: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    chart = browser.find_element("css selector", "[data-chart=lr] svg")
    browser.execute_script("arguments[0].focus()", chart)
    chart.send_keys(Keys.ARROW_RIGHT)
    chart.send_keys(Keys.ARROW_RIGHT)
    tip = browser.find_element("css selector", "[data-chart=lr] .tip")
    assert "crnet" in tip.text
    assert "step" in tip.text
    chart.send_keys("+")
    assert browser.find_element("id", "curves").get_attribute("data-to")
    chart.send_keys(Keys.ESCAPE)
    assert not browser.find_element("id", "curves").get_attribute("data-to")


def test_axes_and_runs_are_chosen(browser: Any) -> None:
    def lines() -> list[str]:
        return browser.execute_script(
            "return [...document.querySelectorAll('[data-chart=loss] path.line')]"
            ".map((path) => path.getAttribute('d'))"
        )

    by_step = lines()
    browser.find_element("css selector", "#axis button[value=flops]").click()
    assert lines() != by_step
    browser.find_element("css selector", "#axis button[value=step]").click()
    assert lines() == by_step
    chip = browser.find_element("css selector", ".chip")
    chip.click()
    assert len(lines()) == 1
    assert not browser.find_element("id", "run-0").is_displayed()
    chip.click()
    assert lines() == by_step


def test_cells_of_the_gains_are_as_many_as_gains(browser: Any, gathered: dict[str, Any]) -> None:
    (gains,) = gathered["runs"][0]["gains"]
    cells = browser.execute_script(
        "return [...document.querySelectorAll('#run-0 .part')]"
        ".filter((part) => part.querySelector('h3').textContent.startsWith('Gains'))"
        ".map((part) => part.querySelectorAll('td.cell').length)"
    )
    assert cells == [gains["count"]]


def test_spectra_follow_the_chosen_map(browser: Any) -> None:
    from selenium.webdriver.support.ui import Select

    place = browser.find_element("css selector", "[data-spectra='0']")
    lines = len(place.find_elements("css selector", "svg path"))
    select = Select(place.find_element("css selector", "select"))
    assert len(select.options) == 7
    before = place.find_element("css selector", "svg path").get_attribute("d")
    select.select_by_visible_text("down")
    assert place.find_element("css selector", "svg path").get_attribute("d") != before
    assert lines == len(place.find_elements("css selector", "svg path")) == 3


def test_a_narrow_screen_does_not_scroll_sideways(browser: Any) -> None:
    browser.set_window_size(500, 900)  # the least that a window has
    try:
        wide = browser.execute_script(
            "return [document.documentElement.scrollWidth, window.innerWidth]"
        )
        assert wide[0] <= wide[1]
    finally:
        browser.set_window_size(1280, 1600)
    assert browser.get_log("browser") == []
