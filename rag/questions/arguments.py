"""The flags that name a data set of questions and answers: declared once, parsed by every script that reads one.

@dataclass
class EvalArguments(SearchArguments, DatasetArguments): ...
"""

from dataclasses import dataclass

from rag.command_line.flags import flag

# The names that are looked for, in this order, where no flag names a column.
QUESTION_COLUMNS = ("question", "input", "query")
ANSWERS_COLUMNS = ("answers", "answer", "target", "output", "golden_answers")


@dataclass(kw_only=True)
class DatasetArguments:
    """Questions and answers by name."""

    dataset_name: str | None = flag(
        None,
        "Questions and answers by name: OWNER/NAME on the Hugging Face hub, a file .parquet, .jsonl, .json, .csv or "
        ".tsv, or a folder of such named by their splits (train.jsonl, validation.jsonl).",
    )
    dataset_config: str | None = flag(None, "Configuration of the hub's dataset, where it has several.")
    question_column: str | None = flag(
        None, f"Its column of questions; left out, the first of {', '.join(QUESTION_COLUMNS)} that is there."
    )
    answers_column: str | None = flag(
        None,
        "Its column of answers: a text, several, or records of them as SQuAD, TriviaQA and KILT have; left out, the "
        f"first of {', '.join(ANSWERS_COLUMNS)} that is there.",
    )

    def dataset_problems(self) -> list[str]:
        """Flags about a data set where none is named, and flags that name nothing."""
        others = ("dataset_config", "question_column", "answers_column", "dataset_split")
        given = {name: value for name in others if (value := getattr(self, name, None)) is not None}
        if self.dataset_name is None:
            return [f"--{name} {value} is about --dataset_name; give it, too" for name, value in given.items()]
        given = {"dataset_name": self.dataset_name} | given
        return [f"--{name} {value!r} names nothing; leave it out" for name, value in given.items() if not value.strip()]
