"""`report_rag.py`: what its page holds, what it refuses, and how large it gets."""

import json
import os
import re
from html.parser import HTMLParser

import pytest

import report_rag as script
from rag.errors import UserError
from rag.pages.templates import script_json
from tests.evaluation.report_files import write_evaluation, write_files, write_gold, write_run

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


class Page(HTMLParser):
    """The elements of a page, its texts, and its data."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.texts).split())
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
        self.data = json.loads(found[1]) if found else None

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def report(tmp_path):
    """A function that writes a report of files and flags and reads it."""

    def write(*predictions, **flags) -> Page:
        words = ["--output_path", str(tmp_path / "report.html")]
        words += ["--predictions_path", *map(str, predictions)] if predictions else []
        for name, value in flags.items():
            words += [f"--{name}", str(value)]
        return Page(open(script.main(script.parse_args(words)), encoding="utf-8").read())

    return write


@pytest.fixture
def gold(tmp_path):
    return write_gold(tmp_path / "gold.qa", 40)


def test_a_page_has_all_parts(report, gold, tmp_path):
    a = write_evaluation(tmp_path / "before" / "a.txt", gold, 0.3, seed=1)
    b = write_evaluation(tmp_path / "after" / "a.txt", gold, 0.8, seed=2)
    page = report(a, b, gold_data_path=gold, run_dir=write_run(tmp_path / "run"))
    for part in (
        "Scores",
        "Run against run",
        "Training",
        "Retrieval",
        "Calibration",
        "Kinds of questions",
        "Best and worst",
    ):
        assert part in page.text
    assert page.data["shown"] == page.data["total"] == 40 and [run["name"] for run in page.data["runs"]] == [
        "before/a",
        "after/a",
    ]
    assert page.tags.count("svg") == 4 + 2 + 2 + 1, "curves that were logged, recall and precision, two calibrations"
    assert page.tags.count("mark") > 5 and "Not in this run's files" in page.text
    assert report(a, b, gold_data_path=gold, run_dir=tmp_path / "run").text == page.text, "the same each time"


def test_nothing_is_fetched(report, gold, tmp_path):
    page = report(
        write_evaluation(tmp_path / "a.txt", gold, 0.5), gold_data_path=gold, run_dir=write_run(tmp_path / "run")
    )
    assert ("content", POLICY) in page.attributes
    targets = [
        value for name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "data", "srcset")
    ]
    assert targets and all(target.startswith(("#", "data:,")) for target in targets)
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"@import|url\((?!#)", html)


def test_what_files_hold_is_text(report, tmp_path):
    evil = "<script>alert(1)</script>"
    more = f"{evil}</script><!--<img src=x onerror=alert(2)>\u2028 \ud800 & 'q' \"d\" $a$ {{{{ 7 * 7 }}}}"
    gold = tmp_path / "gold.qa"
    gold.write_text(f"{evil}\t{[evil]!r}\n")
    record = {"question": evil, "titles": [more], "texts": [f"{more} {evil}"], "scores": [1.0], "posteriors": [1.0]}
    for name in ("a", "<b>$x$"):
        path = write_files(tmp_path / f"{name}.txt", ["<i>no</i>"], [record])
        path.with_name(f"{path.name}.scores.json").write_text(
            json.dumps(
                {"scores": {f"{evil}_at_1": 0.5}, "settings": {"model_name_or_path": evil}, "index": {evil: evil}}
            )
        )
    run = write_run(tmp_path / "run")
    log = {"step": 1, f"lr{evil}": 1.0, "loss": 1.0}
    (run / "training_log.jsonl").write_text(f"{json.dumps(log)}\n")
    page = report(tmp_path / "a.txt", tmp_path / "<b>$x$.txt", gold_data_path=gold, run_dir=run)
    assert page.tags.count("script") == 2 and "img" not in page.tags and "i" in page.tags
    assert page.data["questions"] == [evil] and page.data["runs"][0]["answers"] == ["<i>no</i>"]
    assert "<i>no</i>" in page.text and "{{ 7 * 7 }}" in page.text and "<b>$x$" in page.text
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_json_in_a_script_ends_no_script():
    content = {"<script>": ["</script>", "<!--", "&lt;", "\u2028"]}
    text = script_json(content)
    assert not set("<>&\u2028") & set(text) and json.loads(text) == content


@pytest.mark.slow
def test_ten_thousand_questions_take_five_megabytes(report, tmp_path):
    gold = write_gold(tmp_path / "gold.qa", 10_000)
    runs = [write_evaluation(tmp_path / f"{n}.txt", gold, 0.5, n_docs=2, words=20, seed=n) for n in (1, 2, 3)]
    page = report(*runs, gold_data_path=gold)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert len(page.data["questions"]) == page.data["total"] == 10_000
    assert page.tags.count("details") < 100, "passages of a bounded number"


def test_long_questions_take_no_more(report, tmp_path):
    (tmp_path / "gold").write_text(f"{'wörd ' * 60}\n" * 10_000)
    records = [{"question": "wörd " * 60, "texts": ["wörd " * 10]}] * 10_000
    a = write_files(tmp_path / "a.txt", ["wörd " * 60] * 10_000, records)
    page = report(a, gold_data_path=tmp_path / "gold", gold_data_mode="ans")
    assert (tmp_path / "report.html").stat().st_size < 5_000_000 and page.data["shown"] == 10_000


# --- Less than all there may be ---------------------------------------------------------------------------------------


def test_a_run_alone(report, tmp_path):
    page = report(run_dir=write_run(tmp_path / "run"))
    assert page.data is None and "All questions" not in page.text and "val" not in page.text.split("Training", 2)[0]


def test_answers_alone(report, gold, tmp_path):
    page = report(write_files(tmp_path / "a.txt", ["Oslo"] * 40), gold_data_path=gold)
    assert "its .jsonl file has no passages' texts" in page.text and "no calibration" in page.text
    assert "Retrieval" not in page.text and page.data["questions"][0].endswith("land 0?")


def test_files_of_earlier_versions(report, gold, tmp_path):
    a = write_evaluation(tmp_path / "a.txt", gold, 0.5)
    records = [json.loads(line) for line in (tmp_path / "a.txt.jsonl").read_text().splitlines()]
    for record in records:
        del record["texts"], record["posteriors"]
    write_files(a, a.read_text().splitlines(), records)
    page = report(a, gold_data_path=gold)
    assert "Signs of collapse" in page.text and "Recall@k" not in page.text and "prior" in page.text


def test_without_gold_there_are_the_scores_that_were_written(report, gold, tmp_path):
    a = write_evaluation(tmp_path / "a.txt", gold, 0.5)
    (tmp_path / "a.txt.scores.json").write_text(json.dumps({"scores": {"em": 0.4321}, "settings": {"n_docs": 3}}))
    page = report(a)
    assert "43.2" in page.text and "give --gold_data_path" in page.text and "em" not in page.data["runs"][0]
    page = report(a, gold_data_path=gold)
    assert "43.21 in its .scores.json" in page.text, "another gold file than eval_rag.py's"


def test_titles(report, tmp_path):
    (tmp_path / "titles").write_text("Oslo\nRome\tBonn\n")
    a = write_files(
        tmp_path / "a.tsv", ["Oslo\tKiel", "Kiel\tBonn"], [{"titles": ["Oslo", "Kiel"]}, {"titles": ["Kiel", "Bonn"]}]
    )
    page = report(a, gold_data_path=tmp_path / "titles", gold_data_mode="titles")
    assert "Precision@k" in page.text and "MRR" in page.text and page.data["runs"][0]["first"] == [1, 2]


def test_other_questions_are_not_compared(report, gold, tmp_path):
    a = write_evaluation(tmp_path / "a.txt", gold, 0.5)
    b = write_evaluation(tmp_path / "b.txt", write_gold(tmp_path / "other", 30), 0.5)
    page = report(a, b)
    assert "b: other questions than a's" in page.text and "Run against run" not in page.text


# --- Mistakes ---------------------------------------------------------------------------------------------------------


def damage(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: damage(f / "a.txt.jsonl", "{}\n" * 39 + "{\n"),
            r"--predictions_path .*a\.txt: .*a\.txt\.jsonl, line 40 is damaged .*--recalculate",
        ),
        (lambda f: damage(f / "a.txt.jsonl", "[]\n" * 40), "line 1 is damaged .no JSON object"),
        (lambda f: damage(f / "a.txt.jsonl", '{"titles": [1]}\n' * 40), "its titles are no list of texts"),
        (lambda f: damage(f / "a.txt.jsonl", '{"scores": [NaN]}\n' * 40), "its scores are no list of numbers"),
        (lambda f: damage(f / "a.txt.jsonl", '{"scores": [1], "texts": []}\n' * 40), "its lists differ in length"),
        (lambda f: damage(f / "a.txt.jsonl", "{}\n"), "40 lines, but .*a.txt.jsonl has 1; finish the evaluation"),
        (lambda f: damage(f / "a.txt.scores.json", "{"), "--predictions_path .*a.txt: .*scores.json is damaged"),
        (lambda f: damage(f / "a.txt", ""), "--predictions_path .*a.txt is empty; run eval_rag.py first"),
        (lambda f: damage(f / "a.txt", "x\n"), "has 1 lines, but --gold_data_path .* has 40; finish the evaluation"),
        (lambda f: (f / "a.txt").unlink(), "--predictions_path .*a.txt does not exist; give a --predictions_path"),
        (lambda f: (f / "gold.qa").unlink(), "--gold_data_path .*gold.qa does not exist"),
        (lambda f: damage(f / "gold.qa", "no tab\n"), "--gold_data_path .*gold.qa, line 1: .* is expected"),
        (lambda f: damage(f / "run" / "metrics.json", "{"), "--run_dir: .*metrics.json is damaged"),
        (lambda f: damage(f / "run" / "hparams.json", "[]"), "--run_dir: .*hparams.json is damaged"),
        (lambda f: damage(f / "run" / "training_log.jsonl", "{\n"), "--run_dir: .*_log.jsonl, line 1 is damaged"),
        (lambda f: [file.unlink() for file in (f / "run").iterdir()], "--run_dir .* has neither metrics.json nor"),
    ],
)  # fmt: skip
def test_one_line_says_what_is_wrong(change, message, report, gold, tmp_path):
    a = write_evaluation(tmp_path / "a.txt", gold, 0.5)
    run = write_run(tmp_path / "run")
    change(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        report(a, gold_data_path=gold, run_dir=run)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--run_dir and --predictions_path are missing; give one"),
        (["--run_dir", "gone"], "--run_dir gone does not exist; give the --output_dir"),
        (["--run_dir", "a.txt"], "--run_dir a.txt is a file, not a folder"),
        (["--predictions_path", "a.txt", "./a.txt"], "names one file twice"),
        (["--run_dir", ".", "--gold_data_path", "a.txt"], "--gold_data_path judges predictions; give"),
        (["--predictions_path", "a.txt", "--output_path", "a.txt"], "--output_path a.txt is a.txt, which is read"),
        (["--predictions_path", "a.txt", "--output_path", "a.txt/x"], "--output_path a.txt/x cannot be written: "),
        (["--predictions_path", "a.txt", "--output_path", "/proc/x.html"], "--output_path /proc/x.html cannot be"),
    ],
)  # fmt: skip
def test_paths_that_cannot_be_used(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Oslo\n")
    with pytest.raises(UserError, match=message):
        script.main(script.parse_args(words))
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_missing_package_is_one_line(gold, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    a = write_evaluation(tmp_path / "a.txt", gold, 0.5)
    with pytest.raises(UserError, match=r"--output_path: .* need matplotlib; pip install matplotlib$"):
        script.main(script.parse_args(["--predictions_path", str(a), "--output_path", str(tmp_path / "r.html")]))
    assert not (tmp_path / "r.html").exists()
