"""Finetune a RAG model, question encoder and generator together, or a bare generator as its closed-book baseline.

    one process   python finetune_rag.py --model_name_or_path CHECKPOINT --data_dir DATA --output_dir OUT
    one node      python finetune_rag.py ... --gpus 8 --fp16
    two nodes     torchrun --nnodes 2 --nproc_per_node 8 --node_rank N --master_addr NODE_0 --master_port 29500 \\
                      finetune_rag.py ... --fp16

DATA holds train|val|test .source and .target, one example a line. In its place --dataset_name takes OWNER/NAME on the
hub, or a local folder of Parquet, JSONL or CSV files. OUT receives metrics.json, hparams.json, git_log.json, the best
three checkpoints by exact match (Lightning's and, as checkpoint1, checkpoint2, ..., Hugging Face's) and, with
--do_predict, test_results.txt and test_generations.txt. With --train_context_encoder it receives passages and index of
the trained context encoder, too, as `knowledge`. If a run is killed, the same command resumes it.
"""

import logging
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rag.command_line.script import run_script
from rag.errors import raise_problems
from rag.files import read_lines, save_json
from rag.models.trust import allow_code
from rag.outputs import output_folder_problems, writing
from rag.public_names import module_getattr
from rag.questions.tables import path_problems
from rag.training.arguments import FinetuneArguments
from rag.training.arguments import parse_args as parse_finetune_args
from rag.training.named_data import settle_data, splits_read
from rag.training.namespaces import finetune_arguments
from rag.training.run_folder import checkpoint_to_resume, continuation_problems, held
from utils_rag import data_file_problems, save_git_info

logger = logging.getLogger(__name__)

ELSEWHERE = {"GenerativeQAModule": "rag.training.qa_module"}
REPLACED = {
    "AttrDict": "settings are dataclasses (rag/training/arguments.py); argparse.Namespace(**settings) reads a dict",
    "CustomDDP": "Lightning's own strategy will do (--strategy ddp): GenerativeQAModule.setup opens the index",
}
__getattr__ = module_getattr(__name__, ELSEWHERE, REPLACED)


def parse_args(argv: list[str] | None = None) -> FinetuneArguments:
    return parse_finetune_args(argv, description=__doc__)


def main(args: FinetuneArguments | Namespace) -> dict[str, float]:
    """Train, test or both; returns the last validation's and the test's metrics.

    A namespace is one of a parser with `GenerativeQAModule.add_model_specific_args` and `add_retriever_specific_args`.
    """
    args = finetune_arguments(args)
    allow_code(args.run.trust_remote_code)
    output_dir = args.run.output_dir
    raise_problems(
        output_folder_problems("--output_dir", output_dir)
        + _data_problems(args)
        + args.retrieval.path_problems()
        + _measure_problems(args)
    )
    with writing("--output_dir", output_dir), held(output_dir):
        raise_problems(continuation_problems(args))
        if args.data.dataset_name is not None:
            settle_data(args)
            raise_problems(_data_problems(args))
        args.run.resume_from_checkpoint = checkpoint_to_resume(args)
        return finetune(args)


def _data_problems(args: FinetuneArguments) -> list[str]:
    """What is wrong with the files of --data_dir, or with the path of a --dataset_name that was not read yet."""
    if args.data.data_dir is None:
        return path_problems(args.data)
    return data_file_problems(args.data.data_dir, splits_read(args))


def _questions(args: FinetuneArguments) -> Iterator[tuple[Path, list[str]]]:
    """The files of questions, and those of them that are asked."""
    for split in splits_read(args):
        path, count = Path(args.data.folder) / f"{split}.source", getattr(args.data, f"n_{split}")
        yield path, read_lines(path)[: None if count < 0 else count]


def _measure_problems(args: FinetuneArguments) -> list[str]:
    """A training that would be measured never, so that no checkpoint would be the best and none exported."""
    trainer, epochs = args.trainer, args.training.num_train_epochs
    if not args.run.do_train or trainer.fast_dev_run:
        return []
    if trainer.limit_val_batches == 0:
        return ["--limit_val_batches 0 measures nothing, so that no checkpoint would be exported; leave it out"]
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch > epochs:
        return [
            f"--check_val_every_n_epoch {trainer.check_val_every_n_epoch} is more than --num_train_epochs {epochs}: "
            "nothing would be measured, and no checkpoint exported; lower it"
        ]
    return []


def finetune(args: FinetuneArguments) -> dict[str, float]:
    """`main` behind the checks that need nothing heavy."""
    import pytorch_lightning as pl
    import torch

    from callbacks_rag import RunDescription, build_callbacks
    from lightning_base import Seq2SeqDataModule, build_logger, build_trainer, refusals, training_device
    from rag.distributed.launch import ended_together
    from rag.training.loading import going_back_to, load_model_and_tokenizer, settle_precision
    from rag.training.qa_module import GenerativeQAModule

    # AdamW's mean gradient of a word that no longer comes up falls below 1e-38 within 800 steps, where a CPU takes over
    # twenty times as long for it. Threads have this from the one that starts them: it comes before the first of them.
    torch.set_flush_denormal(True)
    pl.seed_everything(args.training.seed, workers=True, verbose=False)
    settle_precision(args, training_device(args))
    only_tests = not args.run.do_train and (Path(args.run.output_dir) / "hparams.json").is_file()
    callbacks = build_callbacks(args)
    if not only_tests:  # a test leaves the description of the run that trained
        callbacks.append(RunDescription(lambda: write_run_description(args)))
    refresh = _index_refresh(args)
    callbacks += [] if refresh is None else [refresh]
    trainer = build_trainer(args, callbacks, build_logger(args))
    model, tokenizer = load_model_and_tokenizer(args)
    with refusals(args), ended_together(trainer), _retriever(args, model, tokenizer) as retriever:
        module = GenerativeQAModule(args, model, tokenizer, retriever)
        tokenizers = (module.question_tokenizer, module.answer_tokenizer)
        prefetch = module.prefetch_retrieval if module.can_prefetch(trainer.strategy.root_device) else None
        data = Seq2SeqDataModule(args.data, args.training.seed, *tokenizers, prefetch)
        metrics, checkpoint_to_test = {}, args.run.resume_from_checkpoint
        if args.run.do_train:
            with going_back_to(args.run.resume_from_checkpoint):
                trainer.fit(module, datamodule=data, ckpt_path=args.run.resume_from_checkpoint)
            metrics |= trainer.callback_metrics
            checkpoint_to_test = trainer.checkpoint_callback.best_model_path or None
            if refresh is not None and checkpoint_to_test is not None:
                refresh.finish(trainer, module, Path(checkpoint_to_test).with_suffix(""))
        if args.run.do_predict:
            with going_back_to(checkpoint_to_test):
                trainer.test(module, datamodule=data, ckpt_path=checkpoint_to_test, verbose=False)
            metrics |= trainer.callback_metrics
    return {name: float(value) for name, value in metrics.items()}


def _index_refresh(args: FinetuneArguments):
    """What has the index follow a context encoder that learns; None where none does."""
    if not (args.model.train_context_encoder and args.run.do_train):
        return None
    from rag.training.refresh import IndexRefresh

    return IndexRefresh(args)


def write_run_description(args: FinetuneArguments) -> None:
    """What made the results, beside them. An interrupted run's description is what its continuation is held to."""
    save_json(args.to_dict(), Path(args.run.output_dir) / "hparams.json")
    save_git_info(args.run.output_dir)


@contextmanager
def _retriever(args: FinetuneArguments, model, tokenizer):
    """The retriever that --distributed_retriever names, None for a model without retrieval.

    Nothing is opened yet: `GenerativeQAModule.setup` does that on every rank. Leaving ends what was started for it.
    """
    if model.config.model_type != "rag":
        yield None
        return
    from rag.retrieval.retriever import require_n_docs

    parts, retrieval = (model.config, tokenizer.question_encoder, tokenizer.generator), args.retrieval
    with RETRIEVERS[retrieval.distributed_retriever](args, parts) as retriever:
        require_n_docs(retriever.index, model.config.n_docs)
        if retrieval.over_retrieve is not None:
            require_n_docs(retriever.index, retrieval.over_retrieve, "--over_retrieve")
        if retriever.config.index_name == "given":
            _check_given_passages(args, retriever)
        elif retrieval.reranker is not None and not args.model.freeze_question_encoder:
            logger.warning(
                f"--reranker {retrieval.reranker}: its scores have no gradient for the question encoder, which does "
                "not learn"
            )
        yield retriever


def _check_given_passages(args: FinetuneArguments, retriever) -> None:
    """Raise `UserError` if a question has no passages in --passages_file; say what does not learn from them."""
    from rag.retrieval.retriever import require_passages_for

    for path, questions in _questions(args):
        require_passages_for(retriever.index, questions, f"--data_dir {path}", args.data.prefix)
    if not args.model.freeze_question_encoder:
        logger.warning(
            f"--passages_file {retriever.config.passages_file}: scores stay as they are in it, so that the question "
            "encoder does not learn"
        )


@contextmanager
def _pytorch_retriever(args: FinetuneArguments, parts: tuple):
    from distributed_pytorch_retriever import RagPyTorchDistributedRetriever

    yield RagPyTorchDistributedRetriever(*parts, timeout=args.run.rank_timeout)


@contextmanager
def _ray_retriever(args: FinetuneArguments, parts: tuple):
    from distributed_ray_retriever import RagRayDistributedRetriever, RetrievalWorkers

    retrieval = args.retrieval
    with RetrievalWorkers(
        retrieval.num_retrieval_workers, retrieval.ray_address, retrieval.retrieval_worker_gpus, args.run.rank_timeout
    ) as workers:
        yield RagRayDistributedRetriever(*parts, workers, timeout=args.run.rank_timeout)


@contextmanager
def _local_retriever(args: FinetuneArguments, parts: tuple):
    from rag.retrieval.retriever import RagKnowledgeRetriever

    yield RagKnowledgeRetriever(*parts, init_retrieval=False)


RETRIEVERS = {"pytorch": _pytorch_retriever, "ray": _ray_retriever, "local": _local_retriever}


def cli() -> NoReturn:
    """The command `rag-finetune`."""
    run_script(parse_args, main)


if __name__ == "__main__":
    cli()
