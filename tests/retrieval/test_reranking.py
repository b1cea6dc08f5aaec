"""Rerankers: the scores are plain transformers', and every script keeps the passages that score best."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

import eval_rag
import finetune_rag
from rag.errors import UserError
from rag.files import load_json, read_lines, write_lines
from rag.models.checkpoints import load_model
from rag.models.modes import evaluating
from rag.models.prompts import PLAIN, settle_language_model
from rag.retrieval.arguments import RerankArguments
from rag.retrieval.finding import FoundPassages, find_passages
from rag.retrieval.reranking import CrossEncoder, Upr, open_cross_encoder, open_reranker
from rag.retrieval.retriever import RagKnowledgeRetriever, retrieve_contexts
from tests.conftest import (
    DIMENSION,
    PASSAGES,
    QUESTIONS,
    assert_the_generator_alone_learned,
    in_float64,
    saved,
)

ASKED = [question for question, _ in QUESTIONS]


def classifier(tokenizer, labels: int = 1) -> BertForSequenceClassification:
    torch.manual_seed(8)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=DIMENSION, num_hidden_layers=1, num_attention_heads=2, num_labels=labels,
        intermediate_size=32, max_position_embeddings=40, initializer_range=0.5,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


@pytest.fixture(scope="module")
def pair_tokenizer(bert_tokenizer):
    """As BERT's, of pairs, too."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(bert_tokenizer)
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


@pytest.fixture(scope="module")
def cross_folder(pair_tokenizer, tmp_path_factory):
    return saved(classifier(pair_tokenizer), pair_tokenizer, tmp_path_factory.mktemp("cross"))


def found_of(ids: np.ndarray, questions: list[str]) -> FoundPassages:
    """Passages by their rows, -1 for none."""
    docs = [
        {
            name: [PASSAGES[row][place] if row >= 0 else "" for row in own]
            for place, name in enumerate(("title", "text"))
        }
        for own in ids
    ]
    return FoundPassages(torch.zeros(len(ids), 1), questions, ids, docs, torch.zeros(ids.shape))


TOO_FEW = "is less than the 5 passages that are kept; give 5 or more"
IDS = np.array([[0, 3, 5, 1], [7, -1, 2, 4], [6, -1, -1, -1], [-1, -1, -1, -1]])


# --- CrossEncoder -----------------------------------------------------------------------------------------------------


def test_a_cross_encoders_scores_are_transformers_own(cross_folder, pair_tokenizer, monkeypatch):
    monkeypatch.setattr("rag.retrieval.reranking.PAIRS_AT_A_TIME", 3)
    rerank = open_reranker(str(cross_folder), 4, None, None)
    assert isinstance(rerank, CrossEncoder) and rerank.depth == 4 and rerank.most == 40
    scores = rerank(found_of(IDS, ASKED[:4]))
    assert scores.dtype == torch.float32 and not scores.requires_grad
    model = classifier(pair_tokenizer)
    for row, ids in enumerate(IDS):
        for place, passage in enumerate(ids):
            if passage >= 0:
                title, text = PASSAGES[passage]
                tokens = pair_tokenizer(
                    ASKED[row], f"{title} {text}", truncation=True, max_length=40, return_tensors="pt"
                )
                with torch.no_grad():
                    right = model(**tokens).logits[0, 0]
                torch.testing.assert_close(scores[row, place], right, atol=1e-5, rtol=1e-5)


def test_a_long_passage_is_cut(cross_folder):
    rerank = open_cross_encoder(str(cross_folder), 4)
    long, cut = rerank.logits([("who", "paris " * 500), ("who", "paris " * 40)])
    assert torch.equal(long, cut)


def test_what_is_no_cross_encoder_is_told(bart_folder, bert_tokenizer, pair_tokenizer, tmp_path):
    two = saved(classifier(pair_tokenizer, 2), pair_tokenizer, tmp_path / "two")
    with pytest.raises(UserError, match=f"--reranker {two} has 2 labels, and a reranker has one"):
        open_cross_encoder(str(two), 4)
    plain = saved(BertModel(classifier(pair_tokenizer).config), pair_tokenizer, tmp_path / "plain")
    with pytest.raises(UserError, match=r"lacks 2 of AutoModelForSequenceClassification's weights \(classifier"):
        open_cross_encoder(str(plain), 4)
    headless = classifier(pair_tokenizer)
    weights = {name: weight for name, weight in headless.state_dict().items() if "pooler" not in name}
    headless.save_pretrained(tmp_path / "headless", state_dict=weights)
    pair_tokenizer.save_pretrained(tmp_path / "headless")
    with pytest.raises(UserError, match=r"lacks 2 of .*pooler.dense"):
        open_cross_encoder(str(tmp_path / "headless"), 4)
    with pytest.raises(UserError, match=f"--reranker {tmp_path / 'none'} is not a folder"):
        open_cross_encoder(str(tmp_path / "none"), 4)


# --- upr --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_upr_is_the_generators_log_likelihood(family, request):
    generator = in_float64(copy.deepcopy(request.getfixturevalue(family)))
    tokenizer = copy.deepcopy(request.getfixturevalue(f"{family}_tokenizer"))
    scores = Upr(generator, tokenizer, 4)(found_of(IDS, ASKED[:4]))
    for row, ids in enumerate(IDS):
        labels = tokenizer(ASKED[row], return_tensors="pt").input_ids
        for place, passage in enumerate(ids):
            if passage >= 0:
                title, text = PASSAGES[passage]
                prompt = f"Passage: {title} {text}. Please write a question based on this passage."
                with torch.no_grad():
                    loss = generator(**tokenizer(prompt, return_tensors="pt"), labels=labels).loss
                right = -loss.item() * labels.shape[1]  # the sum over the question's tokens
                assert scores[row, place].item() == pytest.approx(right, abs=1e-4)


def test_upr_of_a_language_model_reads_its_template_up_to_the_question(llama, llama_tokenizer):
    generator, tokenizer = copy.deepcopy(llama), copy.deepcopy(llama_tokenizer)
    settle_language_model(generator, tokenizer, PLAIN, "--generator_name_or_path x")
    scores = Upr(generator, tokenizer, 4)(found_of(IDS, ASKED[:4]))
    for row, ids in enumerate(IDS):
        question = [*tokenizer(f" {ASKED[row]}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        for place, passage in enumerate(ids):
            if passage >= 0:
                title, text = PASSAGES[passage]
                prompt = tokenizer(f"Title: {title}\nPassage: {text}\nQuestion:", add_special_tokens=False).input_ids
                with torch.no_grad():
                    logits = generator(torch.tensor([prompt + question])).logits[0].log_softmax(-1)
                says = logits[len(prompt) - 1 : -1]
                right = says[torch.arange(len(question)), question].sum().item()
                assert scores[row, place].item() == pytest.approx(right, abs=1e-3)


def test_upr_cuts_a_long_passage_and_keeps_what_is_asked(bart, bart_tokenizer):
    upr = Upr(bart, bart_tokenizer, 4, most=30)
    one, two = upr.log_likelihoods(ASKED[0], [("paris", "river " * 30 + "oslo"), ("paris", "river " * 400)])
    assert one == two != upr.log_likelihoods(ASKED[0], [("paris", "oslo")])
    upr.log_likelihoods("paris " * 1000, [("paris", "river")])  # nor is a question too long for the decoder


def test_upr_has_no_dropout_and_leaves_the_modes(bart, bart_tokenizer):
    generator = copy.deepcopy(bart)
    generator.config.dropout = 0.5
    for module in generator.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.5
    right = Upr(generator, bart_tokenizer, 4)(found_of(IDS, ASKED[:4]))
    generator.train()
    generator.model.encoder.eval()
    modes = {name: module.training for name, module in generator.named_modules()}
    assert torch.equal(Upr(generator, bart_tokenizer, 4)(found_of(IDS, ASKED[:4])), right)
    assert modes == {name: module.training for name, module in generator.named_modules()}
    with evaluating(generator):
        assert not any(module.training for module in generator.modules())


# --- The best are kept ------------------------------------------------------------------------------------------------


class ByTitle:
    """A score that tells what was found: the later in the alphabet, the better."""

    learns = False

    def __init__(self, depth: int):
        self.depth = depth

    def __call__(self, found: FoundPassages) -> torch.Tensor:
        order = sorted(title for title, _ in PASSAGES)
        return torch.tensor([[float(order.index(t)) if t else 99.0 for t in doc["title"]] for doc in found.docs])


def test_the_best_of_those_that_were_found_are_kept(rag_sequence, retriever, bert_tokenizer):
    tokens = bert_tokenizer(ASKED, padding=True, return_tensors="pt")
    plain = find_passages(rag_sequence.question_encoder, retriever, tokens, ASKED, 5)
    found = find_passages(rag_sequence.question_encoder, retriever, tokens, ASKED, 2, rescore=ByTitle(5))
    for own, all_five, doc, scores in zip(found.doc_ids, plain.doc_ids, found.docs, found.scores, strict=True):
        titles = sorted((PASSAGES[row][0] for row in all_five), reverse=True)[:2]
        assert doc["title"] == titles == [PASSAGES[row][0] for row in own] and scores[0] > scores[1]
    contexts = retrieve_contexts(rag_sequence.rag, retriever, *tokens.values(), 2, rescore=ByTitle(5))
    np.testing.assert_array_equal(contexts.doc_ids, found.doc_ids)
    assert torch.equal(contexts.doc_scores, found.scores) and not contexts.doc_scores.requires_grad
    assert contexts.docs == found.docs and len(contexts.input_ids) == 2 * len(ASKED)


def test_slots_without_a_passage_are_last(rag_sequence, retriever, bert_tokenizer):
    tokens = bert_tokenizer(ASKED[:2], padding=True, return_tensors="pt")
    found = find_passages(rag_sequence.question_encoder, retriever, tokens, ASKED[:2], 9, rescore=ByTitle(12))
    assert (found.doc_ids[:, 8] == -1).all() and (found.doc_ids[:, :8] >= 0).all()
    assert found.scores[:, 8].isneginf().all() and found.scores[:, :8].isfinite().all()


# --- The scripts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rag_folder(checkpoint):
    return checkpoint("rag_sequence", "bart")


@pytest.fixture
def evaluate(rag_folder, tmp_path):
    asked, answers = zip(*QUESTIONS, strict=True)
    write_lines(asked, tmp_path / "questions")
    write_lines(answers, tmp_path / "gold")

    def run(*flags):
        words = ["--model_name_or_path", rag_folder, "--evaluation_set", tmp_path / "questions", "--gold_data_mode"]
        words += ["ans", "--gold_data_path", tmp_path / "gold", "--predictions_path", tmp_path / "found", *flags]
        return eval_rag.main(eval_rag.parse_args(list(map(str, words))))

    return run


@pytest.mark.parametrize("mode", ["retrieval", "e2e"])
@pytest.mark.parametrize("kind", ["upr", "cross"])
def test_evaluation(mode, kind, evaluate, rag_folder, cross_folder, tmp_path):
    name = str(cross_folder) if kind == "cross" else kind
    flags = ("--eval_mode", mode, "--n_docs", 2, "--num_beams", 1, "--max_length", 5)
    evaluate(*flags, "--reranker", name, "--rerank_depth", 8)
    records = [json.loads(line) for line in read_lines(tmp_path / "found.jsonl")]
    retriever = RagKnowledgeRetriever.from_pretrained(rag_folder)
    rerank = open_reranker(name, 8, load_model(str(rag_folder)), retriever.generator_tokenizer)
    ids = np.tile(np.arange(8), (len(ASKED), 1))
    scores = rerank(found_of(ids, ASKED))
    for record, own in zip(records, scores, strict=True):
        assert record["doc_ids"] == own.argsort(descending=True)[:2].tolist()
        np.testing.assert_allclose(record["scores"], own.sort(descending=True).values[:2], atol=1e-4)
    settings = load_json(tmp_path / "found.settings.json")["settings"]
    assert settings["rerank_depth"] == 8 and ("digest" in settings["reranker"]) == (kind == "cross")
    evaluate(*flags, "--reranker", name, "--rerank_depth", 8)  # scored again
    with pytest.raises(UserError, match="reranker "):
        evaluate(*flags)
    with pytest.raises(UserError, match=r"rerank_depth 8 \(now 7\)"):
        evaluate(*flags, "--reranker", name, "--rerank_depth", 7)


def test_another_cross_encoder_is_another_evaluation(evaluate, cross_folder, pair_tokenizer, tmp_path):
    folder = saved(classifier(pair_tokenizer), pair_tokenizer, tmp_path / "cross")
    flags = ("--eval_mode", "retrieval", "--reranker", folder)
    evaluate(*flags)
    torch.manual_seed(9)
    changed = classifier(pair_tokenizer)
    torch.nn.init.normal_(changed.classifier.weight)
    changed.save_pretrained(folder)
    with pytest.raises(UserError, match=r"reranker .*its content has changed"):
        evaluate(*flags)


@pytest.mark.parametrize("kind", ["upr", "cross"])
def test_finetuning(kind, rag_folder, data_dir, tmp_path, cross_folder, caplog):
    name = str(cross_folder) if kind == "cross" else kind
    words = f"""--model_name_or_path {rag_folder} --data_dir {data_dir} --output_dir {tmp_path / "out"} --n_docs 2
    --reranker {name} --rerank_depth 4 --train_batch_size 4 --num_workers 0 --accelerator cpu --num_train_epochs 2
    --learning_rate 0.01 --max_source_length 32 --num_sanity_val_steps 0 --log_every_n_steps 1"""
    finetune_rag.main(finetune_rag.parse_args(words.split()))
    folder = tmp_path / "out" / "checkpoint2"
    assert_the_generator_alone_learned(rag_folder, folder)
    assert not any("classifier" in name for name in torch.load(f"{folder}.ckpt", weights_only=True)["state_dict"])
    assert "its scores have no gradient for the question encoder, which does not learn" in caplog.text
    assert "rerank_depth" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("given", "n_docs", "problem"),
    [
        ({"rerank_depth": 5}, 5, "--rerank_depth 5 is for --reranker; give it, too, or leave it out"),
        ({"reranker": "upr", "rerank_depth": 0}, 5, "--rerank_depth 0 must be from 1 to 100,000"),
        ({"reranker": "upr", "rerank_depth": 3}, 5, f"--rerank_depth 3 {TOO_FEW}"),
        ({"reranker": " "}, 5, "--reranker '' names nothing; give upr or a CrossEncoder, or leave it out"),
    ],
)  # fmt: skip
def test_flags_that_cannot_be_meant(given, n_docs, problem):
    args = RerankArguments(**given)
    assert args.rerank_problems(n_docs) == [problem]
    with pytest.raises(UserError, match=problem[:30]):
        args.depth_for(n_docs)


def test_depths_that_are_left_out():
    args = RerankArguments(reranker="upr")
    assert (args.depth_for(5), args.depth_for(80)) == (50, 80)


def test_no_more_is_fetched_than_there_is(rag_sequence, retriever, bert_tokenizer, cross_folder):
    """Slots behind the last passage would take memory, and are empty."""
    tokens, fetched = bert_tokenizer(ASKED, padding=True, return_tensors="pt"), []
    rerank = open_cross_encoder(str(cross_folder), 100_000)

    def noted(found):
        fetched.append(found.doc_ids.shape)
        return rerank(found)

    noted.depth, noted.learns = rerank.depth, rerank.learns
    found = find_passages(rag_sequence.rag.question_encoder, retriever, tokens, ASKED, 2, rescore=noted)
    assert fetched == [(len(ASKED), len(PASSAGES))] and found.doc_ids.shape == (len(ASKED), 2)


@pytest.mark.parametrize(
    "flags", [["--reranker", "upr"], ["--retriever_loss", "pdist"], ["--train_context_encoder"], ["--fusion", "ranks"]]
)
def test_a_bare_generator_cannot_be_trained_with_passages(flags, bart_folder, data_dir, tmp_path):
    words = ["--model_name_or_path", bart_folder, "--data_dir", data_dir, "--output_dir", tmp_path / "out", *flags]
    with pytest.raises(UserError, match=f"^{' '.join(flags)}: .*leave it out"):
        finetune_rag.main(finetune_rag.parse_args([*map(str, words), "--accelerator", "cpu"]))


def test_a_model_without_retrieval_has_nothing_to_rerank(bart_folder, data_dir, tmp_path):
    words = ["--model_name_or_path", bart_folder, "--evaluation_set", data_dir / "test.source", "--gold_data_path"]
    words += [data_dir / "test.target", "--gold_data_mode", "ans", "--reranker", "upr"]
    with pytest.raises(UserError, match="retrieves nothing that --reranker upr could read"):
        eval_rag.main(eval_rag.parse_args([*map(str, words), "--predictions_path", str(tmp_path / "found")]))


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--freeze_generator", r"--freeze_generator with --reranker upr \(whose scores have no gradient"),
        ("--retriever_loss emdr2", "--retriever_loss emdr2 with --reranker upr"),
        ("--question_encoder_lora_r 4", "--question_encoder_lora_r and --reranker upr contradict each other"),
        ("--strategy fsdp --bf16", "--strategy fsdp and --reranker upr contradict each other"),
        ("--rerank_depth 2 --n_docs 3", "--rerank_depth 2 is less than the 3 passages"),
    ],
)
def test_settings_that_contradict_a_reranker(flags, problem, rag_folder, data_dir, tmp_path):
    words = f"--model_name_or_path {rag_folder} --data_dir {data_dir} --output_dir {tmp_path / 'out'} --reranker upr"
    with pytest.raises(UserError, match=problem):
        finetune_rag.parse_args([*words.split(), *flags.split()])
