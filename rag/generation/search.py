"""Greedy and beam search over trees of tokens, exactly as transformers' `generate` runs them.

found = Search(model.generator, settings, decoder, memory, context_input_ids).run()
found.sequences, found.log_probs        # of each document, best first
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax
from transformers.generation import (
    EosTokenCriteria,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    GenerationMode,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from rag.generation.beams import Beams, BeamSearch, GreedySearch
from rag.generation.pace import Watch, pace_of
from rag.generation.running import RunningBest
from rag.generation.token_trees import Past

# Rules on tokens by which no log-probability rises above 0.
ONLY_LOWER = {
    MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor, ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor, NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor, SuppressTokensAtBeginLogitsProcessor,
}  # fmt: skip


@dataclass
class Found:
    """The sequences of the search: (items, num_beams, max_length), best first, and their log-probabilities.

    Where a search ended early, since its question was decided, some are none.
    """

    sequences: torch.Tensor
    log_probs: torch.Tensor
    is_one: torch.Tensor  # (items, num_beams) bool

    def note(self, beams: Beams, rules: BeamSearch, ended_early: torch.Tensor) -> None:
        """What has been found for the items of the beams."""
        self.sequences[beams.item], self.log_probs[beams.item] = beams.sequences, rules.log_probs(beams)
        self.is_one[beams.item] = beams.finished | ~ended_early[:, None]


class Search:
    """Greedy or beam search exactly as `owner.generate` runs it, over items whose finished ones are dropped.

    An item is a document (RAG-Sequence) or, where `doc_log_probs` (B, n_docs) are given, a question (RAG-Token), whose
    next token's probability is the mean over its documents.

    Args:
        bounds: of the sequences' scores under all documents (RAG-Sequence); None where nobody asks.
        running: is told what each step has come to; None where nobody watches.
    """

    def __init__(
        self, owner, settings: dict, decoder, memory, context_input_ids, doc_log_probs=None, bounds=None,
        running: RunningBest | None = None,
    ):  # fmt: skip
        self.owner, self.decoder, self.memory, self.context_input_ids = owner, decoder, memory, context_input_ids
        self.doc_log_probs, self.bounds, self.running = doc_log_probs, bounds, running
        self.documents = 1 if doc_log_probs is None else doc_log_probs.shape[1]  # of an item
        self.items = len(context_input_ids) // self.documents
        self.device = context_input_ids.device
        self.watch = Watch(self.device)
        settings = dict(settings)
        self.custom_processors = settings.pop("logits_processor", LogitsProcessorList())
        self.config = _generation_config(owner, settings, self.device)
        start = self.config.decoder_start_token_id
        self.start_token_id = self.config.bos_token_id if start is None else start
        positions = getattr(owner.config, "max_position_embeddings", None)
        if positions is not None and not owner.config.is_encoder_decoder:
            positions -= memory.longest  # the contexts have theirs before the answers
        self.stops = _stopping_criteria(self.config, positions)
        self.past = Past(decoder.depth, capacity=1 + self.config.num_beams * (self.config.max_length - 1))
        self.ancestors: torch.Tensor | None = None  # (I, N, tokens in self.past)
        self.own = {n: torch.eye(n, dtype=torch.bool, device=self.device) for n in {1, self.config.num_beams}}
        self.processors = self._processors()
        # Bounds of what may come are made of what is: no rule may make it more.
        self.decides = bounds is not None and bounds.rows == 1 and all(type(p) in ONLY_LOWER for p in self.processors)

    def run(self) -> Found:
        rules, bounds, longest = self._rules(), self.bounds, self.config.max_length
        noted = (0,) if bounds is None else bounds.noted
        beams = rules.start(self.items, self.start_token_id, self.decoder.pad, self.decoder.dtype, self.device, noted)
        found = Found(beams.sequences.clone(), beams.scores.clone(), beams.finished.clone())
        is_decided = torch.zeros_like(rules.is_over(beams))
        for length in range(1, longest):
            nodes = 1 if length == 1 else rules.num_beams  # all beams start alike
            prefixes, parents = beams.running[:, :nodes, :length], beams.parents[:, :nodes]
            scores = self._step(prefixes[..., -1], parents)
            log_probs = scores if self.doc_log_probs is not None else log_softmax(scores, -1)
            if bounds is not None:
                bounds.begin(beams.item, prefixes[..., -1], parents, log_probs)
            scores = log_probs if rules.reads_log_probs else scores
            scores = self.processors(prefixes.flatten(0, 1), scores.flatten(0, 1)).view_as(scores)
            beams = rules.advance(beams, scores, length, self.stops, None if bounds is None else bounds.gains)
            over = rules.is_over(beams)
            if bounds is not None:
                bounds.note(beams, over, rules.stays(beams, length))
                is_decided = bounds.decided(beams.item) if self.decides else is_decided
            if self.running is not None:
                self.running.note(beams, over | is_decided, length + 1)
            if (rows := self._rows_left(over | is_decided)) is None:
                continue
            if not len(rows):
                break
            found.note(beams, rules, is_decided)
            beams, is_decided = beams.select(rows), is_decided[rows]
            self._keep(rows)
        found.note(beams, rules, is_decided)
        return found

    def _rules(self) -> BeamSearch:
        config = self.config
        if config.num_beams == 1:
            return GreedySearch(max_length=config.max_length)
        return BeamSearch(
            num_beams=config.num_beams,
            max_length=config.max_length,
            end_tokens=0 if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).numel(),
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
        )

    def _processors(self) -> LogitsProcessorList:
        return self.owner._get_logits_processor(
            self.config,
            input_ids_seq_length=1,
            # Rules on repetition hold for all contexts of an item.
            encoder_input_ids=self.context_input_ids.reshape(-1, self.documents * self.context_input_ids.shape[1]),
            logits_processor=self.custom_processors,
            device=self.device,
        )

    def _step(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Hang tokens (I, N) on the tokens of the step before: scores of what may follow each, (I, N, vocabulary)."""
        own = self.own[tokens.shape[1]].expand(len(tokens), -1, -1)
        if self.ancestors is not None:
            before = self.ancestors.expand(-1, parents.shape[1], -1)
            rows = torch.arange(len(tokens), device=self.device)[:, None]
            own = torch.cat([before[rows, parents], own], -1)
        self.ancestors = own
        depths = torch.full((1, tokens.shape[1]), self.past.steps, device=self.device)
        if self.documents > 1:
            item_of = torch.arange(len(self.memory.mask), device=self.device) // self.documents
            tokens, own = tokens[item_of], own[item_of]
        hidden = self.decoder.decode(tokens, depths, own, self.memory, self.past)
        logits = self.decoder.logits(hidden)  # (I * documents, N, vocabulary)
        return logits if self.doc_log_probs is None else self._over_documents(logits)

    def _over_documents(self, logits: torch.Tensor) -> torch.Tensor:
        """log sum_z p(z) p(token | z): logits (I * documents, N, vocabulary) to (I, N, vocabulary)."""
        logits = logits.unflatten(0, (-1, self.documents))
        # On a CPU an item at a time: it fits into the processor's cache.
        items = max(1, pace_of(self.device).chunk_logits // logits[0].numel())
        chunks = zip(logits.split(items), self.doc_log_probs.split(items), strict=True)
        sums = [(log_softmax(own, -1) + weights[..., None, None]).logsumexp(1) for own, weights in chunks]
        return torch.cat(sums) if len(sums) > 1 else sums[0]

    def _rows_left(self, over: torch.Tensor) -> torch.Tensor | None:
        """The rows of the items to go on with, none if all are over; None: go on with all of them.

        That is while too few are over to be worth the copy of what is kept of the others.
        """
        over, count = self.watch.look(over)
        if 4 * count < len(over):
            return None
        return over.int().argsort(stable=True)[: len(over) - count]

    def _keep(self, rows: torch.Tensor) -> None:
        """Drop what is kept of the items that are not in `rows`."""
        assert self.ancestors is not None, "a step comes first"
        documents = rows
        if self.documents > 1:
            places = torch.arange(self.documents, device=self.device)
            documents = (rows[:, None] * self.documents + places).flatten()
        self.memory, self.ancestors = self.memory.select(documents), self.ancestors[rows]
        self.past.select(documents)
        self.context_input_ids = self.context_input_ids[documents]
        self.watch.keep(rows)
        if self.doc_log_probs is not None:
            self.doc_log_probs = self.doc_log_probs[rows]
        if self.config.encoder_repetition_penalty not in (None, 1.0) or self.config.encoder_no_repeat_ngram_size:
            self.processors = self._processors()  # the only ones that hang on the contexts


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
