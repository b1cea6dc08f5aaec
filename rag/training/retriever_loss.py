"""Losses that teach the retriever which passages help the generator: --retriever_loss.

With p_z = softmax_z(s_z / tau) what the retriever says of the passages z of a question, l_z = log p(y|x, z) what the
generator says of the right answer beside each, which gets no gradient here, and T the teacher's temperature:

    emdr2   -log sum_z p_z exp l_z                         Sachan et al. 2021 (2106.05346), equation 8
    pdist   KL(softmax_z(l_z / T) || p)                    Izacard et al. 2022 (2208.03299), "perplexity distillation"
    lsr     KL(softmax_z(l_z / (words T)) || p)            Shi et al. 2023 (2301.12652), Lin et al. 2023 (2310.01352)
    loop    KL(softmax_z(-log p(y|x, all but z) / T) || p)  Izacard et al. 2022, "leave-one-out"
    adist   KL(softmax_z(a_z / T) || p)                     Izacard et al. 2022, "attention distillation"

adist is for a Fusion-in-Decoder, whose one decoder attends to all passages: a_z is the attention probability of each
token of the passage times the length of its value vector, summed over these, and the mean over layers, heads and the
answer's tokens.

marginal, the default, is none of these: RAG's own likelihood has a gradient for the retriever, which is emdr2's.

Where papers differ: REPLUG and RA-DIT write lsr's softmax over likelihoods and REPLUG the divergence from the
retriever's side; here, as in Atlas, the teacher is a softmax of log-likelihoods and comes first. Atlas' code averages
a divergence over all its entries; here it is a sum over passages, and a step takes the mean over questions. Atlas reads
"all but z" by one Fusion-in-Decoder, and so does one here; of another model it is RAG's own mixture, whose priors are
shared out among the others. Izacard & Grave 2020 (2012.04584), where adist begins, take attention before its softmax,
of the answer's first token alone, and the mean over a passage's tokens; Atlas' code divides the sum that is taken here
by 256, and then by a temperature of 0.01: together T = 2.56.

    losses = RETRIEVER_LOSSES["pdist"](teacher, doc_scores, tau, T)        # (B,) nats
    taught(RETRIEVER_LOSSES["pdist"], teacher, doc_scores, tau, T)         # (B, n_docs) what p is drawn to
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rag.generation.forward import full_precision


@dataclass
class Teacher:
    """What the generator says of the right answers, without gradients.

    Attributes:
        log_probs: (B, n_docs, T) of each target token, nats; 0 where an answer is padding.
        lengths: (B) tokens of each answer.
        per_token: whether the model mixes the passages' probabilities word by word (RAG-Token).
    """

    log_probs: torch.Tensor
    lengths: torch.Tensor
    per_token: bool

    @property
    def answers(self) -> torch.Tensor:
        """(B, n_docs) of whole answers."""
        return self.log_probs.sum(-1)

    def mixed(self, log_priors: torch.Tensor) -> torch.Tensor:
        """log p(y|x) under priors log p(z|x) (..., B, n_docs), -inf for passages to leave out: (..., B)."""
        if not self.per_token:
            return (self.answers + log_priors).logsumexp(-1)
        # Padding is certain whatever the passage.
        return (self.log_probs + log_priors.unsqueeze(-1)).logsumexp(-2).sum(-1)

    def all_but_each(self, doc_scores: torch.Tensor) -> torch.Tensor:
        """log p(y|x, all but z) of each passage z, (B, n_docs), under what is left of the priors of the scores."""
        scores = full_precision(doc_scores.detach())
        n_docs = scores.shape[1]
        is_left_out = torch.eye(n_docs, dtype=torch.bool, device=scores.device).unsqueeze(1)  # (n_docs, 1, n_docs)
        # Of a question with one passage nothing is left: any prior will do, since one passage is all that is compared.
        is_alone = (scores > float("-inf")).sum(1, keepdim=True) < 2
        others = scores.masked_fill(is_left_out & ~is_alone, float("-inf")).log_softmax(-1)  # (n_docs, B, n_docs)
        return self.mixed(others).T


class LeftOutTeacher(Teacher):
    """What a Fusion-in-Decoder says that has read all passages but each: log_probs are of these readings."""

    def all_but_each(self, doc_scores: torch.Tensor) -> torch.Tensor:
        return self.answers


@dataclass
class AttentionTeacher:
    """What a Fusion-in-Decoder attends to while it says the right answers, without gradients.

    Attributes:
        attention: (B, n_docs) a_z of each passage.
    """

    attention: torch.Tensor


def emdr2(teacher: Teacher, doc_scores: torch.Tensor, temperature: float, _: float) -> torch.Tensor:
    return -teacher.mixed(log_prior(doc_scores, temperature))


def pdist(teacher: Teacher, doc_scores: torch.Tensor, temperature: float, teacher_temperature: float) -> torch.Tensor:
    return divergence(teacher.answers / teacher_temperature, doc_scores, temperature)


def lsr(teacher: Teacher, doc_scores: torch.Tensor, temperature: float, teacher_temperature: float) -> torch.Tensor:
    each_word = teacher.answers / teacher.lengths.clamp(min=1).unsqueeze(1)
    return divergence(each_word / teacher_temperature, doc_scores, temperature)


def loop(teacher: Teacher, doc_scores: torch.Tensor, temperature: float, teacher_temperature: float) -> torch.Tensor:
    return divergence(-teacher.all_but_each(doc_scores) / teacher_temperature, doc_scores, temperature)


def adist(
    teacher: AttentionTeacher, doc_scores: torch.Tensor, temperature: float, teacher_temperature: float
) -> torch.Tensor:
    return divergence(teacher.attention / teacher_temperature, doc_scores, temperature)


def divergence(judgment: torch.Tensor, doc_scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL(softmax_z(judgment) || softmax_z(doc_scores / temperature)), (B, n_docs) each, to (B,) nats.

    A passage that is missing, whose score is -inf, has no part in either.
    """
    is_missing = doc_scores.isneginf()
    teacher = (
        full_precision(judgment).masked_fill(is_missing, float("-inf")).log_softmax(1).masked_fill(is_missing, 0.0)
    )
    student = log_prior(doc_scores, temperature).masked_fill(is_missing, 0.0)
    return (teacher.exp() * (teacher - student)).masked_fill(is_missing, 0.0).sum(1)


def log_prior(doc_scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """log p(z|x) of doc_scores (B, n_docs), nats."""
    return (full_precision(doc_scores) / temperature).log_softmax(1)


def taught(
    loss: "RetrieverLoss", teacher: Any, doc_scores: torch.Tensor, temperature: float, teacher_temperature: float
) -> torch.Tensor:
    """What a divergence draws p to, (B, n_docs), float32: its gradient by s_z / tau is p_z minus the teacher's."""
    scores = full_precision(doc_scores.detach()).requires_grad_()
    losses = loss(teacher, scores, temperature, teacher_temperature)
    (slope,) = torch.autograd.grad(losses.sum(), scores)
    return (log_prior(scores.detach(), temperature).exp() - temperature * slope).clamp(min=0.0)


RetrieverLoss = Callable[[Any, torch.Tensor, float, float], torch.Tensor]
RETRIEVER_LOSSES: dict[str, RetrieverLoss] = {
    "emdr2": emdr2, "pdist": pdist, "lsr": lsr, "loop": loop, "adist": adist,
}  # fmt: skip
