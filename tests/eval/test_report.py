"""The page holds what the run holds, opens without a network, and does what its controls say, in a real browser."""

import csv
import json
import re

import pytest
from typer.testing import CliRunner

import dualign
from browser import chromium, severe, shown_as
from dualign.cli import application
from dualign.common.errors import UserError
from dualign.eval.report import write_report
from dualign.eval.report.data import collect, evenly
from runs_common import tree, vowels, write_prompts

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'"><!-- <b>'


def hostile(completions, **columns):
    return vowels(completions)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """Two runs whose prompts try to break out of the page."""
    folder = tmp_path_factory.mktemp("report")
    prompts = folder / "prompts.jsonl"
    write_prompts(folder, 24)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    rows[3]["prompt"][0]["content"] = HOSTILE
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = []
    for name, algo in (("first", {"name": "dar", "beta": 0.3}), ("second", {"name": "grpo"})):
        config = tree(tiny, prompts, folder / name, algo, online_batches=4, online_batch=48, update_size=24, lr=3e-3)
        config["eval"] |= {"prompts": 24, "every": 2}
        config["rollout"]["max_new_tokens"] = 8
        config["data"] |= {"shuffle": False}
        found.append(dualign.train(config, reward=vowels, quiet=True).folder)
    return found


@pytest.fixture(scope="module")
def page(runs):
    application_of = CliRunner()
    spec = f"{__file__}:hostile"
    for run in runs:
        arguments = ["eval", "winrate", str(run), "--judge", spec]
        assert application_of.invoke(application(), arguments, catch_exceptions=False).exit_code == 0
    return write_report(runs, runs[0].parent / "page" / "index.html")


def test_the_page_is_one_file_without_network(page):
    text = page.read_text(encoding="utf-8")
    assert len(text) < 5_000_000
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text.replace('href="http://www.w3.org', ""))
    assert text.count("<script") == 2 and "</script><script>" not in text
    assert "win rate" in text and "grpo" in text


def test_every_figure_has_svg_png_and_csv(page):
    names = {p.stem for p in (page.parent / "figures").glob("*.png")}
    assert names >= {"reward", "kl", "pareto", "length", "missing_eos", "weights", "health", "timings", "winrate"}
    text = page.read_text(encoding="utf-8")
    for name in names:
        assert f'id="figure-{name}"' in text
        rows = list(csv.reader((page.parent / "figures" / f"{name}.csv").open(encoding="utf-8")))
        assert len(rows) > 1 and len({len(r) for r in rows}) == 1
        assert (page.parent / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), "an id stands for one thing"


def test_the_numbers_are_the_runs(page, runs):
    rows = list(csv.DictReader((page.parent / "figures" / "reward.csv").open(encoding="utf-8")))
    logged = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    plotted = [float(r["reward"]) for r in rows if r["run"] == "first" and r["kind"] == "training batch"]
    assert plotted == pytest.approx([m["reward"] for m in logged])
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)[1])
    answers = [a for groups in data[0]["batches"].values() for g in groups for a in g["answers"]]
    assert len(answers) == 4 * 48 and all("weight" in a and "pull" in a and "push" in a for a in answers)


def test_long_runs_are_thinned_and_say_so(runs, monkeypatch):
    monkeypatch.setattr("dualign.eval.report.data.TEXT_BUDGET", 12_000)
    data = collect(runs[:1])[0]
    assert data.batch_count == 4 and set(data.batches) == {0, 3} and all(data.batches.values())
    assert evenly(range(100), 5) == [0, 25, 50, 74, 99] and evenly([1, 2], 5) == [1, 2]


def test_what_is_no_run_or_empty_is_told(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        write_report([tmp_path])
    with pytest.raises(UserError, match=r"is an \.html file"):
        write_report([tmp_path], tmp_path / "page.pdf")


def test_without_matplotlib_the_remedy_is_named(runs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'dualign\[plots\]'"):
        write_report(runs[:1], runs[0].parent / "none.html")


# --- in a browser ---


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def opened(browser, page):
    browser.get(page.as_uri())
    return browser


def cards(browser):
    return browser.find_elements("css selector", ".prompt")


def choose(browser, id, value):
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("id", id)).select_by_value(value)


def count(browser):
    return int(browser.find_element("id", "count").text.split()[0])


def test_it_opens_without_errors_and_completions_are_inert(opened):
    assert opened.title == "dualign: first, second"
    choose(opened, "what", "batch 0")
    hostile_card = next(c for c in cards(opened) if "</script>" in c.text)
    assert HOSTILE.split("\n")[0] in hostile_card.text
    assert not opened.find_elements("css selector", ".prompt img, .prompt script, .prompt b b")
    assert severe(opened) == []
    assert opened.title == "dualign: first, second"


def test_a_batch_shows_k_answers_with_reward_weight_and_factors(opened):
    choose(opened, "what", "batch 1")
    card = cards(opened)[0]
    assert len(card.find_elements("css selector", ".answer")) == 4
    facts = card.find_element("css selector", ".facts").text
    assert re.search(r"reward [+−]\d", facts) and re.search(r"weight \d", facts)
    assert "(π_0/π_t)^α" in facts and "exp(A/β)" in facts
    assert not opened.find_element("id", "with").is_displayed()


def test_before_and_after_stand_side_by_side(opened):
    titles = [e.text.split(" reward")[0] for e in cards(opened)[0].find_elements("css selector", ".facts")]
    assert [t.split("\n")[0] for t in titles] == ["π_0", "after batch 4"]
    choose(opened, "with", "2")
    assert "after batch 2" in cards(opened)[0].text


def test_filter_sort_and_pages(opened):
    assert count(opened) == 24 and len(cards(opened)) == 10
    first = cards(opened)[0].text
    opened.find_element("id", "next").click()
    assert cards(opened)[0].text != first and "page 2 of 3" in opened.find_element("id", "page").text
    opened.find_element("id", "text").send_keys("onerror")
    assert count(opened) == 1
    opened.find_element("id", "text").clear()
    opened.find_element("id", "text").send_keys("no answer says this")
    assert count(opened) == 0
    opened.refresh()
    choose(opened, "sort", "gain")
    gains = [[float(v.replace("−", "-")) for v in re.findall(r"reward ([+−][\d.]+)", c.text)] for c in cards(opened)]
    order = [after - before for before, after in gains]
    assert order == sorted(order, reverse=True) and order[0] > order[-1]
    choose(opened, "what", "batch 0")
    choose(opened, "only", "clipped")
    assert all("clipped" in c.text for c in cards(opened))


def test_runs_and_keys(opened):
    choose(opened, "run", "1")
    assert count(opened) == 24
    body = opened.find_element("css selector", "h1")
    opened.execute_script("document.activeElement.blur()")
    opened.find_element("css selector", "body").send_keys("jj")
    assert opened.switch_to.active_element.id == cards(opened)[1].id
    opened.switch_to.active_element.send_keys("n")
    assert "page 2" in opened.find_element("id", "page").text
    opened.find_element("css selector", "body").send_keys("/")
    assert opened.switch_to.active_element.get_attribute("id") == "text" and body


@pytest.mark.parametrize("dark", [False, True])
def test_phone_and_dark(opened, dark):
    with shown_as(opened, 360, 740, dark):
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 360
        colours = opened.execute_script(
            "const s = getComputedStyle(document.body), t = document.querySelector('figure svg text');"
            "const all = [s.backgroundColor, s.color, getComputedStyle(t.closest('g')).color];"
            "return all.map(c => c.match(/\\d+/g).map(Number))"
        )
        paper, ink, drawn = (sum(c[:3]) / 3 for c in colours)
        assert abs(ink - paper) > 150 and abs(drawn - paper) > 150 and (paper < 60) == dark
