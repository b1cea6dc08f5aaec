"""Questions a second of `generate_answers` beside transformers' own `generate`: same weights, contexts and process.

    python benchmarks/decoding.py --short                          # under two minutes on two cores
    python benchmarks/decoding.py --rounds 3
    python benchmarks/decoding.py --equal 500 --size small         # no clock, only whether the token ids are the same
    python benchmarks/decoding.py --equal 500                      # the same at BART-base size: hours

The weights are random, scaled so that answers hang on the contexts; a bias on the end token, which grows from word to
word, makes them 3 to 12 tokens long. transformers' side gets the contexts' attention mask handed to its inner
`generate`, which leaves it out. Both sides read the same contexts, padded to the longest of the batch.
"""

import datetime
import os
import platform
import statistics
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli_rag import parse_into, run_script

SIZES = {
    "base": {"d_model": 768, "layers": 6, "heads": 12, "ffn": 3072, "vocabulary": 50265},
    "small": {"d_model": 64, "layers": 2, "heads": 4, "ffn": 128, "vocabulary": 2000},
}
SETTINGS = {"num_beams": 4, "min_length": 1, "max_length": 16}
PAD, END = 1, 2


@dataclass
class BenchmarkArguments:
    short: bool = field(default=False, metadata={"help": "One round on few questions: under two minutes on two cores."})
    rounds: int = field(default=3, metadata={"help": "Measured rounds; medians are reported."})
    batch_size: int = field(default=8, metadata={"help": "Questions decoded at a time."})
    n_docs: int = field(default=5, metadata={"help": "Documents a question."})
    size: str = field(default="base", metadata={"help": "base (as BART-base) or small."})
    equal: int = field(default=0, metadata={"help": "Only compare the token ids of so many random questions."})
    seeds: int = field(default=5, metadata={"help": "Random models that share the questions of --equal."})


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


def transformers_way(model, ids, mask, doc_scores):
    with mask_handed_over(model, mask):
        return model.generate(
            context_input_ids=ids, context_attention_mask=mask, doc_scores=doc_scores, n_docs=model.config.n_docs,
            **SETTINGS,
        )  # fmt: skip


def our_way(model, ids, mask, doc_scores):
    from decoding_rag import generate_answers

    return generate_answers(model, ids, mask, doc_scores, n_docs=model.config.n_docs, **SETTINGS)


def trim(sequences) -> list[list[int]]:
    return [[token for token in row if token != PAD] for row in sequences.tolist()]


def timed(function, model, contexts) -> tuple[float, float, list]:
    """Wall seconds and CPU seconds a question (the second is fair on a busy machine), and the answers."""
    wall, cpu = time.perf_counter(), time.process_time()
    answers = trim(function(model, *contexts))
    return (time.perf_counter() - wall) / len(answers), (time.process_time() - cpu) / len(answers), answers


def first_questions(contexts, n: int):
    ids, mask, doc_scores = contexts
    n_docs = doc_scores.shape[1]
    return ids[: n * n_docs], mask[: n * n_docs], doc_scores[:n]


def measure(args, model_class, generator, questions: int, rounds: int) -> dict:
    """Medians over the rounds. transformers' RAG-Sequence takes one question at a time: a few of the batch suffice."""
    model = make_model(model_class, generator, args.n_docs)
    vocabulary = SIZES[args.size]["vocabulary"]
    our_way(model, *make_contexts(1, args.n_docs, vocabulary, seed=99))
    transformers_way(model, *make_contexts(1, args.n_docs, vocabulary, seed=99))
    theirs, ours, same, lengths = [], [], 0, []
    for seed in range(rounds):
        contexts = make_contexts(args.batch_size, args.n_docs, vocabulary, seed)
        *seconds, expected = timed(transformers_way, model, first_questions(contexts, questions))
        theirs.append(seconds)
        *seconds, answers = timed(our_way, model, contexts)
        ours.append(seconds)
        same += sum(map(list.__eq__, expected, answers))
        lengths += map(len, answers)
    median = statistics.median
    wall, cpu = ([median(s[i] for s in side) for side in (theirs, ours)] for i in (0, 1))
    result = {
        "model": model_class.__name__, "transformers_s": wall[0], "ours_s": wall[1], "ratio": wall[0] / wall[1],
        "cpu_ratio": cpu[0] / cpu[1], "same": f"{same} of {questions * rounds}",
    }  # fmt: skip
    print(
        f"{result['model']}: transformers {wall[0]:.2f} s a question, ours {wall[1]:.2f} s: {result['ratio']:.1f}x "
        f"(CPU time {cpu[0]:.1f} s, {cpu[1]:.1f} s: {result['cpu_ratio']:.1f}x); same token ids: {result['same']}; "
        f"answers of {min(lengths)} to {max(lengths)} tokens, median {median(lengths):g}",
        flush=True,
    )
    return result


def compare(args, model_class) -> int:
    """Count the questions whose token ids differ, and say of each whether float64 settles it as a tie."""
    different = asked = 0
    for seed in range(args.seeds):
        model = make_model(model_class, make_generator(args.size, seed), args.n_docs)
        remaining = -(-args.equal // args.seeds)
        while remaining:
            batch = min(args.batch_size, remaining)
            contexts = make_contexts(batch, args.n_docs, SIZES[args.size]["vocabulary"], 1000 * seed + remaining)
            remaining -= batch
            expected, answers = trim(transformers_way(model, *contexts)), trim(our_way(model, *contexts))
            asked += batch
            for row in (i for i in range(batch) if expected[i] != answers[i]):
                different += 1
                print(f"  differs: {expected[row]} {answers[row]}: {tie_or_fault(model, contexts, row)}", flush=True)
        print(f"{model_class.__name__}: {asked} questions, {different} different", flush=True)
    return different


def tie_or_fault(model, contexts, row: int) -> str:
    """A tie that float32 rounds one way or the other is none in float64: there both sides agree."""
    import copy

    ids, mask, doc_scores = contexts
    n = model.config.n_docs
    one = ids[row * n : row * n + n], mask[row * n : row * n + n], doc_scores[row : row + 1].double()
    model = copy.deepcopy(model).double()
    same = trim(transformers_way(model, *one)) == trim(our_way(model, *one))
    return "a tie, the same in float64" if same else "FAULT"


def main(args: BenchmarkArguments) -> list[dict]:
    import torch
    import transformers
    from transformers import RagSequenceForGeneration, RagTokenForGeneration

    transformers.logging.set_verbosity_error()
    print(
        f"{datetime.date.today()}, {' '.join(sys.argv)}\n{os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n{args.size} size, batch {args.batch_size}, {args.n_docs} documents, "
        f"{SETTINGS}",
        flush=True,
    )
    if args.equal:
        return [{"different": compare(args, c)} for c in (RagSequenceForGeneration, RagTokenForGeneration)]
    generator, rounds = make_generator(args.size, 0), 1 if args.short else args.rounds
    return [
        measure(args, RagSequenceForGeneration, generator, 1 if args.short else 2, rounds),
        measure(args, RagTokenForGeneration, generator, args.batch_size, rounds),
    ]


if __name__ == "__main__":
    run_script(parse_args, main)
