"""Cards of checkpoints: the hub's own tools read them; they tell what was measured, and no folder of the machine."""

import getpass
import re
import shlex

import pytest
from huggingface_hub import EvalResult, ModelCard
from safetensors.torch import load_file

import consolidate_rag_checkpoint
import eval_rag
from rag.files import load_json, write_lines
from rag.hub import public_name
from rag.models.card import HERE, Making, changed_flags, read_card, write_card
from rag.training.arguments import DataArguments
from tests.cards import lasting
from tests.conftest import QUESTIONS, saved
from tests.training.test_finetune_rag import run

MEASURED = {"exact_match": ("avg_em", 100), "f1": ("avg_f1", 100), "loss": ("avg_loss", 1)}
CARD = """---
license: {license}
base_model: {base}
---
# A model
"""


def consolidate(*words):
    return consolidate_rag_checkpoint.main(consolidate_rag_checkpoint.parse_args([str(word) for word in words]))


def of_parts(generator, question_encoder, dest):
    flags = ("--generator_name_or_path", generator, "--question_encoder_name_or_path", question_encoder)
    return consolidate(*flags, "--dest", dest)


def assert_private(text: str, *folders) -> None:
    """No folder of the machine, nobody's name, no token."""
    assert not re.search(r"(?<![\w.:/)])/[a-z]\w*/", text), text
    for secret in (*map(str, folders), getpass.getuser() + "/", "hf_secret"):
        assert secret not in text, secret


def code(text: str, language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)[1]


def test_a_new_checkpoint_tells_its_parts(bart_folder, question_encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    dest = of_parts(bart_folder, question_encoder_folder, tmp_path / "rag")
    card = ModelCard.load(dest / "README.md")
    assert card.data.license == "unknown" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "question-answering" and card.data.eval_results is None
    assert card.data.tags == ["rag", "retrieval-augmented-generation", "dpr", "bart"]
    assert card.data.base_model is None  # which the hub takes for a name of its own
    assert card.data["rag_parts"] == {"question_encoder": question_encoder_folder.name, "generator": bart_folder.name}
    numbers = sum(weight.numel() for weight in load_file(dest / "model.safetensors").values())
    assert f"all weights of it: {numbers:,} numbers" in card.text
    assert f"| generator | `bart` | `{bart_folder.name}` |" in card.text
    assert_private(str(card), tmp_path, bart_folder.parent)


@pytest.mark.parametrize("generator", ["bart", "llama"])
@pytest.mark.parametrize("flags", [[], ["--lora_r", 2]], ids=["whole", "adapters"])
def test_a_trained_checkpoint_tells_its_scores_and_how_to_get_them(
    generator, flags, checkpoint, knowledge, data_dir, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    run(checkpoint("rag_token", generator), data_dir, out, "--do_train", "--ef_search", 40, "--prefix", "what ", *flags)
    card = ModelCard.load(out / "checkpoint2" / "README.md")
    row = load_json(out / "metrics.json")["val"][1]
    assert {one.metric_type: one.metric_value for one in card.data.eval_results} == {
        name: pytest.approx(row[f"val_{measure}"] * factor, abs=1e-4) for name, (measure, factor) in MEASURED.items()
    }
    for result in card.data.eval_results:
        assert result.dataset_args == {"questions": 8, "step": 4, "epoch": 1} and result.dataset_split == "validation"
        assert result.metric_args.items() >= {
            "n_docs": 2, "num_beams": 1, "kind": "IndexHNSWFlat", "ef_search": 40, "prefix": "what ",
        }.items()  # fmt: skip
    assert "--learning_rate 0.01\n" in card.text and "`data`: 8 train, 8 val" in card.text
    assert ("lora" in card.data.tags) == bool(flags) and card.data.tags[3] == generator
    assert_private(str(card), tmp_path, checkpoint("rag_token", generator).parent)

    names = {}
    exec(code(card.text, "python").replace(HERE, str(out / "checkpoint2")), names)
    assert names["model"].num_parameters() and names["tokenizer"].generator
    write_lines([question for question, _ in QUESTIONS], tmp_path / "questions.txt")
    write_lines([answer for _, answer in QUESTIONS], tmp_path / "answers.txt")
    command = code(card.text, "bash").replace(HERE, str(out / "checkpoint2"))
    command = command.replace("path/to/passages", knowledge["passages_path"])
    command = command.replace("path/to/index", knowledge["index_path"])
    monkeypatch.chdir(tmp_path)
    scores = eval_rag.main(eval_rag.parse_args(shlex.split(command)[2:]))
    assert scores["em"] == pytest.approx(row["val_avg_em"]) and scores["f1"] == pytest.approx(row["val_avg_f1"])


def test_merged_adapters_keep_what_was_measured_of_them(
    bart_folder, question_encoder_folder, data_dir, knowledge, tmp_path
):
    rag = of_parts(bart_folder, question_encoder_folder, tmp_path / "rag")
    index = [word for flag, value in knowledge.items() for word in (f"--{flag}", value)]
    run(rag, data_dir, tmp_path / "out", "--lora_r", 2, "--num_train_epochs", 1, *index)
    own = ModelCard.load(tmp_path / "out" / "checkpoint1" / "README.md")
    merged = consolidate("--merge_adapters", tmp_path / "out" / "checkpoint1", "--dest", tmp_path / "merged")
    card = ModelCard.load(merged / "README.md")
    assert len(card.data.eval_results) == 3 and card.data.eval_results == own.data.eval_results
    assert card.data["rag_parts"] == own.data["rag_parts"] == ModelCard.load(rag / "README.md").data["rag_parts"]
    assert "lora" in own.data.tags and "lora" not in card.data.tags
    assert "base.json" in own.text and "base.json" not in card.text


def test_a_card_is_the_same_but_for_its_day(bart_folder, question_encoder_folder, tmp_path):
    first, second = (of_parts(bart_folder, question_encoder_folder, tmp_path / name / "rag") for name in ("a", "b"))
    assert lasting(first / "README.md") == lasting(second / "README.md")
    assert b"- Date: " in (first / "README.md").read_bytes()


def test_what_a_reader_writes_into_a_card_stays(checkpoint, data_dir, tmp_path):
    """A run that goes on does not take it for damage, and what made predictions is still the same model."""
    words = (checkpoint(), data_dir, tmp_path / "out", "--num_train_epochs")
    run(*words, 1)
    card = tmp_path / "out" / "checkpoint1" / "README.md"
    card.write_text(card.read_text() + "Mine.\n")
    run(*words, 2)
    assert card.read_text().endswith("Mine.\n")


# --- What is known of the parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ([("mit", "[bart-a]"), ("mit", "dpr/b")], ("mit", ["dpr/b", "bart-a"])),
        ([("mit", "a/b"), ("apache-2.0", "a/b")], ("other", ["a/b"])),
        ([("mit", "[a/b, 3, /etc/passwd, {c: d}]"), None], ("unknown", ["a/b"])),
        ([("[mit]", "null"), ("mit", "5")], ("unknown", None)),
    ],
)
def test_license_and_base_models_are_those_of_the_parts(
    cards, expected, bart, bart_tokenizer, question_encoder, bert_tokenizer, tmp_path
):
    folders = saved(bart, bart_tokenizer, tmp_path / "bart"), saved(question_encoder, bert_tokenizer, tmp_path / "dpr")
    for folder, card in zip(folders, cards, strict=True):
        if card is not None:
            (folder / "README.md").write_text(CARD.format(license=card[0], base=card[1]))
    data = ModelCard.load(of_parts(*folders, tmp_path / "rag") / "README.md").data
    assert (data.license, data.base_model) == expected


@pytest.mark.parametrize(
    "content",
    [b"", b"no metadata", b"---\n- a list\n---\n", b"---\na: [\n---\n", b"---\na: " + b"[" * 5000 + b"\n---\n",
     b"\xff\xfe---", b"---\nlicense: mit\n---\n" + b"x" * (1 << 21)],
)  # fmt: skip
def test_a_card_that_cannot_be_read_says_nothing(content, bart, bart_tokenizer, question_encoder_folder, tmp_path):
    folder = saved(bart, bart_tokenizer, tmp_path / "bart")
    (folder / "README.md").write_bytes(content)
    assert read_card(str(folder)) == {}
    card = of_parts(folder, question_encoder_folder, tmp_path / "rag") / "README.md"
    assert ModelCard.load(card).data.license == "unknown"


def test_names_on_the_hub_are_the_base_models(bart, tmp_path, monkeypatch):
    """Without a hub that can be reached, too."""
    parts = {"question_encoder": "facebook/dpr-question_encoder-single-nq-base", "generator": "facebook/bart-large"}
    write_card(tmp_path, bart, Making("x.py", parts))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == list(parts.values()) and "`facebook/bart-large`" in card.text


def test_strange_names_break_neither_text_nor_metadata(bart, tmp_path):
    name = "a`b|c\n---\nlicense: mit\x1b[31m: '\"#é\udcff"
    result = EvalResult("qa", name, name, "exact_match", 1.5, metric_name=name, dataset_split="test")
    settings = {"prefix": f" {name}", "data_dir": f"/home/alice/{name}", "lora_target_modules": ["/home/alice/q", "v"]}
    making = Making("x.py", {"generator": f"/home/alice/{name}"}, settings, f"/home/alice/{name}", results=[result])
    write_card(tmp_path, bart, making)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "unknown" and "alice" not in str(card) and "\x1b" not in str(card)
    assert card.text.count("```") == 6 and "--lora_target_modules q v" in card.text


@pytest.mark.parametrize(
    ("path", "name"),
    [("/home/alice/bart", "bart"), ("alice/models/bart/", "bart"), ("~/bart", "bart"), ("~", "~"), ("../x", "x"),
     ("facebook/bart-large", "facebook/bart-large"), ("tests/models", "models")],
)  # fmt: skip
def test_a_path_is_told_by_its_last_part(path, name):
    assert public_name(path) == name


def test_only_flags_that_were_changed_are_told():
    assert changed_flags(DataArguments("data", n_val=5), ("data_dir",)) == {"n_val": 5}


def test_what_a_stranger_writes_cannot_fill_the_memory(bart, bart_tokenizer, question_encoder_folder, tmp_path):
    """Lists of lists of ... of one another, which YAML writes in some lines."""
    levels = "".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]\n" for i in range(1, 20))
    folder = saved(bart, bart_tokenizer, tmp_path / "bart")
    bomb = f"l0: &l0 x\n{levels}rag_parts: {{generator: *l19, *l0 : *l19}}\nlicense: *l19\nbase_model: *l19\n"
    (folder / "README.md").write_text(f"---\n{bomb}---\n")
    data = ModelCard.load(of_parts(folder, question_encoder_folder, tmp_path / "rag") / "README.md").data
    assert data.license == "unknown" and data["rag_parts"] == {"question_encoder": question_encoder_folder.name}


def test_scores_of_a_stranger_are_not_repeated(checkpoint, data_dir, tmp_path):
    run(checkpoint(), data_dir, tmp_path / "out", "--lora_r", 2, "--num_train_epochs", 1)
    adapters = tmp_path / "out" / "checkpoint1"
    text = (adapters / "README.md").read_text()
    for old, new in {
        "value: ": "value: x", "args:": "arguments:", "metrics:": "none:", "n_docs: 2": "n_docs: [2]",
    }.items():  # fmt: skip
        (adapters / "README.md").write_text(text.replace(old, new))
        dest = tmp_path / f"merged {old[:4]}"
        consolidate("--merge_adapters", adapters, "--dest", dest)
        assert ModelCard.load(dest / "README.md").data.eval_results is None
