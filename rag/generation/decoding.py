"""Answers of a RAG model from contexts that were already retrieved: transformers' answers without its repeated work.

    contexts = retrieve_contexts(model.rag, retriever, input_ids, attention_mask, n_docs=5)
    token_ids = generate_answers(model, contexts.input_ids, contexts.attention_mask, contexts.doc_scores, n_docs=5)

A context is encoded once and its cross-attention keys and values are projected once. The tokens decoded for it form a
tree that hangs on it: a token attends to its ancestors, so that neither beams nor candidates copy or move any cache.
Beam search grows the trees of all documents by `num_beams` tokens a step. RAG-Sequence's scoring lays the candidates of
a question out as one tree, in which common beginnings stand once, and decodes it in a single pass a document.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import log_softmax
from transformers import RagSequenceForGeneration, RagTokenForGeneration
from transformers.generation import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from rag.generation.beams import BeamSearch
from rag.generation.plain_decoder import decoder_of
from rag.generation.token_trees import CHUNK_TOKENS, Past


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
    **generate_kwargs,
) -> torch.Tensor:
    """The best answers to B questions, (B * num_return_sequences, T), best first, padded with the generator's pad id.

    Where a question has fewer candidates than `num_return_sequences`, its last rows are padding.

    Args:
        context_input_ids: (B * n_docs, S), the documents of a question in a row.
        context_attention_mask: (B * n_docs, S).
        doc_scores: (B, n_docs); -inf where there is no document: that slot proposes nothing and has no probability.
            A question without any document is answered from its first context, which holds the question alone.
        do_deduplication: RAG-Sequence: equal candidates of several documents stand once.
        decoding: RAG-Sequence (Lewis et al. 2020, section 2.5): "thorough" scores every candidate under every document;
            "fast" takes the beams' own scores, and 0 for a document whose beams did not find the candidate.
        generate_kwargs: what else the generator's `generate` takes for greedy or beam search (bad_words_ids, ...).
    """
    assert decoding in ("thorough", "fast"), decoding
    assert doc_scores.shape == (len(context_input_ids) // n_docs, n_docs), doc_scores.shape
    settings = {"num_beams": num_beams, "min_length": min_length, "max_length": max_length, **generate_kwargs}
    decoder = decoder_of(model.generator)
    lost = doc_scores.isneginf().all(1, keepdim=True)
    first = torch.arange(n_docs, device=doc_scores.device) == 0
    doc_scores = doc_scores.to(decoder.dtype).masked_fill(lost & first, 0.0)

    if isinstance(model, RagTokenForGeneration):
        memory = decoder.read(context_input_ids, context_attention_mask)
        found = _Search(model, settings, decoder, memory, context_input_ids, log_softmax(doc_scores, -1)).run()
        answers = [own[:num_return_sequences] for own in _candidates(found.sequences, decoder.pad)]
        return _stack(answers, num_return_sequences, decoder.pad, doc_scores.device)

    present = doc_scores.flatten() > float("-inf")  # (B * n_docs)
    context_input_ids = context_input_ids[present]
    memory = decoder.read(context_input_ids, context_attention_mask[present])
    found = _Search(model.generator, settings, decoder, memory, context_input_ids).run()
    candidates = _candidates(found.sequences, decoder.pad)
    bos = model.config.bos_token_id or getattr(model.config.generator, "bos_token_id", None)
    answers, document = [], 0
    for own_scores in doc_scores:
        doc_log_probs = log_softmax(own_scores[own_scores > float("-inf")], -1)  # (n)
        own = slice(document, document + len(doc_log_probs))
        document = own.stop
        pool = [candidate for beams in candidates[own] for candidate in beams]
        distinct = list(dict.fromkeys(pool))
        if decoding == "fast":
            scores = _beam_scores(distinct, pool, found.log_probs[own] + doc_log_probs[:, None])
        else:
            scores = _marginal_log_probs(decoder, memory.select(own), distinct, doc_log_probs, bos)
        if do_deduplication:
            pool = distinct
        else:
            scores = scores[[distinct.index(candidate) for candidate in pool]]
        best = scores.topk(min(num_return_sequences, len(pool))).indices.tolist()
        answers.append([pool[i] for i in best])
    return _stack(answers, num_return_sequences, decoder.pad, doc_scores.device)


def _candidates(sequences: torch.Tensor, pad_token_id: int) -> list[list[tuple[int, ...]]]:
    """Sequences (items, num_beams, T) without their padding; the decoder's first token and one more always stay."""

    def trim(tokens: list[int]) -> tuple[int, ...]:
        end = len(tokens)
        while end > 2 and tokens[end - 1] == pad_token_id:
            end -= 1
        return tuple(tokens[:end])

    return [[trim(tokens) for tokens in beams] for beams in sequences.tolist()]


def _stack(answers: list[list[tuple]], rows: int, pad_token_id: int, device) -> torch.Tensor:
    """The token tuples of B questions, at most `rows` each, to (B * rows, T)."""
    flat = [answer for own in answers for answer in own + [()] * (rows - len(own))]
    length = max(map(len, flat))
    return torch.tensor([[*a, *[pad_token_id] * (length - len(a))] for a in flat], dtype=torch.long, device=device)


# ---- the score of a candidate answer to RAG-Sequence


def _beam_scores(distinct: list, pool: list, log_probs: torch.Tensor) -> torch.Tensor:
    """log sum of p(z) p(candidate | z) over the documents that found it: the pool's log_probs (n, num_beams) to (C)."""
    found = torch.tensor([[c == d for c in pool] for d in distinct], device=log_probs.device)  # (C, n * num_beams)
    return log_probs.flatten().masked_fill(~found, float("-inf")).logsumexp(-1)


def _marginal_log_probs(decoder, memory, candidates: list, doc_log_probs: torch.Tensor, bos: int | None):
    """log sum_z p(z) p(candidate | z), as `RagSequenceForGeneration.get_nll` without label smoothing.

    Args:
        memory: of the n documents of one question.
        candidates: C distinct token tuples, from the decoder's start on.
        doc_log_probs: (n).
        bos: the first token is not scored where every candidate begins with this one, as in get_nll.

    Returns:
        (C).
    """
    without_first = bos is not None and all(c[1:2] == (bos,) for c in candidates)
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    edges: dict[tuple[int, int], int] = {}  # (node, next token) -> edge
    paths: list[list[int]] = []  # each candidate's edges
    for candidate in candidates:
        node, path = -1, []
        for depth, (token, target) in enumerate(pairwise(candidate)):
            node = nodes.setdefault((node, token), len(nodes))
            if target != decoder.pad and not (without_first and depth == 0):
                path.append(edges.setdefault((node, target), len(edges)))
        paths.append(path)
    device = doc_log_probs.device
    on_path = torch.zeros(len(edges), len(candidates), dtype=doc_log_probs.dtype, device=device)
    for c, path in enumerate(paths):
        on_path[path, c] = 1
    edge_log_probs = _edge_log_probs(decoder, memory, list(nodes), list(edges))  # (n, edges)
    # get_nll puts the document's probability on the second token: an empty answer has none.
    has_second = torch.tensor([len(c) > 2 and c[2] != decoder.pad for c in candidates], device=device)
    with torch.autocast(device.type, enabled=False):  # a sum in float32
        return (edge_log_probs @ on_path + doc_log_probs[:, None] * has_second).logsumexp(0)


def _edge_log_probs(decoder, memory, nodes: list, edges: list) -> torch.Tensor:
    """log p(next token | node) under each document: nodes (parent, token), edges (node, next token) to (n, edges)."""
    device = memory.mask.device
    ancestors = torch.eye(len(nodes), dtype=torch.bool)
    depth_of: list[int] = []
    for node, (parent, _) in enumerate(nodes):
        depth_of.append(depth_of[parent] + 1 if parent >= 0 else 0)
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
    tokens = torch.tensor([token for _, token in nodes], device=device)
    depths, ancestors = torch.tensor(depth_of, device=device), ancestors.to(device)
    places, targets = torch.tensor(edges, dtype=torch.long, device=device).view(-1, 2).unbind(1)
    log_probs, step = [], max(1, CHUNK_TOKENS // len(nodes))
    for first in range(0, len(memory.mask), step):
        own = memory.select(slice(first, first + step))
        hidden = decoder.decode(tokens.expand(len(own.mask), -1), depths, ancestors[None], own)
        log_probs.append(decoder.token_log_probs(hidden, places, targets))
    return torch.cat(log_probs)


# ---- greedy and beam search


@dataclass
class _Found:
    """The sequences of the search: (items, num_beams, max_length), best first, and their log-probabilities."""

    sequences: torch.Tensor
    log_probs: torch.Tensor


class _Search:
    """Greedy or beam search exactly as `owner.generate` runs it, over items whose finished ones are dropped.

    An item is a document (RAG-Sequence) or, where `doc_log_probs` (B, n_docs) are given, a question (RAG-Token), whose
    next token's probability is the mean over its documents.
    """

    def __init__(self, owner, settings: dict, decoder, memory, context_input_ids, doc_log_probs=None):
        self.owner, self.decoder, self.memory, self.context_input_ids = owner, decoder, memory, context_input_ids
        self.doc_log_probs = doc_log_probs
        self.documents = 1 if doc_log_probs is None else doc_log_probs.shape[1]  # of an item
        self.items = len(context_input_ids) // self.documents
        self.device = context_input_ids.device
        settings = dict(settings)
        self.custom_processors = settings.pop("logits_processor", LogitsProcessorList())
        self.config = _generation_config(owner, settings, self.device)
        start = self.config.decoder_start_token_id
        self.start_token_id = self.config.bos_token_id if start is None else start
        self.stops = _stopping_criteria(self.config, getattr(owner.config, "max_position_embeddings", None))
        self.past = Past(capacity=1 + self.config.num_beams * (self.config.max_length - 1))
        self.ancestors: torch.Tensor | None = None  # (I, N, tokens in self.past)
        self._set_processors()

    def run(self) -> _Found:
        return self._beam_search() if self.config.num_beams > 1 else self._greedy_search()

    def _set_processors(self):
        self.processors = self.owner._get_logits_processor(
            self.config,
            input_ids_seq_length=1,
            # Rules on repetition hold for all contexts of an item.
            encoder_input_ids=self.context_input_ids.reshape(-1, self.documents * self.context_input_ids.shape[1]),
            logits_processor=self.custom_processors,
            device=self.device,
        )

    def _step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Hang tokens (I, N) on the tokens of the step before: scores of what may follow each, (I, N, vocabulary)."""
        own = torch.eye(tokens.shape[1], dtype=torch.bool, device=self.device).expand(len(tokens), -1, -1)
        if self.ancestors is not None:
            before = self.ancestors.expand(-1, tokens.shape[1], -1).take_along_dim(parents[..., None], 1)
            own = torch.cat([before, own], -1)
        self.ancestors = own
        hidden = self.decoder.decode(
            tokens.repeat_interleave(self.documents, 0),
            torch.full(tokens.shape[1:], self.past.steps, device=self.device),
            self.ancestors.repeat_interleave(self.documents, 0),
            self.memory,
            self.past,
        )
        logits = self.decoder.logits(hidden)  # (I * documents, N, vocabulary)
        if self.doc_log_probs is None:
            return logits
        logits = logits.unflatten(0, (-1, self.documents))
        return torch.stack(  # one item at a time: it fits into the processor's cache
            [
                (log_softmax(own, -1) + log_prob[:, None, None]).logsumexp(0)
                for own, log_prob in zip(logits, self.doc_log_probs, strict=True)
            ]
        )

    def _drop(self, over: torch.Tensor) -> torch.Tensor | None:
        """The rows of the items to go on with, or None while too few are over to be worth the copy of the others."""
        if 4 * over.sum() < len(over):
            return None
        assert self.ancestors is not None, "a step comes first"
        rows = (~over).nonzero().squeeze(1)
        documents = (rows[:, None] * self.documents + torch.arange(self.documents, device=self.device)).flatten()
        self.memory, self.ancestors = self.memory.select(documents), self.ancestors[rows]
        self.past.select(documents)
        self.context_input_ids = self.context_input_ids[documents]
        if self.doc_log_probs is not None:
            self.doc_log_probs = self.doc_log_probs[rows]
        self._set_processors()
        return rows

    def _greedy_search(self) -> _Found:
        sequences = torch.full((self.items, self.config.max_length), self.decoder.pad, device=self.device)
        sequences[:, 0] = self.start_token_id
        log_probs = torch.zeros(self.items, dtype=self.decoder.dtype, device=self.device)
        alive = torch.arange(self.items, device=self.device)
        over = torch.zeros_like(alive, dtype=torch.bool)
        for length in range(1, self.config.max_length):
            prefixes = sequences[alive, :length]
            scores = self._step(prefixes[:, -1:], torch.zeros_like(alive)[:, None]).squeeze(1)  # (I, vocabulary)
            scores = self.processors(prefixes, scores)
            tokens = scores.argmax(-1)
            sequences[alive, length] = tokens.masked_fill(over, self.decoder.pad)
            gained = log_softmax(scores, -1).gather(1, tokens[:, None]).squeeze(1)
            log_probs[alive] += gained.masked_fill(over, 0.0)
            over = over | self.stops(sequences[alive, : length + 1], None)
            if over.all():
                break
            if (rows := self._drop(over)) is not None:
                alive, over = alive[rows], over[rows]
        return _Found(sequences[:, None], log_probs[:, None])

    def _beam_search(self) -> _Found:
        config = self.config
        search = BeamSearch(
            num_beams=config.num_beams,
            max_length=config.max_length,
            end_tokens=0 if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).numel(),
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
        )
        beams = search.start(self.items, self.start_token_id, self.decoder.pad, self.decoder.dtype, self.device)
        found = _Found(beams.sequences.clone(), beams.scores.clone())
        for length in range(1, config.max_length):
            nodes = 1 if length == 1 else config.num_beams  # all beams start alike
            prefixes = beams.running[:, :nodes, :length]
            scores = self._step(prefixes[..., -1], beams.parents[:, :nodes])
            if self.doc_log_probs is None:
                scores = log_softmax(scores, -1)
            scores = self.processors(prefixes.flatten(0, 1), scores.flatten(0, 1)).view_as(scores)
            beams = search.advance(beams, scores, length, self.stops)
            over = search.is_over(beams)
            found.sequences[beams.item], found.log_probs[beams.item] = beams.sequences, search.log_probs(beams)
            if over.all():
                break
            if (rows := self._drop(over)) is not None:
                beams = beams.select(rows)
        return found


def _generation_config(owner, settings: dict, device) -> GenerationConfig:
    """What `owner.generate(**settings)` would follow: the settings, else the owner's own, else transformers' defaults.

    Raises:
        ValueError: some settings are unknown, or ask for more than greedy or beam search.
    """
    config, unknown = owner._prepare_generation_config(settings.pop("generation_config", None), **settings)
    if unknown:
        raise ValueError(f"generate_answers does not know {', '.join(unknown)}")
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH):
        raise ValueError("generate_answers runs greedy or beam search only; set do_sample=False")
    if config.guidance_scale not in (None, 1):
        raise ValueError("generate_answers runs the generator on the contexts alone; leave guidance_scale out")
    owner._prepare_special_tokens(config, True, device=device)  # what `_get_logits_processor` reads
    if config.max_new_tokens is not None:  # not counting the decoder's first token
        config.max_length = 1 + config.max_new_tokens
    if config.min_new_tokens is not None:
        config.min_length = 1 + config.min_new_tokens
    return config


def _stopping_criteria(config: GenerationConfig, max_position_embeddings: int | None) -> StoppingCriteriaList:
    """What ends a sequence.

    Raises:
        ValueError: `stop_strings` are set: there is no tokenizer here.
    """
    if config.stop_strings is not None:
        raise ValueError("generate_answers does not know stop_strings: it has no tokenizer")
    criteria = StoppingCriteriaList([MaxLengthCriteria(config.max_length, max_position_embeddings)])
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(config.max_time))
    if config.eos_token_id is not None:
        criteria.append(EosTokenCriteria(config.eos_token_id))
    return criteria
