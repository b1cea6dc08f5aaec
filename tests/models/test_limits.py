"""Lengths and beams beyond what a model can do, tokenizers that are not its own, the decoder's first token."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BartConfig,
    LEDConfig,
    MBartConfig,
    MBartForConditionalGeneration,
    RagConfig,
    RagTokenizer,
    T5Config,
)
from transformers.models.mbart.modeling_mbart import shift_tokens_right

from rag.errors import UserError
from rag.evaluation.arguments import parse_args as eval_args
from rag.evaluation.predictors import size_problems
from rag.models import checkpoints
from rag.models.checkpoints import compose_rag, fitting_model_type, load_config, load_tokenizer
from rag.models.fit import complete_start, require_fit
from rag.models.limits import beams_problems, length_problems, most_tokens
from rag.models.pooled_encoder import PooledEncoderConfig
from rag.retrieval.retriever import RagKnowledgeRetriever
from rag.training.arguments import parse_args as finetune_args
from rag.training.loading import load_model_and_tokenizer
from rag.training.loss import decoder_inputs_and_targets
from tests.conftest import DIMENSION

SIZES = {"vocab_size": 99, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.mark.parametrize(
    "family", ["bert", "roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "electra", "distilbert", "albert"]
)
def test_the_longest_text_that_an_encoder_reads(family):
    """One token more is an error of the model's own."""
    own = {"attention_window": 4, "pad_token_id": 1} if family == "longformer" else {}
    own |= {"embedding_size": 8} if family in ("albert", "electra") else {}
    own |= {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8} if family == "distilbert" else {}
    config = AutoConfig.for_model(family, max_position_embeddings=30, **SIZES | own)
    model = AutoModel.from_config(config).eval()
    longest = most_tokens(config)
    ids = torch.full((1, longest + 1), 7)
    with torch.no_grad():
        model(ids[:, 1:], attention_mask=torch.ones_like(ids[:, 1:]))
        with pytest.raises((IndexError, RuntimeError)):
            model(ids, attention_mask=torch.ones_like(ids))
    assert most_tokens(PooledEncoderConfig(backbone=config)) == longest


def test_limits_of_generators():
    assert most_tokens(BartConfig(max_position_embeddings=77)) == 77
    assert most_tokens(T5Config()) is most_tokens(AutoConfig.for_model("xlnet")) is None
    led = LEDConfig(max_encoder_position_embeddings=64, max_decoder_position_embeddings=32)
    assert (most_tokens(led), most_tokens(led, decoder=True)) == (64, 32)


def test_each_flag_is_held_to_the_part_that_it_is_about():
    rag = RagConfig(
        question_encoder=AutoConfig.for_model("roberta", max_position_embeddings=130).to_dict(),
        generator=BartConfig(max_position_embeddings=200).to_dict(),
    )
    fits = {
        "max_source_length": 128, "max_combined_length": 200, "max_target_length": 199, "max_length": 200,
        "min_length": None,
    }  # fmt: skip
    assert length_problems(rag, fits) == []
    more = {name: value + 1 for name, value in fits.items() if value}
    problems = length_problems(rag, more, "--model_name_or_path x")
    assert [problem.split(" is more than the ")[0] for problem in problems] == [f"--{n} {v}" for n, v in more.items()]
    assert "128 tokens that the question encoder reads (--model_name_or_path x); lower it" in problems[0]
    # A bare generator reads the question itself.
    assert length_problems(BartConfig(max_position_embeddings=200), {"max_source_length": 200}) == []
    assert len(length_problems(BartConfig(max_position_embeddings=200), {"max_source_length": 201})) == 1
    assert length_problems(T5Config(), {"max_source_length": 10**6, "max_length": 10**6}) == []


def test_beams_beyond_the_vocabulary():
    assert beams_problems(BartConfig(vocab_size=40), 20) == []
    assert (
        "--num_beams 21 is more than half of the generator's 40 words"
        in beams_problems(BartConfig(vocab_size=40), 21)[0]
    )


def test_the_scripts_ask_before_anything_is_loaded(checkpoint, data_dir, tmp_path, monkeypatch):
    folder = checkpoint()
    monkeypatch.setattr(checkpoints, "load_weights", None)
    flags = ["--model_name_or_path", str(folder), "--data_dir", str(data_dir), "--output_dir", str(tmp_path / "out")]
    lengths = {"max_source_length": 129, "max_combined_length": 129, "val_max_target_length": 128, "num_beams": 80}
    args = finetune_args(flags + [word for name, value in lengths.items() for word in (f"--{name}", str(value))])
    with pytest.raises(UserError) as error:
        load_model_and_tokenizer(args)
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        "--max_source_length", "--val_max_target_length", "--max_combined_length", "--num_beams"
    ]  # fmt: skip
    flags = ["--model_name_or_path", str(folder), "--evaluation_set", "q", "--gold_data_path", "g"]
    flags += ["--max_length", "129", "--num_beams", "80"]
    problems = size_problems(eval_args(flags), load_config(str(folder)))
    assert [problem.split()[0] for problem in problems] == ["--max_length", "--num_beams"]
    assert size_problems(eval_args([*flags, "--eval_mode", "retrieval"]), load_config(str(folder))) == []


def test_a_tokenizer_that_is_not_the_models(rag_sequence, bert_tokenizer, bart_tokenizer, t5_tokenizer, caplog):
    require_fit(rag_sequence, RagTokenizer(bert_tokenizer, bart_tokenizer), "--tokenizer_name x")
    assert caplog.text == ""
    larger = copy.deepcopy(bart_tokenizer)
    larger.add_tokens(["one more", "and one"])
    with pytest.raises(UserError, match=r"^--tokenizer_name x: the tokenizer has \d+ tokens, the generator only \d+;"):
        require_fit(rag_sequence, RagTokenizer(bert_tokenizer, larger), "--tokenizer_name x")
    with pytest.raises(UserError, match="pads with id 0, the generator with 1"):
        require_fit(rag_sequence, RagTokenizer(bert_tokenizer, t5_tokenizer), "--tokenizer_name x")
    assert "ends an answer with id 1, the generator with 2" in caplog.text


def test_messages_name_the_tokenizers_flag(checkpoint, bart_folder, data_dir, tmp_path):
    flags = [
        "--model_name_or_path",
        str(checkpoint()),
        "--data_dir",
        str(data_dir),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    for tokenizer in (str(bart_folder), str(tmp_path / "none")):
        with pytest.raises(UserError, match=f"^--tokenizer_name {tokenizer} "):
            load_model_and_tokenizer(finetune_args([*flags, "--tokenizer_name", tokenizer]))


def test_mbart_starts_from_the_last_token_of_an_answer(bart_tokenizer, question_encoder):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    mbart = MBartForConditionalGeneration(MBartConfig(vocab_size=len(bart_tokenizer), **sizes, **heads))
    assert mbart.config.decoder_start_token_id is None
    model = compose_rag("rag_sequence", question_encoder, mbart)
    complete_start(model, RagTokenizer(bart_tokenizer, bart_tokenizer), "--m x")
    configs = (mbart.config, mbart.generation_config, model.config)
    assert [config.decoder_start_token_id for config in configs] == [2, 2, 2]
    labels = bart_tokenizer(["paris", "old oslo"], padding=True, return_tensors="pt").input_ids
    decoder_ids, targets = decoder_inputs_and_targets(labels, mbart.config)
    theirs = shift_tokens_right(labels, 1)  # transformers' rule; it cuts the end off instead of growing by one
    assert torch.equal(decoder_ids[:, :-1].where(targets[:, :-1] != 1, 1), theirs.where(labels != 1, 1))
    bart = BartConfig(decoder_start_token_id=None)
    model.generator.config = bart
    for config in (model.config, mbart.generation_config):
        config.decoder_start_token_id = None
    with pytest.raises(UserError, match="--m x: its config has no decoder_start_token_id"):
        complete_start(model, RagTokenizer(bart_tokenizer, bart_tokenizer), "--m x")


def test_model_types_that_do_not_fit(checkpoint, bart_folder, question_encoder_folder, caplog):
    sequence = checkpoint("rag_sequence")

    def fit(folder, model_type):
        return fitting_model_type(load_config(str(folder)), str(folder), model_type)

    assert fit(sequence, "rag_sequence") == "rag_sequence" and caplog.text == ""
    assert fit(sequence, "rag_token") == fit(sequence, "rag_token") == "rag_token"
    assert caplog.text.count("is a rag_sequence checkpoint and is read as --model_type rag_token") == 1
    for folder, model_type in (
        (sequence, "bart"), (sequence, "auto"), (bart_folder, "t5"), (bart_folder, "rag_token"),
        (question_encoder_folder, "t5"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"--model_type {model_type} does not fit .*; leave --model_type out"):
            fit(folder, model_type)
    with pytest.raises(UserError, match="neither RAG nor an encoder-decoder"):
        fit(question_encoder_folder, "auto")
    assert fit(bart_folder, "auto") == "auto"


def test_a_rag_models_tokenizer_needs_both(checkpoint, bart_folder):
    with pytest.raises(UserError, match="has one tokenizer, a RAG model two"):
        load_tokenizer(str(bart_folder), "rag_sequence", flag="--tokenizer_name")
    config = json.loads((checkpoint() / "config.json").read_text())
    assert config["model_type"] == "rag"


# --- The length of the question vectors -------------------------------------------------------------------------------


def test_the_question_encoder_says_how_long_its_vectors_are(checkpoint, knowledge):
    """`RagModel.from_pretrained_question_encoder_generator` leaves transformers' 768 in the config."""
    folder = checkpoint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"retrieval_vector_size": 768}))
    assert load_config(str(folder)).retrieval_vector_size == DIMENSION
    assert RagKnowledgeRetriever.from_pretrained(folder, **knowledge).index.vector_size == DIMENSION
    (folder / "config.json").write_text(json.dumps(config | {"retrieval_vector_size": 64}))
    with pytest.raises(UserError, match="says retrieval_vector_size 64; write 16, as its question encoder"):
        load_config(str(folder))
    bare = config | {"question_encoder": config["question_encoder"] | {"projection_dim": 8}}
    (folder / "config.json").write_text(json.dumps(bare | {"retrieval_vector_size": 768}))
    assert load_config(str(folder)).retrieval_vector_size == 8
