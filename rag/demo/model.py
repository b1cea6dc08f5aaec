"""A RAG model with its open index, asked one question at a time.

    models = open_models(args)
    models[0].ask(Question("where is oslo?", {"n_docs": 3, "num_beams": 4}), tell=print)
    models[0].search(question)      # passages alone: the generator does not run

Number of passages, beams and the index's effort are each question's own: neither model nor index is loaded again.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from rag.demo.arguments import DemoArguments
from rag.demo.questions import Question, Setting
from rag.errors import UserError, raise_problems
from rag.evaluation.predictors import (
    answer_contexts,
    decode,
    fetch_contexts,
    find_passages,
    head_cache_of,
    load_rag,
    passage_details,
    pick_device,
    rag_config,
    rescoring_of,
    size_problems,
)
from rag.index.faiss_opening import ANY_EFFORT, set_effort
from rag.index.hybrid import HybridIndex
from rag.models.checkpoints import RAG_TYPES, fitting_model_type
from rag.models.loading import MODEL_FLAG, load_config
from rag.models.precision import dtype_of
from rag.retrieval.retriever import require_n_docs

COMPARE_FLAG = "--compare_with"
# More passages or beams than these a question may only bring where the flags ask for them.
MOST_DOCS, MOST_BEAMS = 100, 32
EFFORTS = {"ef_search": "efSearch", "nprobe": "nprobe"}  # the flags, and FAISS's names of what they set
HALF_A_CHARACTER = "\ufffd"  # of a text whose last character's bytes are not all there yet


class DemoModel:
    """A RAG model with its index. One thread at a time may ask it, or any other model of the process: they share the
    machine's cores and what torch and FAISS keep.

    Args:
        model_type: rag_sequence, rag_token or fid.
        flag: that named the checkpoint.

    Attributes:
        settings: what each question may bring, by the flag's name.
        index: how the index is searched, as `eval_rag.py` notes it.
    """

    def __init__(self, args: DemoArguments, model_type: str, flag: str):
        self.path, self.type, self.plan = args.model_name_or_path, model_type, args.answer_plan
        dtype = dtype_of(args.precision, pick_device(args.device))
        self.model, self.retriever = load_rag(
            self.path, model_type, self.plan, rag_config(args, flag), args.device, dtype, flag=flag
        )
        require_n_docs(self.retriever.index, args.n_docs)
        named = None if args.reranker is None else (args.reranker, args.depth_for(args.n_docs))
        self.rescore = rescoring_of(self.model, self.retriever, named)
        self.cache = head_cache_of(self.model)
        self.index = self.retriever.index.description()
        passages = self.index["passages"]
        self.settings = {
            "n_docs": Setting(args.n_docs, min(passages, max(MOST_DOCS, args.n_docs))),
            "num_beams": Setting(args.num_beams, max(MOST_BEAMS, args.num_beams)),
        }
        for name in EFFORTS:
            if name in self.index and not self._effort_problems({name: self.index[name]}):
                self.settings[name] = Setting(self.index[name], max(ANY_EFFORT, passages))

    def description(self) -> dict[str, Any]:
        """What the page shows of it."""
        settings = {name: asdict(setting) for name, setting in self.settings.items()}
        return {"path": self.path, "type": self.type, "index": self.index, "settings": settings}

    def ask(self, question: Question, tell: Callable[[dict[str, Any]], None]) -> None:
        """Answer; `tell` is given what is known, as soon as it is, and ends the search by what it raises.

        First {"found"}, the passages (`_found`); after each step of the search {"partial"}, the best text so far; last
        {"answer"}: answer, probability p(y|x), posteriors p(z|x,y), which a Fusion-in-Decoder lacks, of RAG-Token
        tokens and token_posteriors, seconds.
        """
        plan = replace(self.plan, n_docs=question.settings["n_docs"], num_beams=question.settings["num_beams"])
        tokenizer = self.retriever.generator_tokenizer

        def tell_step(token_ids: torch.Tensor) -> None:
            tell({"partial": decode(tokenizer, token_ids)[0].rstrip(HALF_A_CHARACTER)})

        with torch.inference_mode():
            start = time.perf_counter()
            self._set_effort(question)
            contexts = fetch_contexts(plan, self.model, self.retriever, [question.text], self.rescore)
            tell({"found": self._found(contexts.doc_ids, contexts.docs, contexts.doc_scores, start)})
            _, (detail,) = answer_contexts(
                plan, self.model, self.retriever, contexts, note_step=tell_step, **self.cache
            )
        kept = ("answer", "posteriors", "tokens", "token_posteriors")
        answer = {name: detail[name] for name in kept if name in detail}
        answer["probability"] = math.exp(detail["answer_log_prob"])
        tell({"answer": answer | {"seconds": time.perf_counter() - start}})

    def search(self, question: Question) -> dict[str, Any]:
        """The passages of the largest scores, as {"found"}; the generator does not run."""
        with torch.inference_mode():
            start = time.perf_counter()
            self._set_effort(question)
            encoder, n_docs = self.model.rag.question_encoder, question.settings["n_docs"]
            doc_ids, docs, scores = find_passages(
                self.plan, encoder, self.retriever, [question.text], n_docs, self.rescore
            )
            return {"found": self._found(doc_ids, docs, scores, start)}

    def _found(self, doc_ids, docs: list[dict], scores, start: float) -> dict[str, Any]:
        """doc_ids, titles, texts, scores and priors p(z|x) of the passages, lists of one length, and the seconds."""
        (found,) = passage_details(doc_ids, docs, {"scores": scores}, "title", "text")
        priors = torch.tensor(found["scores"], dtype=torch.float64).softmax(0).tolist()
        return found | {"priors": priors, "seconds": time.perf_counter() - start}

    def _set_effort(self, question: Question) -> None:
        effort = {name: value for name, value in question.settings.items() if name in EFFORTS}
        raise_problems(self._effort_problems(effort) if effort else [])

    def _effort_problems(self, effort: dict[str, int]) -> list[str]:
        """Set what is given of ef_search and nprobe; the problems with it."""
        index = self.retriever.index
        index = index.dense if isinstance(index, HybridIndex) else index
        return set_effort(index.faiss_index, {theirs: effort.get(ours) for ours, theirs in EFFORTS.items()}, len(index))


def open_models(args: DemoArguments) -> list[DemoModel]:
    """The model that the flags name and, with --compare_with, the second one.

    Raises:
        UserError: one is no RAG checkpoint, cannot be run, or the index or a flag does not fit it.
    """
    named = [(args, MODEL_FLAG)]
    if args.compare_with is not None:
        named.append((replace(args, model_name_or_path=args.compare_with), COMPARE_FLAG))
    types = [_model_type(own, flag) for own, flag in named]  # of both, before one is loaded
    return [DemoModel(own, model_type, flag) for (own, flag), model_type in zip(named, types, strict=True)]


def _model_type(args: DemoArguments, flag: str) -> str:
    config = load_config(args.model_name_or_path, flag=flag)
    model_type = fitting_model_type(config, args.model_name_or_path, args.model_type, flag)
    if model_type not in RAG_TYPES:
        raise UserError(
            f"{flag} {args.model_name_or_path} is a {model_type} model, which retrieves nothing; give a RAG "
            "checkpoint, as consolidate_rag_checkpoint.py and finetune_rag.py write them"
        )
    if args.decoding != "thorough" and model_type != "rag_sequence":
        raise UserError(f"--decoding {args.decoding} is for rag_sequence; leave it out: {flag} is a {model_type} model")
    raise_problems(size_problems(args, config, flag))
    return model_type
