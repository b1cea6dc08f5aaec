"""RAG-Sequence answers of a causal language model beside the plain loop over `generate`, on real questions.

    python benchmarks/language_model_decode.py --questions 10

The plain loop answers a question passage by passage: `generate` with beams, then each distinct candidate of all
passages is scored under each passage by full forward passes, the candidates of a passage in one batch.
"""

import copy
import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.machine import header
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script

BEAMS, MAX_LENGTH, N_DOCS, WORDS = 4, 16, 5, 100
HEAD, QUESTION, END = "Title: {title}\nPassage: {text}", "\nQuestion: {question}", "\nAnswer:"


@dataclass
class DecodeArguments:
    model: str = flag("/tmp/smollm2", "A causal language model and its tokenizer.")
    data: str = flag("../shared/data/nq_gold", "A folder with passages.tsv and questions.jsonl.")
    questions: int = flag(10, "How many are answered both ways.")
    first: int = flag(0, "The first of them, in the test split.")
    pairs: int = flag(5, "Pairs of questions on the same passages.")


def parse_args(argv=None) -> DecodeArguments:
    return parse_into(DecodeArguments, description=__doc__, argv=argv)


def read_questions(folder: str) -> tuple[list[dict], dict[str, tuple[str, str]]]:
    """Test questions, and passages of about 100 words by id."""
    rows = [line.split("\t") for line in Path(folder, "passages.tsv").read_text().splitlines()]
    passages = {number: (title, text) for number, title, text in rows if 80 <= len(text.split()) <= 120}
    questions = [json.loads(line) for line in Path(folder, "questions.jsonl").read_text().splitlines()]
    return [q for q in questions if q["split"] != "train" and q["passage_id"] in passages], passages


class Setting:
    """The language model, and prompts of real questions and passages as it reads them."""

    def __init__(self, args: DecodeArguments):
        import numpy as np
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, RagSequenceForGeneration

        from benchmarks.decoding import make_model

        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.lm = AutoModelForCausalLM.from_pretrained(args.model).eval()
        self.end = self.tokenizer(END, add_special_tokens=False)["input_ids"]
        line_end = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        self.ends = [self.lm.config.eos_token_id, *line_end]  # untrained, it ends its answers with a line
        for config in (self.lm.config, self.lm.generation_config):
            config.pad_token_id, config.decoder_start_token_id, config.eos_token_id = 0, self.end[-1], self.ends
        self.model = make_model(RagSequenceForGeneration, self.lm, N_DOCS)
        self.questions, self.passages = read_questions(args.data)
        self.random, self.torch = np.random.default_rng(0), torch

    def ids_of(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def contexts(self, number: int, question: str | None = None):
        """ids and mask (N_DOCS, S), doc_scores (1, N_DOCS) and heads: the gold passage and others."""
        import numpy as np

        from rag.packing import Heads

        asked, random = self.questions[number], np.random.default_rng(number)
        others = [key for key in random.permutation(list(self.passages)) if key != asked["passage_id"]]
        chosen = [self.passages[key] for key in (asked["passage_id"], *others[: N_DOCS - 1])]
        heads = [self.ids_of(HEAD.format(title=title, text=text)) for title, text in chosen]
        rest = self.ids_of(QUESTION.format(question=question or asked["question"])) + self.end[:-1]
        rows = [self.torch.tensor(head + rest) for head in heads]
        ids = self.torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = self.torch.tensor([len(row) for row in rows])
        mask = (self.torch.arange(ids.shape[1]) < lengths[:, None]).long()
        doc_scores = self.torch.from_numpy(-np.sort(-2 * random.standard_normal((1, N_DOCS))).astype(np.float32))
        return ids, mask, doc_scores, Heads(np.array([len(head) for head in heads]), np.arange(N_DOCS))


def plain_answer(setting: Setting, lm, ids, mask, doc_scores) -> list[int]:
    """The loop: token ids of the answer, from the start token to the end token."""
    torch = setting.torch
    prompts = [[*row[own == 1].tolist(), setting.end[-1]] for row, own in zip(ids, mask, strict=True)]
    found = {}
    for prompt in prompts:
        rows = lm.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), num_beams=BEAMS,
            num_return_sequences=BEAMS, max_new_tokens=MAX_LENGTH - 1, min_new_tokens=0, do_sample=False,
        )  # fmt: skip
        found |= dict.fromkeys(tuple(trim(row, setting.ends)) for row in rows[:, len(prompt) - 1 :].tolist())
    candidates = list(found)
    longest = max(map(len, candidates)) - 1
    scores = []
    for prompt in prompts:
        rows = torch.zeros(len(candidates), len(prompt) + longest, dtype=torch.long)
        is_token, targets = torch.zeros_like(rows), torch.zeros(len(candidates), longest, dtype=torch.long)
        for row, candidate in enumerate(candidates):
            text = prompt + list(candidate[1:])
            rows[row, : len(text)], is_token[row, : len(text)] = torch.tensor(text), 1
            targets[row, : len(candidate) - 1] = torch.tensor(candidate[1:])
        logits = lm(rows, attention_mask=is_token, logits_to_keep=longest + 1, use_cache=False).logits[:, :-1]
        log_probs = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]
        counts = torch.arange(longest) < torch.tensor([len(candidate) - 1 for candidate in candidates])[:, None]
        scores.append((log_probs * counts).sum(1))
    totals = (torch.stack(scores) + doc_scores[0].to(scores[0].dtype).log_softmax(0)[:, None]).logsumexp(0)
    return list(candidates[int(totals.argmax())])


def our_answer(setting: Setting, model, ids, mask, doc_scores, heads, cache=None) -> list[int]:
    from rag.generation.decoding import generate_answers

    answer = generate_answers(
        model, ids, mask, doc_scores, n_docs=N_DOCS, num_beams=BEAMS, max_length=MAX_LENGTH, min_length=0,
        heads=heads, head_cache=cache,
    )  # fmt: skip
    return trim(answer[0].tolist(), setting.ends)


def trim(tokens: list[int], ends: list[int]) -> list[int]:
    return tokens[: next((place + 1 for place, token in enumerate(tokens) if place and token in ends), len(tokens))]


def timed(function, *args):
    wall, cpu = time.perf_counter(), time.process_time()
    answer = function(*args)
    return answer, time.perf_counter() - wall, time.process_time() - cpu


def compare(args: DecodeArguments, setting: Setting) -> dict:
    """Both ways on the same questions, one at a time; a difference that float64 does not have is a tie."""
    same, seconds = 0, []
    for number in range(args.first, args.first + args.questions):
        contexts = setting.contexts(number)
        expected, *plain = timed(plain_answer, setting, setting.lm, *contexts[:3])
        answer, *ours = timed(our_answer, setting, setting.model, *contexts)
        seconds.append((*plain, *ours))
        same += answer == expected
        print(number, repr(setting.tokenizer.decode(answer[1:])), [f"{s:.2f}" for s in seconds[-1]], flush=True)
        if answer != expected:
            print(f"  a difference: {expected} {answer}", flush=True)
            model = copy.deepcopy(setting.model).double()
            exact = plain_answer(setting, model.generator, *contexts[:3]), our_answer(setting, model, *contexts)
            if exact[0] != exact[1]:
                raise SystemExit(f"it is one in float64 too: {exact}")
    plain, plain_cpu, ours, ours_cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(
        f"plain loop {plain:.2f} s a question, ours {ours:.2f} s: {plain / ours:.1f}x; CPU time {plain_cpu:.2f} s, "
        f"{ours_cpu:.2f} s: {plain_cpu / ours_cpu:.1f}x; same token ids: {same} of {args.questions}",
        flush=True,
    )
    return {"ratio": plain / ours, "same": same, "asked": args.questions}


def ask_twice(args: DecodeArguments, setting: Setting) -> dict:
    """Another question on the same passages, with the cache of their heads."""
    from rag.generation.causal_cache import HeadCache

    seconds = []
    for number in range(args.first, args.first + args.pairs):
        cache = HeadCache()
        _, first, first_cpu = timed(our_answer, setting, setting.model, *setting.contexts(number), cache)
        other = setting.contexts(number, setting.questions[number + 1]["question"])
        answer, second, second_cpu = timed(our_answer, setting, setting.model, *other, cache)
        assert answer == our_answer(setting, setting.model, *other), "a cache changes nothing"
        seconds.append((first, second, first_cpu, second_cpu))
        print(number, [f"{s:.3f}" for s in seconds[-1]], flush=True)
    first, second, first_cpu, second_cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
    print(f"a second question {second:.2f} s of {first:.2f} s: {second / first:.2f}; CPU {second_cpu / first_cpu:.2f}")
    return {"second": second / first}


def main(args: DecodeArguments) -> dict:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    print(header("torch", "transformers", threads=torch.get_num_threads()), flush=True)
    setting = Setting(args)
    with torch.no_grad():
        our_answer(setting, setting.model, *setting.contexts(args.first))
        twice = ask_twice(args, setting) if args.pairs else {}
        return (compare(args, setting) if args.questions else {}) | twice


if __name__ == "__main__":
    run_script(parse_args, main)
