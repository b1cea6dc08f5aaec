"""The training step at BART-large size, compiled, and in finetune_rag.py's own loop.

Step and sides are those of `benchmarks/training_step.py`; here steps follow each other without waiting for the device,
and waits, kernels and padding are counted.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import cycle, islice
from typing import Any

from benchmarks import training_step
from benchmarks.gpu_parts.measuring import (
    Measured,
    Settings,
    attempt,
    peak_mib,
    profiled,
    start_peak,
    synchronize,
    timed,
)
from rag.files import write_lines

LOGGED_EVERY = 10  # optimizer steps, of the loop


def step_case(batch_size: int, attention_dropout: float) -> str:
    return f"step, batch {batch_size}, attention dropout {attention_dropout}"


COMPILED, LOOP = "compiled step", "finetune_rag.py"


def attention_dropouts(settings: Settings) -> tuple[float, ...]:
    """BART-large's own, and none: some kernels know of no dropout."""
    return (0.1,) if settings.short else (0.1, 0.0)


def public_steps(settings: Settings) -> Iterator[Measured]:
    yield from _steps(settings, "public")


def our_steps(settings: Settings) -> Iterator[Measured]:
    yield from _steps(settings, "ours")


def _steps(settings: Settings, side: str) -> Iterator[Measured]:
    for attention_dropout in attention_dropouts(settings):
        for batch_size in settings.batches:
            measure = partial(measure_step, settings, side, batch_size, attention_dropout)
            yield from attempt(step_case(batch_size, attention_dropout), side, measure)


def compiled_steps(settings: Settings) -> Iterator[Measured]:
    """--compile: its first step, the five behind it, in which shapes may still be new, and the pace after these."""
    run = Run(settings, "ours", settings.batches[0], 0.1, flags=[] if settings.short else ["compile"])
    batches = iter(run.batches)
    first = timed(lambda: run.step(next(batches)), settings.device)
    yield Measured(COMPILED, "ours", {"first_s": first})
    settling = [timed(lambda: run.step(next(batches)), settings.device) for _ in range(5)]
    yield Measured(COMPILED, "ours", {"settling_s": sum(settling)})
    yield Measured(COMPILED, "ours", {"ms": run.milliseconds(list(batches))})


# --- The step ---------------------------------------------------------------------------------------------------------


class Run:
    """One side with its model and optimizer on the device and its batches on the host, ready to train."""

    def __init__(self, settings: Settings, side: str, batch_size: int, attention_dropout: float, flags=()):
        import torch

        self.settings, on_gpu = settings, settings.device == "cuda"
        self.args = training_step.BenchmarkArguments(
            batch_size=batch_size, size=settings.size, attention_dropout=attention_dropout, device=settings.device,
            bf16=on_gpu, flags=list(flags), folder=settings.folder / "knowledge", steps=8 if settings.short else 16,
        )  # fmt: skip
        tokenizer, config, parts, (questions, answers) = make_world(self.args)
        self.config, self.pad = config, tokenizer.pad_token_id
        make_side = {"public": training_step.public_side, "ours": training_step.our_side}[side]
        self.losses, self.module, retriever, make_optimizer = make_side(self.args, config, parts, tokenizer)
        self.module.to(settings.device).eval()
        # As a loader hands them over.
        batches = training_step.make_batches(self.args, tokenizer, questions, answers)
        self.batches = [{k: v.pin_memory() if on_gpu else v for k, v in batch.items()} for batch in batches]
        self.autocast = torch.autocast(settings.device, torch.bfloat16, enabled=on_gpu)
        with torch.no_grad(), self.autocast:
            first = training_step.on_device(self.module, self.batches[0], settings.device)
            self.loss = self.losses(first).float().mean().item()
        rag = self.module.rag if side == "public" else self.module.model.rag
        self.tokens = training_step.ContextTokens(retriever, rag.generator)
        self.optimizer = make_optimizer()
        self.module.train()

    def step(self, batch: dict) -> None:
        batch = training_step.on_device(self.module, batch, self.settings.device)
        with self.autocast:
            loss = self.losses(batch).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def milliseconds(self, batches: list[dict]) -> float:
        """Of a step, where none waits for the device."""

        def steps() -> None:
            for batch in batches:
                self.step(batch)

        return 1e3 * timed(steps, self.settings.device) / len(batches)


def make_world(args: training_step.BenchmarkArguments):
    """Tokenizer, RagConfig, (question encoder, generator) with random weights on the device, (questions, answers)."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = training_step.make_tokenizer()
    questions, answers, passages = training_step.examples()
    with torch.device(args.device):
        encoder, generator = training_step.make_parts(args, tokenizer)
    folder = training_step.build_knowledge(args, encoder.eval(), tokenizer, questions, passages)
    config = training_step.make_config(args, encoder, generator, folder)
    needed = args.steps * args.batch_size
    examples = tuple(list(islice(cycle(lines), needed)) for lines in (questions, answers))
    return tokenizer, config, (encoder, generator), examples


def measure_step(settings: Settings, side: str, batch_size: int, attention_dropout: float) -> dict[str, float]:
    start_peak(settings.device)
    run = Run(settings, side, batch_size, attention_dropout)
    warm, measured = (1, 2) if settings.short else (4, 10 if batch_size == settings.batches[0] else 6)
    for batch in run.batches[:warm]:
        run.step(batch)
    run.tokens.restart()
    batches = run.batches[warm : warm + measured]
    figures = {"ms": run.milliseconds(batches), "peak_mib": peak_mib(settings.device), "loss": run.loss}
    context = run.tokens.read / measured
    figures |= {"context_tokens": context, "padding": run.tokens.padding}
    answers = sum(int((batch["labels"] != run.pad).sum()) for batch in batches) / measured
    questions = sum(int(batch["attention_mask"].sum()) for batch in batches) / measured
    figures["read_tokens"] = context + answers  # what finetune_rag.py counts
    figures["flop"] = step_flop(run.config, context, answers * run.config.n_docs, questions)
    figures["weights"] = sum(parameter.numel() for parameter in run.module.parameters())
    following = iter(run.batches[warm + measured :])
    counts = profiled(lambda: run.step(next(following)), settings.device, 1 if settings.short else 2, with_host=True)
    return figures | counts


def step_flop(config, contexts: float, answers: float, questions: float) -> float:
    """Arithmetic of a step: 6 for each weight and token that goes through it; attention itself (2%) is left out.

    Args:
        config: a RagConfig of a BART generator and a DPR question encoder.
        contexts: tokens of contexts, without padding.
        answers: tokens of answers, once for each document.
        questions: tokens of questions.
    """
    bart, dpr = config.generator, config.question_encoder
    d = bart.d_model
    encoder = bart.encoder_layers * (4 * d * d + 2 * d * bart.encoder_ffn_dim)
    cross_attention = bart.decoder_layers * 2 * d * d  # keys and values
    decoder = bart.decoder_layers * (6 * d * d + 2 * d * bart.decoder_ffn_dim) + bart.vocab_size * d
    question_encoder = dpr.num_hidden_layers * (4 * dpr.hidden_size**2 + 2 * dpr.hidden_size * dpr.intermediate_size)
    return 6 * (contexts * (encoder + cross_attention) + answers * decoder + questions * question_encoder)


# --- finetune_rag.py's loop -------------------------------------------------------------------------------------------


class EnoughError(Exception):
    """Ends a training behind the step that was measured last: nothing is validated or saved."""


def loop(settings: Settings) -> Iterator[Measured]:
    """The Trainer, data module and callbacks of finetune_rag.py around the same model, its data read and logged."""
    yield from attempt(LOOP, "ours", partial(measure_loop, settings))


def measure_loop(settings: Settings) -> dict[str, float]:
    from callbacks_rag import build_callbacks
    from lightning_base import Seq2SeqDataModule, build_logger, build_trainer
    from rag.training.arguments import parse_args

    every = 2 if settings.short else LOGGED_EVERY
    first, last = every, (2 if settings.short else 4) * every  # steps between which it is measured
    data, output = settings.folder / "data", settings.folder / "loop"
    shutil.rmtree(output, ignore_errors=True)
    args = parse_args(
        [
            "--model_name_or_path", "random", "--data_dir", str(data), "--output_dir", str(output),
            "--train_batch_size", str(settings.batches[0]), "--num_sanity_val_steps", "0",
            "--log_every_n_steps", str(every), "--enable_model_summary", "false",
            *(["--gpus", "1", "--bf16"] if settings.device == "cuda" else ["--gpus", "0", "--num_workers", "0"]),
        ]
    )  # fmt: skip
    module = make_module(settings, args, examples=(last + 2) * settings.batches[0], data=data)
    watch = make_watch(settings, first, last)
    trainer = build_trainer(args, [*build_callbacks(args), watch], build_logger(args))
    prefetch = module.prefetch_retrieval if module.can_prefetch(trainer.strategy.root_device) else None
    tokenizers = (module.question_tokenizer, module.answer_tokenizer)
    with suppress(EnoughError):
        trainer.fit(module, datamodule=Seq2SeqDataModule(args.data, args.training.seed, *tokenizers, prefetch))
    rows = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row and row["step"] + 1 > first]
    shutil.rmtree(output)
    return {"ms": 1e3 * watch.seconds / (last - first), "logged_rate": sum(rates) / len(rates)}


def make_module(settings: Settings, args, examples: int, data):
    """`GenerativeQAModule` over a model of random weights; its examples are written to the folder `data`."""
    from transformers import RagSequenceForGeneration, RagTokenizer

    from rag.retrieval.retriever import RagKnowledgeRetriever
    from rag.training.qa_module import GenerativeQAModule

    world = training_step.BenchmarkArguments(
        size=settings.size, device=settings.device, folder=settings.folder / "knowledge", batch_size=1, steps=examples
    )
    tokenizer, config, parts, (questions, answers) = make_world(world)
    data.mkdir(parents=True, exist_ok=True)
    for split, count in {"train": examples, "val": 2}.items():
        write_lines(questions[:count], data / f"{split}.source")
        write_lines(answers[:count], data / f"{split}.target")
    model = RagSequenceForGeneration(config, *parts)
    retriever = RagKnowledgeRetriever(config, tokenizer, tokenizer)
    return GenerativeQAModule(args, model, RagTokenizer(tokenizer, tokenizer), retriever)


def make_watch(settings: Settings, first: int, last: int) -> Any:
    """A callback that takes the seconds between two steps, waiting for the device at these alone, and ends the run."""
    from pytorch_lightning.callbacks import Callback

    class Watch(Callback):
        seconds = 0.0

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            step = trainer.global_step
            if step in (first, last):
                synchronize(settings.device)
                self.seconds = time.perf_counter() - self.seconds
            if step > last:  # whose log is written
                raise EnoughError

    return Watch()
