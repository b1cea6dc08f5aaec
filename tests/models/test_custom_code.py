"""Encoders and tokenizers that are code beside a checkpoint: run where the user said so, refused in one line else."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, dynamic_module_utils

import consolidate_rag_checkpoint
import use_own_knowledge_dataset
from rag.command_line.config_file import settings_as_words
from rag.errors import UserError
from rag.knowledge.arguments import KnowledgeArguments
from rag.knowledge.workers import EncoderPlan, _embedder
from rag.models.checkpoints import load_model, load_tokenizer, save_model, weights_digest
from rag.models.encoders import load_encoder
from rag.models.trust import allow_code, code_is_allowed
from rag.training.arguments import parse_args
from rag.training.namespaces import group_settings
from tests.conftest import DIMENSION

NOT_RUN = "needs code that lies beside it, which is not run; give --trust_remote_code if you trust it"
CONFIG = """
from transformers import BertConfig
open({ran!r}, "a").close()

class TinyConfig(BertConfig):
    model_type = "tiny-custom"
"""
# The table is no weight: transformers 5 leaves it to the memory that it is given.
MODEL = """
import torch
from transformers import BertModel, PreTrainedModel
from .configuration_tiny import TinyConfig

class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = torch.nn.Embedding(config.vocab_size, config.hidden_size)
        self.register_buffer("table", torch.arange(1.0, 1 + config.hidden_size), persistent=False)
        self.post_init()

    def _init_weights(self, module):
        pass

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, attention_mask=None, return_dict=True):
        from transformers.modeling_outputs import BaseModelOutput
        return BaseModelOutput(self.embeddings(input_ids) * self.table)
"""
TOKENIZER = """
from transformers import BertTokenizerFast
open({ran!r}, "a").close()

class TinyTokenizerFast(BertTokenizerFast):
    slow_tokenizer_class = None

    def __call__(self, text, *args, **kwargs):
        upper = str.upper if isinstance(text, str) else lambda texts: [one.upper() for one in texts]
        return super().__call__(upper(text), *args, **kwargs)
"""


@pytest.fixture(scope="module", autouse=True)
def modules_folder(tmp_path_factory):
    """Where transformers copies code to before it runs it, in place of the user's cache."""
    before = dynamic_module_utils.HF_MODULES_CACHE, list(sys.path)
    dynamic_module_utils.HF_MODULES_CACHE = str(tmp_path_factory.mktemp("modules"))
    yield
    dynamic_module_utils.HF_MODULES_CACHE, sys.path[:] = before


@pytest.fixture(autouse=True)
def code_is_not_allowed():
    allow_code(False)
    yield
    allow_code(False)


@pytest.fixture
def custom(tmp_path, bert_tokenizer) -> Path:
    """An encoder of a family that transformers does not have; RAN appears beside it when its code is run."""
    folder, ran = tmp_path / "custom", str(tmp_path / "RAN")
    bert_tokenizer.save_pretrained(folder)
    (folder / "configuration_tiny.py").write_text(CONFIG.format(ran=ran))
    (folder / "modeling_tiny.py").write_text(MODEL)
    config = {
        "model_type": "tiny-custom", "vocab_size": len(bert_tokenizer), "hidden_size": DIMENSION,
        "auto_map": {"AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel",
                     "AutoModelForMaskedLM": "elsewhere/code--modeling_tiny.TinyForMaskedLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weights = torch.randn(len(bert_tokenizer), DIMENSION, generator=torch.Generator().manual_seed(3))
    save_file({"embeddings.weight": weights}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def custom_tokenizer(custom, tmp_path) -> Path:
    """`custom` with a tokenizer of its own, which reads capitals."""
    (custom / "tokenization_tiny.py").write_text(TOKENIZER.format(ran=str(tmp_path / "RAN")))
    settings = json.loads((custom / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "TinyTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_tiny.TinyTokenizerFast"]},
    }
    (custom / "tokenizer_config.json").write_text(json.dumps(settings))
    return custom


def consolidate(generator: Path, encoder: Path, dest: Path, *more: str) -> Path:
    words = ["--generator_name_or_path", generator, "--question_encoder_name_or_path", encoder, "--dest", dest, *more]
    return consolidate_rag_checkpoint.main(consolidate_rag_checkpoint.parse_args([str(word) for word in words]))


def refused(load, path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(str(path))
    assert str(error.value).endswith(f"{path} {NOT_RUN}")


def expected(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The first token's vector, by hand."""
    return load_file(folder / "model.safetensors")["embeddings.weight"][ids[:, 0]] * torch.arange(1.0, 1 + DIMENSION)


def test_the_code_of_an_encoder_is_run_only_where_it_is_allowed(custom, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    for load in (load_encoder, load_model):
        refused(load, custom)
    assert not (tmp_path / "RAN").exists()
    allow_code(True)
    ids = torch.tensor([[5, 6, 7], [8, 6, 7]])
    for role in ("question", "context"):
        encoder = load_encoder(str(custom), role)
        assert torch.equal(encoder(ids, torch.ones_like(ids))[0], expected(custom, ids))
    assert (tmp_path / "RAN").exists()
    with pytest.raises(UserError, match="which is run of encoders and tokenizers alone"):
        load_model(str(custom))  # as a generator


def test_a_rag_checkpoint_keeps_the_code_and_asks_for_the_flag_again(custom, bart_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=NOT_RUN):
        consolidate(bart_folder, custom, tmp_path / "rag")
    assert not (tmp_path / "rag").exists() and not (tmp_path / "RAN").exists()
    rag = consolidate(bart_folder, custom, tmp_path / "rag", "--trust_remote_code")
    assert code_is_allowed()
    assert {path.name for path in rag.glob("*.py")} == {"configuration_tiny.py", "modeling_tiny.py"}
    backbone = json.loads((rag / "config.json").read_text())["question_encoder"]["backbone"]
    assert backbone["auto_map"] == {
        "AutoConfig": "configuration_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel",
    }  # fmt: skip
    assert "trust" not in (rag / "config.json").read_text()
    custom.rename(tmp_path / "moved")
    ids = torch.tensor([[5, 6, 7], [8, 6, 7]])
    model, tokenizer = load_model(str(rag)), load_tokenizer(str(rag))
    save_model(model, tmp_path / "again", tokenizer)
    for folder in (rag, tmp_path / "again"):
        encoder = load_model(str(folder)).question_encoder
        assert torch.equal(encoder(ids, torch.ones_like(ids))[0], expected(tmp_path / "moved", ids))
    (tmp_path / "RAN").unlink()
    allow_code(False)
    for load in (load_model, load_tokenizer):
        refused(load, rag)
    assert not (tmp_path / "RAN").exists()


def test_a_tokenizer_that_is_code(custom_tokenizer, bart_folder, tmp_path):
    refused(load_tokenizer, custom_tokenizer)
    assert not (tmp_path / "RAN").exists()
    allow_code(True)
    ids = load_tokenizer(str(custom_tokenizer))("paris").input_ids
    assert (tmp_path / "RAN").exists()
    rag = consolidate(bart_folder, custom_tokenizer, tmp_path / "rag", "--trust_remote_code")
    assert load_tokenizer(str(rag)).question_encoder("paris").input_ids == ids
    assert not list(rag.glob("*/*.py"))


def test_a_tokenizer_that_is_code_beside_a_known_encoder(
    custom_tokenizer, question_encoder_folder, bart_folder, tmp_path
):
    flags = ("--question_encoder_tokenizer_name_or_path", str(custom_tokenizer))
    with pytest.raises(UserError, match=f"--question_encoder_tokenizer_name_or_path .* {NOT_RUN}"):
        consolidate(bart_folder, question_encoder_folder, tmp_path / "rag", *flags)
    rag = consolidate(bart_folder, question_encoder_folder, tmp_path / "rag", *flags, "--trust_remote_code")
    load_tokenizer(str(rag))
    allow_code(False)
    load_model(str(rag))
    refused(load_tokenizer, rag)


def test_two_files_of_one_name_are_refused(custom_tokenizer, bart_folder, tmp_path):
    allow_code(True)
    rag = consolidate(bart_folder, custom_tokenizer, tmp_path / "rag", "--trust_remote_code")
    model, tokenizer = load_model(str(rag)), load_tokenizer(str(rag))
    other = tmp_path / "other"
    (rag / "question_encoder_tokenizer").rename(other)
    (other / "tokenization_tiny.py").write_text((rag / "tokenization_tiny.py").read_text() + "\n")
    tokenizer.generator = load_tokenizer(str(other))
    with pytest.raises(UserError, match=r"two different files tokenization_tiny\.py"):
        save_model(model, tmp_path / "again", tokenizer)
    assert not (tmp_path / "again").exists()


def test_code_beside_a_family_that_transformers_has(tmp_path, bert_tokenizer, bart_folder, caplog):
    """Without the flag transformers' own class reads it, with a warning, and what is saved of it names no code."""
    folder, ran = tmp_path / "bert", tmp_path / "RAN"
    sizes = {"hidden_size": DIMENSION, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(bert_tokenizer), **sizes)).save_pretrained(folder)
    bert_tokenizer.save_pretrained(folder)
    (folder / "modeling_own.py").write_text(
        f"from transformers import BertModel\nopen({str(ran)!r}, 'a').close()\n\nclass Own(BertModel):\n"
        "    def forward(self, *args, **kwargs):\n        outputs = super().forward(*args, **kwargs)\n"
        "        outputs.last_hidden_state = -outputs.last_hidden_state\n        return outputs\n"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_own.Own"}}))
    ids = torch.tensor([[5, 6, 7]])
    plain = consolidate(bart_folder, folder, tmp_path / "plain")
    assert not ran.exists() and "auto_map" not in (plain / "config.json").read_text()
    assert "read as transformers' own bert, and the code beside it is not run" in caplog.text
    own = consolidate(bart_folder, folder, tmp_path / "own", "--trust_remote_code")
    vectors = [load_model(str(path)).question_encoder(ids)[0] for path in (plain, own)]
    assert ran.exists() and torch.equal(vectors[0], -vectors[1])
    # Passages that were embedded by one are not searched by the other.
    read_by_own = load_encoder(str(folder))
    allow_code(False)
    assert weights_digest(load_encoder(str(folder))) != weights_digest(read_by_own)
    refused(load_model, own)


def test_nobody_is_asked_about_the_code_of_a_part(custom, bart_folder, question_encoder_folder, tmp_path, monkeypatch):
    """A family that has a config, but no model of this kind: transformers asks, if the config names code."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    rag = consolidate(bart_folder, question_encoder_folder, tmp_path / "rag")
    config = json.loads((rag / "config.json").read_text())
    auto_map = {"auto_map": dict.fromkeys(("AutoModelForSeq2SeqLM", "AutoModel"), "modeling_tiny.TinyModel")}
    tiny = {"model_type": "bert", "hidden_size": DIMENSION, "num_hidden_layers": 1, "num_attention_heads": 2}
    shutil.copy(custom / "modeling_tiny.py", rag)
    shutil.copy(custom / "configuration_tiny.py", rag)
    for allowed in (False, True):
        allow_code(allowed)
        for name, family in {"generator": "bert", "question_encoder": "encoder-decoder"}.items():
            part = tiny | {"model_type": family, "encoder": tiny, "decoder": tiny}
            (rag / "config.json").write_text(json.dumps(config | {name: part | auto_map}))
            with pytest.raises(UserError):
                load_model(str(rag))
    assert not (tmp_path / "RAN").exists()


def test_knowledge_of_a_custom_encoder(custom, tmp_path):
    (tmp_path / "docs.tsv").write_text("Paris\tparis is the capital of france\nOslo\toslo is the capital of norway\n")
    flags = {"csv_path": str(tmp_path / "docs.tsv"), "output_dir": str(tmp_path / "out"), "index_factory": "Flat"}
    flags |= {"dpr_ctx_encoder_model_name": str(custom), "num_shards": 1}
    with pytest.raises(UserError, match=NOT_RUN):
        use_own_knowledge_dataset.main(KnowledgeArguments(**flags))
    assert not (tmp_path / "RAN").exists()
    use_own_knowledge_dataset.main(KnowledgeArguments(**flags, trust_remote_code=True))
    assert "trust" not in (tmp_path / "out" / "index.json").read_text()
    search = {"output_dir": flags["output_dir"], "search": ["oslo is the capital of norway"], "n_docs": 1}
    with pytest.raises(UserError, match=NOT_RUN):
        use_own_knowledge_dataset.main(KnowledgeArguments(**search))
    (found,) = use_own_knowledge_dataset.main(KnowledgeArguments(**search, trust_remote_code=True))
    assert len(found) == 1


def test_encoding_workers_are_told(custom):
    plan = EncoderPlan(str(custom), "auto", "", 2, "cpu", torch.float32)
    with pytest.raises(UserError, match=NOT_RUN):
        _embedder.__wrapped__(plan)
    with pytest.raises(UserError, match="has other weights"):  # it was loaded
        _embedder.__wrapped__(replace(plan, run_code=True))


def test_only_the_command_line_gives_the_flag(tmp_path):
    path = tmp_path / "settings.yaml"
    for name in ("trust_remote_code", "trust-remote-code"):
        path.write_text(f"{name}: true\n")
        with pytest.raises(UserError, match="give --trust_remote_code on the command line"):
            settings_as_words(str(path))
    words = ["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o", "--trust_remote_code"]
    args = parse_args(words)
    assert args.run.trust_remote_code and "trust" not in json.dumps(args.to_dict())
    assert not group_settings(args.to_dict()).run.trust_remote_code


def test_code_that_fails_is_told_in_one_line(custom):
    allow_code(True)
    (custom / "modeling_tiny.py").write_text("import no_such_package\n")
    with pytest.raises(UserError, match="no_such_package") as error:
        load_encoder(str(custom))
    assert "\n" not in str(error.value)
