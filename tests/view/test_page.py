"""The page in a real browser: what is hostile stays text, what is in the address comes back, keys and phones work."""

from __future__ import annotations

import json
import re
import time

import pytest

from browser import chromium, severe, shown_as
from serving import serving
from view_runs import HOSTILE, record, write_batch, write_run

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
ActionChains = webdriver.ActionChains
ODD = "<img src=x onerror=document.title='owned'>"
TURNED = "a\u202egnp.exe\x1b"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "first", finished=True, beta=0.1)
    write_run(folder / "second", beta=0.5)
    write_run(folder / "sweep" / TURNED)
    hostile = write_run(folder / ODD)
    write_batch(hostile / "batches" / "000000.parquet", 0, HOSTILE * 2, 4)
    for step in range(3, 43):
        write_batch(folder / "second" / "batches" / f"{step:06d}.parquet", step, [f"row {i}" for i in range(96)], 1)
    return folder


@pytest.fixture(scope="module")
def address(root):
    with serving(root) as found:
        yield found.address


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


def until(holds, seconds=20):
    """What `holds` returns as soon as it is true: the page asks the server, which takes its time."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


def all_of(browser, selector):
    return browser.find_elements("css selector", selector)


def texts(browser, selector):
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
    return browser.execute_script(script, selector)


def type_keys(browser, keys):
    browser.execute_script("document.activeElement.blur()")
    ActionChains(browser).send_keys(keys).perform()


def opened(browser, address, path, selector):
    browser.get(address + path)
    until(lambda: all_of(browser, selector))


def test_runs_are_filtered_sorted_and_chosen_and_the_address_knows(browser, address):
    opened(browser, address, "/", ".runs tbody tr")
    assert len(all_of(browser, ".runs tbody tr")) == 4 and severe(browser) == []
    type_keys(browser, "/")
    browser.switch_to.active_element.send_keys("algo.beta<0.2")
    until(lambda: texts(browser, ".runs td.name") == ["first"])
    assert "q=algo.beta" in browser.current_url
    browser.refresh()
    until(lambda: texts(browser, ".runs td.name") == ["first"])
    opened(browser, address, "/?sort=-beta&state=stopped", ".runs tbody tr")
    opened(browser, address, "/?sort=-algo.beta&state=stopped", ".runs tbody tr")
    assert texts(browser, ".runs td.name")[0] == "second" and "first" not in texts(browser, ".runs td.name")
    type_keys(browser, "jx")
    assert "run=second" in browser.current_url
    type_keys(browser, "c")
    until(lambda: all_of(browser, ".chart"))
    assert "/curves?run=second" in browser.current_url


def test_names_of_runs_are_text(browser, address):
    opened(browser, address, "/", ".runs tbody tr")
    assert ODD in texts(browser, ".runs td.name") and "sweep/aU+202Egnp.exeU+001B" in texts(browser, ".runs td.name")
    link = next(a for a in all_of(browser, ".runs td.name a") if "gnp" in a.text)
    link.click()
    until(lambda: all_of(browser, ".chart"))
    assert browser.title.startswith("sweep/a") and not all_of(browser, "main img") and severe(browser) == []


def test_each_reward_and_the_money_have_curves(browser, address):
    opened(browser, address, "/curves?run=first", ".chart svg path")
    shown = {c.split("\n")[0]: c for c in (chart.text for chart in all_of(browser, ".chart") if chart.is_displayed())}
    assert shown["Dollars"].split("\n")[1] == "0.75" and {"helpful/mean", "brief/mean"} <= shown.keys()
    assert {"helpful", "brief"} <= set(shown["Each reward, held out"].split("\n"))
    drawn = (
        "return [...document.querySelectorAll('.chart')].find(c => c.innerText.startsWith(arguments[0]))"
        ".querySelectorAll(arguments[1]).length"
    )
    assert browser.execute_script(drawn, "Each reward", ".lines circle") == 4
    assert browser.execute_script(drawn, "Each reward", ".lines .bar") == 4
    opened(browser, address, "/curves?run=first&run=second", ".chart svg path")
    until(lambda: browser.execute_script(drawn, "Each reward", ".lines circle") == 8)
    assert severe(browser) == []


def test_curves_zoom_and_point_together(browser, address):
    opened(browser, address, "/curves?run=first&run=second", ".chart svg path")
    assert {"Reward", "KL to π₀, nats"} <= {t.split("−")[0] for t in texts(browser, ".chart figcaption")}
    assert texts(browser, ".settings tr th:first-child")[1:] == ["algo.beta"]
    chart = all_of(browser, ".chart svg[role=img]")[0]
    ActionChains(browser).move_to_element(chart).perform()
    until(lambda: len([c for c in all_of(browser, ".cross") if c.find_elements("css selector", "line")]) > 1)
    assert "first" in texts(browser, ".tip")[0] and "second" in texts(browser, ".tip")[0]
    wide = chart.size["width"]
    ActionChains(browser).move_to_element(chart).click_and_hold().move_by_offset(int(wide * 0.4), 0).release().perform()
    until(lambda: "from=1" in browser.current_url)
    browser.refresh()
    until(lambda: [b for b in all_of(browser, ".bar button") if b.text == "zoom out" and b.is_displayed()])
    type_keys(browser, "0")
    until(lambda: "from=" not in browser.current_url)
    assert severe(browser) == []


def test_numbers_move_while_training_writes(browser, address, root):
    opened(browser, address, "/curves?run=second", ".chart svg path")
    until(lambda: "3/4" in texts(browser, ".runitem")[0])
    with open(root / "second" / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record(3)) + "\n")
    until(lambda: "4/4" in texts(browser, ".runitem")[0])
    until(lambda: "0.3" in texts(browser, ".chart figcaption")[0])


def test_hostile_completions_are_text(browser, address):
    opened(browser, address, "/completions?" + "run=" + re.sub("=", "%3D", ODD) + "&at=0", ".answer")
    until(lambda: len(all_of(browser, ".answer")) == 4)
    said = texts(browser, ".answer > .said, .answer > div > .said")
    assert said[0] == HOSTILE[0]
    assert said[1] == re.sub(r"[\x00-\x08\x1b\u200b\u202c\u202e]", lambda m: f"U+{ord(m[0]):04X}", HOSTILE[1])
    assert len(said[2]) == 6000 and "more (994,000 characters)" in texts(browser, ".more")
    assert not all_of(browser, "main img, main script, .said b")
    next(b for b in all_of(browser, ".more") if "994,000" in b.text).click()
    until(lambda: "more (954,000 characters)" in texts(browser, ".more"))
    assert browser.title != "owned" and severe(browser) == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1200


def test_the_list_scrolls_through_all_with_few_rows_in_the_page(browser, address):
    opened(browser, address, "/completions?run=second", ".row")
    until(lambda: "3,846 prompts" in texts(browser, ".count")[0])
    browser.execute_script("const l = document.querySelector('.list'); l.scrollTop = l.scrollHeight")
    until(lambda: any("batch 42" in t for t in texts(browser, ".row")))
    assert len(all_of(browser, ".row")) < 60
    type_keys(browser, "j")
    until(lambda: all_of(browser, ".row[aria-selected=true]") and all_of(browser, ".answer"))


def test_search_is_in_the_address_and_comes_back(browser, address):
    opened(browser, address, "/completions?run=first&q=apples+is:clipped", ".row")
    total = texts(browser, ".count")[0]
    until(lambda: all_of(browser, "mark"))
    assert [c.text for c in all_of(browser, ".chip[aria-pressed=true]")] == ["clipped"]
    next(c for c in all_of(browser, ".chip") if c.text == "clipped").click()
    until(lambda: texts(browser, ".count")[0] not in (total, "reading …"))
    assert "clipped" not in browser.current_url
    opened(browser, address, "/completions?run=first&at=4", ".answer")
    until(lambda: all_of(browser, ".row[aria-selected=true]"))
    assert "batch 2" in all_of(browser, ".row[aria-selected=true]")[0].text
    assert texts(browser, ".criteria")[0].startswith("✓ short")


def test_evaluations_stand_side_by_side_with_their_differences(browser, address):
    opened(browser, address, "/completions?run=first&col=first%400&col=first%403&at=1&diff=1", ".answer")
    until(lambda: texts(browser, ".side h3") == ["π₀", "after 3"])
    assert texts(browser, "del") == ["0"] and texts(browser, "ins") == ["3"]
    type_keys(browser, "d")
    until(lambda: not all_of(browser, "ins"))
    assert "diff" not in browser.current_url


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("path", ["/", "/curves?run=first", "/completions?run=first", "/completions?run=first&at=1"])
def test_phone_and_dark(browser, address, path, dark):
    with shown_as(browser, 360, 740, dark):
        opened(browser, address, path, ".answer" if "at=" in path else ".row, .chart, .runs td")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        paper, ink = browser.execute_script(
            "const s = getComputedStyle(document.body);"
            "return [s.backgroundColor, s.color].map(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + Number(b), 0) / 3)"
        )
        assert abs(ink - paper) > 150 and (paper < 60) == dark
        if "at=" in path:
            all_of(browser, ".back")[0].click()
            until(lambda: all_of(browser, ".list")[0].is_displayed())
