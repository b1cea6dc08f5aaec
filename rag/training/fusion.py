"""The step of a Fusion-in-Decoder: the loss of its answers, and what it can teach the retriever.

    nll = fused_nll(model.generator, contexts, batch, label_smoothing, teachers.append, "adist")     # (B,) nats

The answer's likelihood knows no document's score, so that the question encoder learns by a loss of its own alone
(retriever_loss.py). Its teacher reads the states that the answers were decoded from, by the decoder without dropout and
without gradients, as Atlas does (Izacard et al. 2022, arXiv 2208.03299, section 2.2):

    emdr2, pdist, lsr   log p(y|x, z), each passage alone
    loop                log p(y|x, all but z), each passage left out once
    adist               the decoder's attention to each passage, all read at once
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rag.errors import UserError
from rag.generation.forward import EncodedContexts, decode_answers, output_layer
from rag.generation.fusion import NotedAttention, Passages, encode_passages
from rag.generation.logprobs import target_logprobs
from rag.models.modes import evaluating
from rag.packing import Packing, to_device
from rag.retrieval.retriever import RetrievedContexts
from rag.training.loss import rag_sequence_nll
from rag.training.retriever_loss import AttentionTeacher, LeftOutTeacher, Teacher


@dataclass
class Reading:
    """A generator, the passages that it has encoded, and the right answers.

    Attributes:
        decoder_input_ids: (B, T).
        targets: (B, T), padded.
        lengths: (B) tokens of each answer, on the host.
    """

    generator: Any
    passages: Passages
    decoder_input_ids: torch.Tensor
    targets: torch.Tensor
    lengths: np.ndarray

    def nll(self, label_smoothing: float) -> torch.Tensor:
        """Loss of each answer, all passages read at once: (B,) nats."""
        hidden, answers = decode_answers(self.generator, self.passages.joined(), self.decoder_input_ids, self.lengths)
        alone = torch.zeros(len(self.targets), 1, device=self.targets.device)  # all passages are one document
        layer, pad_token_id = output_layer(self.generator), self.generator.config.pad_token_id
        return rag_sequence_nll(hidden, layer, alone, self.targets, pad_token_id, label_smoothing, answers)

    def log_probs(self, contexts: EncodedContexts, owners: np.ndarray) -> torch.Tensor:
        """Log-probability of each target beside N contexts, each of the question that `owners` (N) names: (N, T)."""
        rows = to_device(owners, self.targets.device)
        inputs, targets = self.decoder_input_ids[rows], self.targets[rows]
        hidden, answers = decode_answers(self.generator, contexts, inputs, self.lengths[owners])
        found, _ = target_logprobs(hidden, *output_layer(self.generator), targets, answers)
        return found.masked_fill(targets == self.generator.config.pad_token_id, 0.0)

    def by_slot(self, of_passages: torch.Tensor) -> torch.Tensor:
        """(D, ...) to (B, n_docs, ...), 0 where there is no passage."""
        passages = self.passages
        slots = to_device(passages.slots, of_passages.device)
        shape = len(self.targets) * passages.n_docs, *of_passages.shape[1:]
        return of_passages.new_zeros(shape).index_copy(0, slots, of_passages).unflatten(0, (-1, passages.n_docs))

    @property
    def token_counts(self) -> torch.Tensor:
        """(B) tokens of each answer, on the device."""
        return to_device(self.lengths, self.targets.device)


def fused_nll(
    generator,
    contexts: RetrievedContexts,
    batch: dict,
    label_smoothing: float = 0.0,
    note_teacher: Callable[[Any], None] | None = None,
    retriever_loss: str = "marginal",
) -> torch.Tensor:
    """Loss of each example (B,), nats.

    Args:
        batch: as `GenerativeQAModule.prepare_batch` returned it.
        note_teacher: is told what the retriever is to learn from.
        retriever_loss: a key of TEACHERS where somebody is told.
    """
    is_there = contexts.doc_ids >= 0
    passages = encode_passages(generator, contexts.input_ids, contexts.attention_mask, is_there, contexts.lengths)
    answers = batch["decoder_input_ids"], batch["decoder_targets"], batch["decoder_lengths"]
    reading = Reading(generator, passages, *answers)
    nll = reading.nll(label_smoothing)
    # Behind the answers: what autocast has cast for these, it has cast with gradients.
    if note_teacher is not None:
        with torch.no_grad(), evaluating(generator.get_decoder()):
            note_teacher(TEACHERS[retriever_loss](reading))
    return nll


def read_alone(reading: Reading) -> Teacher:
    passages = reading.passages
    found = reading.log_probs(passages.encoded, passages.owners)
    return Teacher(reading.by_slot(found), reading.token_counts, per_token=False)


def read_all_but_each(reading: Reading) -> LeftOutTeacher:
    """One pass for each slot, on every rank: of questions that have no such passage, or no other, all are read."""
    passages, questions = reading.passages, np.arange(len(reading.targets))
    place, counts = passages.slots % passages.n_docs, np.bincount(passages.owners)
    found = []
    for slot in range(passages.n_docs):
        is_read = (place != slot) | (counts == 1)[passages.owners]
        found.append(reading.log_probs(passages.joined(is_read), questions))
    return LeftOutTeacher(torch.stack(found, 1), reading.token_counts, per_token=False)


def read_attention(reading: Reading) -> AttentionTeacher:
    noted: list[NotedAttention] = []

    def attend(queries: Packing, keys: Packing) -> NotedAttention:
        noted.append(NotedAttention(queries, keys))
        return noted[0]

    passages = reading.passages
    packing = passages.encoded.packing
    if packing is None:  # what flags tell of it, `fusion_problems` has refused
        raise UserError(
            "--retriever_loss adist reads attention in packed rows, and these contexts have padding in front of their "
            "tokens; take a tokenizer of the generator with padding_side right, or give --retriever_loss pdist"
        )
    decode_answers(reading.generator, passages.joined(), reading.decoder_input_ids, reading.lengths, attend)
    return AttentionTeacher(reading.by_slot(noted[0].of_passages(packing)))


TEACHERS: dict[str, Callable[[Reading], Teacher | AttentionTeacher]] = {
    "emdr2": read_alone, "pdist": read_alone, "lsr": read_alone, "loop": read_all_but_each, "adist": read_attention,
}  # fmt: skip
