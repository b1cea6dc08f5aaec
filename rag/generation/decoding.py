"""Answers of a RAG model from contexts that were already retrieved: transformers' answers without its repeated work.

    contexts = retrieve_contexts(model.rag, retriever, input_ids, attention_mask, n_docs=5)
    token_ids = generate_answers(model, contexts.input_ids, contexts.attention_mask, contexts.doc_scores, n_docs=5)

A context is encoded once and its cross-attention keys and values are projected once. The tokens decoded for it form a
tree that hangs on it: a token attends to its ancestors, so that neither beams nor candidates copy or move any cache.
Beam search (search.py) grows the trees of all documents by `num_beams` tokens a step. RAG-Sequence's scoring
(candidates.py) lays the candidates of a question out as one tree, in which common beginnings stand once, and decodes
those of all questions and documents in a single pass.

A causal language model's contexts are prompts without their last token, which is the decoder's start token. It keeps
their keys and values, those of a passage once for all prompts that begin with it. Its candidates are scored where the
search itself does not tell already which one is the best, and a search ends where nothing better can come (bounds.py).

A Fusion-in-Decoder reads all passages of a question at once: one search a question, over their joined keys and values
(fusion.py), with the answers that `generate` finds from the joined states of the encoder.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel, RagSequenceForGeneration, RagTokenForGeneration

from rag.generation.bounds import Bounds
from rag.generation.candidates import Candidates, beam_scores, distinct_rows, marginal_log_probs, memory_of
from rag.generation.causal_cache import HeadCache
from rag.generation.causal_decoder import CausalDecoder
from rag.generation.fusion import is_fusion, joined_memory
from rag.generation.plain_decoder import decoder_of
from rag.generation.posteriors import Posteriors, posteriors_of
from rag.generation.running import RunningBest
from rag.generation.search import Search
from rag.generation.token_trees import Memory
from rag.packing import Heads, to_device

# cuDNN's attention would make a plan for every new shape, and a search has a new one at each step.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@torch.no_grad()
def generate_answers(
    model: RagSequenceForGeneration | RagTokenForGeneration,
    context_input_ids: torch.Tensor,
    context_attention_mask: torch.Tensor,
    doc_scores: torch.Tensor,
    *,
    n_docs: int,
    num_beams: int = 4,
    num_return_sequences: int = 1,
    min_length: int = 1,
    max_length: int = 50,
    do_deduplication: bool = True,
    decoding: str = "thorough",
    heads: Heads | None = None,
    head_cache: HeadCache | None = None,
    note_posteriors: Callable[[Posteriors], None] | None = None,
    note_step: Callable[[torch.Tensor], None] | None = None,
    **generate_kwargs,
) -> torch.Tensor:
    """The best answers to B questions, (B * num_return_sequences, T), best first, padded with the generator's pad id.

    Where a question has fewer candidates than `num_return_sequences`, its last rows are padding.

    Args:
        context_input_ids: (B * n_docs, S), the documents of a question in a row.
        context_attention_mask: (B * n_docs, S).
        doc_scores: (B, n_docs); -inf where there is no document: that slot proposes nothing and has no probability.
            A question without any document is answered from its first context, which holds the question alone. Of a
            Fusion-in-Decoder they say nothing else.
        do_deduplication: RAG-Sequence: equal candidates of several documents stand once.
        decoding: RAG-Sequence (Lewis et al. 2020, section 2.5): "thorough" scores every candidate under every document;
            "fast" takes the beams' own scores, and 0 for a document whose beams did not find the candidate.
        heads: of the contexts of a causal language model: equal ones are read once.
        head_cache: of that model: what it holds is not read again.
        note_posteriors: is told the documents' parts in each question's best answer, and how likely that is.
        note_step: is told after each step of the search what it has of each answer, token ids (B, T) on the CPU
            (`RunningBest`). What it raises ends the search.
        generate_kwargs: what else the generator's `generate` takes for greedy or beam search (bad_words_ids, ...). Of a
            language model, too, lengths and rules on tokens are the answer's alone, from the start token on: `generate`
            would have them hold for the prompt.
    """
    assert decoding in ("thorough", "fast"), decoding
    assert doc_scores.shape == (len(context_input_ids) // n_docs, n_docs), doc_scores.shape
    settings = {"num_beams": num_beams, "min_length": min_length, "max_length": max_length, **generate_kwargs}
    with _attention_and_precision(model.generator):
        decoder = decoder_of(model.generator)
        lost = doc_scores.isneginf().all(1, keepdim=True)
        first = torch.arange(n_docs, device=doc_scores.device) == 0
        doc_scores = doc_scores.to(decoder.dtype).masked_fill(lost & first, 0.0)
        contexts = context_input_ids, context_attention_mask
        head_lengths = None if heads is None else heads.lengths
        doc_log_probs = log_softmax(doc_scores, -1)
        is_token_model, is_fused = isinstance(model, RagTokenForGeneration), is_fusion(model)
        slots = np.arange(doc_scores.numel())
        if not is_token_model:
            slots = slots[(doc_scores > float("-inf")).flatten().cpu().numpy()]
        if len(slots) < doc_scores.numel():
            kept = to_device(slots, doc_scores.device)
            contexts = contexts[0][kept], contexts[1][kept]
            head_lengths = None if head_lengths is None else head_lengths[slots]
        memory, running = read(decoder, *contexts, head_lengths, head_cache), None
        if is_fused:  # from here on a question's documents are one
            memory = joined_memory(memory, slots // n_docs)
            context_input_ids = _joined_ids(context_input_ids, doc_scores, decoder.pad)
            slots, doc_log_probs = np.arange(len(doc_scores)), torch.zeros_like(doc_scores[:, :1])
        if note_step is not None:
            by_question = is_token_model or is_fused
            running = RunningBest(note_step, doc_log_probs, None if by_question else slots, decoder.pad)
        if is_token_model:
            found = Search(model, settings, decoder, memory, context_input_ids, doc_log_probs, running=running).run()
            answers = found.sequences.cpu().numpy()
        elif is_fused:
            found = Search(model.generator, settings, decoder, memory, context_input_ids, running=running).run()
            answers = found.sequences.cpu().numpy()
        else:
            bos = model.config.bos_token_id or getattr(model.config.generator, "bos_token_id", None)
            answers = _sequence_answers(
                model.generator, decoder, memory, contexts[0], slots, doc_log_probs, settings,
                bos=bos, rows=num_return_sequences, distinct=do_deduplication, thorough=decoding == "thorough",
                running=running,
            )  # fmt: skip
        if note_posteriors is not None:
            posteriors = posteriors_of(decoder, memory, slots, answers[:, 0], doc_log_probs, is_token_model)
            note_posteriors(replace(posteriors, passages=None) if is_fused else posteriors)
        return _padded(answers, num_return_sequences, decoder.pad, doc_scores.device)


@torch.no_grad()
def answer_prompts(
    generator: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    num_beams: int = 4,
    num_return_sequences: int = 1,
    min_length: int = 1,
    max_length: int = 50,
    **generate_kwargs,
) -> torch.Tensor:
    """A bare language model's answers to B prompts, (B * num_return_sequences, T), as `generate_answers` gives them.

    Args:
        input_ids: (B, S), prompts without their last token: that is the decoder's first one, and each answer's.
        attention_mask: (B, S).
    """
    settings = {"num_beams": num_beams, "min_length": min_length, "max_length": max_length, **generate_kwargs}
    with _attention_and_precision(generator):
        decoder = decoder_of(generator)
        found = Search(generator, settings, decoder, read(decoder, input_ids, attention_mask), input_ids).run()
        return _padded(found.sequences.cpu().numpy(), num_return_sequences, decoder.pad, input_ids.device)


def _joined_ids(context_input_ids: torch.Tensor, doc_scores: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """What a question's documents hold, (B, n_docs * S), for the rules on repetition: padding where there is none."""
    missing = doc_scores.isneginf().view(-1, 1)
    return context_input_ids.masked_fill(missing, pad_token_id).view(len(doc_scores), -1)


@contextmanager
def _attention_and_precision(generator) -> Iterator[None]:
    """The kernels to choose from, and autocast as it is around, but of a generator in half precision none."""
    device, casts = generator.device.type, generator.dtype == torch.float32
    with sdpa_kernel(ATTENTION), torch.autocast(device, enabled=casts and torch.is_autocast_enabled(device)):
        yield


def _sequence_answers(
    generator, decoder, memory: Memory, context_input_ids, slots: np.ndarray, doc_log_probs, settings: dict,
    *, bos, rows: int, distinct: bool, thorough: bool, running: RunningBest | None,
) -> np.ndarray:  # fmt: skip
    """RAG-Sequence's `rows` best candidates, (B, at most `rows`, T), best first, padded; -inf scores of none at all.

    Args:
        memory: of D documents.
        slots: (D) where each document stands among all questions' n_docs.
    """
    bounds = None
    if thorough and isinstance(decoder, CausalDecoder):
        places = to_device(slots, doc_log_probs.device)
        bounds = Bounds(places, doc_log_probs, decoder, settings["num_beams"], rows)
    found = Search(generator, settings, decoder, memory, context_input_ids, bounds=bounds, running=running).run()
    sequences, is_one = found.sequences.cpu().numpy(), found.is_one.cpu().numpy()
    candidates = Candidates.of(sequences, slots, doc_log_probs.shape[1], decoder.pad, is_one)
    if not thorough:
        return candidates.best(beam_scores(candidates, found.log_probs, doc_log_probs), rows, distinct)
    if bounds is None:
        return candidates.best(marginal_log_probs(decoder, memory, candidates, doc_log_probs, bos), rows, distinct)
    candidates = candidates.only(bounds.may_be_best(candidates).cpu().numpy())
    return candidates.best(_scores_of_several(decoder, memory, candidates, doc_log_probs), rows, distinct)


def _scores_of_several(decoder, memory: Memory, candidates: Candidates, doc_log_probs: torch.Tensor) -> torch.Tensor:
    """A language model's scores of the candidates (Q, C) where a question has more than one; 0 of a single one."""
    scores = doc_log_probs.new_zeros(candidates.lengths.shape)
    questions = np.flatnonzero((candidates.lengths > 0).sum(1) > 1)
    if len(questions):
        several, documents = candidates.of_questions(questions)
        own = torch.from_numpy(questions).to(scores.device)
        memory = memory_of(memory, documents)
        scores[own] = marginal_log_probs(decoder, memory, several, doc_log_probs[own], None, weighs_empty=True)
    return scores.masked_fill(torch.from_numpy(candidates.lengths == 0).to(scores.device), float("-inf"))


def read(
    decoder,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    head_lengths: np.ndarray | None = None,
    head_cache: HeadCache | None = None,
) -> Memory:
    """What the decoder reads of contexts (D, S); equal ones are encoded once.

    A context holds its question, too, and each of its words is encoded by all others: only where questions are equal,
    or a question's passages, is there anything to share. A language model has read a head before the question comes.
    """
    if isinstance(decoder, CausalDecoder):
        return decoder.read(input_ids, attention_mask, head_lengths, head_cache)
    rows = torch.cat([input_ids, attention_mask], 1).cpu().numpy()
    places = distinct_rows(rows)
    if len(places[0]) == len(rows):
        return decoder.read(input_ids, attention_mask)
    first, which = (torch.from_numpy(numbers).to(input_ids.device) for numbers in places)
    return decoder.read(input_ids[first], attention_mask[first]).select(which)


def _padded(answers: np.ndarray, rows: int, pad_token_id: int, device) -> torch.Tensor:
    """Answers (B, n, T), of which the first `rows` count, to (B * rows, T of the longest)."""
    answers = answers[:, :rows]
    length = max(2, int(((answers != pad_token_id).any((0, 1)) * np.arange(1, answers.shape[2] + 1)).max()))
    padded = np.full((len(answers), rows, length), pad_token_id, dtype=np.int64)
    padded[:, : answers.shape[1]] = answers[..., :length]
    return torch.from_numpy(padded.reshape(-1, length)).to(device)
