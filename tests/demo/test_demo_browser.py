"""The page of `demo_rag.py` in a browser: an address asks, a reader asks, what is pointed at is shown, two themes."""

import html
import json
import re

import pytest

from tests import browser
from tests.conftest import PASSAGES, QUESTIONS

pytestmark = browser.NEEDS_CHROMIUM
QUESTION = QUESTIONS[0][0]
ADDRESS = f"/?q={QUESTION.replace(' ', '+')}"
# The browser's clock stands still while a whole response is waited for, but not while one is read line by line: who
# waits for an answer asks for passages, which come in turn.
UNTIL = """
const $ = (id) => document.getElementById(id);
const all = (selector) => [...document.querySelectorAll(selector)];
const texts = (selector) => all(selector).map((one) => one.textContent);
const request = { method: "POST", headers: { "Content-Type": "application/json" }, body: '{"question": "oslo"}' };
const until = async (is) => { while (!is()) await fetch("/search", request).then((found) => found.text()); };
const answered = () => texts(".facts").every((text) => text.includes("p(y|x)"));
"""
WAIT = "until(answered);"
# What a reader does, and what is to be seen of it; the answer goes into the page's title.
SESSION = """
const seen = {};
const posteriors = () => texts(".share:nth-of-type(4) output");
(async () => {
  await until(answered);
  seen.first = [texts(".answer")[0], texts(".passage strong"), posteriors()];
  const token = all(".tokens button")[0];
  token.dispatchEvent(new Event("mouseenter"));
  seen.pointed = [texts(".tokens button"), token.getAttribute("aria-pressed"), posteriors()];
  all(".tokens")[0].dispatchEvent(new Event("mouseleave"));
  seen.left = [token.getAttribute("aria-pressed"), posteriors()];
  seen.table = texts("td.weight");
  $("n_docs").value = "99";
  $("search").click();
  seen.refused = [$("form").checkValidity(), texts(".passage strong").length];
  $("n_docs").value = "8";
  $("search").click();
  await until(() => texts(".facts")[0].startsWith("8 passages"));
  seen.search = [texts(".answer")[0], texts(".passage strong"), all(".share:nth-of-type(4)")[0].hidden];
  seen.address = location.search;
  $("question").value = "<img src=x onerror=alert(1)>";
  $("form").requestSubmit();
  await until(answered);
  seen.images = all("img").length;
  document.title = JSON.stringify(seen);
})();
"""


def browse(client, address: str, profile, *flags: str, script: str = WAIT) -> tuple[str, list[str]]:
    """What the browser prints of the page with a script added to it, and what the page's console says."""
    server, page = client.server, client.server.page
    server.page = page.replace(b"</body>", f'<script nonce="{server.nonce}">{UNTIL}{script}</script></body>'.encode())
    try:
        return browser.browse(f"http://127.0.0.1:{client.port}{address}", profile, *flags)
    finally:
        server.page = page


def test_a_reader_asks_points_and_searches(client, tmp_path):
    expected = client.ask(QUESTION)
    dom, console = browse(client, ADDRESS, tmp_path, "--dump-dom", script=SESSION)
    assert console == []
    seen = json.loads(html.unescape(re.search(r"<title>(.*?)</title>", dom)[1]))

    def percents(shares):
        return [pytest.approx(100 * share, abs=0.06) for share in shares]

    def numbers(shown):
        return [float(text.removesuffix("%")) for text in shown]

    answer, titles, posteriors = seen["first"]
    assert (answer, titles) == (expected["answer"], expected["titles"])
    assert numbers(posteriors) == percents(expected["posteriors"])
    tokens, pressed, shares = seen["pointed"]
    assert (tokens, pressed) == (expected["tokens"], "true")
    assert numbers(shares) == percents(expected["token_posteriors"][0])
    assert seen["left"] == ["false", posteriors]
    rows = zip(*expected["token_posteriors"], strict=True)  # of the passages
    assert numbers(seen["table"]) == percents(share for row in rows for share in row)
    assert seen["refused"] == [False, 3]
    answer, titles, hidden = seen["search"]
    assert (answer, hidden) == ("", True) and sorted(titles) == sorted(title for title, _ in PASSAGES)
    assert seen["address"] == ADDRESS[1:] + "&n_docs=8&passages=only"
    assert seen["images"] == 0


def test_two_models_side_by_side(serve, rag_folder, checkpoint, tmp_path):
    client = serve(rag_folder, compare_with=checkpoint("rag_sequence", "t5"))
    dom, console = browse(client, ADDRESS + "&n_docs=2", tmp_path, "--dump-dom")
    assert console == []
    answers = re.findall(r'<p class="answer"[^>]*>([^<]*)</p>', dom)
    assert answers == [client.ask(QUESTION, n_docs=2, model=model)["answer"] for model in (0, 1)]
    assert dom.count('<div class="passage">') == 4 and dom.count('class="tokens"><button') == 1


def test_both_themes(client, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    for theme in ("light", "dark"):
        shot = [f"--screenshot={tmp_path / theme}.png", "--window-size=1000,1200", "--hide-scrollbars"]
        assert browse(client, f"{ADDRESS}#theme={theme}", tmp_path / "profile", *shot)[1] == []
    brightness = {name: image.imread(tmp_path / f"{name}.png")[..., :3].mean() for name in ("light", "dark")}
    assert brightness["light"] > 0.9 and brightness["dark"] < 0.2
