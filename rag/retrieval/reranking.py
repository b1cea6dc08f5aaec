"""Better passages without training: those that the index found, in the order of another model's scores.

    rerank = open_reranker("upr", depth=50, model=model, tokenizer=retriever.generator_tokenizer)
    rerank = open_reranker("cross-encoder/ms-marco-MiniLM-L6-v2", depth=50, model=model, tokenizer=None)
    contexts = retrieve_contexts(model.rag, retriever, input_ids, attention_mask, n_docs=5, rescore=rerank)

upr            log p(question | passage) by the model's own generator (Sachan et al. 2022, arXiv 2204.07496). Theirs is
               the mean over the question's tokens, ours their sum: the order is the same, and of passages that are
               equally likely beforehand the sum is the logit of p(passage | question), by Bayes' rule.
CrossEncoder   one logit of the pair of question and passage, as sentence-transformers' CrossEncoder gives it: a
               classifier of transformers with one label (Nogueira & Cho 2019, arXiv 1901.04085).

The scores are the logits of p(passage | question), as the index's are without a reranker. They have no gradient.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rag.errors import UserError, one_line, raise_problems
from rag.generation.forward import answer_states, output_layer
from rag.generation.logprobs import target_logprobs
from rag.models.checkpoints import load_tokenizer
from rag.models.fit import vocabulary_problems
from rag.models.limits import most_tokens
from rag.models.loading import load_config, load_weights
from rag.models.modes import evaluating
from rag.models.passages import TOKENS_OF_NO_LIMIT
from rag.models.prompts import passage_prompts
from rag.models.tokens import reading
from rag.packing import to_device
from rag.retrieval.arguments import UPR
from rag.retrieval.finding import FetchedPassages, Rescoring
from rag.retrieval.retriever import bare_title

FLAG = "--reranker"
PAIRS_AT_A_TIME = 32  # that a CrossEncoder reads, of similar length
QUESTION_TOKENS = 128  # of a question that the generator is to say, the scripts' default
MOST_TOKENS = 10**6  # of a pair; a tokenizer that knows no limit says 10**30, which is more than it can be told


def text_of(title: str, text: str) -> str:
    """A passage as rerankers read it."""
    return f"{bare_title(title)} {text}".strip()


class Upr:
    """log p(question | passage), nats, by a generator: the sum over the question's tokens, its end token included.

    An encoder-decoder reads Sachan et al.'s prompt and is scored on what follows; a language model reads its own
    template up to the question.

    Args:
        generator: as it is at each call, which may be between two steps of its training; without dropout.
        tokenizer: of the generator.
        depth: passages a question.
        most: tokens of a passage's prompt; more are cut off the passage.
    """

    learns = False

    def __init__(self, generator: PreTrainedModel, tokenizer: Any, depth: int, most: int = TOKENS_OF_NO_LIMIT):
        self.generator = generator
        self.tokenizer = tokenizer
        self.depth = depth
        readable = most_tokens(generator.config)
        self.most = most if readable is None else min(most, readable)

    @torch.no_grad()
    def __call__(self, found: FetchedPassages) -> torch.Tensor:
        scores = torch.zeros(found.doc_ids.shape, dtype=torch.float32, device=found.queries.device)
        with evaluating(self.generator):
            for row, (question, doc, ids) in enumerate(zip(found.questions, found.docs, found.doc_ids, strict=True)):
                there = np.flatnonzero(ids >= 0)
                passages = [(bare_title(doc["title"][place]), doc["text"][place]) for place in there]
                if passages:
                    scores[row, to_device(there, scores.device)] = self.log_likelihoods(question, passages)
        return scores

    def log_likelihoods(self, question: str, passages: list[tuple[str, str]]) -> torch.Tensor:
        """Of one question, beside each of N titles and texts, (N,) float32."""
        generator, device = self.generator, next(self.generator.parameters()).device
        decoder = most_tokens(generator.config, decoder=True) or self.most
        rows, says = passage_prompts(
            self.tokenizer, generator.config, passages, question, self.most, min(QUESTION_TOKENS, decoder - 1)
        )
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), generator.config.pad_token_id)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
        inputs = to_device(torch.tensor([says[:-1]]), device)  # (1, T)
        lengths = np.array([len(row) for row in rows])
        hidden, answers = answer_states(
            generator, to_device(ids, device), to_device(mask, device), inputs, lengths=lengths
        )
        targets = to_device(torch.tensor(says[1:]), device).expand(len(rows), -1)  # (N, T), none of them padding
        found, _ = target_logprobs(hidden, *output_layer(generator), targets, answers)
        return found.sum(1).float()


class CrossEncoder:
    """The one logit of a classifier that reads question and passage side by side.

    Args:
        model: with one label.
        tokenizer: of the model.
        depth: passages a question.
    """

    learns = False

    def __init__(self, model: PreTrainedModel, tokenizer: Any, depth: int):
        self.model = model
        self.tokenizer = tokenizer
        self.depth = depth
        self.most = min(most_tokens(model.config) or MOST_TOKENS, tokenizer.model_max_length, MOST_TOKENS)

    def __call__(self, found: FetchedPassages) -> torch.Tensor:
        device = found.queries.device
        self.model.to(device)
        there = np.argwhere(found.doc_ids >= 0)
        pairs = [
            (found.questions[row], text_of(found.docs[row]["title"][place], found.docs[row]["text"][place]))
            for row, place in there
        ]
        scores = torch.zeros(found.doc_ids.shape, dtype=torch.float32, device=device)
        if pairs:
            rows, places = (to_device(np.ascontiguousarray(part), device) for part in there.T)
            scores[rows, places] = self.logits(pairs)
        return scores

    @torch.no_grad()
    def logits(self, pairs: list[tuple[str, str]]) -> torch.Tensor:
        """Of N questions and texts, (N,) float32 on the model's device."""
        order = np.argsort([len(question) + len(text) for question, text in pairs], kind="stable")
        device = self.model.device
        scores = torch.zeros(len(pairs), dtype=torch.float32, device=device)
        with torch.autocast(device.type, enabled=False):
            for part in np.split(order, range(PAIRS_AT_A_TIME, len(order), PAIRS_AT_A_TIME)):
                questions, texts = zip(*(pairs[place] for place in part), strict=True)
                with reading(self.tokenizer):
                    tokens = self.tokenizer(
                        list(questions), list(texts), max_length=self.most, truncation=True, padding=True,
                        return_tensors="pt",
                    )  # fmt: skip
                tokens = {name: to_device(tensor, device) for name, tensor in tokens.items()}
                scores[to_device(part, device)] = self.model(**tokens).logits[:, 0].float()
        return scores


# --- From a flag to a reranker ----------------------------------------------------------------------------------------


def open_upr(name: str, depth: int, model: Any, tokenizer: Any) -> Upr:
    return Upr(model.generator, tokenizer, depth, model.config.max_combined_length)


def open_cross_encoder(name: str, depth: int, model: Any = None, tokenizer: Any = None) -> CrossEncoder:
    """The CrossEncoder of a folder or hub name, in float32 and evaluation mode.

    Raises:
        UserError: there is none, it has another number of labels than one, or it cannot read a pair.
    """
    source = f"{FLAG} {name}"
    config = load_config(name, flag=FLAG)
    if config.num_labels != 1:
        raise UserError(
            f"{source} has {config.num_labels} labels, and a reranker has one: the score; give a CrossEncoder of one "
            f"label, or {UPR}"
        )
    cross = load_weights(AutoModelForSequenceClassification, name, FLAG, config=config, with_pooler=True).eval()
    own = load_tokenizer(name, flag=FLAG)
    raise_problems(vocabulary_problems(cross, own, source))
    reranker = CrossEncoder(cross, own, depth)
    try:
        score = float(reranker.logits([("who wrote it", "a play")])[0])
    except Exception as error:  # a model of another kind ends wherever it misses something
        raise UserError(
            f"{source} cannot read a pair of texts ({one_line(error, 200)}); give a CrossEncoder"
        ) from error
    if not np.isfinite(score):
        raise UserError(f"{source} gives a score that is not finite ({score}); give a whole CrossEncoder")
    return reranker


RERANKERS: dict[str, Callable[..., Rescoring]] = {UPR: open_upr}  # any other name is a CrossEncoder's


def open_reranker(name: str | None, depth: int, model: Any, tokenizer: Any) -> Rescoring | None:
    """What --reranker names; None where it names nothing.

    Args:
        depth: passages a question that it reads.
        model: a RAG model, whose generator may be the reranker.
        tokenizer: of its generator.

    Raises:
        UserError: there is no such CrossEncoder, or it is none.
    """
    if name is None:
        return None
    return RERANKERS.get(name, open_cross_encoder)(name, depth, model, tokenizer)
