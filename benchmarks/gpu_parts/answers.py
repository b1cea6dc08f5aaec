"""Answers of a BART-large RAG model, 5 passages and 4 beams: `generate_answers` beside transformers' own `generate`.

Model and contexts are those of `benchmarks/decoding.py`. transformers answers fewer questions where it takes one at a
time (RAG-Sequence), the whole batch where it takes it at once (RAG-Token).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks import decoding
from benchmarks.gpu_parts.measuring import Measured, Settings, attempt, profiled, seconds_of, timed

KINDS = ("RAG-Sequence", "RAG-Token")
PRECISIONS = ("float32", "bfloat16")


def answers_case(kind: str, batch_size: int, precision: str) -> str:
    return f"{kind}, batch {batch_size}, {precision}"


def answers(settings: Settings) -> Iterator[Measured]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    with torch.device(settings.device):
        generator = decoding.make_generator(settings.size, 0)
    first: dict[str, Any] = {}  # what is found once: our answers in float32, and the arithmetic of a question
    for precision in PRECISIONS:
        generator.to(getattr(torch, precision))
        for kind in KINDS:
            for batch_size in settings.answer_batches:
                case = answers_case(kind, batch_size, precision)
                call = Call(settings, kind, generator, batch_size)
                yield from attempt(case, "ours", partial(measure_ours, call, first))
                yield from attempt(case, "public", partial(measure_public, call))


class Call:
    """A model and a batch of contexts on the device."""

    def __init__(self, settings: Settings, kind: str, generator, batch_size: int):
        import transformers

        self.settings, self.kind, self.batch_size = settings, kind, batch_size
        model_class = {
            "RAG-Sequence": transformers.RagSequenceForGeneration,
            "RAG-Token": transformers.RagTokenForGeneration,
        }[kind]
        n_docs = 2 if settings.short else 5
        self.model = decoding.make_model(model_class, generator, n_docs).to(settings.device, generator.dtype)
        vocabulary = decoding.SIZES[settings.size]["vocabulary"]
        contexts = decoding.make_contexts(batch_size, n_docs, vocabulary, seed=0)
        self.contexts = [tensor.to(settings.device) for tensor in contexts]
        self.ours: list = []

    def answer(self) -> None:
        self.ours = decoding.trim(decoding.our_way(self.model, *self.contexts))


def measure_ours(call: Call, first: dict[str, Any]) -> dict[str, float]:
    device, short = call.settings.device, call.settings.short
    seconds = seconds_of(call.answer, device, calls=1 if short else 2, first=0 if short else 1)
    figures = {"ms": 1e3 * seconds / call.batch_size, "kernels": profiled(call.answer, device)["kernels"]}
    exact = f"{call.kind} {call.batch_size}"
    if call.model.dtype.itemsize == 4:
        first[exact] = call.ours
    if exact in first:
        pairs = zip(call.ours, first[exact], strict=True)
        figures["as_float32"] = sum(own == right for own, right in pairs) / call.batch_size
    if f"{call.kind} flop" not in first:
        first[f"{call.kind} flop"] = flop_of(call)
    return figures | {"flop": first[f"{call.kind} flop"]}


def flop_of(call: Call) -> float:
    """Arithmetic of a question: of the matrix products that a call makes, padding included."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call.answer()
    return counter.get_total_flops() / call.batch_size


def measure_public(call: Call) -> dict[str, float]:
    """transformers' time, and of its answers the share that ours are equal to."""
    few = 1 if call.settings.short else 3
    first = decoding.first_questions(call.contexts, call.batch_size if call.kind == "RAG-Token" else few)
    found: list = []

    def answer() -> None:
        found[:] = decoding.trim(decoding.transformers_way(call.model, *first))

    decoding.transformers_way(call.model, *decoding.first_questions(call.contexts, 1))
    seconds = timed(answer, call.settings.device)
    same = sum(own == theirs for own, theirs in zip(call.ours, found, strict=False))
    return {"ms": 1e3 * seconds / len(found), "same": same / len(found)}
