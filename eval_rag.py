"""Measure a RAG model, or a closed-book generator: answers (EM, F1) or retrieved passages (precision@k, MRR, recall@k).

    python eval_rag.py --model_name_or_path output/checkpoint1 --eval_mode e2e --gold_data_mode ans \\
        --evaluation_set test_data/test.source --gold_data_path test_data/test.target \\
        --predictions_path output/e2e_preds.txt --index_name custom --n_docs 5 \\
        --passages_path output/my_knowledge_dataset --index_path output/my_knowledge_dataset_hnsw_index.faiss
    python eval_rag.py --model_name_or_path facebook/rag-sequence-nq --eval_mode retrieval --k 1 5 20 \\
        --evaluation_set output/biencoder-nq-dev.questions --gold_data_path output/biencoder-nq-dev.pages \\
        --predictions_path output/retrieval_preds.tsv
    torchrun --standalone --nproc_per_node 8 eval_rag.py ...    # the same files, each rank answers its share

The predictions file has a line a question: the answer (e2e) or the titles of --n_docs passages, tab-separated
(retrieval), which any --k up to that number is scored from. A complete one is scored again without the model, one with
fewer lines (a killed run's) is continued, one of another model or other settings is refused. Beside PREDICTIONS stand
PREDICTIONS.jsonl, a record a question (line number, question, answer; of the passages ids, titles, texts, scores, and
their part in the answer, p(z|x,y)), PREDICTIONS.settings.json, what made them, and PREDICTIONS.scores.json. Scores are
fractions in files, percent in print.

Gold files, line n for question n: e2e `qa`: `question TAB ['answer', 'another']`; e2e `ans`: the answer; e2e `regex`:
as qa, with regular expressions for answers; retrieval: the titles of the right passages, tab-separated. KILT's files
(.jsonl) are read as they are, for both. In the place of both files --dataset_name takes OWNER/NAME on the hub, or a
local Parquet, JSONL or CSV file with columns. Behind each score stands its 95% interval over the questions.
"""

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from rag.command_line.script import run_script
from rag.errors import UserError, printable, raise_problems
from rag.evaluation.arguments import EvalArguments
from rag.evaluation.arguments import parse_args as parse_eval_args
from rag.evaluation.gold import EvalData, checkpoint_folders, own_predictions_path, read_data
from rag.evaluation.intervals import intervals
from rag.evaluation.named_data import read_named_data
from rag.evaluation.predictions import Predictions, differences, file_identity, missing_batches
from rag.evaluation.printing import made_with, print_checkpoints, print_scores
from rag.evaluation.scores import (
    get_precision_at_k,
    get_scores,
    means,
    require_titles,
    values_of,
)
from rag.files import save_json, shown
from rag.index.arguments import SEARCH_FLAGS, WIKI_FLAGS, fusion_of
from rag.locks import lock_beside, one_at_a_time
from rag.metrics import answer_recall_at_k, metric_max_over_ground_truths, pattern_recall_at_k
from rag.models.trust import allow_code
from rag.outputs import writing
from rag.progress import progress
from rag.public_names import module_getattr
from rag.retrieval.arguments import UPR

__all__ = ["get_args", "get_precision_at_k", "get_scores", "main", "metric_max_over_ground_truths", "parse_args"]
# More names of the public suite, which cost an import of torch.
ELSEWHERE = {
    "evaluate_batch_e2e": "rag.evaluation.predictors",
    "evaluate_batch_retrieval": "rag.evaluation.predictors",
    "infer_model_type": "rag.models.checkpoints",
}
__getattr__ = module_getattr(__name__, ELSEWHERE)

CHECKPOINT_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.bin",
    "*tokenizer*/*", "*tokenizer*.json", "vocab*", "merges.txt", "*.model", "*.py", "base.json", "*_adapter/*",
)  # fmt: skip
PASSAGE_FILES = ("data-*.arrow",)
# A checkpoint may remember more. BM25's index follows from the passages and may not be there yet.
PATHS_READ = {
    "custom": ("index_path", "passages_path"), "legacy": ("index_path",), "bm25": ("passages_path",),
    "hybrid": ("index_path", "passages_path"), "given": ("passages_file",),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> EvalArguments:
    return parse_eval_args(argv, description=__doc__)


get_args = parse_args  # its name in the public suite


def main(args: EvalArguments) -> dict[str, Any]:
    """The scores, as fractions by name; with `eval_all_checkpoints` those dicts by the checkpoint's name.

    Collective under torchrun: every rank answers its share and returns the scores; rank 0 alone reads questions and
    gold, writes files and prints.
    """
    allow_code(args.trust_remote_code)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        data = data_of(args)  # its mistakes are told before torch is imported
        from rag.distributed.ranks import Ranks

        return measure(args, data, Ranks(args.rank_timeout))
    from rag.distributed.ranks import joined_job

    with joined_job(args.rank_timeout) as ranks:
        data = EvalData(**ranks.from_rank_zero("reading the questions", lambda: vars(data_of(args))))
        return measure(args, data, ranks)


def data_of(args: EvalArguments) -> EvalData:
    """Questions and gold, wherever they come from."""
    return read_data(args) if args.dataset_name is None else read_named_data(args)


def measure(args: EvalArguments, data: EvalData, ranks) -> dict[str, Any]:
    """`main` behind the data; `ranks` is a `Ranks`."""
    if not args.eval_all_checkpoints:
        return evaluate(args, data, ranks)
    scores = {}
    folders = ranks.from_rank_zero(
        "listing the checkpoints", lambda: list(map(str, checkpoint_folders(args.model_name_or_path)))
    )
    for folder in map(Path, folders):
        own_path = own_predictions_path(args.predictions_path, folder)
        own_args = replace(args, model_name_or_path=str(folder), predictions_path=own_path)
        scores[folder.name] = evaluate(own_args, data, ranks)
    if ranks.rank == 0:
        print_checkpoints(scores)
    return scores


def evaluate(args: EvalArguments, data: EvalData, ranks) -> dict[str, float]:
    """Predict what is not predicted yet, score, print and write the scores of one checkpoint. Collective."""
    with ExitStack() as held:  # by rank 0
        predictions = ranks.on_rank_zero("opening the predictions file", lambda: open_predictions(args, data, held))
        done, identity = ranks.from_rank_zero(
            "reading the predictions file", lambda: (len(predictions.lines), predictions.identity)
        )
        if done < len(data.questions):
            predict_missing(args, data, predictions, ranks, done, identity)
        return ranks.from_rank_zero("scoring", lambda: score(args, data, predictions))


def open_predictions(args: EvalArguments, data: EvalData, held: ExitStack) -> Predictions:
    """The predictions file, which no other run may use until `held` is closed."""
    enough = {"n_docs": max(args.k)} if args.eval_mode == "retrieval" else {}
    kept = ["precision"] if args.precision == "auto" else []
    identity = run_identity(args, data, model_type_of(args), precision_of(args))
    with writing("--predictions_path", args.predictions_path):
        lock = lock_beside(args.predictions_path)
        held.enter_context(one_at_a_time(lock, "--predictions_path", args.predictions_path))
    predictions = Predictions(args.predictions_path, data.questions, identity, args.recalculate, enough, kept)
    if args.eval_mode == "retrieval" and not predictions.origin_known:
        require_titles(args.predictions_path, predictions.lines, max(args.k))
    if predictions.lines:
        state = "scored again" if predictions.is_complete else "continued"
        done = f"{len(predictions.lines):,} of {len(data.questions):,}"
        print(f"{shown(args.predictions_path)}: {done} lines, {state}")
    return predictions


def score(args: EvalArguments, data: EvalData, predictions: Predictions) -> dict[str, float]:
    values = values_of(args, data, predictions)
    scores = means(values)
    report(args, data, predictions, scores, intervals(values))
    return scores


# --- What made the predictions ----------------------------------------------------------------------------------------


def run_identity(args: EvalArguments, data: EvalData, model_type: str, precision: str) -> dict[str, Any]:
    """All that the predictions depend on; read from files, without loading a model or an index.

    Args:
        precision: float32, bfloat16 or float16.
    """
    from rag.evaluation.predictors import rag_config
    from rag.models.checkpoints import RAG_TYPES

    identity = {
        "eval_mode": args.eval_mode,
        "model_name_or_path": file_identity(args.model_name_or_path, CHECKPOINT_FILES),
        "model_type": model_type,
        **(
            {"dataset_name": data.identity} if data.identity else {"evaluation_set": file_identity(args.evaluation_set)}
        ),
        "max_source_length": args.max_source_length,
        "prefix": args.prefix,
        "precision": precision,
    }
    if model_type in RAG_TYPES:
        config = rag_config(args)
        identity |= {"index_name": config.index_name, "n_docs": config.n_docs}
        for name in PATHS_READ.get(config.index_name, ()):
            path = getattr(config, name)
            identity[name] = path and file_identity(path, PASSAGE_FILES if name == "passages_path" else ("*",))
        names = SEARCH_FLAGS + (WIKI_FLAGS if config.index_name in ("exact", "compressed") else ())
        identity |= {name: getattr(config, name, None) for name in names}
        if config.index_name == "hybrid":
            identity |= fusion_of(config)
        if args.reranker is not None:
            identity["reranker"] = UPR if args.reranker == UPR else file_identity(args.reranker, CHECKPOINT_FILES)
            identity["rerank_depth"] = args.depth_for(config.n_docs)
    if args.eval_mode == "e2e":
        identity |= {name: getattr(args, name) for name in ("num_beams", "min_length", "max_length")}
        if model_type == "rag_sequence":
            identity["decoding"] = args.decoding
    elif data.answers is not None:
        if args.answers_path is not None:
            identity["answers_path"] = file_identity(args.answers_path)
        if args.gold_data_mode == "regex":
            identity["gold_data_mode"] = "regex"
    return identity


def precision_of(args: EvalArguments) -> str:
    """What --precision stands for on this machine."""
    from rag.evaluation.predictors import pick_device
    from rag.models.precision import dtype_of, name_of

    # Only auto asks which device it is: predictions made elsewhere are scored where there is none.
    return name_of(dtype_of(args.precision, pick_device(args.device) if args.precision == "auto" else "cpu"))


def model_type_of(args: EvalArguments) -> str:
    """--model_type, or what the checkpoint says.

    Raises:
        UserError: a flag does not fit the model.
    """
    from rag.evaluation.predictors import size_problems
    from rag.models.checkpoints import RAG_TYPES, fitting_model_type
    from rag.models.loading import load_config

    config = load_config(args.model_name_or_path)
    model_type = fitting_model_type(config, args.model_name_or_path, args.model_type)
    model = f"--model_name_or_path {args.model_name_or_path} is a {model_type} model"
    if args.eval_mode == "retrieval" and model_type not in RAG_TYPES:
        raise UserError(f"{model}, which retrieves nothing; measure it with --eval_mode e2e")
    if args.reranker is not None and model_type not in RAG_TYPES:
        raise UserError(f"{model}, which retrieves nothing that --reranker {args.reranker} could read; leave it out")
    if args.eval_mode == "e2e" and args.decoding != "thorough" and model_type != "rag_sequence":
        raise UserError(f"--decoding {args.decoding} is for rag_sequence; leave it out: {model}")
    raise_problems(size_problems(args, config))
    return model_type


# --- Predictions ------------------------------------------------------------------------------------------------------


def predict_missing(
    args: EvalArguments, data: EvalData, predictions: Predictions | None, ranks, done: int, identity: dict[str, Any]
) -> None:
    """Append the missing predictions, batch by batch; the ranks take the batches in turn. Collective.

    Args:
        predictions: rank 0's; None elsewhere.
        done: predictions made so far.
        identity: of the predictions, whose number of passages counts: a file with more is continued so.
    """
    import torch

    from rag.evaluation.predictors import CONTEXT_COUNTS, load_predictor, rag_config
    from rag.models.checkpoints import RAG_TYPES

    args = replace(args, n_docs=identity.get("n_docs", args.n_docs))
    model_type, precision = identity["model_type"], identity["precision"]

    def load():
        if ranks.rank != 0:
            require_same_files(identity, run_identity(args, data, model_type, precision), ranks.rank)
        config = rag_config(args) if model_type in RAG_TYPES else None
        return load_predictor(
            args.model_name_or_path,
            model_type,
            args.answer_plan,
            config,
            args.device,
            retrieve_only=args.eval_mode == "retrieval",
            questions=data.questions,
            questions_flag="--evaluation_set" if args.dataset_name is None else "--dataset_name",
            dtype=getattr(torch, precision),
            holds_answer=pattern_recall_at_k if args.gold_data_mode == "regex" else answer_recall_at_k,
            reranker=None if args.reranker is None or config is None else (args.reranker, identity["rerank_depth"]),
        )

    predict, index = ranks.all_or_none("loading the model", load)
    ranks.on_rank_zero("starting the predictions file", lambda: predictions.start(index))
    batches = missing_batches(done, len(data.questions), args.eval_batch_size)
    rounds = [batches[start : start + ranks.size] for start in range(0, len(batches), ranks.size)]

    def answer(batches: list[range]):
        """This rank's batch of a round; the last round may have none for it."""
        if ranks.rank < len(batches):
            part = slice(batches[ranks.rank].start, batches[ranks.rank].stop)
            return predict(data.questions[part], data.answers and data.answers[part])

    def collect(batches: list[range], parts: list) -> None:
        for batch, (lines, details) in zip(batches, parts[: len(batches)], strict=True):
            counts = details[0].pop(CONTEXT_COUNTS, (0, 0, 0))
            contexts.append(counts)
            predictions.append(batch.start, lines, details)

    contexts: list[tuple[int, int, int]] = []  # made, cut, at which length
    desc = "Answering" if args.eval_mode == "e2e" else "Retrieving"
    if ranks.rank == 0:
        total = sum(map(len, batches))
        rounds = progress(rounds, total, desc, "questions", size=lambda batches: sum(map(len, batches)))
    with torch.inference_mode():
        ranks.in_rounds(f"{desc.lower()}, round", rounds, answer, collect)
    made, cut = (sum(counts[n] for counts in contexts) for n in (0, 1))
    if cut:
        print(
            f"{cut:,} of {made:,} contexts were longer than max_combined_length {contexts[0][2]} tokens: their "
            "passages were cut"
        )


def require_same_files(expected: dict[str, Any], here: dict[str, Any], rank: int) -> None:
    """Another machine may have other files under the same names."""
    if changed := differences(expected, here):
        raise UserError(
            f"rank {rank} on {os.uname().nodename} does not see the files that rank 0 sees: {', '.join(changed)}; give "
            "paths that are the same on every node"
        )


# --- Scores -----------------------------------------------------------------------------------------------------------


def report(
    args: EvalArguments,
    data: EvalData,
    predictions: Predictions,
    scores: dict[str, float],
    ranges: dict[str, tuple[float, float]],
) -> None:
    """Write the scores' file; print what was asked for, then the scores and the most telling settings.

    Args:
        ranges: where each score lies in 95% of the resamples, by name.
    """
    made = {"settings": predictions.identity if predictions.origin_known else None, "index": predictions.index}
    path = f"{args.predictions_path}.scores.json"
    gold = {"gold_data_path": args.gold_data_path or args.dataset_name, "questions": len(data.questions)}
    with writing("--predictions_path", args.predictions_path):
        save_json({"scores": scores, "intervals": ranges, **gold, **made}, path)
    for line, record in zip(predictions.lines, predictions.records, strict=True):
        if args.print_predictions:
            print(printable(f"Q: {record['question']} - A: {line}"))
        if args.print_docs:
            shares = record.get("posteriors") or [None] * len(record.get("titles", []))
            for title, score, share in zip(record.get("titles", []), record.get("scores", []), shares, strict=True):
                part = "" if share is None else f"  {share:6.1%}"
                print(printable(f"    {score:10.4f}{part}  {title}"))
    print_scores(scores, ranges, len(data.questions), made_with(**made), path)


def cli() -> NoReturn:
    """The command `rag-eval`."""
    run_script(parse_args, main)


if __name__ == "__main__":
    cli()
