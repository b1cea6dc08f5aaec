"""What an encoder's folder says is what is done with texts: prompts, lengths, pooling, layers behind it."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertModel,
    GPT2Config,
    GPT2Model,
    RagTokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5EncoderModel,
)

from rag.errors import UserError
from rag.index.index_files import IndexDescription
from rag.knowledge.embedding import PassageEmbedder
from rag.models.checkpoints import compose_rag, load_model, load_tokenizer, save_model
from rag.models.encoders import describe_encoder, encoder_dimension, load_encoder
from rag.models.pooled_encoder import pool
from rag.models.questions import bare_questions, encode_questions, with_prompt
from rag.retrieval.retriever import RagKnowledgeRetriever, retrieve_contexts
from tests.conftest import DIMENSION, QUESTIONS, assert_equal_but_for_rounding
from utils_rag import Seq2SeqDataset

FLAG = "--question_encoder_name_or_path"
SIZES = {"hidden_size": DIMENSION, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
KIND = "sentence_transformers.models."
PROMPTS = {"query": "who near: ", "passage": "the city of "}


def write(folder, name, content):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


@pytest.fixture
def make(bert_tokenizer, tmp_path):
    """A function that makes a sentence-transformers folder: make(model, pooling={"pooling_mode": "mean"})."""

    def make(model=None, pooling=None, layers=("Normalize",), tokenizer=bert_tokenizer, transformer="", **files):
        torch.manual_seed(5)
        model = model or BertModel(BertConfig(vocab_size=len(bert_tokenizer), initializer_range=0.5, **SIZES))
        folder = tmp_path / f"encoder{len(list(tmp_path.iterdir()))}"
        model.save_pretrained(folder / transformer)
        tokenizer.save_pretrained(folder / transformer)
        kinds = ["Transformer", "Pooling", *layers]
        paths = [transformer, *(f"{n}_{kind}" for n, kind in enumerate(kinds) if n)]
        modules = [
            {"idx": n, "path": path, "type": KIND + kind}
            for n, (kind, path) in enumerate(zip(kinds, paths, strict=True))
        ]
        write(folder, "modules.json", modules)
        write(folder, "1_Pooling/config.json", pooling or {"pooling_mode_mean_tokens": True})
        for name, content in files.items():
            write(folder, f"{name}.json", content)
        return folder, model.eval()

    return make


def embed(encoder, tokens):
    return copy.deepcopy(encoder).double()(tokens["input_ids"], tokens["attention_mask"])[0]


def test_prompts_lengths_and_case_are_obeyed_kept_and_shown(make, bart, bart_tokenizer, bert_tokenizer, tmp_path):
    folder, _ = make(
        config_sentence_transformers={"prompts": PROMPTS},
        sentence_bert_config={"max_seq_length": 9, "do_lower_case": True},
    )
    encoder = load_encoder(str(folder))
    line = describe_encoder(encoder)
    assert line == (
        "PooledEncoder of bert, mean pooling, normalized, 9 tokens, lower-cased, query_prompt 'who near: ', "
        "passage_prompt 'the city of '"
    )
    model = compose_rag("rag_sequence", encoder, bart)
    save_model(model, tmp_path / "rag", RagTokenizer(bert_tokenizer, bart_tokenizer))
    loaded = load_model(str(tmp_path / "rag"))
    assert describe_encoder(loaded.question_encoder) == line
    tokenizer = load_tokenizer(str(tmp_path / "rag")).question_encoder
    tokens = encode_questions(
        tokenizer, ["What is OSLO", "where is the sea " * 9], 4, padding=True, return_tensors="pt"
    )
    expected = ["who near: what is", "who near: where is"]  # four tokens, two of them [CLS] and [SEP]
    assert tokens["input_ids"].tolist() == bert_tokenizer(expected)["input_ids"]
    assert len(encode_questions(tokenizer, ["the sea " * 9], 128)["input_ids"][0]) == 9
    assert bare_questions(tokenizer, tokens["input_ids"]) == ["what is", "where is"]
    # A flag overrides what the folder says, also with no prompt at all.
    assert load_encoder(str(folder), prompt="").config.query_prompt == ""
    assert load_encoder(str(folder), "context", prompt="x ").config.passage_prompt == "x "


def test_passages_are_embedded_behind_their_prompt(make, bert_tokenizer):
    plain, _ = make()
    prompted, _ = make(config_sentence_transformers={"prompts": PROMPTS}, sentence_bert_config={"max_seq_length": 8})

    def vectors(folder, passages, prompt=None):
        encoder = load_encoder(str(folder), "context", prompt=prompt)
        embedder = PassageEmbedder(encoder, copy.deepcopy(bert_tokenizer), 4)
        found = dict(pair for rows, batch in embedder(passages) for pair in zip(rows.tolist(), batch, strict=True))
        return torch.tensor([found[n].tolist() for n in range(len(passages))]), embedder

    passages = [("oslo", "near"), ("rome", "the sea and the river and the museum")]
    found, embedder = vectors(prompted, passages)
    assert (embedder.max_length, embedder.cut) == (8, 1)
    by_hand, _ = vectors(plain, [("the city of oslo", "near"), ("the city of rome", "the sea")])
    assert_equal_but_for_rounding(found, by_hand)
    assert_equal_but_for_rounding(vectors(prompted, passages, "")[0][:1], vectors(plain, passages)[0][:1])
    described = IndexDescription(**embedder.reader.description(), encoder_digest="a")
    assert described.passage_prompt == "the city of "
    without = IndexDescription(**embedder.reader.description() | {"passage_prompt": ""}, encoder_digest="a")
    assert described.passages_digest() != without.passages_digest()
    with pytest.raises(UserError, match="leaves no room for a passage in the encoder's 8 tokens"):
        vectors(prompted, passages, "the city of " * 4)


@pytest.mark.parametrize(
    ("prompts", "default", "query", "passage"),
    [
        ({}, None, "", ""),
        ({"query": "q ", "document": "d "}, None, "q ", "d "),
        ({"query": "q ", "document": "d ", "passage": "p "}, "query", "q ", "d "),
        ({"query": "q "}, "query", "q ", ""),
        ({"any": "a ", "query": "q "}, "any", "q ", "a "),
        ({"any": "a "}, "any", "a ", "a "),
        ({"any": "a "}, None, "", ""),
    ],
)
def test_which_prompt_is_whose(prompts, default, query, passage, make):
    folder, _ = make(config_sentence_transformers={"prompts": prompts, "default_prompt_name": default})
    config = load_encoder(str(folder)).config
    assert (config.query_prompt, config.passage_prompt) == (query, passage)


def test_the_generator_gets_the_bare_question(make, bart, bart_tokenizer, bert_tokenizer, knowledge, data_dir):
    """As does an index that reads text; the question encoder gets the prompt, in training as in evaluation."""
    folder, _ = make(config_sentence_transformers={"prompts": PROMPTS})
    encoder = load_encoder(str(folder))
    model = compose_rag("rag_sequence", encoder, bart)
    for name, value in knowledge.items():
        setattr(model.config, name, value)
    model.config.max_combined_length = 64
    texts = [question for question, _ in QUESTIONS]
    tokenizers = [copy.deepcopy(bert_tokenizer) for _ in range(2)]
    with_prompt(tokenizers[1], encoder.config)
    contexts = []
    for tokenizer in tokenizers:
        data = Seq2SeqDataset(RagTokenizer(tokenizer, bart_tokenizer), data_dir, 128, 20)
        batch = data.collate_fn([data[n] for n in range(len(data))])
        assert batch["source"] == texts
        retriever = RagKnowledgeRetriever(model.config, tokenizer, bart_tokenizer)
        docs = [{"title": ["oslo"], "text": ["a city"]}] * len(texts)
        retriever.retrieve = lambda vectors, n, docs=docs: (
            vectors[:, None],
            torch.zeros(len(docs), 1).long().numpy(),
            docs,
        )
        found = retrieve_contexts(model.rag, retriever, batch["input_ids"], batch["attention_mask"], 1)
        contexts.append(found)
    assert torch.equal(contexts[0].input_ids, contexts[1].input_ids)
    assert not torch.allclose(contexts[0].doc_scores, contexts[1].doc_scores) or encoder.config.normalize
    assert batch["input_ids"].tolist() == tokenizers[0](
        ["who near: " + text for text in texts], padding=True
    )["input_ids"]  # fmt: skip


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "max", "include_prompt": True}, "max"),
        ({"embedding_dimension": 16, "pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean"]}, "mean"),
    ],
)
def test_pooling_layouts(pooling, name, make):
    folder, _ = make(pooling=pooling, layers=())
    config = load_encoder(str(folder)).config
    assert (config.pooling, config.normalize) == (name, False)


def test_pooling_does_not_depend_on_the_side_of_the_padding():
    hidden = torch.tensor([[[1.0], [2.0], [9.0]], [[9.0], [3.0], [4.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pool(hidden, mask, "cls").tolist() == [[1], [3]]
    assert pool(hidden, mask, "last").tolist() == [[2], [4]]


def test_a_folder_of_the_older_layout(make, bert_tokenizer):
    folder, bert = make(transformer="0_Transformer", layers=())
    write(folder, "0_Transformer/sentence_bert_config.json", {"max_seq_length": 7})
    encoder = load_encoder(str(folder))
    assert encoder.config.max_seq_length == 7
    tokens = load_tokenizer(str(folder), flag=FLAG)(["oslo is near"], return_tensors="pt")
    expected = copy.deepcopy(bert).double()(**tokens).last_hidden_state.mean(1)
    assert_equal_but_for_rounding(embed(encoder, tokens), expected)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_t5_encoder_with_a_dense_layer(file, make, t5_tokenizer, bart, tmp_path):
    sizes = {"d_model": DIMENSION, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    folder, t5 = make(
        T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer), **sizes)), layers=("Dense", "Normalize"),
        tokenizer=t5_tokenizer,
    )  # fmt: skip
    layer = {"in_features": DIMENSION, "out_features": 12, "bias": True}
    write(folder, "2_Dense/config.json", layer | {"activation_function": "torch.nn.modules.activation.Tanh"})
    weights = {"linear.weight": torch.randn(12, DIMENSION), "linear.bias": torch.randn(12)}
    (save_file if file.endswith("safetensors") else torch.save)(weights, folder / "2_Dense" / file)
    encoder = load_encoder(str(folder))
    assert encoder_dimension(encoder) == 12
    tokens = t5_tokenizer(["paris is the capital", "rome"], padding=True, return_tensors="pt")
    hidden = copy.deepcopy(t5).double()(**tokens).last_hidden_state
    mask = tokens.attention_mask.unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    dense = torch.tanh(mean @ weights["linear.weight"].double().T + weights["linear.bias"].double())
    expected = torch.nn.functional.normalize(dense, dim=-1)
    assert_equal_but_for_rounding(embed(encoder, tokens), expected)
    save_model(compose_rag("rag_sequence", encoder, bart), tmp_path / "rag")
    assert_equal_but_for_rounding(embed(load_model(str(tmp_path / "rag")).question_encoder, tokens), expected)
    # Without what its authors say there is no telling how it pools.
    (folder / "modules.json").unlink()
    with pytest.raises(UserError, match="is a t5 model, whose first token says nothing of the text"):
        load_encoder(str(folder))
    assert_equal_but_for_rounding(embed(load_encoder(str(folder), pooling="mean"), tokens), mean)


def test_a_decoder_is_read_by_its_last_token_or_refused(make, bert_tokenizer):
    gpt = GPT2Model(GPT2Config(vocab_size=len(bert_tokenizer), n_embd=DIMENSION, n_layer=1, n_head=2, n_positions=32))
    folder, gpt = make(gpt, pooling={"pooling_mode_lasttoken": True}, layers=())
    tokens = bert_tokenizer(["paris is the capital", "rome"], padding=True, return_tensors="pt")
    hidden = copy.deepcopy(gpt).double()(**tokens).last_hidden_state
    expected = torch.stack([hidden[0, -1], hidden[1, 2]])
    assert_equal_but_for_rounding(embed(load_encoder(str(folder)), tokens), expected)
    write(folder, "1_Pooling/config.json", {"pooling_mode_cls_token": True})
    for _ in range(2):
        with pytest.raises(UserError, match=f"{FLAG} .* is a gpt2 model, whose first token says nothing of the text"):
            load_encoder(str(folder))
        (folder / "modules.json").unlink(missing_ok=True)
    assert_equal_but_for_rounding(embed(load_encoder(str(folder), pooling="last"), tokens), expected)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_language_models_head_is_left_out_and_said(kind, bert_tokenizer, tmp_path, caplog):
    if kind == "bert":
        model = BertForPreTraining(BertConfig(vocab_size=len(bert_tokenizer), **SIZES)).eval()
        backbone, head = model.bert, "(cls)"
    else:
        model = RobertaForMaskedLM(RobertaConfig(vocab_size=len(bert_tokenizer), **SIZES)).eval()
        backbone, head = model.roberta, "(lm_head)"
    model.save_pretrained(tmp_path)
    tokens = bert_tokenizer(["oslo is near"], return_tensors="pt")
    encoder = load_encoder(str(tmp_path))
    assert_equal_but_for_rounding(encoder(**tokens)[0], backbone(**tokens).last_hidden_state[:, 0])
    assert f"weights of its head {head} are left out: an encoder has none" in caplog.text
    # Layers that the config does not have are no head.
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    with pytest.raises(UserError, match="weights more"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match="lacks"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("modules.json", {"a": 1}),
        ("modules.json", [3]),
        ("modules.json", [{"type": 3}]),
        ("modules.json", []),
        (
            "modules.json",
            [{"type": KIND + "Transformer", "path": "gone"}, {"type": KIND + "Pooling", "path": "1_Pooling"}],
        ),
        ("1_Pooling/config.json", [1]),
        ("1_Pooling/config.json", {"pooling_mode": {"a": 1}}),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}),
        ("config_sentence_transformers.json", {"prompts": ["a"]}),
        ("config_sentence_transformers.json", {"prompts": {"query": 3}}),
        ("config_sentence_transformers.json", {"prompts": {"query": "q"}, "default_prompt_name": "none"}),
        ("sentence_bert_config.json", {"max_seq_length": "many"}),
        ("sentence_bert_config.json", {"max_seq_length": 0}),
        ("sentence_bert_config.json", {"do_lower_case": "yes"}),
    ],
    ids=str,
)
def test_files_of_another_shape_are_one_line(name, content, make):
    folder, _ = make()
    write(folder, name, content)
    with pytest.raises(UserError, match=f"^{FLAG} {folder}[ :]") as error:
        load_encoder(str(folder))
    assert "\n" not in str(error.value)


def test_a_dpr_encoder_has_no_prompt(question_encoder_folder):
    with pytest.raises(UserError, match="is a DPR encoder, which was trained without prompts"):
        load_encoder(str(question_encoder_folder), prompt="query: ")
