"""Questions a second of `generate_answers` beside transformers' own `generate`: same weights, contexts and process.

    python benchmarks/decoding.py --short                          # under two minutes on two cores
    python benchmarks/decoding.py                                  # seven minutes
    python benchmarks/decoding.py --equal 500 --size small         # no clock, only whether the token ids are the same
    python benchmarks/decoding.py --equal 500 --encode_once        # at BART-base size: an hour and a quarter
    python benchmarks/decoding.py --precision bf16 --equal 100 --size small    # which answers are as in float32

The weights are random, scaled so that answers hang on the contexts; a bias on the end token, which grows from word to
word, makes them 3 to 12 tokens long. transformers' side gets the contexts' attention mask handed to its inner
`generate`, which leaves it out. Both sides read the same contexts, padded to the longest of the batch. Of RAG-Sequence,
where it takes one question at a time whatever the batch, it answers the first --questions of each batch only. "Memory"
is the peak that a call adds to the process. A difference that is none in float64 is a tie that float32 rounds one way
or the other; any other difference ends the benchmark with an error. RAG-Sequence's scoring has transformers encode each
context once a candidate; with --encode_once its encoder answers equal rows of a call from one pass, all else as it is.
With --precision both sides have half-precision weights; differences between them are counted, not looked into.
"""

import copy
import ctypes
import os
import statistics
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.machine import header, status_mib
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script

SIZES = {
    "large": {"d_model": 1024, "layers": 12, "heads": 16, "ffn": 4096, "vocabulary": 50265},
    "base": {"d_model": 768, "layers": 6, "heads": 12, "ffn": 3072, "vocabulary": 50265},
    "medium": {"d_model": 256, "layers": 3, "heads": 4, "ffn": 1024, "vocabulary": 50265},
    "small": {"d_model": 64, "layers": 2, "heads": 4, "ffn": 128, "vocabulary": 2000},
}
SETTINGS = {"num_beams": 4, "min_length": 1, "max_length": 16}
PAD, END = 1, 2


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "One round on few questions: under two minutes on two cores.")
    rounds: int = flag(3, "Measured rounds of a batch each; medians are reported.")
    questions: int = flag(4, "Of a batch, those that transformers' RAG-Sequence answers.")
    batch_size: int = flag(8, "Questions decoded at a time.")
    n_docs: int = flag(5, "Documents a question.")
    size: str = flag("base", "large, base (as BART's), medium or small.")
    equal: int = flag(0, "Only compare the token ids of so many random questions.")
    seeds: int = flag(5, "Random models that share the questions of --equal.")
    encode_once: bool = flag(False, "For --equal: spare transformers equal rows' encoding.")
    first_seed: int = flag(0, "Of the random models and questions.")
    precision: Literal["fp32", "bf16", "fp16"] = flag("fp32", "Of both sides' weights; not fp32: compared with fp32's.")

    def __post_init__(self):
        if self.short:
            self.rounds, self.questions = 1, 2


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


def make_generator(size: str, seed: int):
    """A random BART whose answers are 3 to 12 tokens long and differ from context to context."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(seed)
    s = SIZES[size]
    config = BartConfig(
        vocab_size=s["vocabulary"], d_model=s["d_model"], encoder_layers=s["layers"], decoder_layers=s["layers"],
        encoder_ffn_dim=s["ffn"], decoder_ffn_dim=s["ffn"], encoder_attention_heads=s["heads"],
        decoder_attention_heads=s["heads"], forced_eos_token_id=END, tie_word_embeddings=False,
    )  # fmt: skip
    generator = BartForConditionalGeneration(config).eval()
    generator.generation_config.forced_bos_token_id = 0
    generator.generation_config.exponential_decay_length_penalty = (3, 1.15)  # the end comes ever more likely
    # Sharp attention makes documents differ, large logits the distribution peaked; more of either amplifies rounding.
    gains = {"q_proj": 1.8, "k_proj": 1.8, "lm_head": 6.0}
    with torch.no_grad():
        for name, weight in generator.named_parameters():
            if "embed_positions" in name or "embed_tokens" in name or "shared" in name:
                weight.normal_(std=0.5 if "positions" in name else 1.0)
            elif weight.dim() == 2:
                gain = next((gain for part, gain in gains.items() if part in name), 0.8)
                weight.normal_(std=gain / weight.shape[1] ** 0.5)
        # What all places share would make one word win everywhere: take it off.
        contexts = torch.randint(3, s["vocabulary"], (8, 100))
        mean = generator(contexts, decoder_input_ids=contexts[:, :16]).logits.mean((0, 1))
        generator.final_logits_bias -= mean
        generator.final_logits_bias[0, END] += 8.0
        generator.final_logits_bias[0, PAD] = -100.0
    return generator


def make_model(model_class, generator, n_docs: int):
    """A RAG model around the generator; its question encoder is never used."""
    from transformers import DPRConfig, DPRQuestionEncoder, RagConfig

    encoder = DPRQuestionEncoder(
        DPRConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    config = RagConfig.from_question_encoder_generator_configs(encoder.config, generator.config, n_docs=n_docs)
    model = model_class(config=config, question_encoder=encoder, generator=generator).eval()
    model.generation_config = generator.generation_config
    return model


def make_contexts(questions: int, n_docs: int, vocabulary: int, seed: int):
    """Contexts of 100 to 200 tokens (questions * n_docs, 200), their mask, and doc_scores (questions, n_docs)."""
    import torch

    random = torch.Generator().manual_seed(seed)
    mask = (torch.arange(200) < torch.randint(100, 201, (questions * n_docs, 1), generator=random)).long()
    ids = torch.randint(3, vocabulary, mask.shape, generator=random)
    return ids.where(mask == 1, PAD), mask, 2 * torch.randn(questions, n_docs, generator=random)


@contextmanager
def mask_handed_over(model, mask):
    """transformers 5.x calls its inner `generate` with attention_mask=None, a question at a time."""
    generate, masks = model.generator.generate, iter(mask.split(model.config.n_docs))
    model.generator.generate = lambda ids, **kwargs: generate(ids, **kwargs | {"attention_mask": next(masks)})
    yield
    del model.generator.generate


@contextmanager
def equal_rows_encoded_once(encoder):
    """The encoder is a function of a row and its mask: what it says of equal rows is computed once and repeated."""
    import torch

    forward = encoder.forward

    def of_distinct_rows(input_ids, attention_mask, **kwargs):
        rows, places = torch.cat([input_ids, attention_mask], 1).unique(dim=0, return_inverse=True)
        ids, mask = rows.chunk(2, 1)
        encoded = forward(input_ids=ids, attention_mask=mask, **kwargs)
        encoded.last_hidden_state = encoded.last_hidden_state[places]
        return encoded

    encoder.forward = of_distinct_rows
    yield
    del encoder.forward


def transformers_way(model, ids, mask, doc_scores):
    with mask_handed_over(model, mask):
        return model.generate(
            context_input_ids=ids, context_attention_mask=mask, doc_scores=doc_scores, n_docs=model.config.n_docs,
            **SETTINGS,
        )  # fmt: skip


def our_way(model, ids, mask, doc_scores):
    from rag.generation.decoding import generate_answers

    return generate_answers(model, ids, mask, doc_scores, n_docs=model.config.n_docs, **SETTINGS)


def trim(sequences) -> list[list[int]]:
    return [[token for token in row if token != PAD] for row in sequences.tolist()]


@dataclass
class Cost:
    """Of one call: seconds a question by the clock and of CPU time (fair on a busy machine), GiB added at the peak."""

    wall: float
    cpu: float
    memory: float


def timed(function, model, contexts) -> tuple[Cost, list]:
    """The cost of a call, and its answers."""
    ctypes.CDLL(None).malloc_trim(0)  # what the call before left to be used again would hide what this one needs
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    memory, wall, cpu = status_mib("VmRSS"), time.perf_counter(), time.process_time()
    answers = trim(function(model, *contexts))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Cost(wall / len(answers), cpu / len(answers), (status_mib("VmHWM") - memory) / 1024), answers


def first_questions(contexts, n: int):
    ids, mask, doc_scores = contexts
    n_docs = doc_scores.shape[1]
    return ids[: n * n_docs], mask[: n * n_docs], doc_scores[:n]


def in_precision(model, word: str):
    """The model itself, or a copy in half precision."""
    from rag.models.precision import DTYPES

    return model if word == "fp32" else copy.deepcopy(model).to(DTYPES[word])


def equal_rows(some: list, others: list) -> int:
    return sum(one == other for one, other in zip(some, others, strict=True))


def measure(args, model_class, generator, questions: int) -> dict:
    """Medians over the rounds, and how many answers are the same."""
    full = make_model(model_class, generator, args.n_docs)
    model, as_full = in_precision(full, args.precision), 0
    our_way(model, *make_contexts(1, args.n_docs, SIZES[args.size]["vocabulary"], seed=99))
    theirs, ours, same, lengths = [], [], 0, []
    for seed in range(args.first_seed, args.first_seed + args.rounds):
        contexts = make_contexts(args.batch_size, args.n_docs, SIZES[args.size]["vocabulary"], seed)
        cost, expected = timed(transformers_way, model, first_questions(contexts, questions))
        theirs.append(cost)
        cost, answers = timed(our_way, model, contexts)
        ours.append(cost)
        if model is full:
            same += len(expected) - len(different_rows(model, contexts, expected, answers))
        else:
            same += equal_rows(expected, answers[: len(expected)])
            as_full += equal_rows(answers, trim(our_way(full, *contexts)))
        lengths += map(len, answers)
    result = {"model": model_class.__name__, "same": f"{same} of {questions * args.rounds}"}
    for name in ("wall", "cpu", "memory"):
        result[name] = [statistics.median(getattr(cost, name) for cost in side) for side in (theirs, ours)]
    ratios = [one.wall / other.wall for one, other in zip(theirs, ours, strict=True)]
    result["ratio"] = result["wall"][0] / result["wall"][1]
    if model is not full:
        result["same"] += f", as float32's: {as_full} of {args.batch_size * args.rounds}"
    print(
        "{model}: transformers {wall[0]:.2f} s a question, ours {wall[1]:.2f} s: {ratio:.1f}x".format(**result),
        f"({min(ratios):.1f} to {max(ratios):.1f} in {args.rounds} rounds);",
        "CPU time {cpu[0]:.1f} s, {cpu[1]:.1f} s; memory {memory[0]:.2f} GiB, {memory[1]:.2f} GiB;".format(**result),
        f"same token ids: {result['same']};",
        f"answers of {min(lengths)} to {max(lengths)} tokens, median {statistics.median(lengths):g}",
        flush=True,
    )
    return result


def compare(args, model_class) -> dict:
    """How many of so many random questions to several random models get other token ids; ties, as others are errors."""
    started, ties, asked = time.perf_counter(), 0, 0
    for number in range(args.seeds):
        seed = args.first_seed + number
        model = make_model(model_class, make_generator(args.size, seed), args.n_docs)
        encoder = model.generator.get_encoder()
        remaining = args.equal // args.seeds + (number < args.equal % args.seeds)
        while remaining:
            batch = min(args.batch_size, remaining)
            contexts = make_contexts(batch, args.n_docs, SIZES[args.size]["vocabulary"], 1000 * seed + remaining)
            remaining -= batch
            with equal_rows_encoded_once(encoder) if args.encode_once else nullcontext():
                expected = trim(transformers_way(model, *contexts))
            answers = trim(our_way(model, *contexts))
            asked += batch
            ties += len(different_rows(model, contexts, expected, answers))
        minutes = (time.perf_counter() - started) / 60
        print(f"{model_class.__name__}: {asked} questions, {ties} of them ties, {minutes:.1f} minutes", flush=True)
    return {"model": model_class.__name__, "asked": asked, "ties": ties}


def compare_precisions(args, model_class) -> dict:
    """How many of so many random questions get the answer that float32 gives, of us and of transformers."""
    names = ("ours as float32's", "transformers' as float32's", "ours as transformers'")
    counts, asked = dict.fromkeys(names, 0), 0
    for number in range(args.seeds):
        seed = args.first_seed + number
        full = make_model(model_class, make_generator(args.size, seed), args.n_docs)
        half = in_precision(full, args.precision)
        remaining = args.equal // args.seeds + (number < args.equal % args.seeds)
        while remaining:
            batch = min(args.batch_size, remaining)
            contexts = make_contexts(batch, args.n_docs, SIZES[args.size]["vocabulary"], 1000 * seed + remaining)
            remaining -= batch
            ways = (our_way, full), (our_way, half), (transformers_way, full), (transformers_way, half)
            ours, ours_half, theirs, theirs_half = (trim(way(model, *contexts)) for way, model in ways)
            pairs = (ours, ours_half), (theirs, theirs_half), (ours_half, theirs_half)
            for name, pair in zip(names, pairs, strict=True):
                counts[name] += equal_rows(*pair)
            asked += batch
    shares = ", ".join(f"{name}: {count}" for name, count in counts.items())
    print(f"{model_class.__name__}: {asked} questions in {args.precision}; {shares}", flush=True)
    return {"model": model_class.__name__, "asked": asked, **counts}


def different_rows(model, contexts, expected: list, answers: list) -> list[int]:
    """The questions whose answers are not the same because float32 rounds a tie: in float64 they are the same."""
    ids, mask, doc_scores = contexts
    n = model.config.n_docs
    rows = [row for row, answer in enumerate(expected) if answer != answers[row]]
    for row in rows:
        print(f"  a difference: {expected[row]} {answers[row]}", flush=True)
        one = ids[row * n : row * n + n], mask[row * n : row * n + n], doc_scores[row : row + 1].double()
        exact = copy.deepcopy(model).double()
        if trim(transformers_way(exact, *one)) != trim(our_way(exact, *one)):
            raise SystemExit("it is one in float64 too: generate_answers is wrong")
    return rows


def main(args: BenchmarkArguments) -> list[dict]:
    import torch
    import transformers
    from transformers import RagSequenceForGeneration, RagTokenForGeneration

    transformers.logging.set_verbosity_error()
    print(
        f"{header('torch', 'transformers', threads=torch.get_num_threads())}\n"
        f"{args.size} size, batch {args.batch_size}, {args.n_docs} documents, {args.precision}, {SETTINGS}",
        flush=True,
    )
    if args.equal:
        compared = compare if args.precision == "fp32" else compare_precisions
        return [compared(args, model_class) for model_class in (RagSequenceForGeneration, RagTokenForGeneration)]
    generator = make_generator(args.size, args.first_seed)
    contexts = make_contexts(1, args.n_docs, SIZES[args.size]["vocabulary"], seed=99)
    transformers_way(make_model(RagTokenForGeneration, generator, args.n_docs), *contexts)  # to warm up
    return [
        measure(args, RagSequenceForGeneration, generator, min(args.questions, args.batch_size)),
        measure(args, RagTokenForGeneration, generator, args.batch_size),
    ]


if __name__ == "__main__":
    run_script(parse_args, main)
