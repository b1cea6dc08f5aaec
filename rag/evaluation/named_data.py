"""Questions and gold of --dataset_name, in the place of --evaluation_set and --gold_data_path.

data = read_named_data(args)
data.questions, data.gold, data.identity
"""

from typing import Any

from rag.errors import UserError, raise_problems
from rag.evaluation.arguments import EvalArguments
from rag.evaluation.gold import EvalData, input_problems, read_gold, strip_title, titles_in
from rag.evaluation.kilt import pages_of
from rag.files import json_digest
from rag.metrics import compile_pattern
from rag.questions.columns import Examples, read_examples
from rag.questions.reading import Splits, read_splits, split_named
from rag.questions.tables import SPLIT_NAMES


def read_named_data(args: EvalArguments) -> EvalData:
    """As `rag.evaluation.gold.read_data`; question n is row n of the split.

    Raises:
        UserError: there is no such data set or split, or a question has no answer.
    """
    raise_problems(input_problems(args))
    is_retrieval, is_regex = args.eval_mode == "retrieval", args.gold_data_mode == "regex"
    splits = read_splits(args)
    split = _split_of(args, splits)
    what = f"--dataset_name {args.dataset_name}" + (f", split {split}" if split else "")
    examples = read_examples(args, splits[split], as_they_are=is_regex, may_lack_answers=is_retrieval)
    if not examples.questions:
        raise UserError(f"{what} has no question; give one that has")
    pages = _pages_of(examples)
    if args.gold_data_mode == "kilt" and pages is None:
        raise UserError(f"{what} names no pages, as KILT's records do; leave --gold_data_mode kilt out")
    answers = examples.answers if any(examples.answers) else None
    if not is_retrieval or answers is not None:
        _require_answers(what, args, splits, split, examples)
    if is_regex:
        _require_patterns(examples)
    gold = _titles(args, examples.questions, pages, what) if is_retrieval else examples.answers
    data = EvalData(examples.questions, gold, answers if is_retrieval else None, pages)
    asked: list[Any] = [data.questions, data.answers]  # the records of a retrieval say which passage holds an answer
    path = f"{args.dataset_name} ({split})" if split else str(args.dataset_name)
    data.identity = {"path": path, "digest": json_digest(asked)}
    return data


def _split_of(args: EvalArguments, splits: Splits) -> str:
    """The name of the split that is asked; "" of a single file."""
    there = ", ".join(name for name in splits if name) or "one file"
    wanted = args.dataset_split
    names = [*SPLIT_NAMES["test"], *SPLIT_NAMES["val"]] if wanted is None else [wanted, *_other_names(wanted)]
    if wanted is None and "" in splits:
        return ""
    if (split := split_named(splits, names)) is not None:
        return split
    if wanted is None:
        raise UserError(f"--dataset_name {args.dataset_name} has no test or validation ({there}); give --dataset_split")
    raise UserError(
        f"--dataset_split {wanted}: --dataset_name {args.dataset_name} has no such split ({there}); give another, or "
        "leave it out"
    )


def _other_names(split: str) -> tuple[str, ...]:
    return next((names for names in SPLIT_NAMES.values() if split.lower() in names), ())


def _pages_of(examples: Examples) -> list[list[list[str]]] | None:
    """The evidence sets of KILT's outputs; None where no row has one. The hub's have an empty one for want of any."""
    pages = []
    for place, cell in zip(examples.places, examples.cells, strict=True):
        outputs = (
            [one for one in cell if isinstance(one, dict) and one.get("provenance")] if isinstance(cell, list) else []
        )
        try:
            pages.append([list(map(strip_title, own)) for own in pages_of({"output": outputs})])
        except ValueError as error:
            raise UserError(f"--dataset_name: {place}: {error}") from error
    return pages if any(pages) else None


def _require_answers(what: str, args: EvalArguments, splits: Splits, split: str, examples: Examples) -> None:
    """Raise `UserError` where a question has no answer: left out, it would shift all that stands by its number."""
    if not (without := examples.unanswered):
        return
    if len(without) == len(examples.questions):
        others = ", ".join(name for name in splits if name != split)
        raise UserError(f"{what} has no answer to any question; give --dataset_split ({others or 'there is no other'})")
    raise UserError(
        f"{what}: {len(without):,} of {len(examples.questions):,} questions have no answer, the first is "
        f"{examples.places[without[0]]}; leave them out of the data"
    )


def _require_patterns(examples: Examples) -> None:
    for place, patterns in zip(examples.places, examples.answers, strict=True):
        for pattern in patterns:
            try:
                compile_pattern(pattern)
            except ValueError as error:
                raise UserError(f"--dataset_name: {place}: {error}") from error


def _titles(
    args: EvalArguments, questions: list[str], pages: list[list[list[str]]] | None, what: str
) -> list[list[str]]:
    """The right titles of each question: those of --gold_data_path, or KILT's."""
    if args.gold_data_path is not None:
        return read_gold("--gold_data_path", args.gold_data_path, questions, "titles")
    if pages is None:
        raise UserError(f"{what} has no titles of right passages, as KILT's records do; give --gold_data_path")
    return titles_in(pages)
