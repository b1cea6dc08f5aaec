"""The page of `report_rag.py` in a browser that reaches nothing: it opens, it filters, it has two themes."""

import json
import re
from pathlib import Path

import pytest

import report_rag as script
from tests import browser
from tests.evaluation.report_files import write_evaluation, write_gold, write_run

pytestmark = browser.NEEDS_CHROMIUM
# What a reader does, and what is to be seen of it; the answer goes into the page's title.
SESSION = """
const seen = [];
const $ = (id) => document.getElementById(id);
const look = () => seen.push([$("count").textContent, $("rows").children.length, $("more").hidden]);
const choose = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("input")); look(); };
look();
choose("search", "land 7?");
choose("search", "LAND oslo nowhere");
choose("search", "");
choose("kind", "right");
choose("run", "1");
choose("kind", "disagree");
choose("kind", "all");
$("more").click();
look();
choose("order", "lowest");
seen.push($("rows").querySelectorAll("tr:first-child td.wrong").length);
const paper = () => getComputedStyle(document.body).backgroundColor;
seen.push(paper());
$("theme").click();
seen.push(paper());
$("theme").click();
seen.push(paper());
const link = $("rows").querySelector("a");
link.click();
seen.push(document.querySelector(`details[data-number="${link.textContent}"]`).open);
document.title = JSON.stringify(seen);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    gold = write_gold(folder / "gold.qa", 120)
    runs = [write_evaluation(folder / f"{n}.txt", gold, accuracy, seed=n) for n, accuracy in ((1, 0.3), (2, 0.8))]
    words = ["--predictions_path", *map(str, runs), "--gold_data_path", str(gold)]
    words += ["--run_dir", str(write_run(folder / "run")), "--output_path", str(folder / "report.html")]
    return Path(script.main(script.parse_args(words)))


def browse(page: Path, *flags: str, address: str = "") -> tuple[str, list[str]]:
    """What the browser prints, and what the page's console says."""
    return browser.browse(f"file://{page}{address}", page.parent / "profile", *flags)


def test_a_reader_filters_orders_and_switches_the_theme(page):
    copy = page.with_name("session.html")
    copy.write_text(page.read_text().replace("</body>", f"<script>{SESSION}</script></body>"))
    dom, console = browse(copy, "--dump-dom")
    assert console == []
    title = re.search(r"<title>(.*?)</title>", dom)[1].replace("&gt;", ">")
    *looks, most_wrong, paper, other, again, is_open = json.loads(title)
    runs = json.loads(re.search(r'id="data">(.*?)</script>', dom)[1])["runs"]
    right = [run["em"].count("1") for run in runs]
    disagree = sum(a != b for a, b in zip(runs[0]["em"], runs[1]["em"], strict=True))
    counts = [120, 12, 0, 120, *right, disagree, 120, 120, 120]
    assert [look[0] for look in looks] == [f"{count} of 120" for count in counts]
    assert [look[1] for look in looks] == [min(count, 50) for count in counts[:-2]] + [120, 50]
    assert [look[2] for look in looks] == [count <= 50 for count in counts[:-2]] + [True, False]
    assert most_wrong >= 1 and is_open
    assert paper != other and again == paper


def test_an_address_says_what_is_looked_for(page):
    dom, console = browse(page, "--dump-dom", address="#q=land+11&kind=wrong&order=highest&run=9")
    assert console == [] and 0 < int(re.search(r'id="count">(\d+) of 120<', dom)[1]) < 12
    assert "land 11" in dom and len(re.findall(r"<tr><td", dom)) < 30


def test_both_themes(page):
    image = pytest.importorskip("matplotlib.image")
    light, dark = (page.with_name(f"{theme}.png") for theme in ("light", "dark"))
    for path in (light, dark):
        shot = [f"--screenshot={path}", "--window-size=1000,1600", "--hide-scrollbars"]
        assert browse(page, *shot, address=f"#theme={path.stem}")[1] == []
    brightness = {path.stem: image.imread(path)[..., :3].mean() for path in (light, dark)}
    assert brightness["light"] > 0.9 and brightness["dark"] < 0.2


def test_the_systems_theme_is_taken(page):
    path = page.with_name("system.png")
    shot = [f"--screenshot={path}", "--window-size=600,600", "--blink-settings=preferredColorScheme=0"]
    browse(page, *shot)
    assert pytest.importorskip("matplotlib.image").imread(path)[..., :3].mean() < 0.3
