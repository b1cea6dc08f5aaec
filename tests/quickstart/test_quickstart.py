"""The quickstart's data keeps its promises; the quickstart runs in small, and a second run finds its work done."""

import filecmp
import json

import pytest

from quickstart import __main__ as quickstart_main
from quickstart import data as quickstart_data
from quickstart import weights
from quickstart.steps import Steps
from rag.files import read_lines
from rag.metrics import normalize_answer
from tests.conftest import ROOT
from tests.quickstart.test_weights import needs_weights

TEST_DATA = ROOT / "test_data"
WEIGHTS = needs_weights(weights.MINILM_PACKAGE)


@pytest.fixture(scope="module")
def documents():
    header, *lines = read_lines(TEST_DATA / "my_knowledge_dataset.csv")
    assert header == "title\ttext"
    pairs = [line.split("\t") for line in lines]
    documents = dict(pairs)
    assert len(documents) == len(pairs), "titles are unique"
    return documents


def questions(split):
    return list(zip(read_lines(TEST_DATA / f"{split}.source"), read_lines(TEST_DATA / f"{split}.target"), strict=True))


def test_committed_data_is_what_the_command_writes(tmp_path):
    counts = quickstart_data.main(quickstart_data.parse_args(["--output_dir", str(tmp_path)]))
    written = sorted(path.name for path in tmp_path.iterdir())
    same, changed, missing = filecmp.cmpfiles(tmp_path, TEST_DATA, written, shallow=False)
    assert (sorted(same), changed, missing) == (written, [], [])
    assert counts["test"] == 250


def test_committed_data_is_small():
    assert sum(path.stat().st_size for path in TEST_DATA.iterdir()) < 2_000_000


def test_some_documents_are_split(documents):
    lengths = [len(text.split()) for text in documents.values()]
    assert sum(length > 100 for length in lengths) > 100
    assert sum(length < 50 for length in lengths) > len(documents) / 2


def test_answers_stand_in_the_documents(documents):
    pages = read_lines(TEST_DATA / "test.pages")
    for title, (question, answer) in zip(pages, questions("test"), strict=True):
        assert title in question
        assert f" {normalize_answer(answer)}" in normalize_answer(documents[title])


def test_test_cities_are_in_no_training_question(documents):
    pages = read_lines(TEST_DATA / "test.pages")
    assert len(set(pages)) == len(pages)
    asked = " ".join(question for split in ("train", "val") for question, _ in questions(split))
    named = {title for title in documents if f" {title}?" in asked or f" {title} " in asked}
    assert len(named) > len(documents) / 2
    assert not named & set(pages)


def test_qa_file_says_the_same_as_source_and_target():
    lines = [line.split("\t") for line in read_lines(TEST_DATA / "test.qa")]
    assert [(question, *json.loads(answers)) for question, answers in lines] == questions("test")


def test_names_are_compared_as_the_tokenizer_reads_them():
    assert quickstart_data.folded("São Tomé") == "sao tome"
    assert quickstart_data.folded("İzmir") == "izmir"


def test_nearest_larger_city():
    def city(name, population, longitude):
        return {"name": name, "population": population, "latitude": 0.0, "longitude": longitude}

    world = [city("small", 1, 0.0), city("middle", 2, 3.0), city("large", 3, 1.0), city("equal", 1, 0.1)]
    quickstart_data.add_nearest_larger(world, world)
    assert [place["near"] for place in world] == ["large"] * 4


@pytest.mark.slow
@WEIGHTS
def test_quickstart_in_small(tmp_path, capsys):
    args = quickstart_main.parse_args(["--smoke", "--output_dir", str(tmp_path)])
    before = Steps(tmp_path / "none.json").peak_memory_mb  # of the tests that came before in this process
    results = quickstart_main.main(args)
    assert json.loads((tmp_path / "quickstart_results.json").read_text()) == results
    assert "RAG report" in (tmp_path / "report.html").read_text(encoding="utf-8")
    names = ["precision_at_1", "precision_at_5", "em_before", "em_after", "f1_after", "seconds", "peak_memory_mb"]
    assert list(results) == names
    assert results["precision_at_1"] == 1.0
    assert results["em_before"] == 0.0
    assert 0 < results["peak_memory_mb"] < before + 4096
    printed = capsys.readouterr().out
    assert printed.count("Q: ") == 5
    assert "$ python finetune_rag.py --" in printed

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = quickstart_main.main(args)  # its memory is this process's, which only grows
    assert {**again, "peak_memory_mb": 0} == {**results, "peak_memory_mb": 0}
    assert capsys.readouterr().out.count("(done in an earlier run)") == 7
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files
