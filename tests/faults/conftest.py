"""The tiny world of the faults: models, knowledge, questions, documents, and the flags that use them rightly."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import PASSAGES, QUESTIONS
from tests.evaluation.report_files import write_evaluation, write_run


@dataclass
class World:
    """Attributes:
    folder: what all cases read and none may change.
    flags: by script, those of a run that works; "{out}" is the case's own folder.
    """

    folder: Path
    flags: dict[str, dict]

    def flags_of(self, script: str, out: Path, changes: dict) -> dict:
        """The flags of a run that works, with changes."""
        both = self.flags[script] | changes
        return {flag: self._filled(value, out) for flag, value in both.items()}

    def _filled(self, value, out: Path):
        if isinstance(value, list):
            return [self._filled(one, out) for one in value]
        if not isinstance(value, str):
            return value
        return value.replace("{world}", str(self.folder)).replace("{out}", str(out))


@pytest.fixture(scope="session")
def world(
    checkpoint, knowledge, bart_folder, llama, llama_tokenizer, llama_folder, question_encoder_folder,
    context_encoder_folder, tmp_path_factory,
):  # fmt: skip
    folder = tmp_path_factory.mktemp("faults") / "world"
    for source, name in (
        (llama_folder, "llama"), (checkpoint("rag_sequence", "llama"), "llama_rag"),
        (checkpoint(), "rag"), (checkpoint("rag_token"), "rag_token"), (bart_folder, "generator"),
        (question_encoder_folder, "question_encoder"), (context_encoder_folder, "context_encoder"),
        (knowledge["passages_path"], "passages"),
    ):  # fmt: skip
        shutil.copytree(source, folder / name)
    shutil.copy(knowledge["index_path"], folder / "index.faiss")
    for name in ("rag", "rag_token", "llama_rag"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        config |= {"passages_path": str(folder / "passages"), "index_path": str(folder / "index.faiss")}
        path.write_text(json.dumps(config))
    save_adapters_of(folder / "llama_rag", folder / "llama_lora")
    data = folder / "data"
    data.mkdir()
    for split in ("train", "val", "test"):
        (data / f"{split}.source").write_text("".join(f"{question}\n" for question, _ in QUESTIONS))
        (data / f"{split}.target").write_text("".join(f"{answer}\n" for _, answer in QUESTIONS))
    named = folder / "named"
    named.mkdir()
    for split in ("train", "validation"):
        records = [{"question": question, "answers": [answer]} for question, answer in QUESTIONS]
        (named / f"{split}.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "gold.qa").write_text("".join(f"{question}\t{[answer]}\n" for question, answer in QUESTIONS))
    (folder / "titles").write_text("".join(f"{answer}\n" for _, answer in QUESTIONS))
    (folder / "documents.tsv").write_text("".join(f"{title}\t{text}\n" for title, text in PASSAGES * 2))
    records = [{"question": question, "positive_ctxs": [{"title": answer}]} for question, answer in QUESTIONS]
    (folder / "dpr.json").write_text(json.dumps(records))
    write_other_records(folder)
    return World(folder, FLAGS)


def write_other_records(folder: Path) -> None:
    """An evaluation and a training for a report, passages of another system, KILT's gold."""
    write_evaluation(folder / "answers.txt", folder / "gold.qa", accuracy=0.5)
    write_run(folder / "run")
    texts = dict(PASSAGES)
    found = [
        {"question": q, "titles": [a, "x"], "texts": [texts[a], "a river"], "scores": [2, 1]} for q, a in QUESTIONS
    ]
    kilt = [{"id": a, "input": q, "output": [{"answer": a, "provenance": [{"title": a}]}]} for q, a in QUESTIONS]
    for name, records in (("found.jsonl", found), ("kilt.jsonl", kilt)):
        (folder / name).write_text("".join(f"{json.dumps(record)}\n" for record in records))


def save_adapters_of(base: Path, folder: Path) -> None:
    """What a run with LoRA exports that starts from a RAG checkpoint."""
    from rag.models.adapters import LoraPlan, add_adapters
    from rag.models.bases import base_of, save_learned
    from rag.models.checkpoints import load_model, load_tokenizer

    model = load_model(str(base))
    model.requires_grad_(False)
    add_adapters(model.generator, LoraPlan(r=2, alpha=4))
    folder.mkdir()
    save_learned(model, folder, base_of(str(base)))
    model.generation_config.to_json_file(folder / "generation_config.json")
    load_tokenizer(str(base)).save_pretrained(folder)


FLAGS = {
    "eval_rag.py": {
        "--model_name_or_path": "{world}/rag", "--evaluation_set": "{world}/data/test.source",
        "--gold_data_path": "{world}/gold.qa", "--predictions_path": "{out}/out/p.txt", "--n_docs": 2, "--num_beams": 2,
        "--max_length": 5,
    },
    "finetune_rag.py": {
        "--model_name_or_path": "{world}/rag", "--data_dir": "{world}/data", "--output_dir": "{out}/out",
        "--num_workers": 0, "--num_train_epochs": 1, "--train_batch_size": 4, "--max_steps": 2, "--n_docs": 2,
        "--val_max_target_length": 5, "--test_max_target_length": 5, "--n_val": 4, "--n_test": 4,
        "--accelerator": "cpu",
    },
    "use_own_knowledge_dataset.py": {
        "--csv_path": "{world}/documents.tsv", "--dpr_ctx_encoder_model_name": "{world}/context_encoder",
        "--output_dir": "{out}/out", "--m": 4, "--recall_queries": 4, "--n_docs": 2,
    },
    "consolidate_rag_checkpoint.py": {
        "--generator_name_or_path": "{world}/generator", "--question_encoder_name_or_path": "{world}/question_encoder",
        "--dest": "{out}/out/rag", "--model_type": "rag_sequence",
    },
    "parse_dpr_relevance_data.py": {
        "--src_path": "{world}/dpr.json", "--evaluation_set": "{out}/out/q.txt", "--gold_data_path": "{out}/out/titles",
    },
    "report_rag.py": {
        "--output_path": "{out}/out/report.html", "--predictions_path": "{world}/answers.txt",
        "--run_dir": "{world}/run", "--gold_data_path": "{world}/gold.qa",
    },
}  # fmt: skip
