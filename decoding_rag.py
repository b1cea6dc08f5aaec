"""Answers of a RAG model from contexts that were already retrieved: transformers' answers without its repeated work.

    contexts = retrieve_contexts(model.rag, retriever, input_ids, attention_mask, n_docs=5)
    token_ids = generate_answers(model, contexts.input_ids, contexts.attention_mask, contexts.doc_scores, n_docs=5)

A context is encoded once and its cross-attention keys and values are projected once. The tokens decoded for it form a
tree that hangs on it: a token attends to its ancestors, so that neither beams nor candidates copy or move any cache.
Beam search grows the trees of all documents by `num_beams` tokens a step. RAG-Sequence's scoring lays the candidates of
a question out as one tree, in which common beginnings stand once, and decodes it in a single pass a document.
"""

from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from torch.nn.functional import linear, log_softmax, scaled_dot_product_attention
from transformers import RagSequenceForGeneration, RagTokenForGeneration
from transformers.generation import GenerationMode, LogitsProcessorList, StoppingCriteriaList

# Tokens encoded or decoded in one pass: enough to keep the cores busy, few enough that padding and memory stay small.
CHUNK_TOKENS = 2048
# Rows of the output matrix in one pass of the scoring: the logits stay in the processor's cache.
CHUNK_VOCABULARY = 8192


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
    decoder = _decoder(model.generator)
    lost = doc_scores.isneginf().all(1, keepdim=True)
    first = torch.arange(n_docs, device=doc_scores.device) == 0
    doc_scores = _full_precision(doc_scores).masked_fill(lost & first, 0.0)

    if isinstance(model, RagTokenForGeneration):
        memory = decoder.read(context_input_ids, context_attention_mask)
        found = _Search(model, settings, decoder, memory, context_input_ids, log_softmax(doc_scores, -1)).run()
        answers = [_trim(a, decoder.pad) for own in found.sequences for a in own[:num_return_sequences].tolist()]
        return _stack(answers, decoder.pad, doc_scores.device)

    present = doc_scores.flatten() > float("-inf")  # (B * n_docs)
    context_input_ids = context_input_ids[present]
    memory = decoder.read(context_input_ids, context_attention_mask[present])
    found = _Search(model.generator, settings, decoder, memory, context_input_ids).run()
    bos = model.config.bos_token_id or getattr(model.config.generator, "bos_token_id", None)
    answers, document = [], 0
    for own_scores in doc_scores:
        doc_log_probs = log_softmax(own_scores[own_scores > float("-inf")], -1)  # (n)
        own = slice(document, document + len(doc_log_probs))
        document = own.stop
        candidates = [tuple(_trim(c, decoder.pad)) for c in found.sequences[own].flatten(0, 1).tolist()]
        distinct = list(dict.fromkeys(candidates))
        if decoding == "fast":
            scores = _beam_scores(distinct, candidates, found.log_probs[own] + doc_log_probs[:, None])
        else:
            scores = _marginal_log_probs(decoder, memory.select(own), distinct, doc_log_probs, bos)
        if not do_deduplication:
            scores, distinct = scores[[distinct.index(c) for c in candidates]], candidates
        best = scores.topk(min(num_return_sequences, len(distinct))).indices.tolist()
        answers += [distinct[i] for i in best] + [()] * (num_return_sequences - len(best))
    return _stack(answers, decoder.pad, doc_scores.device)


def _trim(tokens: list[int], pad_token_id: int) -> list[int]:
    """Without the padding behind the last token."""
    end = len(tokens)
    while end and tokens[end - 1] == pad_token_id:
        end -= 1
    return tokens[:end]


def _stack(answers: list, pad_token_id: int, device) -> torch.Tensor:
    """Token lists of different lengths to (len(answers), T)."""
    length = max(map(len, answers))
    return torch.tensor([[*a, *[pad_token_id] * (length - len(a))] for a in answers], dtype=torch.long, device=device)


def _full_precision(x: torch.Tensor) -> torch.Tensor:
    """float32 at least: sums of 50,000 half-precision terms overflow."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logsumexp(x: torch.Tensor) -> torch.Tensor:
    """`x.logsumexp(-1)`, on a CPU eight times as fast: of the two only log_softmax has a kernel of its own."""
    return x.amax(-1) - log_softmax(x, -1).amax(-1)


# ---- the score of a candidate answer to RAG-Sequence


def _beam_scores(distinct: list, candidates: list, log_probs: torch.Tensor) -> torch.Tensor:
    """log sum over the documents that found it of p(z) p(candidate | z): log_probs (n, num_beams) to (C)."""
    log_probs = log_probs.flatten()
    found = torch.tensor([[c == d for c in candidates] for d in distinct], device=log_probs.device)  # (C, candidates)
    return log_probs.masked_fill(~found, float("-inf")).logsumexp(-1)


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
    nodes, edges, paths = {}, {}, []  # (parent, token) -> node; (node, next token) -> edge; each candidate's edges
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
    return (edge_log_probs @ on_path + doc_log_probs[:, None] * has_second).logsumexp(0)


def _edge_log_probs(decoder, memory, nodes: list, edges: list) -> torch.Tensor:
    """log p(next token | node) under each document: nodes (parent, token), edges (node, next token) to (n, edges)."""
    device = memory.mask.device
    ancestors, depths = torch.eye(len(nodes), dtype=torch.bool), []
    for node, (parent, _) in enumerate(nodes):
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
    tokens = torch.tensor([token for _, token in nodes], device=device)
    depths, ancestors = torch.tensor(depths, device=device), ancestors.to(device)
    places, targets = torch.tensor(edges, device=device).unbind(1)
    log_probs = []
    for documents in torch.arange(len(memory.mask), device=device).split(max(1, CHUNK_TOKENS // len(nodes))):
        own = memory.select(documents)
        hidden = decoder.decode(tokens.expand(len(documents), -1), depths, ancestors[None], own)
        log_probs.append(decoder.token_log_probs(hidden, places, targets))
    return torch.cat(log_probs)


# ---- greedy and beam search


@dataclass
class _Found:
    """The sequences of the search: (items, num_beams, max_length), best first, and their log-probabilities."""

    sequences: torch.Tensor
    log_probs: torch.Tensor


@dataclass
class _Beams:
    """The state of transformers' beam search over I items, row by row; see GenerationMixin._beam_search."""

    item: torch.Tensor  # (I) where the item stood at the beginning
    running: torch.Tensor  # (I, num_beams, max_length) unfinished sequences
    running_scores: torch.Tensor  # (I, num_beams)
    parents: torch.Tensor  # (I, num_beams) the running beam of the step before that each one continues
    sequences: torch.Tensor  # (I, num_beams, max_length) the best finished sequences
    scores: torch.Tensor  # (I, num_beams) theirs, with the length penalty
    lengths: torch.Tensor  # (I, num_beams, 1) tokens decoded
    finished: torch.Tensor  # (I, num_beams) bool
    improvable: torch.Tensor  # (I, 1) bool

    def select(self, rows: torch.Tensor) -> "_Beams":
        return _Beams(*(getattr(self, f.name)[rows] for f in fields(self)))


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
        self.config, unknown = owner._prepare_generation_config(settings.pop("generation_config", None), **settings)
        if unknown:
            raise ValueError(f"generate_answers does not know {', '.join(unknown)}")
        if self.config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH):
            raise ValueError("generate_answers runs greedy or beam search only; set do_sample=False")
        owner._prepare_special_tokens(self.config, True, device=self.device)
        owner._prepare_generated_length(self.config, False, False, "input_ids", 1, context_input_ids)
        self.stops = owner._get_stopping_criteria(self.config, StoppingCriteriaList())
        self.past = _Past(capacity=1 + self.config.num_beams * (self.config.max_length - 1))
        self.ancestors = None  # (I, N, tokens in self.past)
        self._set_processors()

    def run(self) -> _Found:
        return self._beam_search() if self.config.num_beams > 1 else self._greedy_search()

    def _set_processors(self):
        self.processors = self.owner._get_logits_processor(
            self.config,
            input_ids_seq_length=1,
            encoder_input_ids=self.context_input_ids,
            logits_processor=self.custom_processors,
            device=self.device,
        )

    def _blank(self, *shape) -> torch.Tensor:
        """Sequences (*shape, max_length) that hold the decoder's first token."""
        sequences = torch.full((*shape, self.config.max_length), self.decoder.pad, device=self.device)
        sequences[..., 0] = self.config._decoder_start_token_tensor
        return sequences

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
        sequences, log_probs = self._blank(self.items), torch.zeros(self.items, device=self.device)
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
        config, shape = self.config, (self.items, self.config.num_beams)
        beams = _Beams(
            item=torch.arange(self.items, device=self.device),
            running=self._blank(*shape),
            running_scores=torch.tensor([0.0] + [-1e9] * (shape[1] - 1), device=self.device).repeat(shape[0], 1),
            parents=torch.zeros(shape, dtype=torch.long, device=self.device),
            sequences=self._blank(*shape),
            scores=torch.full(shape, -1e9, device=self.device),
            lengths=torch.zeros(*shape, 1, dtype=torch.long, device=self.device),
            finished=torch.zeros(shape, dtype=torch.bool, device=self.device),
            improvable=torch.ones(shape[0], 1, dtype=torch.bool, device=self.device),
        )
        found = _Found(beams.sequences.clone(), beams.scores.clone())
        for length in range(1, config.max_length):
            beams = self._advance(beams, length)
            over = ~beams.improvable.squeeze(1) | (beams.finished.all(1) & (config.early_stopping is True))
            found.sequences[beams.item] = beams.sequences
            found.log_probs[beams.item] = beams.scores * beams.lengths.squeeze(-1) ** config.length_penalty
            if over.all():
                break
            if (rows := self._drop(over)) is not None:
                beams = beams.select(rows)
        return found

    def _advance(self, beams: _Beams, length: int) -> _Beams:
        """One step of GenerationMixin._beam_search, by its own functions, from `length` tokens to one more."""
        config, num_beams = self.config, self.config.num_beams
        n_eos = 0 if config._eos_token_tensor is None else len(config._eos_token_tensor)
        kept = max(2, 1 + n_eos) * num_beams
        nodes = 1 if length == 1 else num_beams  # all beams begin alike
        prefixes = beams.running[:, :nodes, :length]
        scores = self._step(prefixes[..., -1], beams.parents[:, :nodes])
        if self.doc_log_probs is None:
            scores = log_softmax(scores, -1)
        scores = self.processors(prefixes.flatten(0, 1), scores.flatten(0, 1)).view_as(scores)
        values, tokens = (t.expand(-1, num_beams, -1) for t in scores.topk(min(kept, scores.shape[-1])))  # (I, N, k)
        log_probs, best = (values + beams.running_scores[..., None]).flatten(1).topk(kept)  # (I, kept)
        parents = best // values.shape[-1]
        grown = beams.running.take_along_dim(parents[..., None], 1)
        grown[..., length] = tokens.flatten(1).gather(1, best)
        stopped = self.stops(grown[..., : length + 1].flatten(0, 1), None).view_as(parents)
        running, running_scores, parents = self.owner._get_running_beams_for_next_iteration(
            log_probs, grown, parents[..., None], stopped, num_beams
        )
        sequences, finished_scores, lengths, finished = self.owner._update_finished_beams(
            sequences=beams.sequences,
            topk_running_sequences=grown,
            beam_scores=beams.scores,
            topk_log_probs=log_probs,
            beam_indices=beams.lengths,
            topk_running_beam_indices=torch.full_like(best, length)[..., None],
            is_early_stop_heuristic_unsatisfied=beams.improvable,
            is_sent_finished=beams.finished,
            next_token_hits_stopping_criteria=stopped,
            top_num_beam_mask=torch.arange(kept, device=self.device) < num_beams,
            num_beams=num_beams,
            cur_len=length,
            decoder_prompt_len=1,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
        )
        improvable = self.owner._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=beams.improvable,
            running_beam_scores=running_scores,
            beam_scores=finished_scores,
            is_sent_finished=finished,
            cur_len=length + 1,
            max_length=config.max_length,
            decoder_prompt_len=1,
            early_stopping=config.early_stopping,
            length_penalty=config.length_penalty,
        )
        return _Beams(
            beams.item, running, running_scores, parents.squeeze(-1), sequences, finished_scores, lengths, finished,
            improvable,
        )  # fmt: skip


# ---- trees of tokens that hang on documents


@dataclass
class _Memory:
    """What the decoder reads of D documents: cross-attention keys and values (D, heads, S, head size) of each layer."""

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    mask: torch.Tensor  # (D, 1, 1, S) bool

    def select(self, documents) -> "_Memory":
        return _Memory([(keys[documents], values[documents]) for keys, values in self.layers], self.mask[documents])


class _Past:
    """Keys and values of the tokens decoded so far; they are appended and never moved."""

    def __init__(self, capacity: int):
        self.capacity, self.steps, self.length = capacity, 0, 0
        self.depths = None  # (length) of each token in its tree
        self.layers = []  # (2, D, heads, capacity, head size)

    def grow(self, depths: torch.Tensor) -> None:
        self.steps += 1
        self.length += len(depths)
        self.depths = depths if self.depths is None else torch.cat([self.depths, depths])

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        documents, heads, new, size = keys.shape
        if layer == len(self.layers):
            self.layers.append(keys.new_empty(2, documents, heads, self.capacity, size))
        self.layers[layer][0, :, :, self.length - new : self.length] = keys
        self.layers[layer][1, :, :, self.length - new : self.length] = values
        return self.layers[layer][:, :, :, : self.length].unbind(0)

    def select(self, documents: torch.Tensor) -> None:
        for i, layer in enumerate(self.layers):
            kept = layer.new_empty(2, len(documents), *layer.shape[2:])
            kept[:, :, :, : self.length] = layer[:, documents, :, : self.length]
            self.layers[i] = kept


class _Decoder:
    """A generator's encoder and decoder, the decoder over trees of tokens; the subclasses know their layers."""

    def __init__(self, generator):
        self.encoder, self.decoder, self.config = generator.get_encoder(), generator.get_decoder(), generator.config
        self.pad = generator.config.pad_token_id
        self.weight = generator.get_output_embeddings().weight  # (vocabulary, d)
        self.bias = self.weight.new_zeros(len(self.weight))

    def read(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> _Memory:
        """Encode contexts (D, S) in groups of similar length, so that little padding is encoded."""
        lengths = (attention_mask * torch.arange(1, attention_mask.shape[1] + 1, device=input_ids.device)).amax(1)
        order, layers = lengths.argsort(), None
        lengths = lengths[order].tolist()
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and (stop + 1 - start) * lengths[stop] <= CHUNK_TOKENS:
                stop += 1
            rows, length = order[start:stop], lengths[stop - 1]
            encoded = self.encoder(input_ids[rows, :length], attention_mask=attention_mask[rows, :length])[0]
            projected = [
                (self.heads(key(encoded)), self.heads(value(encoded))) for key, value in self.cross_projections()
            ]
            if layers is None:
                shape = len(order), projected[0][0].shape[1], lengths[-1], projected[0][0].shape[3]
                layers = [(encoded.new_zeros(shape), encoded.new_zeros(shape)) for _ in projected]
            for (keys, values), (new_keys, new_values) in zip(layers, projected, strict=True):
                keys[rows, :, :length], values[rows, :, :length] = new_keys, new_values
            start = stop
        return _Memory(layers, attention_mask[:, None, None, : lengths[-1]].bool())

    def decode(self, tokens, depths, ancestors, memory: _Memory, past: _Past | None = None) -> torch.Tensor:
        """Last hidden states of tokens (D, N) that hang on D documents, (D, N, d).

        Args:
            depths: (N), 0 for the decoder's first token.
            ancestors: (D or 1, N, tokens in `past` and these), True where a token attends.
        """
        if past is None:
            key_depths = depths
        else:
            past.grow(depths)
            key_depths = past.depths
        bias = self.self_attention_bias(ancestors[:, None], depths, key_depths)
        hidden = self.embed(tokens, depths)
        for i, (layer, (memory_keys, memory_values)) in enumerate(zip(self.layers(), memory.layers, strict=True)):

            def attend_self(query, keys, values, i=i):
                keys, values = self.heads(keys), self.heads(values)
                if past is not None:
                    keys, values = past.append(i, keys, values)
                return self.attend(query, keys, values, bias)

            def attend_memory(query, keys=memory_keys, values=memory_values):
                return self.attend(query, keys, values, memory.mask)

            hidden = self.apply(layer, hidden, attend_self, attend_memory)
        return self.finish(hidden)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """(D, N, d) to (D, heads, N, head size)."""
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def attend(self, query, keys, values, mask) -> torch.Tensor:
        attended = scaled_dot_product_attention(self.heads(query), keys, values, attn_mask=mask, scale=self.scale)
        return attended.transpose(1, 2).flatten(2)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return _full_precision(linear(hidden, self.weight, self.bias))

    def token_log_probs(self, hidden: torch.Tensor, places: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p(targets | hidden[:, places]): (n, N, d), (E), (E) to (n, E), without all logits at a time."""
        chunks = zip(self.weight.split(CHUNK_VOCABULARY), self.bias.split(CHUNK_VOCABULARY), strict=True)
        normalizers = [_logsumexp(_full_precision(linear(hidden, weight, bias))) for weight, bias in chunks]
        normalizer = torch.stack(normalizers).logsumexp(0)  # (n, N)
        logits = _full_precision(hidden[:, places] * self.weight[targets]).sum(-1) + self.bias[targets]
        return logits - normalizer[:, places]


class _BartDecoder(_Decoder):
    def __init__(self, generator):
        super().__init__(generator)
        self.n_heads, self.scale = self.config.decoder_attention_heads, None
        self.bias = generator.final_logits_bias[0]

    def layers(self):
        return self.decoder.layers

    def cross_projections(self):
        return [(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in self.decoder.layers]

    def embed(self, tokens, depths):
        positions = self.decoder.embed_positions(tokens, position_ids=depths)
        return self.decoder.layernorm_embedding(self.decoder.embed_tokens(tokens) + positions)

    def self_attention_bias(self, ancestors, depths, key_depths):
        return ancestors

    def apply(self, layer, hidden, attend_self, attend_memory):
        own, cross = layer.self_attn, layer.encoder_attn
        attended = own.out_proj(attend_self(own.q_proj(hidden), own.k_proj(hidden), own.v_proj(hidden)))
        hidden = layer.self_attn_layer_norm(hidden + attended)
        hidden = layer.encoder_attn_layer_norm(hidden + cross.out_proj(attend_memory(cross.q_proj(hidden))))
        return layer.final_layer_norm(hidden + layer.fc2(layer.activation_fn(layer.fc1(hidden))))

    def finish(self, hidden):
        return hidden


class _T5Decoder(_Decoder):
    def __init__(self, generator):
        super().__init__(generator)
        self.n_heads, self.scale = self.config.num_heads, 1.0

    def layers(self):
        return self.decoder.block

    def cross_projections(self):
        return [(block.layer[1].EncDecAttention.k, block.layer[1].EncDecAttention.v) for block in self.decoder.block]

    def embed(self, tokens, depths):
        return self.decoder.embed_tokens(tokens)

    def self_attention_bias(self, ancestors, depths, key_depths):
        """T5's bias by distance, (D or 1, heads, N, keys): a distance in the tree is one in the sequence."""
        first = self.decoder.block[0].layer[0].SelfAttention
        buckets = first._relative_position_bucket(
            key_depths - depths[:, None],
            bidirectional=False,
            num_buckets=first.relative_attention_num_buckets,
            max_distance=first.relative_attention_max_distance,
        )
        bias = first.relative_attention_bias(buckets).permute(2, 0, 1)
        return bias.masked_fill(~ancestors, float("-inf"))

    def apply(self, block, hidden, attend_self, attend_memory):
        own, cross, feed_forward = block.layer
        normed, attention = own.layer_norm(hidden), own.SelfAttention
        hidden = hidden + attention.o(attend_self(attention.q(normed), attention.k(normed), attention.v(normed)))
        attention = cross.EncDecAttention
        hidden = hidden + attention.o(attend_memory(attention.q(cross.layer_norm(hidden))))
        return feed_forward(hidden)

    def finish(self, hidden):
        hidden = self.decoder.final_layer_norm(hidden)
        return hidden * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else hidden


DECODERS = {"bart": _BartDecoder, "t5": _T5Decoder}


def _decoder(generator) -> _Decoder:
    if generator.config.model_type not in DECODERS:
        known = " and ".join(DECODERS)
        raise ValueError(f"a RAG model's generator must be {known}, not {generator.config.model_type}")
    return DECODERS[generator.config.model_type](generator)
