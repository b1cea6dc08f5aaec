"""The quickstart's data keeps its promises; the quickstart runs in small, and a second run finds its work done."""

import errno
import filecmp
import json
import re

import pytest
import torch

import finetune_rag
from lightning_base import training_device
from quickstart import __main__ as quickstart_main
from quickstart import data as quickstart_data
from quickstart import language_model, weights
from quickstart.steps import Step, Steps
from rag.errors import UserError
from rag.evaluation.predictors import pick_device
from rag.files import read_lines
from rag.knowledge.workers import EncodingResources
from rag.metrics import normalize_answer
from rag.training.arguments import trainer_kwargs
from tests.conftest import ROOT
from tests.quickstart.printed import parse_next_commands, require_calm
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
def test_quickstart_in_small(tmp_path, capfd):
    args = quickstart_main.parse_args(["--smoke", "--output_dir", str(tmp_path)])
    before = Steps(tmp_path / "none", {}, "").peak_memory_mb  # of the tests that came before in this process
    results = quickstart_main.main(args)
    assert json.loads((tmp_path / "quickstart_results.json").read_text()) == results
    assert "RAG report" in (tmp_path / "report.html").read_text(encoding="utf-8")
    names = ["precision_at_1", "precision_at_5", "em_before", "em_after", "f1_after", "seconds", "peak_memory_mb"]
    assert list(results) == names
    assert results["precision_at_1"] == 1.0
    assert results["em_before"] == 0.0
    assert 0 < results["peak_memory_mb"] < before + 4096
    out, err = capfd.readouterr()
    headings = require_calm(out, tmp_path)
    assert [heading.split(":")[0] for heading in headings] == [
        f"{number}/9 {name}" for number, name in enumerate(quickstart_main.PLAN, start=1)
    ]
    assert all(re.match(r"(Embedding|Indexing|Retrieving|Answering): ", line) for line in err.splitlines()), err
    assert out.count("Q: ") == 3 and out.count("\nQuestion: ") == 2
    assert "$ python finetune_rag.py --" in out
    parse_next_commands(out)

    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = quickstart_main.main(args)  # its memory is this process's, which only grows
    assert {**again, "peak_memory_mb": 0} == {**results, "peak_memory_mb": 0}
    out, _ = capfd.readouterr()
    assert out.count("(done in an earlier run, in ") == 9
    require_calm(out, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files
    with pytest.raises(UserError, match=r"holds what `python -m quickstart --smoke` has left, not `python -m quicks"):
        quickstart_main.main(quickstart_main.parse_args(["--output_dir", str(tmp_path)]))


# --- What goes wrong --------------------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_told_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in ("file", "file/below"):
        with pytest.raises(UserError, match=r"^--output_dir .*file.*; give the path of a folder that can be written"):
            quickstart_main.main(quickstart_main.parse_args(["--output_dir", str(tmp_path / path)]))
    (tmp_path / "steps.json").write_text("{")
    with pytest.raises(UserError, match=r"steps.json is damaged .*; remove it"):
        quickstart_main.main(quickstart_main.parse_args(["--output_dir", str(tmp_path)]))
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name, *rest: None)
    for module in (quickstart_main, language_model):
        with pytest.raises(UserError, match=r"^the report's charts need matplotlib: pip install matplotlib"):
            module.main(module.parse_args(["--output_dir", str(tmp_path / "new")]))
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_a_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(quickstart_main, "make_models", full)
    with pytest.raises(UserError, match=r"^--output_dir .* cannot be written: the disk is full; make room"):
        quickstart_main.main(quickstart_main.parse_args(["--output_dir", str(tmp_path)]))


def test_what_takes_long_is_told_before(tmp_path, capsys):
    steps = Steps(tmp_path, {"One": Step("does this", 40), "Two": Step("does that", 240)}, "")
    for name in ("One", "Two", "One"):
        with steps(name, tmp_path / name):
            (tmp_path / name).touch()
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("===")] == [
        "=== 1/2 One: does this (about 40 s)",
        "=== 2/2 Two: does that (about 4 min)",
        "=== 1/2 One: does this (about 40 s)",
    ]
    steps = Steps(tmp_path, steps.plan, "")
    with steps("One", tmp_path / "One"):
        pass
    assert capsys.readouterr().out == "\n=== 1/2 One: does this (done in an earlier run, in 0.0 s)\n"


# --- A GPU ------------------------------------------------------------------------------------------------------------


def test_a_gpu_is_used_where_there_is_one(monkeypatch):
    """As far as settings show it: nothing keeps the scripts to the CPU, and each takes a GPU by itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    common = ["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o"]
    for settings in (quickstart_main.FINETUNING, language_model.FINETUNING):
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        index = ["--index_name", "custom", "--passages_path", "p", "--index_path", "i"]
        args = finetune_rag.parse_args([*common, *words, *index])
        assert training_device(args).type == "cuda"
        assert trainer_kwargs(args)["devices"] == "auto"
    assert not {"device", "index_device"} & (quickstart_main.ANSWERING | language_model.ANSWERING).keys()
    assert pick_device(None).type == "cuda"
    assert EncodingResources(None, None, "auto", None).device == "cuda"
