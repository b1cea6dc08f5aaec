"""Line reading, SQuAD v1.1 metrics, the dataset's batches, whole-or-nothing files, progress."""

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import git
import pytest

import utils_rag
from rag.errors import UserError
from rag.files import (
    atomic_folder,
    atomic_write,
    free_bytes,
    load_json,
    read_lines,
    remove,
    save_json,
    space_problems,
    write_lines,
)
from rag.metrics import (
    answer_recall_at_k,
    calculate_exact_match,
    exact_match_score,
    f1_score,
    metric_max_over_ground_truths,
    normalize_answer,
    precision_at_k,
    reciprocal_rank,
)
from rag.progress import progress
from tests.conftest import ROOT
from utils_rag import Seq2SeqDataset, check_data_files, get_git_info, save_git_info, trim_batch

# --- Text files -------------------------------------------------------------------------------------------------------


def test_lines_end_at_newlines_and_nowhere_else(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffone\u2028still one\r\ntwo\x0b\x85\x0c\rthree\n\n".encode())
    assert read_lines(path) == ["one\u2028still one", "two\x0b\x85\x0c", "three", ""]


@pytest.mark.parametrize(
    ("text", "lines"), [("", []), ("\n", [""]), ("a", ["a"]), ("a\n", ["a"]), ("a\n\n", ["a", ""])]
)
def test_no_phantom_line_at_the_end(tmp_path, text, lines):
    (tmp_path / "f").write_text(text)
    assert read_lines(tmp_path / "f") == lines


def test_written_lines_come_back(tmp_path):
    lines = ["a", "", "Łódź\u2028b", " c ", ""]
    write_lines(lines, tmp_path / "new" / "f")
    assert read_lines(tmp_path / "new" / "f") == lines
    with pytest.raises(AssertionError):
        write_lines(["two\nlines"], tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_other_encodings_are_named(tmp_path):
    (tmp_path / "latin").write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin is not UTF-8 \(byte 3"):
        read_lines(tmp_path / "latin")


# --- Metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel-Tower!", "eiffeltower"),
        ("an apple a day", "apple day"),
        ("Theatre of the Anthill", "theatre of anthill"),
        ("\tA\u00a0B ", "b"),
        ("“quoted”", "“quoted”"),  # only ASCII punctuation goes
        ("the", ""),
    ],
)
def test_normalisation_of_the_squad_script(text, normal):
    assert normalize_answer(text) == normal


def test_exact_match_and_f1_by_hand():
    assert exact_match_score("The U.S.A.", "usa")
    assert not exact_match_score("usa today", "usa")
    assert f1_score("The cat sat", "cat sat down") == pytest.approx(0.8)  # precision 2/2, recall 2/3
    assert f1_score("a b b c", "b b d") == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    assert f1_score("", "") == 0.0 and f1_score("x", "y") == 0.0
    assert metric_max_over_ground_truths(f1_score, "one two", ["three", "two", "one two"]) == 1.0
    assert calculate_exact_match(["a dog", "cat"], ["dog", "dogs"]) == 0.5
    with pytest.raises(ValueError, match="shorter"):
        calculate_exact_match(["a", "b"], ["a"])


def test_metric_properties_on_random_answers():
    rng = random.Random(0)
    words = ["the", "a", "river", "Rhine", "x.", "42", "é", ""]
    for _ in range(300):
        first, second = (" ".join(rng.choices(words, k=rng.randint(0, 5))) for _ in range(2))
        assert f1_score(first, second) == pytest.approx(f1_score(second, first))
        assert 0.0 <= f1_score(first, second) <= 1.0
        assert normalize_answer(normalize_answer(first)) == normalize_answer(first)
        if exact_match_score(first, second):
            assert f1_score(first, second) == (1.0 if normalize_answer(first) else 0.0)


def test_precision_counts_distinct_gold_titles_over_k():
    retrieved, gold = ["B", "A", "A", "C"], ["A", "C"]
    assert [precision_at_k(retrieved, gold, k) for k in (1, 2, 3, 4, 5)] == [0, 1 / 2, 1 / 3, 2 / 4, 2 / 5]
    assert reciprocal_rank(retrieved, gold) == 1 / 2
    assert reciprocal_rank(retrieved, ["Z"]) == 0.0 and reciprocal_rank([], ["A"]) == 0.0


def test_recall_is_monotone_in_k_and_bounded_by_rank():
    rng = random.Random(1)
    for _ in range(200):
        titles = [rng.choice("abcdefgh") for _ in range(6)]
        gold = rng.sample("abcdefgh", 2)
        rank = reciprocal_rank(titles, gold)
        assert (precision_at_k(titles, gold, 6) > 0) == (rank > 0)
        texts = [f"{title} passage" for title in titles]
        found = [answer_recall_at_k(texts, gold, k) for k in range(1, 7)]
        assert found == sorted(found)
        assert rank == (1 / (found.index(True) + 1) if any(found) else 0.0)


def test_answers_are_found_as_whole_words():
    passages = ["Romeo and Juliet", "It flows through Sa\u0303o Paulo (Brazil).", "In 1,024 steps; U.S. soil"]
    assert not answer_recall_at_k(passages, ["Rome"], 3)
    assert answer_recall_at_k(passages, ["rome", "JULIET"], 1)
    assert answer_recall_at_k(passages, ["s\u00e3o  paulo"], 2)  # composed and decomposed letters are one
    assert not answer_recall_at_k(passages, ["sao paulo"], 3)
    assert not answer_recall_at_k(passages, ["são paulo"], 1)
    assert answer_recall_at_k(passages, ["1,024"], 3) and answer_recall_at_k(passages, ["U.S."], 3)
    assert not answer_recall_at_k(passages, ["", "  "], 3)


# --- The dataset ------------------------------------------------------------------------------------------------------


def word_tokenizer(template, specials):
    """A whitespace tokenizer that frames its text as `template` says, and pads on the LEFT unless told otherwise."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*specials, "<unk>", *["who", "what", "is", "the", "river", "rhine", "paris", "here"]]
    vocab = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(word, vocab[word]) for word in specials]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=specials[0], padding_side="left")


@pytest.fixture
def data_dir(tmp_path):
    (tmp_path / "val.source").write_text("who is the river\nwhat\u2028is\r\nwho who\n")
    (tmp_path / "val.target").write_text("rhine\nparis river here\nhere\n")
    return tmp_path


def test_batches_are_framed_and_padded_on_the_right(data_dir):
    bert = word_tokenizer("[CLS] $A [SEP]", ["[PAD]", "[CLS]", "[SEP]"])
    t5 = word_tokenizer("$A </s>", ["<pad>", "</s>"])
    dataset = Seq2SeqDataset(bert, data_dir, 16, 16, "val", prefix="who ", target_tokenizer=t5)
    assert len(dataset) == 3
    assert dataset[1] == {"source": "who what\u2028is", "target": "paris river here", "index": 1}
    batch = dataset.collate_fn([dataset[1], dataset[2]])
    assert [bert.decode(ids) for ids in batch["input_ids"]] == ["[CLS] who what is [SEP]", "[CLS] who who who [SEP]"]
    assert batch["labels"].tolist()[1][2:] == [0, 0] and t5.decode(batch["labels"][0]) == "paris river here </s>"
    assert batch["attention_mask"].tolist() == [[1] * 5] * 2
    assert (batch["source"], batch["index"]) == (["who what\u2028is", "who who who"], [1, 2])
    assert len(Seq2SeqDataset(bert, data_dir, 16, 16, "val", n_obs=2)) == 2


def test_a_long_target_is_cut_and_said_so(data_dir, caplog):
    bert = word_tokenizer("[CLS] $A [SEP]", ["[PAD]", "[CLS]", "[SEP]"])
    dataset = Seq2SeqDataset(bert, data_dir, 4, 3, "val")
    assert "1 of 3 targets of val.target are longer than 3 tokens (the longest has 5)" in caplog.text
    batch = dataset.collate_fn([dataset[i] for i in range(3)])
    assert batch["input_ids"].shape == (3, 4) and batch["labels"].shape == (3, 3)
    assert bert.decode(batch["input_ids"][0]) == "[CLS] who is [SEP]"


def test_a_dataset_serves_a_data_loader(data_dir):
    from torch.utils.data import DataLoader

    bert = word_tokenizer("[CLS] $A [SEP]", ["[PAD]", "[CLS]", "[SEP]"])
    dataset = Seq2SeqDataset(bert, data_dir, 16, 16, "val")
    batches = list(DataLoader(dataset, batch_size=2, collate_fn=dataset.collate_fn))
    assert [batch["index"] for batch in batches] == [[0, 1], [2]]


def test_data_problems_are_named_together(tmp_path):
    (tmp_path / "train.source").write_text("a\n \n\u00a0\nd\n")
    (tmp_path / "train.target").write_text("a\nb\nc\n")
    (tmp_path / "val.source").write_text("")
    problems = "\n".join(check_data_files(tmp_path, ["train", "val"]))
    assert "train.source: blank lines, 2 in all, the first is line 2" in problems
    assert "train.source has 4 lines but train.target has 3 lines" in problems
    assert "val.source is empty" in problems and "val.target is missing" in problems
    assert len(problems.splitlines()) == 4
    assert "is not a folder" in check_data_files(tmp_path / "nowhere", ["train"])[0]


def test_good_data_has_no_problem(data_dir):
    assert check_data_files(data_dir, ["val"]) == []


def test_trim_batch_drops_common_padding():
    import torch

    ids = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]])
    assert trim_batch(ids, 0).tolist() == [[5, 6], [7, 0]]
    trimmed, mask = trim_batch(ids, 0, attention_mask=ids.ne(0).long())
    assert trimmed.shape == mask.shape == (2, 2) and mask.tolist() == [[1, 1], [1, 0]]


# --- Files ------------------------------------------------------------------------------------------------------------


def test_a_broken_write_leaves_the_old_file_and_no_rest(tmp_path):
    save_json({"title": "Łódź"}, tmp_path / "f.json")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "f.json") as file:
        file.write("half")
        raise RuntimeError
    assert load_json(tmp_path / "f.json") == {"title": "Łódź"}
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]
    with atomic_write(tmp_path / "b", "wb") as file:
        file.write(b"\r\n")
    assert (tmp_path / "b").read_bytes() == b"\r\n"


def test_a_folder_takes_its_place_whole(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "model") as folder:
            (folder / content).write_text(content)
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new"]


def test_files_and_folders_are_removed_whole(tmp_path):
    for name in ("folder", ".hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    left = tmp_path / f".folder.{os.getpid()}.old"  # by a run that was killed, of the same process id
    left.mkdir()
    (left / "file").touch()
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "file").touch()
    for name in ("folder", ".hidden", "link", "file", "nothing"):
        remove(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_space_is_added_up_by_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(utils_rag.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 if path.exists() else -1))
    assert free_bytes(tmp_path / "to" / "be" / "made") == 100
    assert space_problems("--x y", {tmp_path / "a": 60, tmp_path / "b" / "c": 40}, "free some") == []
    assert space_problems("--x y", {tmp_path / "a": 60, tmp_path / "b" / "c": 1041}, "free some") == [
        f"--x y: 1,101 bytes are needed and 100 are free at {tmp_path}; free some"
    ]


def test_git_log_is_written_in_and_outside_a_checkout(tmp_path, monkeypatch):
    save_git_info(tmp_path)
    assert set(load_json(tmp_path / "git_log.json")) == {"repo_id", "repo_sha", "repo_branch", "hostname"}
    monkeypatch.setattr(utils_rag, "__file__", str(tmp_path / "utils_rag.py"))
    assert get_git_info()["repo_sha"] is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert get_git_info()["repo_sha"] is None and get_git_info()["hostname"]


def test_git_info_of_a_repository_a_detached_head_and_one_without_commits(tmp_path, monkeypatch):
    repo = git.Repo.init(tmp_path, initial_branch="trunk")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.setattr(utils_rag, "__file__", str(tmp_path / "a" / "b" / "utils_rag.py"))
    found = {"repo_id": str(tmp_path), "repo_branch": "trunk", "repo_sha": None}
    assert found.items() <= get_git_info().items()
    author = git.Actor("A", "a@example.org")
    found["repo_sha"] = repo.index.commit("first", author=author, committer=author).hexsha
    assert found.items() <= get_git_info().items()
    repo.head.reference = repo.head.commit
    assert (found | {"repo_branch": "HEAD"}).items() <= get_git_info().items()


def test_git_info_without_the_git_program(tmp_path):
    code = "import json, utils_rag; print(json.dumps(utils_rag.get_git_info()))"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert answer.stderr == ""
    found = json.loads(answer.stdout)
    assert found.pop("hostname") and set(found.values()) == {None}


# --- Progress and import ----------------------------------------------------------------------------------------------


def test_progress_logs_lines_when_piped(capsys, monkeypatch):
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(utils_rag.time, "monotonic", lambda: next(clock))
    assert list(progress([[1, 2], [3, 4], [5, 6], [7]], 7, "Answering", "questions", size=len))[-1] == [7]
    assert capsys.readouterr().err.splitlines() == [
        "Answering: 6 of 7 questions, 0.5 questions/s, 00:02 left",
        "Answering: 7 questions in 00:20, 0.3 questions/s",
    ]


def test_import_is_light():
    code = "import sys, utils_rag, json; print(json.dumps([m for m in ('torch', 'transformers') if m in sys.modules]))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(answer) == []
