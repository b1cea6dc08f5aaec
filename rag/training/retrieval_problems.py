"""Settings of retrieval that contradict each other: what finds passages, what scores them, what learns from that.

    problems = retrieval_contradictions(args) + nothing_learns(args)
    problems += fusion_problems(args, is_fused=True, source="--model_name_or_path path/to/fid")

The first needs the flags alone; the last two are also asked when the checkpoint has said what it is.
"""

import importlib.util
from typing import TYPE_CHECKING

from rag.index.arguments import READING_TEXT, WITHOUT_ENCODER, device_problems, teaches
from rag.training.refresh_schedule import schedule_problems

if TYPE_CHECKING:
    from rag.training.arguments import FinetuneArguments, RetrievalArguments

CLOSED_BOOK = ("bart", "t5", "causal")  # types of bare generators


def retrieval_contradictions(args: "FinetuneArguments") -> list[str]:
    problems = _index_contradictions(args.retrieval) + _retriever_loss_contradictions(args)
    if args.model.model_type is not None:  # else the checkpoint says it
        problems += fusion_problems(args, args.model.model_type == "fid", f"--model_type {args.model.model_type}")
    return problems + _context_encoder_contradictions(args)


def _index_contradictions(retrieval: "RetrievalArguments") -> list[str]:
    if problems := retrieval.search_problems() + retrieval.rerank_problems(retrieval.n_docs):
        return problems
    uses_ray = retrieval.distributed_retriever == "ray"
    if retrieval.retrieval_worker_gpus > 0 and not uses_ray:
        return [
            f"--retrieval_worker_gpus {retrieval.retrieval_worker_gpus:g} is for --distributed_retriever ray; give "
            "--index_device cuda instead"
        ]
    if uses_ray and (retrieval.index_device or "").startswith("cuda") and not retrieval.retrieval_worker_gpus:
        return [
            f"--index_device {retrieval.index_device}: Ray shows its processes only the GPUs that are set aside for "
            "them; give --retrieval_worker_gpus 1"
        ]
    return []


def _context_encoder_contradictions(args: "FinetuneArguments") -> list[str]:
    """What cannot be with a context encoder that learns, and settings of one that does not."""
    model, retrieval = args.model, args.retrieval
    if not model.train_context_encoder:
        given = {
            "context_encoder_name_or_path": model.context_encoder_name_or_path,
            "context_encoder_learning_rate": args.training.context_encoder_learning_rate,
            "over_retrieve": retrieval.over_retrieve,
            "refresh_index": retrieval.refresh_index,
            "refresh_device": retrieval.refresh_device,
            "refresh_processes": None if retrieval.refresh_processes == 1 else retrieval.refresh_processes,
        }
        return [
            f"--{name} {value} is for a context encoder that learns; give --train_context_encoder too, or leave it out"
            for name, value in given.items()
            if value is not None
        ]
    without = {
        f"--index_name {retrieval.index_name} (whose scores are by words)": retrieval.index_name in READING_TEXT,
        f"--reranker {retrieval.reranker} (whose scores are its own)": retrieval.reranker is not None,
        f"--model_type {model.model_type} (which retrieves nothing)": model.model_type in CLOSED_BOOK,
        "--strategy fsdp (which shares out the model alone)": args.trainer.strategy == "fsdp",
    }
    problems = [
        f"--train_context_encoder and {flag} contradict each other; leave one out"
        for flag, is_given in without.items()
        if is_given
    ]
    over, n_docs = retrieval.over_retrieve, retrieval.n_docs
    if over is not None and n_docs is not None and over < n_docs:
        problems.append(f"--over_retrieve {over} is less than --n_docs {n_docs}; give as many or more")
    return problems + _refresh_contradictions(retrieval)


def _refresh_contradictions(retrieval: "RetrievalArguments") -> list[str]:
    """What is wrong with when, and where, passages are embedded anew."""
    problems = []
    if retrieval.refresh_index is not None:
        problems += schedule_problems(retrieval.refresh_index)
        if retrieval.index_name not in (None, "custom", *READING_TEXT):
            problems.append(
                f"--refresh_index {retrieval.refresh_index} and --index_name {retrieval.index_name} contradict each "
                "other: an index of your own is made anew alone; leave one out"
            )
    if retrieval.refresh_device != "ray":
        return problems + device_problems("--refresh_device", retrieval.refresh_device)
    if importlib.util.find_spec("ray") is None:
        problems.append("--refresh_device ray: Ray is not installed; pip install ray")
    if retrieval.refresh_processes != 1:
        problems.append(
            f"--refresh_processes {retrieval.refresh_processes}: with --refresh_device ray, Ray starts as many as fit; "
            "leave one out"
        )
    return problems


def nothing_learns(args: "FinetuneArguments") -> list[str]:
    if not args.model.freeze_generator:
        return []
    return [
        f"--freeze_generator with {other}: nothing would learn; leave one out"
        for other in _without_question_encoder(args)
    ]


def _without_question_encoder(args: "FinetuneArguments") -> list[str]:
    """What leaves no question encoder to learn, as it was given."""
    model = args.model
    scores = [f"{flag} ({why})" for flag, why in scores_that_teach_nothing(args.retrieval).items()]
    others = {
        "--freeze_question_encoder": model.freeze_question_encoder and not model.train_context_encoder,
        f"--model_type {model.model_type} (which has no question encoder)": model.model_type in CLOSED_BOOK,
    }
    return [flag for flag, is_given in others.items() if is_given] + scores


def scores_that_teach_nothing(retrieval: "RetrievalArguments") -> dict[str, str]:
    """Flags of scores that have no gradient for the question encoder, and why."""
    index_name, flags = retrieval.index_name, {}
    if index_name in WITHOUT_ENCODER:
        flags[f"--index_name {index_name}"] = "which asks no question encoder"
    elif not teaches(index_name, retrieval.fusion, retrieval.dense_weight):
        given = f"--fusion {retrieval.fusion}" if retrieval.fusion == "ranks" else "--dense_weight 0"
        flags[given] = "whose scores have no gradient for the question encoder"
    if retrieval.reranker is not None:
        flags[f"--reranker {retrieval.reranker}"] = "whose scores have no gradient for the question encoder"
    return flags


def _retriever_loss_contradictions(args: "FinetuneArguments") -> list[str]:
    """A loss of the retriever's own that nothing learns from, and settings of one that is not asked for."""
    training = args.training
    if training.retriever_loss != "marginal":
        flag = f"--retriever_loss {training.retriever_loss}"
        problems = [
            f"{flag} with {other}: it would teach nothing; leave one out" for other in _without_question_encoder(args)
        ]
        if args.retrieval.n_docs == 1:
            problems.append(f"{flag} with --n_docs 1: one passage teaches nothing; give more, or leave one out")
        if training.retriever_loss == "emdr2" and training.teacher_temperature != 1.0:
            problems.append(f"--teacher_temperature {training.teacher_temperature:g} is not for {flag}; leave one out")
        return problems
    names = ("retriever_loss_weight", "retriever_temperature", "teacher_temperature")
    return [
        f"--{name} {getattr(training, name):g} is for a loss of the retriever's own; give --retriever_loss too, or "
        "leave it out"
        for name in names
        if getattr(training, name) != 1.0
    ]


def fusion_problems(args: "FinetuneArguments", is_fused: bool, source: str) -> list[str]:
    """What a Fusion-in-Decoder alone can do, and what its likelihood, which knows no document's score, cannot teach.

    Args:
        is_fused: whether the model is one.
        source: the flag that says so, and its value.
    """
    model, loss = args.model, f"--retriever_loss {args.training.retriever_loss}"
    is_adist, is_marginal = (args.training.retriever_loss == name for name in ("adist", "marginal"))
    if not is_fused:
        why = f"and {source} is none; give --model_type fid, or pdist"
        return [f"{loss} reads the attention of a Fusion-in-Decoder, {why}"] if is_adist else []
    taught = {"--freeze_generator": model.freeze_generator}
    taught["--train_context_encoder"] = model.train_context_encoder
    taught["--question_encoder_lora_r"] = model.question_encoder_lora_r is not None
    problems = [
        f"{flag}: the answers of a Fusion-in-Decoder ({source}) teach the retriever nothing; give "
        "--retriever_loss, too, or leave it out"
        for flag, is_given in taught.items()
        if is_given and is_marginal
    ]
    unpacked = {
        f"--attn_implementation {model.attn_implementation}": model.attn_implementation != "auto",
        f"--strategy {args.trainer.strategy}": args.trainer.strategy == "fsdp",
    }
    return problems + [
        f"{loss} and {flag} contradict each other: attention is read in packed rows alone; leave one out"
        for flag, is_given in unpacked.items()
        if is_given and is_adist
    ]


def closed_book_problems(args: "FinetuneArguments", source: str) -> list[str]:
    """Settings of passages, of a model that reads none.

    Args:
        source: the flag that names the model, and its value.
    """
    reranker, loss = args.retrieval.reranker, args.training.retriever_loss
    given = {
        f"--reranker {reranker}": reranker is not None,
        f"--retriever_loss {loss}": loss != "marginal",
        "--train_context_encoder": args.model.train_context_encoder,
    }
    return [f"{flag}: {source} retrieves nothing; leave it out" for flag, is_given in given.items() if is_given]
