"""How `eval_rag.py` answers: from a batch of questions to lines of its predictions file, and the details of each.

    predict, index = load_predictor(path, "rag_sequence", args.answer_plan, rag_config(args))
    lines, details = predict(["where is oslo?"], None)   # ["norway"], [{"answer": "norway", "titles": [...], ...}]

A RAG model answers from passages, or only retrieves them (--eval_mode retrieval); a bare generator answers closed-book.
"""

import logging
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedConfig, RagConfig

from rag.errors import UserError
from rag.evaluation.arguments import AnswerArguments, AnswerPlan, EvalArguments
from rag.evaluation.gold import strip_title
from rag.generation.causal_cache import HeadCache
from rag.generation.decoding import answer_prompts, generate_answers
from rag.generation.families import require_family
from rag.generation.posteriors import Posteriors
from rag.generation.trial import FLAGS_DECIDE, require_runs
from rag.index.device_search import DeviceUnavailableError, usable_device
from rag.metrics import answer_recall_at_k
from rag.models.checkpoints import load_model, load_tokenizer
from rag.models.fit import complete_start, require_fit, settle_prompt
from rag.models.limits import beams_problems, length_problems
from rag.models.loading import MODEL_FLAG, load_config
from rag.models.prompts import decode_answers
from rag.models.questions import encode_questions
from rag.retrieval import finding
from rag.retrieval.arguments import UPR
from rag.retrieval.finding import Rescoring
from rag.retrieval.reranking import open_reranker
from rag.retrieval.retriever import RagKnowledgeRetriever, RetrievedContexts, require_passages_for, retrieve_contexts

logger = logging.getLogger(__name__)

# Among the details of a batch's first question: contexts made for the batch, those that were cut, and at which length.
CONTEXT_COUNTS = "context_counts"


def load_predictor(
    model_name_or_path: str,
    model_type: str,
    plan: AnswerPlan,
    config: RagConfig | None = None,
    device: str | None = None,
    retrieve_only: bool = False,
    dtype: torch.dtype = torch.float32,
    holds_answer: Callable[..., bool] = answer_recall_at_k,
    questions: Iterable[str] = (),
    questions_flag: str = "--evaluation_set",
    reranker: tuple[str, int] | None = None,
) -> tuple[Callable, dict[str, Any]]:
    """A function from questions (and their answers, for recall) to lines and details, and how the index is searched.

    Args:
        config: of a RAG model, with the index that it is to search; None for a closed-book generator.
        device: as `pick_device`'s.
        retrieve_only: lines are titles, not answers; the generator stays where it is.
        dtype: of the weights; query vectors and documents' scores are float32 in any case.
        holds_answer: of `rag.metrics`, whether passages hold an answer, or what a pattern matches.
        questions: that will be asked; passages that were found already have to hold those of each.
        questions_flag: which names them.
        reranker: --reranker, and how many passages a question it reads.
    """
    if config is None:
        tokenizer, source = load_tokenizer(model_name_or_path, model_type), f"{MODEL_FLAG} {model_name_or_path}"
        model = load_model(model_name_or_path, model_type).to(pick_device(device), dtype)
        settle_prompt(model, tokenizer, source)
        require_fit(model, tokenizer, source)
        complete_start(model, tokenizer, source)
        require_runs(model, tokenizer, source, **generation_kwargs(plan, model))
        return partial(answer_closed_book, plan, model, tokenizer), {}
    model, retriever = load_rag(
        model_name_or_path, model_type, plan, config, device, dtype, questions, questions_flag, retrieve_only
    )
    index = retriever.index.description()
    rescore = rescoring_of(model, retriever, reranker)
    if retrieve_only:
        encoder = model.rag.question_encoder
        if reranker is not None and reranker[0] == UPR:
            model.generator.to(encoder.device, dtype)
        retrieve = partial(retrieve_passages, plan, encoder, retriever, holds_answer=holds_answer, rescore=rescore)
        return retrieve, index
    return partial(answer_from_passages, plan, model, retriever, rescore=rescore, **head_cache_of(model)), index


def rescoring_of(model, retriever: RagKnowledgeRetriever, reranker: tuple[str, int] | None) -> Rescoring | None:
    """What --reranker and its depth ask for; None for the index's own scores."""
    return None if reranker is None else open_reranker(*reranker, model, retriever.generator_tokenizer)


def load_rag(
    model_name_or_path: str,
    model_type: str,
    plan: AnswerPlan,
    config: RagConfig,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    questions: Iterable[str] = (),
    questions_flag: str = "--evaluation_set",
    retrieve_only: bool = False,
    flag: str = MODEL_FLAG,
) -> tuple[Any, RagKnowledgeRetriever]:
    """A RAG model that was tried, and its retriever with the open index; arguments as of `load_predictor`.

    Args:
        flag: that named the model, for the messages.
    """
    where, source = pick_device(device), f"{flag} {model_name_or_path}"
    tokenizer = load_tokenizer(model_name_or_path, model_type, flag=flag)
    require_family(config.generator, source)
    # The index first: it opens in milliseconds, and says what does not fit.
    retriever = RagKnowledgeRetriever(config, tokenizer.question_encoder, tokenizer.generator)
    retriever.init_retrieval()
    require_passages_for(retriever.index, questions, questions_flag)
    model = load_model(model_name_or_path, model_type, config_overrides={"n_docs": config.n_docs}, flag=flag)
    require_fit(model, tokenizer, source)
    complete_start(model, tokenizer, source)
    if retrieve_only:
        model.rag.question_encoder.to(where, dtype)
        require_runs(model, tokenizer, source, answers=False)
    else:
        model = model.to(where, dtype)
        require_runs(model, tokenizer, source, **generation_kwargs(plan, model.generator))
    return model, retriever


def head_cache_of(model) -> dict[str, Any]:
    """`head_cache=` of a RAG model, where its passages are kept from batch to batch; an encoder-decoder keeps none."""
    return {} if model.generator.config.is_encoder_decoder else {"head_cache": HeadCache()}


def rag_config(args: AnswerArguments, flag: str = MODEL_FLAG) -> RagConfig:
    """The checkpoint's config with the index and the number of passages that the flags ask for."""
    config = load_config(args.model_name_or_path, flag=flag)
    config.n_docs = args.passages_per_question
    args.apply_to(config)
    return config


def size_problems(args: AnswerArguments, config: PreTrainedConfig, flag: str = MODEL_FLAG) -> list[str]:
    """Flags that ask for more than the model can read or write."""
    answers = ("max_length", "min_length") if args.gives_answers else ()
    lengths = {name: getattr(args, name) for name in ("max_source_length", *answers)}
    problems = length_problems(config, lengths, f"{flag} {args.model_name_or_path}")
    if args.gives_answers:
        problems += beams_problems(config.generator if isinstance(config, RagConfig) else config, args.num_beams)
    return problems


def pick_device(name: str | None) -> torch.device:
    """The device by its name; else a GPU if there is one, the ranks of a node each their own; else the CPU."""
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)  # so that --index_device cuda means the same one
        return device
    try:
        return usable_device(name)
    except DeviceUnavailableError as error:
        raise UserError(f"--device {name} cannot be used: {error}; leave it out, or give cpu") from error


def answer_from_passages(
    plan: AnswerPlan,
    model,
    retriever,
    questions: list[str],
    _,
    head_cache: HeadCache | None = None,
    rescore: Rescoring | None = None,
) -> tuple[list[str], list[dict]]:
    before = _context_counts(retriever)
    contexts = fetch_contexts(plan, model, retriever, questions, rescore)
    made, cut = (now - then for now, then in zip(_context_counts(retriever), before, strict=True))
    answers, details = answer_contexts(plan, model, retriever, contexts, head_cache)
    details[0][CONTEXT_COUNTS] = [made, cut, getattr(retriever, "context_length", 0)]
    return answers, details


def fetch_contexts(
    plan: AnswerPlan, model, retriever, questions: list[str], rescore: Rescoring | None = None
) -> RetrievedContexts:
    """What the generator reads for these questions."""
    tokens = encode(plan, retriever.question_encoder_tokenizer, questions, model.device)
    return retrieve_contexts(
        model.rag, retriever, tokens.input_ids, tokens.attention_mask, plan.n_docs, questions, rescore=rescore
    )


def answer_contexts(
    plan: AnswerPlan,
    model,
    retriever,
    contexts: RetrievedContexts,
    head_cache: HeadCache | None = None,
    note_step: Callable[[torch.Tensor], None] | None = None,
) -> tuple[list[str], list[dict]]:
    """The answers, and of each the passages and, where there is such, their part in it.

    Args:
        note_step: that of `generate_answers`.
    """
    noted: list[Posteriors] = []
    token_ids = generate_answers(
        model,
        contexts.input_ids,
        contexts.attention_mask,
        contexts.doc_scores,
        n_docs=plan.n_docs,
        decoding=plan.decoding,
        heads=contexts.heads,
        head_cache=head_cache,
        note_posteriors=noted.append,
        note_step=note_step,
        **generation_kwargs(plan, model.generator),
    )
    answers = decode(retriever.generator_tokenizer, token_ids)
    (posteriors,) = noted
    numbers = {"scores": contexts.doc_scores}
    if posteriors.passages is not None:
        numbers["posteriors"] = posteriors.passages
    details = passage_details(contexts.doc_ids, contexts.docs, numbers, "title", "text")
    log_probs = posteriors.answers.tolist()
    details = [
        {"answer": answer, "answer_log_prob": log_prob, **detail}
        for answer, log_prob, detail in zip(answers, log_probs, details, strict=True)
    ]
    if posteriors.tokens is not None:
        words = [retriever.generator_tokenizer.batch_decode([[word] for word in row[1:]]) for row in token_ids]
        for detail, shares in zip(details, token_details(contexts.doc_ids, words, posteriors.tokens), strict=True):
            detail |= shares
    return answers, details


def _context_counts(retriever) -> tuple[int, int]:
    """Contexts made so far, and those that had to be cut; of another retriever it is not known."""
    return getattr(retriever, "contexts", 0), getattr(retriever, "cut_contexts", 0)


def answer_closed_book(plan: AnswerPlan, model, tokenizer, questions: list[str], _) -> tuple[list[str], list[dict]]:
    tokens = encode(plan, tokenizer, questions, model.device)
    answer = model.generate if model.config.is_encoder_decoder else partial(answer_prompts, model)
    token_ids = answer(tokens.input_ids, attention_mask=tokens.attention_mask, **generation_kwargs(plan, model))
    answers = decode(tokenizer, token_ids)
    return answers, [{"answer": answer} for answer in answers]


def retrieve_passages(
    plan: AnswerPlan,
    question_encoder,
    retriever,
    questions,
    answers,
    holds_answer: Callable[..., bool] = answer_recall_at_k,
    rescore: Rescoring | None = None,
) -> tuple[list[str], list[dict]]:
    n_docs = retriever.config.n_docs
    doc_ids, docs, scores = find_passages(plan, question_encoder, retriever, questions, n_docs, rescore)
    details = passage_details(doc_ids, docs, {"scores": scores}, "title")
    lines = ["\t".join(one_line(strip_title(title)) for title in detail["titles"]) for detail in details]
    if answers is not None:
        for detail, doc, right in zip(details, docs, answers, strict=True):
            detail["answer_rank"] = answer_rank(doc["text"], right, holds_answer)
    return lines, details


def find_passages(
    plan: AnswerPlan, question_encoder, retriever, questions: list[str], n_docs: int, rescore: Rescoring | None = None
):
    """doc_ids (B, n_docs), best first, B dicts of the passages' columns, and scores (B, n_docs) float32."""
    tokens = encode(plan, retriever.question_encoder_tokenizer, questions, question_encoder.device)
    found = finding.find_passages(question_encoder, retriever, tokens, questions, n_docs, rescore=rescore)
    return found.doc_ids, found.docs, found.scores.cpu()


def answer_rank(texts: list[str], answers: list[str], holds_answer: Callable[..., bool]) -> int | None:
    """The rank, from 1, of the first passage with an answer."""
    try:
        return next((n for n, text in enumerate(texts, start=1) if holds_answer([text], answers, 1)), None)
    except ValueError as error:  # a pattern takes too long
        raise UserError(f"--answers_path: {error}; write it in another way") from error


def encode(plan, tokenizer, questions: list[str], device):
    """input_ids and attention_mask, (B, S), padded to the longest."""
    questions = [plan.prefix + question for question in questions]
    tokens = encode_questions(tokenizer, questions, plan.max_source_length, padding="longest", return_tensors="pt")
    return tokens.to(device)


def generation_kwargs(plan: AnswerPlan, generator) -> dict[str, Any]:
    """Keyword arguments of `generate` and `generate_answers`."""
    kwargs: dict[str, Any] = {"num_beams": plan.num_beams, "min_length": plan.min_length, "max_length": plan.max_length}
    bos = generator.config.bos_token_id
    if bos is not None:  # BART likes to repeat its first token
        kwargs["bad_words_ids"] = [[bos, bos]]
    return kwargs | FLAGS_DECIDE | {"early_stopping": False}


def decode(tokenizer, token_ids) -> list[str]:
    return [one_line(text).strip() for text in decode_answers(tokenizer, token_ids)]


def one_line(text: str) -> str:
    return text.translate({ord(c): " " for c in "\t\r\n"})


def passage_details(doc_ids, docs: list[dict], numbers: dict[str, Any], *columns: str) -> list[dict]:
    """Of each question's passages the ids, what the index has of them in `columns`, and numbers.

    Args:
        doc_ids: (B, n_docs), negative where there is no passage.
        numbers: by name, (B, n_docs) each.
    """
    details = []
    for question, (ids, doc) in enumerate(zip(doc_ids.tolist(), docs, strict=True)):
        lists = {"doc_ids": ids} | {f"{column}s": doc[column] for column in columns}
        lists |= {name: own[question].tolist() for name, own in numbers.items()}
        details.append(
            {name: [values[n] for n, doc_id in enumerate(ids) if doc_id >= 0] for name, values in lists.items()}
        )
    return details


def token_details(doc_ids, words: list[list[str]], posteriors: torch.Tensor) -> list[dict]:
    """Of each question's answer the tokens, and which part each passage has in each.

    Args:
        doc_ids: (B, n_docs), negative where there is no passage.
        words: B lists, of the tokens behind the first one.
        posteriors: (B, T, n_docs), zero behind an answer's end.
    """
    details = []
    for ids, own, rows in zip(doc_ids.tolist(), words, posteriors.tolist(), strict=True):
        rows = [[share for share, doc_id in zip(row, ids, strict=True) if doc_id >= 0] for row in rows if any(row)]
        details.append({"tokens": own[: len(rows)], "token_posteriors": rows})
    return details


# --- The public suite's functions -------------------------------------------------------------------------------------


def evaluate_batch_e2e(args: EvalArguments, rag_model, questions: list[str]) -> list[str]:
    """Answers of a RAG model that has its retriever (`from_pretrained(path, retriever=...)`), one of this suite."""
    with torch.inference_mode():
        answers, _ = answer_from_passages(args.answer_plan, rag_model, rag_model.retriever, questions, None)
    if args.print_predictions:
        for question, answer in zip(questions, answers, strict=True):
            logger.info(f"Q: {question} - A: {answer}")
    return answers


def evaluate_batch_retrieval(args: EvalArguments, rag_model, questions: list[str]) -> list[str]:
    """Tab-separated titles of the passages that the model's retriever finds, as many as its config's `n_docs`."""
    with torch.inference_mode():
        lines, _ = retrieve_passages(
            args.answer_plan, rag_model.rag.question_encoder, rag_model.retriever, questions, None
        )
    return lines
