"""The context encoder that learns: scores and gradients of the plain way, every loss, whole runs, refusals."""

import shutil

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, RagTokenizer

from rag.errors import UserError
from rag.knowledge.embedding import embed
from rag.models.checkpoints import load_model, load_tokenizer
from rag.models.encoders import load_encoder
from rag.models.pooled_encoder import PooledEncoder, PooledEncoderConfig
from rag.retrieval.finding import FoundPassages
from rag.retrieval.retriever import RagKnowledgeRetriever, retrieve_contexts
from rag.training.arguments import parse_args
from rag.training.context_encoder import FreshScores, open_context_encoder, save_context_encoder
from rag.training.qa_module import GenerativeQAModule
from rag.training.retriever_loss import RETRIEVER_LOSSES
from tests.conftest import QUESTIONS, assert_equal_but_for_rounding, in_float64
from tests.training.test_finetune_rag import run

ASKED = [question for question, _ in QUESTIONS]


@pytest.fixture
def module_of(checkpoint, bert_tokenizer, bart_tokenizer, context_encoder_folder):
    """A function that makes a module under given flags, whose context encoder is not the one that made the index."""
    folder = checkpoint()

    def make(*flags) -> GenerativeQAModule:
        n_docs = flags[flags.index("--n_docs") + 1] if "--n_docs" in flags else 3
        model_type = flags[flags.index("--model_type") + 1] if "--model_type" in flags else None
        model = load_model(str(folder), model_type, config_overrides={"dropout": 0.0, "n_docs": n_docs})
        tokenizer = RagTokenizer(bert_tokenizer, bart_tokenizer)
        words = ["--model_name_or_path", folder, "--data_dir", "d", "--output_dir", "o", "--train_context_encoder"]
        words += ["--context_encoder_name_or_path", context_encoder_folder, *flags]
        retriever = RagKnowledgeRetriever(model.config, tokenizer.question_encoder, tokenizer.generator)
        module = GenerativeQAModule(parse_args(list(map(str, words))), model, tokenizer, retriever).train()
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in module.context_encoder.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        return module

    return make


def batch_of(module, tokenizer) -> dict:
    batch = dict(tokenizer(ASKED, padding=True, return_tensors="pt"))
    answers = [answer for _, answer in QUESTIONS]
    batch["labels"] = module.answer_tokenizer(text_target=answers, padding=True, return_tensors="pt").input_ids
    return batch | {"loss_weight": 1.0, "index": list(range(len(ASKED)))}


def plain_vectors(module, passages) -> torch.Tensor:
    """One passage after the other, tokenized by hand."""
    tokenizer, vectors = module.context_tokenizer, []
    for title, text in passages:
        tokens = tokenizer([title], [text], return_tensors="pt", return_token_type_ids=False)
        vectors.append(module.context_encoder(**tokens)[0])
    return torch.cat(vectors)


def queries_and_contexts(module, tokenizer):
    tokens = tokenizer(ASKED, padding=True, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    queries = module.model.rag.question_encoder(ids, attention_mask=mask)[0]
    return queries, retrieve_contexts(module.model.rag, module.retriever, ids, mask, rescore=module.rescore)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_scores_and_gradients_are_those_of_the_plain_way(attention, module_of, bert_tokenizer):
    module = module_of("--n_docs", 3, "--attn_implementation", attention)
    in_float64(module.model)
    in_float64(module.context_encoder)
    queries, contexts = queries_and_contexts(module, bert_tokenizer)
    passages = [pair for doc in contexts.docs for pair in zip(doc["title"], doc["text"], strict=True)]
    assert len(set(passages)) < len(passages)
    expected = (queries.unsqueeze(1) * plain_vectors(module, passages).view(len(ASKED), 3, -1)).sum(-1)
    assert_equal_but_for_rounding(contexts.doc_scores.detach(), expected.detach())

    def gradients(scores):
        module.zero_grad()
        scores.log_softmax(1)[:, 0].sum().backward(retain_graph=True)
        parts = (module.context_encoder, module.model.rag.question_encoder)
        return {f"{i} {name}": w.grad.clone() for i, part in enumerate(parts) for name, w in part.named_parameters()}

    assert_equal_but_for_rounding(gradients(contexts.doc_scores), gradients(expected))


def test_of_more_passages_the_best_by_fresh_scores_are_read(module_of, bert_tokenizer):
    module = module_of("--n_docs", 2, "--over_retrieve", 6)
    queries, contexts = queries_and_contexts(module, bert_tokenizer)
    _, found, docs = module.retriever.retrieve(queries.detach().numpy(), 6)
    changed = 0
    for row, (ids, doc) in enumerate(zip(found, docs, strict=True)):
        with torch.no_grad():
            scores = plain_vectors(module, zip(doc["title"], doc["text"], strict=True)) @ queries[row]
        best = scores.argsort(descending=True)[:2].numpy()
        np.testing.assert_array_equal(contexts.doc_ids[row], ids[best])
        assert contexts.docs[row]["text"] == [doc["text"][i] for i in best]
        torch.testing.assert_close(contexts.doc_scores[row], scores[best], rtol=1e-4, atol=1e-4)
        changed += list(best) != [0, 1]
    assert changed and contexts.doc_scores.requires_grad


def test_a_slot_without_a_passage_scores_nothing_and_the_encoder_has_a_gradient_all_the_same(module_of):
    fresh = module_of("--n_docs", 2).rescore
    docs = [{"title": ["", ""], "text": ["", ""]}] * 2
    found = FoundPassages(torch.randn(2, 16), ASKED[:2], np.full((2, 2), -1), docs, torch.zeros(2, 2))
    scores = fresh(found)
    missing = torch.ones(2, 2, dtype=torch.bool)
    scores.masked_fill(missing, 0.0).sum().backward()
    assert all(w.grad is not None and not w.grad.any() for w in fresh.encoder.parameters())


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--freeze_generator",
        "--freeze_question_encoder",
        "--freeze_generator --freeze_question_encoder",
        "--question_encoder_lora_r 2",
    ],
)
@pytest.mark.parametrize("loss", ["marginal", *RETRIEVER_LOSSES])
def test_it_learns_from_every_loss(loss, flags, module_of, bert_tokenizer):
    kind = ["--model_type", "fid"] if loss == "adist" else []
    module = module_of("--n_docs", 3, "--retriever_loss", loss, *kind, *flags.split())
    module.is_log_step = lambda: False
    module._training_losses(module.prepare_batch(batch_of(module, bert_tokenizer)))[0].mean().backward()
    gradients = {name: w.grad for name, w in module.context_encoder.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients.values())
    if "freeze_question_encoder" in flags:
        assert all(w.grad is None for w in module.model.rag.question_encoder.parameters())


def test_a_run_exports_the_encoder_beside_the_model(checkpoint, context_encoder_folder, data_dir, tmp_path):
    out = tmp_path / "out"
    flags = ["--train_context_encoder", "--context_encoder_name_or_path", context_encoder_folder, "--freeze_generator"]
    run(checkpoint(), data_dir, out, *flags, "--context_encoder_learning_rate", 0.02, "--num_train_epochs", 2)
    trained = load_encoder(str(out / "checkpoint2" / "context_encoder"), "context").state_dict()
    before = load_encoder(str(context_encoder_folder), "context").state_dict()
    assert any(not torch.equal(weight, before[name]) for name, weight in trained.items())
    weights = torch.load(out / "checkpoint2.ckpt", weights_only=True)["state_dict"]
    saved = {name.removeprefix("context_encoder."): w for name, w in weights.items() if name.startswith("context_enc")}
    for name, weight in saved.items():
        torch.testing.assert_close(weight, trained[name], rtol=0, atol=0)
    assert saved and not any(".generator." in name for name in weights)

    module = GenerativeQAModule.load_from_checkpoint(out / "checkpoint2.ckpt")
    for name, weight in module.context_encoder.state_dict().items():
        torch.testing.assert_close(weight, trained[name], rtol=0, atol=0)


def test_another_encoder_is_refused_or_told(checkpoint, bert_folders, tmp_path, caplog):
    """By what index.json says of the one that made the index."""
    passages, index, encoder = bert_folders
    flags = ["--passages_path", passages, "--index_path", index, "--n_docs", 2]

    def opened(*further):
        words = ["--model_name_or_path", checkpoint(), "--data_dir", "d", "--output_dir", "o", *flags, *further]
        args = parse_args([*map(str, words), "--train_context_encoder"])
        model = load_model(str(args.model.model_name_or_path), prepare_config=args.retrieval.apply_to)
        return open_context_encoder(args, RagKnowledgeRetriever(model.config, None, None, init_retrieval=False))

    assert opened()[0].config.model_type == "dpr"  # the one that index.json names
    other = shutil.copytree(encoder, tmp_path / "other")
    weights = load_encoder(str(other), "context")
    with torch.no_grad():
        next(weights.parameters()).add_(1.0)
    weights.save_pretrained(other)
    opened("--context_encoder_name_or_path", other)
    assert "has other weights than" in caplog.text
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=weights.config.vocab_size, **sizes)).save_pretrained(other)
    with pytest.raises(UserError, match="has input 'title text', but the index was made with 'title, text'"):
        opened("--context_encoder_name_or_path", other)


@pytest.fixture(scope="module")
def bert_folders(context_encoder_folder, tmp_path_factory):
    """Passages, index and the encoder that made them, by use_own_knowledge_dataset.py."""
    import use_own_knowledge_dataset
    from rag.knowledge.arguments import KnowledgeArguments
    from tests.conftest import PASSAGES

    folder = tmp_path_factory.mktemp("own")
    (folder / "documents.tsv").write_text("".join(f"{title}\t{text}\n" for title, text in PASSAGES))
    args = KnowledgeArguments(
        csv_path=str(folder / "documents.tsv"), dpr_ctx_encoder_model_name=str(context_encoder_folder), m=8,
        output_dir=str(folder / "out"), recall_queries=0,
    )  # fmt: skip
    made = use_own_knowledge_dataset.main(args)
    return made.passages_path, made.index_path, context_encoder_folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--over_retrieve 9", "--over_retrieve 9 is for a context encoder that learns"),
        ("--refresh_index 0-:5", "--refresh_index 0-:5 is for a context encoder that learns"),
        ("--train_context_encoder --index_name bm25 --passages_path x", "whose scores are by words"),
        ("--train_context_encoder --passages_file x", "whose scores are by words"),
        ("--train_context_encoder --model_type t5", "which retrieves nothing"),
        ("--train_context_encoder --strategy fsdp", "--strategy fsdp"),
        ("--train_context_encoder --over_retrieve 3 --n_docs 4", "--over_retrieve 3 is less than --n_docs 4"),
        ("--train_context_encoder --refresh_index 5", "'5' says no steps and interval"),
        ("--train_context_encoder --refresh_index 0-:5 --index_name exact", "--index_name exact contradict"),
        ("--train_context_encoder --refresh_device gpu", "--refresh_device gpu is no device"),
        ("--train_context_encoder --refresh_processes 0", "--refresh_processes 0 must be from 1 to 1,024"),
        ("--train_context_encoder --refresh_processes 100000", "--refresh_processes 100000 must be from 1 to 1,024"),
        ("--train_context_encoder --refresh_device ray --refresh_processes 3", "Ray starts as many as fit"),
        ("--refresh_processes 3", "--refresh_processes 3 is for a context encoder that learns"),
        ("--train_context_encoder --context_encoder_learning_rate -1", "must be 0 or more"),
    ],
)
def test_contradictions_are_told_at_once(flags, message):
    with pytest.raises(UserError, match=message):
        parse_args([*["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o"], *flags.split()])


def test_an_index_without_vectors_is_refused(module_of, knowledge):
    words = ["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o", "--train_context_encoder"]
    with pytest.raises(UserError, match="the model retrieves nothing"):
        open_context_encoder(parse_args(words), None)
    retriever = module_of().retriever
    with pytest.raises(UserError, match="needs --context_encoder_name_or_path: the index does not say"):
        open_context_encoder(parse_args(words), retriever)


def test_padded_and_packed_passages_have_the_same_vectors(module_of):
    module = module_of()
    passages = [("oslo", "oslo is in norway"), ("", "a river"), ("rome", "the capital of italy lies on the tiber")]
    padded = FreshScores(module.context_encoder, module.context_tokenizer, packed=False)
    assert module.rescore.packed and not padded.packed
    torch.testing.assert_close(module.rescore.read(passages), padded.read(passages), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_pooled_encoder_reads_as_the_knowledge_build_does(pooling, bert_tokenizer, tmp_path):
    """With its prompt, lower-cased, normalized; and it is written as it was."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=len(bert_tokenizer), **sizes))
    settings = {"pooling": pooling, "normalize": True, "passage_prompt": "a city ", "lower_case": True}
    encoder = PooledEncoder(PooledEncoderConfig(backbone=bert.config, **settings), bert).eval()
    passages = [("Oslo", "Oslo is the capital of Norway"), ("", "a River"), ("Rome", "Rome lies on the tiber")]
    expected = embed(dict(zip(("title", "text"), zip(*passages, strict=True), strict=True)), encoder, bert_tokenizer)
    save_context_encoder(encoder, bert_tokenizer, tmp_path / "encoder")
    written = load_encoder(str(tmp_path / "encoder"), "context"), load_tokenizer(str(tmp_path / "encoder"))
    for parts in ((encoder, bert_tokenizer), written):
        for packed in (True, False):
            found = FreshScores(*parts, packed=packed).read(passages).detach().numpy()
            np.testing.assert_allclose(found, expected["embeddings"], rtol=1e-5, atol=1e-5)
