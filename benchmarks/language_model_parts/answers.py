"""The part `decode` of language_model.py: answers of RAG-Sequence beside the plain loop over `generate`."""

import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.errors import UserError

BEAMS, MAX_LENGTH, WORDS = 4, 16, (80, 120)
HEAD, QUESTION, END = "Title: {title}\nPassage: {text}", "\nQuestion: {question}", "\nAnswer:"


@dataclass
class Prompts:
    """Token ids of questions and passages."""

    heads: list[list[int]]
    questions: list[list[int]]
    gold: list[int]  # the head of each question
    end: list[int]
    line_end: int  # untrained, a model ends its answers with a line
    text_of: Callable[[list[int]], str]

    def contexts(self, number: int, n_docs: int, asked: int | None = None) -> tuple:
        """ids and mask (n_docs, S), doc_scores (1, n_docs) and heads, of a question's passages.

        Args:
            asked: another question on the same passages.
        """
        import numpy as np
        import torch

        from rag.packing import Heads

        random = np.random.default_rng(number)
        others = [head for head in random.permutation(len(self.heads)) if head != self.gold[number]]
        heads = [self.heads[head] for head in (self.gold[number], *others[: n_docs - 1])]
        rest = self.questions[number if asked is None else asked] + self.end[:-1]
        rows = [torch.tensor(head + rest) for head in heads]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]).long()
        doc_scores = torch.from_numpy(2 * random.standard_normal((1, n_docs))).float().sort(descending=True).values
        return ids, mask, doc_scores, Heads(np.array([len(head) for head in heads]), np.arange(n_docs))


def real_prompts(folder: Path, data: Path) -> Prompts:
    """People's questions, and passages of about 100 words, as nq_gold has them."""
    from transformers import AutoTokenizer

    if not (data / "questions.jsonl").is_file():
        raise UserError(f"--data {data} holds no questions.jsonl and passages.tsv; give their folder, or --random")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = [line.split("\t") for line in (data / "passages.tsv").read_text().splitlines()]
    rows = [row for row in rows if WORDS[0] <= len(row[2].split()) <= WORDS[1]]
    number_of = {row[0]: number for number, row in enumerate(rows)}
    asked = map(json.loads, (data / "questions.jsonl").read_text().splitlines())
    asked = [q for q in asked if q["split"] != "train" and q["passage_id"] in number_of]
    return Prompts(
        heads=[ids_of(HEAD.format(title=title, text=text)) for _, title, text in rows],
        questions=[ids_of(QUESTION.format(question=q["question"])) for q in asked],
        gold=[number_of[q["passage_id"]] for q in asked],
        end=ids_of(END),
        line_end=ids_of("\n")[0],
        text_of=tokenizer.decode,
    )


def random_prompts(vocabulary: int) -> Prompts:
    """Of the same lengths."""
    import numpy as np

    random = np.random.default_rng(0)

    def texts(number: int, least: int, most: int) -> list[list[int]]:
        return [random.integers(3, vocabulary, length).tolist() for length in random.integers(least, most, number)]

    return Prompts(texts(400, 130, 171), texts(400, 10, 16), list(range(400)), [198, 199, 200], 198, str)


class Sides:
    """The same language model both ways, which answer a question at a time."""

    def __init__(self, lm: Any, prompts: Prompts, n_docs: int):
        from transformers import RagSequenceForGeneration

        from benchmarks.decoding import make_model

        self.prompts, self.n_docs = prompts, n_docs
        self.ends = [lm.config.eos_token_id, prompts.line_end]
        for config in (lm.config, lm.generation_config):
            config.pad_token_id, config.eos_token_id, config.decoder_start_token_id = 0, self.ends, prompts.end[-1]
        self.model = make_model(RagSequenceForGeneration, lm.eval(), n_docs)

    def ours(self, contexts, cache=None) -> list[int]:
        from rag.generation.decoding import generate_answers

        *inputs, heads = contexts
        answer = generate_answers(
            self.model, *inputs, n_docs=self.n_docs, num_beams=BEAMS, max_length=MAX_LENGTH, min_length=0,
            heads=heads, head_cache=cache,
        )  # fmt: skip
        return self.trim(answer[0].tolist())

    def loop(self, contexts) -> list[int]:
        """`generate` for each passage, then the candidates of all of them in one full pass under each passage."""
        prompts = self.prompts_of(contexts)
        found: dict[tuple[int, ...], None] = {}
        for prompt in prompts:
            found |= dict.fromkeys(self.generate([prompt]))
        return self.best(contexts, prompts, list(found), candidate_log_probs)

    def batches(self, contexts) -> list[int]:
        """The same in a tenth of the time: one `generate` for all passages, candidates behind transformers' cache."""
        prompts = self.prompts_of(contexts)
        return self.best(contexts, prompts, list(dict.fromkeys(self.generate(prompts))), cached_log_probs)

    def prompts_of(self, contexts) -> list[list[int]]:
        ids, mask, *_ = contexts
        return [[*row[own == 1].tolist(), self.prompts.end[-1]] for row, own in zip(ids, mask, strict=True)]

    def generate(self, prompts: list[list[int]]) -> list[tuple[int, ...]]:
        """What transformers' beams find behind each prompt, from its last token on."""
        import torch

        longest = max(map(len, prompts))
        before = [longest - len(prompt) for prompt in prompts]
        rows = self.model.generator.generate(
            torch.tensor([[0] * padding + prompt for padding, prompt in zip(before, prompts, strict=True)]),
            attention_mask=torch.tensor([[0] * padding + [1] * (longest - padding) for padding in before]),
            num_beams=BEAMS, num_return_sequences=BEAMS, max_new_tokens=MAX_LENGTH - 1, do_sample=False,
        )  # fmt: skip
        return [tuple(self.trim(row)) for row in rows[:, longest - 1 :].tolist()]

    def best(self, contexts, prompts: list[list[int]], candidates: list[tuple[int, ...]], log_probs_of) -> list[int]:
        """The candidate of the best log sum_z p(z) p(candidate | z)."""
        import torch

        doc_scores = contexts[2]
        log_probs = torch.stack([log_probs_of(self.model.generator, prompt, candidates) for prompt in prompts])
        totals = (log_probs + doc_scores[0].to(log_probs.dtype).log_softmax(0)[:, None]).logsumexp(0)
        return list(candidates[int(totals.argmax())])

    def trim(self, tokens: list[int]) -> list[int]:
        """Up to the first end token."""
        ends = (place + 1 for place, token in enumerate(tokens) if place and token in self.ends)
        return tokens[: next(ends, len(tokens))]


def candidate_log_probs(lm: Any, prompt: list[int], candidates: list[tuple[int, ...]]) -> Any:
    """(C); of the prompts' logits none is made but the last."""
    import torch

    answers, is_token = padded([list(candidate[1:]) for candidate in candidates])
    prompts = torch.tensor([prompt]).expand(len(candidates), -1)
    logits = lm(
        torch.cat([prompts, answers], 1), attention_mask=torch.cat([torch.ones_like(prompts), is_token], 1),
        logits_to_keep=answers.shape[1] + 1, use_cache=False,
    ).logits[:, :-1]  # fmt: skip
    return (logits.log_softmax(-1).gather(2, answers[..., None])[..., 0] * is_token).sum(1)


def cached_log_probs(lm: Any, prompt: list[int], candidates: list[tuple[int, ...]]) -> Any:
    """The same from one pass of the prompt, whose keys and values transformers keeps and repeats."""
    import torch

    answers, is_token = padded([list(candidate[1:]) for candidate in candidates])
    read = lm(torch.tensor([prompt]), logits_to_keep=1, use_cache=True)
    read.past_key_values.batch_repeat_interleave(len(candidates))
    mask = torch.cat([torch.ones(len(candidates), len(prompt), dtype=torch.long), is_token], 1)
    logits = lm(answers[:, :-1], attention_mask=mask[:, :-1], past_key_values=read.past_key_values).logits
    logits = torch.cat([read.logits.expand(len(candidates), -1, -1), logits], 1)
    return (logits.log_softmax(-1).gather(2, answers[..., None])[..., 0] * is_token).sum(1)


def padded(rows: list[list[int]]) -> tuple[Any, Any]:
    """(C, T) ids and mask."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True), pad_sequence(
        [torch.ones_like(row) for row in tensors], batch_first=True
    )


def timed(function: Callable, *args: Any) -> tuple[list[int], float, float]:
    """What it gives, seconds by the clock and of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    answer = function(*args)
    return answer, time.perf_counter() - wall, time.process_time() - cpu


def medians(rows: list[tuple[float, ...]]) -> list[float]:
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def compare(sides: Sides, asked: int) -> dict:
    """Both ways on the same questions."""
    same, seconds = 0, []
    for number in range(asked):
        contexts = sides.prompts.contexts(number, sides.n_docs)
        expected, *loop = timed(sides.loop, contexts)
        answer, *ours = timed(sides.ours, contexts)
        seconds.append((*loop, *ours))
        same += is_same(sides, number, expected, answer)
        assert sides.batches(contexts) == expected, "batches change nothing"
    loop, loop_cpu, ours, ours_cpu = medians(seconds)
    print(
        f"a question: the loop {loop:.2f} s, ours {ours:.2f} s, {loop / ours:.1f}x as fast (bar 8), by CPU time "
        f"{loop_cpu / ours_cpu:.1f}x; same token ids: {same} of {asked}",
        flush=True,
    )
    return {"speed": loop / ours, "same": same, "asked": asked}


def compare_many(sides: Sides, compared: int) -> dict:
    """Token ids alone, of so many questions."""
    same = 0
    for number in range(compared):
        contexts = sides.prompts.contexts(number, sides.n_docs)
        same += is_same(sides, number, sides.batches(contexts), sides.ours(contexts))
        if number % 10 == 9:
            print(f"{number + 1} questions compared, {same} with the same token ids", flush=True)
    print(f"same token ids as transformers' in batches: {same} of {compared}", flush=True)
    return {"same_as_batches": same, "compared": compared}


def is_same(sides: Sides, number: int, expected: list[int], answer: list[int]) -> bool:
    """Whether token ids are equal; a difference that is none in float64 is a tie that float32 rounds."""
    if answer == expected:
        return True
    by_loop, by_us = (sides.prompts.text_of(tokens[1:]) for tokens in (expected, answer))
    difference = f"question {number}: {by_loop!r} by the loop, {by_us!r} by us"
    exact, contexts = copy.copy(sides), sides.prompts.contexts(number, sides.n_docs)
    exact.model = copy.deepcopy(sides.model).double()
    if exact.batches(contexts) != exact.ours(contexts):
        raise SystemExit(f"{difference}, in float64 too")
    print(f"{difference}: a tie, equal in float64", flush=True)
    return False


def ask_twice(sides: Sides, pairs: int) -> dict:
    """A second question on the same passages, whose heads are in the cache; each of a pair is the second one once."""
    from rag.generation.causal_cache import HeadCache

    seconds = []
    for number in range(pairs):
        first, second = [], []
        for asked in ((number, number + 1), (number + 1, number)):
            cache = HeadCache()
            contexts = [sides.prompts.contexts(number, sides.n_docs, question) for question in asked]
            first.append(timed(sides.ours, contexts[0], cache)[1:])
            answer, *taken = timed(sides.ours, contexts[1], cache)
            second.append(taken)
            assert answer == sides.ours(contexts[1]), "the cache changes nothing"
        (once, once_cpu), (again, again_cpu) = (map(sum, zip(*each, strict=True)) for each in (first, second))
        seconds.append((once / 2, again / 2, again / once, again_cpu / once_cpu))
    first, second, ratio, cpu_ratio = medians(seconds)
    print(
        f"a first question on some passages {first:.2f} s, a second {second:.2f} s: {ratio:.2f} of it (bar 0.4), by "
        f"CPU time {cpu_ratio:.2f}",
        flush=True,
    )
    return {"second": ratio}


def decode(lm: Any, prompts: Prompts, n_docs: int, asked: int, pairs: int, compared: int) -> dict:
    import torch

    sides = Sides(lm, prompts, n_docs)
    with torch.no_grad():
        sides.ours(prompts.contexts(0, n_docs))  # to warm up
        parts = {ask_twice: pairs, compare: asked, compare_many: compared}
        return {name: value for part, count in parts.items() if count for name, value in part(sides, count).items()}
