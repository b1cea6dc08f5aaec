"""utils_rag.py: the finetuning dataset and its checks, and where a result came from."""

import json
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import git
import pytest

import utils_rag
from rag.errors import UserError
from tests.conftest import ROOT
from tests.training.lightning_toy import ToyTokenizer
from utils_rag import (
    Seq2SeqDataset,
    data_file_problems,
    encode_line,
    flatten_list,
    get_git_info,
    is_rag_model,
    lmap,
    load_json,
    pickle_save,
    save_git_info,
    save_json,
    set_extra_model_params,
    trim_batch,
)


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


def test_arguments_of_the_public_suite_are_taken(data_dir):
    bert = word_tokenizer("[CLS] $A [SEP]", ["[PAD]", "[CLS]", "[SEP]"])
    dataset = Seq2SeqDataset(bert, data_dir, 16, 16, "val", None, "en", "de", "who ")
    assert len(dataset) == 3 and dataset[0]["source"] == "who who is the river"
    assert (dataset.src_lang, dataset.tgt_lang) == ("en", "de")
    assert Seq2SeqDataset.get_char_lens(data_dir / "val.target") == [5, 16, 4]


def test_the_tokenizers_of_a_rag_tokenizer_read_each_their_side(data_dir):
    from transformers import RagTokenizer

    bert = word_tokenizer("[CLS] $A [SEP]", ["[PAD]", "[CLS]", "[SEP]"])
    t5 = word_tokenizer("$A </s>", ["<pad>", "</s>"])
    dataset = Seq2SeqDataset(RagTokenizer(bert, t5), data_dir, 16, 16, "val")
    batch = dataset.collate_fn([dataset[0]])
    assert bert.decode(batch["input_ids"][0]) == "[CLS] who is the river [SEP]"
    assert t5.decode(batch["labels"][0]) == "rhine </s>"


def test_encode_line_cuts_and_pads_on_the_side_asked_for():
    bert = word_tokenizer("[CLS] $A [SEP]", ["[PAD]", "[CLS]", "[SEP]"])
    assert bert.decode(encode_line(bert, "who is", 6, "left")["input_ids"][0]) == "[PAD] [PAD] [CLS] who is [SEP]"
    assert bert.decode(encode_line(bert, "who is", 6, "right")["input_ids"][0]) == "[CLS] who is [SEP] [PAD] [PAD]"
    line = encode_line(bert, "who is the river", 4, "right", pad_to_max_length=False)
    assert bert.decode(line["input_ids"][0]) == "[CLS] who is [SEP]" and bert.padding_side == "left"


def test_small_helpers():
    assert lmap(str.upper, "ab") == ["A", "B"] and flatten_list([[1], [], [2, 3]]) == [1, 2, 3]
    assert is_rag_model("rag_token") and not is_rag_model("bart")


def test_json_is_written_as_it_is_asked_for(tmp_path):
    save_json({"ö": 1}, tmp_path / "a.json")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ö": 1\n}\n'
    save_json({"b": 1, "ö": 2}, tmp_path / "a.json", indent=None, ensure_ascii=True, sort_keys=True)
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{"b": 1, "\\u00f6": 2}\n'


def test_a_file_of_the_users_may_be_a_link(tmp_path):
    for save, name in ((save_json, "a.json"), (pickle_save, "a.pkl")):
        (tmp_path / "link").symlink_to(tmp_path / name)
        save([1], tmp_path / "link")
        assert (tmp_path / name).is_file() and (tmp_path / "link").is_symlink()
        (tmp_path / "link").unlink()


def test_plain_data_alone_are_pickled(tmp_path):
    settings = {"a": [1, 2.5, None, "x"], ("b",): {3}}
    pickle_save(settings, tmp_path / "plain.pkl")
    assert pickle.loads((tmp_path / "plain.pkl").read_bytes()) == settings
    for refused in (Namespace(a=1), {"a": len}, [Path], lambda: 1):
        with pytest.raises(TypeError, match="use save_json"):
            pickle_save(refused, tmp_path / "refused.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["plain.pkl"]


def test_settings_move_from_the_flags_into_the_config():
    from transformers import T5Config

    hparams, config = set_extra_model_params(
        ("dropout", "encoder_layerdrop"), Namespace(dropout=0.3, encoder_layerdrop=None, seed=1), T5Config()
    )
    assert config.dropout_rate == 0.3 and vars(hparams) == {"encoder_layerdrop": None, "seed": 1}
    with pytest.raises(UserError, match=r"--encoder_layerdrop 0\.1: a t5 model has no such setting"):
        set_extra_model_params(("encoder_layerdrop",), Namespace(encoder_layerdrop=0.1), T5Config())


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
    problems = "\n".join(data_file_problems(tmp_path, ["train", "val"]))
    assert "train.source: blank lines, 2 in all, the first is line 2" in problems
    assert "train.source has 4 lines but train.target has 3 lines" in problems
    assert "val.source is empty" in problems and "val.target is missing" in problems
    assert len(problems.splitlines()) == 4
    assert all(line.startswith(f"--data_dir {tmp_path}: ") for line in problems.splitlines())
    assert "is not a folder" in data_file_problems(tmp_path / "nowhere", ["train"])[0]


def test_good_data_has_no_problem(data_dir):
    assert data_file_problems(data_dir, ["val"]) == []


def test_trim_batch_drops_common_padding():
    import torch

    ids = torch.tensor([[5, 6, 0, 0], [7, 0, 0, 0]])
    assert trim_batch(ids, 0).tolist() == [[5, 6], [7, 0]]
    trimmed, mask = trim_batch(ids, 0, attention_mask=ids.ne(0).long())
    assert trimmed.shape == mask.shape == (2, 2) and mask.tolist() == [[1, 1], [1, 0]]


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


def test_import_is_light():
    code = "import sys, utils_rag, json; print(json.dumps([m for m in ('torch', 'transformers') if m in sys.modules]))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(answer) == []


# --- Several right answers --------------------------------------------------------------------------------------------


class Epochs:
    epoch = 0


def write_answers(folder, split, *answers):
    lines = [f"{split} question {n}\t{right!r}" for n, right in enumerate(answers)]
    for end, texts in (("qa", lines), ("source", [line.split("\t")[0] for line in lines])):
        (folder / f"{split}.{end}").write_text("".join(f"{text}\n" for text in texts))
    (folder / f"{split}.target").write_text("".join(f"{right[0]}\n" for right in answers))


def test_one_of_several_answers_is_drawn_each_epoch(tmp_path):
    write_answers(tmp_path, "train", ["a", "b", "c"], ["d"], ["e", "f"])
    assert data_file_problems(tmp_path, ["train"]) == []
    make = lambda: Seq2SeqDataset(ToyTokenizer(), tmp_path, 9, 9)  # noqa: E731
    dataset, again, epochs = make(), make(), Epochs()
    assert [dataset[i]["target"] for i in range(3)] == ["a", "d", "e"]  # as the targets say
    dataset.draw_answers(7, epochs)
    again.draw_answers(7, Epochs())
    drawn = []
    for epochs.epoch in range(20):
        drawn.append([dataset[i]["target"] for i in range(3)])
    assert [{row[i] for row in drawn} for i in range(3)] == [{"a", "b", "c"}, {"d"}, {"e", "f"}]
    assert drawn[0] == [again[i]["target"] for i in range(3)]  # whoever asks, in whatever order
    assert dataset.collate_fn([dataset[2]])["answers"] == [["e", "f"]]


def test_without_answers_nothing_is_drawn(tmp_path):
    write_answers(tmp_path, "train", ["a", "b"])
    (tmp_path / "train.qa").unlink()
    dataset = Seq2SeqDataset(ToyTokenizer(), tmp_path, 9, 9)
    dataset.draw_answers(7, Epochs())
    assert dataset[0] == {"source": "train question 0", "target": "a", "index": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train question 0\t['a']\n", "train.qa has 1 lines but train.source has 2"),
        ("train question 0\tx\ntrain question 1\t['a']\n", "line 1: `question TAB"),
        ("train question 1\t['a']\ntrain question 2\t['a']\n", "2 of its questions are not those of train.source"),
        ("", "train.qa has 0 lines"),
    ],
)
def test_answers_that_do_not_fit_are_told(content, message, tmp_path):
    write_answers(tmp_path, "train", ["a"], ["b"])
    (tmp_path / "train.qa").write_text(content)
    (problem,) = data_file_problems(tmp_path, ["train"])
    assert message in problem and problem.startswith("--data_dir")


def test_questions_that_are_cut_are_counted(tmp_path, caplog):
    write_answers(tmp_path, "train", ["a"], ["b"])
    (tmp_path / "train.source").write_text("a line of thirty characters ..\nshort\n")
    Seq2SeqDataset(ToyTokenizer(), tmp_path, 9, 9)
    assert (
        "1 of 2 questions of train.source are longer than --max_source_length 9 tokens (the longest has 30)"
        in caplog.text
    )


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_told(make, tmp_path):
    write_answers(tmp_path, "train", ["a"])
    (tmp_path / "train.source").unlink()
    make(tmp_path / "train.source")
    (problem,) = data_file_problems(tmp_path, ["train"])
    assert "train.source is a folder, a device or a pipe" in problem


def test_what_cannot_be_read_is_told_for_each_file(tmp_path):
    write_answers(tmp_path, "train", ["a"])
    for end in ("source", "target"):
        (tmp_path / f"train.{end}").write_bytes("a\n".encode("utf-16"))
    (tmp_path / "train.qa").unlink()
    problems = data_file_problems(tmp_path, ["train"])
    assert len(problems) == 2 and all("is not UTF-8" in problem for problem in problems)
