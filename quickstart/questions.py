"""The questions and passages of `python -m quickstart.language_model`: real ones where there are any, else the suite's.

    source = find_source("path/to/data")           # None takes ../shared/data, or test_data where that is not there
    data = write_data(source, Path("output/data"))
    data.folder, data.passages                     # train|val|test .source, .target, .qa, .pages; passages.tsv

A data folder holds `nq_gold`: `passages.tsv` (`id TAB title TAB text` a line, no header), `train|val|test` `.source`
and `.target` (a question, an answer a line), `test.qa` (`question TAB ['answer', ...]`) and `test.pages` (the title of
the right passage). Beside it may be `distractors_2wiki/passages.tsv`, passages that answer nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rag.errors import UserError
from rag.files import atomic_folder, read_lines, shown, write_lines

ROOT = Path(__file__).resolve().parent.parent
BESIDE_THE_CHECKOUT = ROOT.parent / "shared" / "data"
OWN = ROOT / "test_data"
QUESTIONS_FOLDER, DISTRACTORS_FOLDER = "nq_gold", "distractors_2wiki"
ORIGIN = (
    "nelson-liu/lost-in-the-middle on GitHub has the questions, qa_data/nq-open-oracle.jsonl.gz (text CC BY-SA 3.0); "
    "quickstart/questions.py says how a data folder is laid out"
)
NEEDED = (
    "train.source",
    "train.target",
    "val.source",
    "val.target",
    "test.source",
    "test.target",
    "test.qa",
    "test.pages",
)
OPTIONAL = ("train.qa", "val.qa")
TEST_QUESTIONS = 200  # the first ones: all 324 of nq_gold would take three minutes more
# Of a sample: questions of each split, and passages beside those that answer them.
SAMPLE = {"train": 4, "val": 2, "test": 5}
SAMPLED_PASSAGES = 20

Passages = list[tuple[str, str]]  # title and text of each


@dataclass
class QuestionData:
    """Attributes:
    folder: questions, as finetune_rag.py and eval_rag.py read them.
    passages: file in DPR's form, whose passages are taken as they are.
    """

    folder: Path
    passages: Path


def find_source(data_dir: str | None) -> Path:
    """The folder that questions come from; says so where it has to be the suite's own.

    Raises:
        UserError: `data_dir` lacks files.
    """
    if data_dir is None and not BESIDE_THE_CHECKOUT.is_dir():
        print("No --data_dir: the suite's own questions are taken; real ones: nelson-liu/lost-in-the-middle (--help)")
        return OWN
    source = BESIDE_THE_CHECKOUT if data_dir is None else Path(data_dir)
    names = [f"{QUESTIONS_FOLDER}/{name}" for name in ("passages.tsv", *NEEDED)]
    if missing := [name for name in names if not (source / name).is_file()]:
        raise UserError(f"--data_dir {source} lacks {', '.join(missing)}; {ORIGIN}")
    return source


def write_data(source: Path, dest: Path, sample: bool = False) -> QuestionData:
    """Write questions (of the test's the first) and passages of a source to `dest`, or with `sample` a few of them."""
    folder = source if source == OWN else source / QUESTIONS_FOLDER
    names = [*NEEDED, *(name for name in OPTIONAL if (folder / name).is_file())]
    questions = {name: read_lines(folder / name) for name in names}
    passages = own_passages() if source == OWN else read_real_passages(source)
    kept = SAMPLE if sample else {"test": TEST_QUESTIONS}
    questions = {name: lines[: kept.get(name.partition(".")[0])] for name, lines in questions.items()}
    if sample:
        passages = sample_passages(passages, set(questions["test.pages"]))
    with atomic_folder(dest) as half_made:
        for name, lines in questions.items():
            write_lines(lines, half_made / name)
        write_passages(passages, half_made / "passages.tsv")
    counts = ", ".join(f"{len(questions[f'{split}.source']):,} {split}" for split in SAMPLE)
    print(f"{shown(dest)}: {len(passages):,} passages and questions ({counts}) of {shown(source)}")
    return QuestionData(dest, dest / "passages.tsv")


def own_passages() -> Passages:
    from rag.knowledge.passages import read_passages

    return list(read_passages(OWN / "my_knowledge_dataset.csv"))


def read_real_passages(source: Path) -> Passages:
    """The passages that answer questions, and behind them the distractors."""
    passages = []
    for name in (QUESTIONS_FOLDER, DISTRACTORS_FOLDER):
        path = source / name / "passages.tsv"
        for number, line in enumerate(read_lines(path) if path.is_file() else (), start=1):
            fields = line.split("\t")
            if len(fields) != 3:
                raise UserError(
                    f"--data_dir {source}: {name}/passages.tsv line {number} has {len(fields)} columns; "
                    "`id TAB title TAB text` is expected"
                )
            passages.append((fields[1], fields[2]))
    return passages


def sample_passages(passages: Passages, titles: set[str]) -> Passages:
    """Those of the titles, and the first of the others."""
    others = [passage for passage in passages if passage[0] not in titles]
    return [passage for passage in passages if passage[0] in titles] + others[:SAMPLED_PASSAGES]


def write_passages(passages: Iterable[tuple[str, str]], path: Path) -> None:
    """In DPR's form: its header says that these are passages, which are not cut any more."""
    rows = (f"{number}\t{text}\t{title}" for number, (title, text) in enumerate(passages, start=1))
    write_lines(["id\ttext\ttitle", *rows], path)
