"""Losses of the retriever's own: worked numbers, finite differences, RAG's own likelihood, steps and whole runs."""

import itertools
import math

import pytest
import torch

from rag.errors import UserError
from rag.training.arguments import parse_args
from rag.training.loss import rag_sequence_nll, rag_token_nll
from rag.training.retriever_loss import RETRIEVER_LOSSES, Teacher, divergence, taught
from rag.training.run_folder import read_metrics
from tests.conftest import assert_equal_but_for_rounding
from tests.training.test_finetune_rag import run

NONE = float("-inf")
SCORES = torch.tensor([[2.0, 1.0, -0.5], [0.3, NONE, 0.1], [1.0, NONE, NONE]], dtype=torch.float64)
BY_LIKELIHOOD = [name for name in RETRIEVER_LOSSES if name != "adist"]  # whose numbers are in test_fusion.py
TARGETS = torch.tensor([[3, 4, 5, 1], [6, 1, 1, 1], [7, 8, 1, 1]])  # 1 is padding


def teacher_of(per_token=False, seed=0) -> Teacher:
    """Of three questions with three passages each, some missing."""
    torch.manual_seed(seed)
    is_word = TARGETS != 1
    log_probs = -torch.rand(3, 3, 4, dtype=torch.float64) * 4 * is_word.unsqueeze(1)
    return Teacher(log_probs, is_word.sum(1), per_token)


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def test_pdist_of_worked_numbers():
    """log p of -1, -3, -3 teaches 0.787, 0.107, 0.107; a retriever that says so has nothing to learn."""
    judged = torch.tensor([[-1.0, -3.0, -3.0]])
    shares = torch.tensor(softmax([-1, -3, -3]))
    assert [round(share, 3) for share in shares.tolist()] == [0.787, 0.107, 0.107]
    teacher = Teacher(judged.unsqueeze(-1), torch.tensor([1]), per_token=False)
    pdist = RETRIEVER_LOSSES["pdist"]
    assert pdist(teacher, judged - 5, 1.0, 1.0).item() == pytest.approx(0, abs=1e-6)
    even = sum(share * math.log(share * 3) for share in shares.tolist())
    assert pdist(teacher, torch.zeros(1, 3), 1.0, 1.0).item() == pytest.approx(even, abs=1e-6)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", BY_LIKELIHOOD)
def test_every_loss_equals_its_formula(name, per_token):
    """Passage by passage, in Python's own numbers."""
    tau, teacher_temperature = 0.7, 1 if name == "emdr2" else 1.9
    teacher = teacher_of(per_token)
    losses = RETRIEVER_LOSSES[name](teacher, SCORES, tau, teacher_temperature).tolist()
    drawn_to = taught(RETRIEVER_LOSSES[name], teacher, SCORES, tau, teacher_temperature)
    for question, scores in enumerate(SCORES.tolist()):
        there = [passage for passage, score in enumerate(scores) if score > NONE]
        words = {passage: teacher.log_probs[question, passage].tolist() for passage in there}
        prior = dict(zip(there, softmax([scores[passage] / tau for passage in there]), strict=True))

        def mixed(weights, words=words):
            if per_token:
                columns = zip(*(words[passage] for passage in weights), strict=True)
                each = [sum(w * math.exp(p) for w, p in zip(weights.values(), c, strict=True)) for c in columns]
                return sum(map(math.log, each))
            return math.log(sum(weight * math.exp(sum(words[passage])) for passage, weight in weights.items()))

        if name == "emdr2":
            assert losses[question] == pytest.approx(-mixed(prior))
            continue
        if name == "loop" and len(there) > 1:
            own = [math.exp(scores[passage]) for passage in there]  # the model's priors know no temperature
            judged = []
            for left_out in range(len(there)):
                rest = sum(own) - own[left_out]
                others = {p: w / rest for n, (p, w) in enumerate(zip(there, own, strict=True)) if n != left_out}
                judged.append(-mixed(others))
        elif name == "loop":
            judged = [0.0]
        else:
            n_words = int(teacher.lengths[question]) if name == "lsr" else 1
            judged = [sum(words[passage]) / n_words for passage in there]
        shares = softmax([value / teacher_temperature for value in judged])
        expected = sum(share * math.log(share / p) for share, p in zip(shares, prior.values(), strict=True))
        assert losses[question] == pytest.approx(expected, abs=1e-12)
        assert drawn_to[question, there].tolist() == pytest.approx(shares, abs=1e-12)
        assert drawn_to[question].sum().item() == pytest.approx(1.0)  # a passage that is missing has no share


@pytest.mark.parametrize(("name", "per_token"), itertools.product(BY_LIKELIHOOD, [False, True]))
def test_gradients_are_those_of_finite_differences(name, per_token):
    teacher = teacher_of(per_token, seed=1)
    frozen = SCORES.clone()  # loop's teacher is the model's own mixture, which gets no gradient

    def loss(scores):
        if name == "loop":
            judged = _loop_judgment(teacher, frozen)
            return divergence(judged / 1.3, scores, 0.8).sum()
        return RETRIEVER_LOSSES[name](teacher, scores, 0.8, 1.0 if name == "emdr2" else 1.3).sum()

    scores = SCORES.clone().requires_grad_()
    RETRIEVER_LOSSES[name](teacher, scores, 0.8, 1.0 if name == "emdr2" else 1.3).sum().backward()
    assert scores.grad.isfinite().all() and scores.grad.abs().sum() > 0.01
    for place in (SCORES > NONE).nonzero().tolist():
        nudge = torch.zeros_like(SCORES)
        nudge[tuple(place)] = 1e-6
        slope = (loss(SCORES + nudge) - loss(SCORES - nudge)) / 2e-6
        assert scores.grad[tuple(place)].item() == pytest.approx(slope.item(), abs=1e-7)
    assert (scores.grad[SCORES.isneginf()] == 0).all()


def _loop_judgment(teacher, scores):
    judged = torch.zeros_like(scores)
    for passage in range(scores.shape[1]):
        others = scores.clone()
        others[:, passage] = torch.where((scores > NONE).sum(1) > 1, NONE, others[:, passage])
        judged[:, passage] = -teacher.mixed(others.log_softmax(-1))
    return judged


@pytest.mark.parametrize("nll", [rag_sequence_nll, rag_token_nll])
def test_emdr2_has_the_gradient_of_rags_own_likelihood(nll):
    torch.manual_seed(2)
    hidden, layer = torch.randn(9, 4, 5).double(), (torch.randn(11, 5).double(), torch.randn(11).double())
    own, ours = SCORES.clone().requires_grad_(), SCORES.clone().requires_grad_()
    noted = []
    loss = nll(hidden, layer, own, TARGETS, 1, note_logprobs=noted.append)
    teacher = Teacher(noted[0], (TARGETS != 1).sum(1), per_token=nll is rag_token_nll)
    same = RETRIEVER_LOSSES["emdr2"](teacher, ours, 1.0, 1.0)
    assert_equal_but_for_rounding(same, loss)
    loss.sum().backward()
    same.sum().backward()
    assert_equal_but_for_rounding(ours.grad, own.grad)


# --- Training ---------------------------------------------------------------------------------------------------------


def gradients_of(module, batch) -> dict[str, torch.Tensor]:
    module.zero_grad()
    torch.manual_seed(0)
    module._training_losses(batch)[0].mean().backward()
    return {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("model_type", ["rag_sequence", "rag_token"])
def test_the_generator_learns_from_the_answers_and_the_retriever_from_its_own_loss(
    model_type, checkpoint, bert_tokenizer, bart_tokenizer
):
    from transformers import RagTokenizer

    from rag.models.checkpoints import load_model
    from rag.retrieval.retriever import RagKnowledgeRetriever
    from rag.training.qa_module import GenerativeQAModule
    from tests.conftest import QUESTIONS, in_float64

    folder = checkpoint(model_type, "bart")
    tokenizer = RagTokenizer(bert_tokenizer, bart_tokenizer)
    batch = dict(bert_tokenizer([question for question, _ in QUESTIONS], padding=True, return_tensors="pt"))
    answers = [answer + " of the sea" * (i % 3) for i, (_, answer) in enumerate(QUESTIONS)]
    batch["labels"] = bart_tokenizer(text_target=answers, padding=True, return_tensors="pt").input_ids

    def module_of(*flags):
        model = load_model(str(folder))
        args = parse_args(["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o", *flags])
        retriever = RagKnowledgeRetriever(model.config, bert_tokenizer, bart_tokenizer)
        retriever.init_retrieval()
        module = GenerativeQAModule(args, model, tokenizer, retriever).train()
        in_float64(module.model)
        module.is_log_step = lambda: False
        return module

    marginal = module_of()
    prepared = marginal.prepare_batch(batch)
    expected = gradients_of(marginal, prepared)
    doubled = gradients_of(module_of("--retriever_loss", "emdr2", "--retriever_loss_weight", "2"), prepared)
    taught = gradients_of(module_of("--retriever_loss", "pdist"), prepared)
    assert expected.keys() == doubled.keys() == taught.keys()

    def parts(gradients, factor=1.0):
        """Those of the question encoder, times a factor, and those of the generator."""
        encoder = {name: factor * own for name, own in gradients.items() if ".question_encoder." in name}
        return encoder, {name: own for name, own in gradients.items() if name not in encoder}

    (expected_encoder, expected_generator), (encoder, generator) = parts(expected, 2.0), parts(doubled)
    assert encoder and generator
    assert_equal_but_for_rounding(encoder, expected_encoder)
    assert_equal_but_for_rounding(generator, expected_generator)
    encoder, generator = parts(taught, 2.0)
    assert_equal_but_for_rounding(generator, expected_generator)
    assert any(not torch.allclose(own, expected_encoder[name]) for name, own in encoder.items())


@pytest.mark.parametrize(
    ("generator", "name", "flags"),
    [
        ("bart", "pdist", ["--retriever_temperature", 2, "--teacher_temperature", 0.5]),
        ("bart", "loop", ["--freeze_generator"]),
        ("llama", "lsr", ["--freeze_generator", "--bf16"]),
        ("llama", "emdr2", ["--lora_r", 4, "--retriever_loss_weight", 0.5]),
    ],
)
def test_a_run_logs_both_losses(generator, name, flags, checkpoint, data_dir, tmp_path):
    out = tmp_path / "out"
    flags = [*flags, "--retriever_loss", name, "--max_steps", 2, "--log_every_n_steps", 1]
    run(checkpoint("rag_sequence", generator), data_dir, out, *flags)
    logged = read_metrics(out / "metrics.json")["train"][-1]
    weight = flags[flags.index("--retriever_loss_weight") + 1] if "--retriever_loss_weight" in flags else 1
    together = logged["answer_loss"] + weight * logged["retriever_loss"]
    assert logged["loss"] == pytest.approx(together, rel=1e-4) and logged["retriever_loss"] > 0
    if name == "emdr2":  # whose teacher has no temperature
        assert "teacher_entropy" not in logged
    else:
        assert 0 < logged["teacher_entropy"] <= math.log(2) + 1e-6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--retriever_loss pdist --freeze_question_encoder", "it would teach nothing"),
        ("--retriever_loss lsr --index_name bm25 --passages_path x", "it would teach nothing"),
        ("--retriever_loss loop --model_type t5", "it would teach nothing"),
        ("--retriever_loss pdist --n_docs 1", "--n_docs 1: one passage teaches nothing"),
        ("--retriever_loss emdr2 --teacher_temperature 2", "--teacher_temperature 2 is not for --retriever_loss emdr2"),
        ("--retriever_temperature 2", "--retriever_temperature 2 is for a loss of the retriever's own"),
        ("--retriever_loss pdist --teacher_temperature 0", "--teacher_temperature 0.0 must be more than 0"),
        ("--retriever_loss pdist --retriever_loss_weight -1", "must be more than 0"),
    ],
)
def test_contradictions_are_told_at_once(flags, message):
    with pytest.raises(UserError, match=message):
        parse_args([*["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o"], *flags.split()])
