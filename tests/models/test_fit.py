"""Parts that fit no RAG model are told before anything is made of them: encoders of no text, tokens that none has."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import consolidate_rag_checkpoint
import use_own_knowledge_dataset
from rag.errors import UserError
from rag.models.checkpoints import load_model
from tests.conftest import DIMENSION

SIZES = {"hidden_size": DIMENSION, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
KIND = "sentence_transformers.models."


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def make(bert_tokenizer, tmp_path):
    """A function that makes an encoder's folder: plain, or with a modules.json for a length or a dense layer."""

    def make(length=None, dense=None, transformer="", **config):
        folder, inner = tmp_path / "encoder", tmp_path / "encoder" / transformer
        torch.manual_seed(5)
        BertModel(BertConfig(vocab_size=len(bert_tokenizer), **SIZES | config)).save_pretrained(inner)
        bert_tokenizer.save_pretrained(inner)
        kinds = ["Transformer", "Pooling", *(["Dense"] if dense is not None else [])]
        if length is None and dense is None and not transformer:
            return folder
        modules = [
            {"path": transformer if kind == "Transformer" else f"1_{kind}", "type": KIND + kind} for kind in kinds
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean"}')
        (inner / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))
        if dense is not None:
            (folder / "1_Dense").mkdir()
            (folder / "1_Dense" / "config.json").write_text('{"activation_function": "Identity"}')
            save_file({"linear.weight": dense}, folder / "1_Dense" / "model.safetensors")
        return folder

    return make


def pictures(tmp_path, bert_tokenizer):
    ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=16)).save_pretrained(tmp_path / "pictures")
    bert_tokenizer.save_pretrained(tmp_path / "pictures")
    return tmp_path / "pictures"


def consolidate(generator, encoder, dest):
    return consolidate_rag_checkpoint.consolidate("rag_sequence", str(generator), str(encoder), dest)


def build(flags, encoder, **more):
    flags = flags | {"--dpr_ctx_encoder_model_name": encoder} | {f"--{name}": value for name, value in more.items()}
    words = [str(word) for flag in flags.items() for word in flag]
    return use_own_knowledge_dataset.main(use_own_knowledge_dataset.parse_args(words))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"is_decoder": True}, "gives the same vector of all texts"),
        ({"length": 2}, "gives the same vector of all texts"),
        ({"length": True}, "max_seq_length True"),
        ({"dense": torch.ones(8, 8)}, "cannot read texts .* give an encoder of texts"),
        ({"dense": torch.full((8, DIMENSION), torch.nan)}, "has NaN or infinity in 1 of its weights"),
        (None, "cannot read texts .* give an encoder of texts"),
    ],
    ids=str,
)
def test_encoders_that_tell_no_text_from_another(
    settings, match, make, bert_tokenizer, bart_folder, flags, tmp_path, capsys
):
    encoder = pictures(tmp_path, bert_tokenizer) if settings is None else make(**settings)
    with pytest.raises(UserError, match=f"^--question_encoder_name_or_path {encoder}.*{match}"):
        consolidate(bart_folder, encoder, tmp_path / "rag")
    with pytest.raises(UserError, match=f"^--dpr_ctx_encoder_model_name {encoder}.*{match}"):
        build(flags, encoder)
    assert not (tmp_path / "rag").exists()
    assert [path.name for path in (tmp_path / "out").rglob("*")] == [".lock"]


def test_dimensions_of_a_folder_of_several_modules(make, flags, tmp_path):
    encoder = make(dense=torch.rand(8, DIMENSION), transformer="0_Transformer")
    with pytest.raises(UserError, match=r"--d 16, but .* gives 8 dimensions"):
        build(flags, encoder, d=DIMENSION)
    assert build(flags, encoder, d=8).dimension == 8


@pytest.mark.parametrize("token", [9999, -1, "two"])
def test_tokens_that_the_generator_does_not_have(token, bart_folder, question_encoder_folder, tmp_path):
    folder = shutil.copytree(bart_folder, tmp_path / "bart")
    edit(folder / "generation_config.json", decoder_start_token_id=token, forced_bos_token_id=token)
    with pytest.raises(UserError) as error:
        consolidate(folder, question_encoder_folder, tmp_path / "rag")
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        f"--generator_name_or_path {folder}: the generator's decoder_start_token_id is {token!r}"
    )


def test_generation_settings_ask_for_what_is_not_done(bart_folder, caplog, tmp_path):
    folder = shutil.copytree(bart_folder, tmp_path / "bart")
    edit(folder / "generation_config.json", do_sample=True, temperature=0.5, num_beams=4)
    settings = load_model(str(folder)).generation_config
    assert not settings.do_sample and settings.temperature is None and settings.num_beams == 4
    assert "ask for samples; answers are searched for all the same" in caplog.text
    settings.save_pretrained(tmp_path / "saved")  # transformers refuses to save what contradicts itself
    edit(folder / "generation_config.json", do_sample=False, temperature=None, num_beams=1, penalty_alpha=0.6, top_k=4)
    with pytest.raises(UserError, match=r"ask for contrastive search, and .* mend its generation_config.json"):
        load_model(str(folder))
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"--model_name_or_path .* cannot be loaded"):
        load_model(str(folder))
