"""What a retriever learns from answers alone: --retriever_loss of each kind, from the same start, on the same data.

    python benchmarks/retriever_losses.py              # four losses, a ceiling, two of both encoders: an hour
    python benchmarks/retriever_losses.py --losses emdr2 emdr2+context --seeds 42 43 44
    python benchmarks/retriever_losses.py --fid        # all five losses, taught by a Fusion-in-Decoder
    python benchmarks/retriever_losses.py --short      # two steps of each on test_data, a minute

A question encoder that finds too little, MiniLM read as a DPR encoder (its first token's vector, inner product), is
trained by the answers of ../shared/data/nq_gold over its passages and those of distractors_2wiki, which are searched
exactly, or as --index_factory says. What teaches is SmolLM2-135M-Instruct as its authors left it: it stays as it is,
and so do the passages' vectors but in trainings of both encoders. The ceiling is the same training with labels: the
teacher is sure of the passages with the gold page's title. Each training is a call of finetune_rag.py, in which the
teacher is asked about a question and a passage once for all of them; each line of the table is a call of eval_rag.py; a
gold page a question, so that recall@k is k times precision@k. What is finished is found again.

With --fid the teacher is a Fusion-in-Decoder, whose attention adist needs. None that is pretrained is at hand: the
quickstart's BART made of MiniLM learns from the same training questions first to answer from one passage, then from
five.
"""

import gc
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.machine import header
from quickstart.__main__ import FINETUNING, make_models
from quickstart.weights import make_language_model
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.errors import UserError
from rag.files import json_digest, read_lines, save_json
from rag.knowledge.contents import knowledge_in, read_knowledge

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
START, CEILING = "start", "gold"
BOTH = "+context"  # behind a loss: the context encoder learns, too, and all passages are embedded anew at the end
LOSSES = ["emdr2", "pdist", "lsr", "loop", CEILING, f"emdr2{BOTH}", f"pdist{BOTH}"]
FUSION_LOSSES = ["emdr2", "pdist", "lsr", "loop", "adist", CEILING]
CONTEXT_LEARNING_RATE = 2e-5
Judgments = dict[str, float]  # "question passage", by their numbers: log p(y|x,z), nats
CERTAIN = 30.0  # nats by which the ceiling's teacher prefers the passages with the right title
TRAINING = {
    "n_docs": 5,
    "train_batch_size": 8,
    "learning_rate": 1e-4,
    "warmup_steps": 10,
    "freeze_generator": True,
    "max_source_length": 48,
    "max_target_length": 16,
    "val_max_target_length": 4,
    "n_val": 2,  # nothing is chosen by them
    "num_sanity_val_steps": 0,
    "num_workers": 0,
    "precision": "auto",
    "log_every_n_steps": 10,
}
READING = FINETUNING | {"train_batch_size": 16, "n_docs": 1, "max_steps": 250, "n_val": 2}
FUSED_READING = READING | {"train_batch_size": 8, "n_docs": 5, "model_type": "fid"}


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "Two steps of each on test_data.")
    folder: Path = flag(Path("output/retriever_losses"), "Models, knowledge, trainings.")
    index_factory: str = flag("Flat", "What the passages are searched by; each in a --folder of its own.")
    fid: bool = flag(False, "The teacher is a Fusion-in-Decoder, trained first, in the place of the language model.")
    losses: list[str] | None = flag(
        None, f"Which to train by; gold is the ceiling, {BOTH} trains both encoders; left out, those of a table."
    )
    steps: int = flag(120, "Of each training, of 8 questions.")
    seeds: list[int] = flag([42], "Each loss trains once with each.")
    flags: str = flag("{}", "More settings of finetune_rag.py, as JSON; other lengths in a --folder of their own.")

    def __post_init__(self):
        self.losses = self.losses or (FUSION_LOSSES if self.fid else LOSSES)
        if self.short:
            self.steps, self.folder = 2, self.folder / "short"
            # test_data has no labels to train by
            self.losses = [loss for loss in self.losses if not loss.startswith(CEILING)]


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


# --- The start --------------------------------------------------------------------------------------------------------


def data_folder(short: bool) -> tuple[Path, list[Path]]:
    """Questions, and the files of passages (id, title, text; of test_data title and text)."""
    if short:
        return ROOT / "test_data", [ROOT / "test_data" / "my_knowledge_dataset.csv"]
    files = [SHARED / name / "passages.tsv" for name in ("nq_gold", "distractors_2wiki")]
    if not all(file.exists() for file in files):
        raise UserError(f"the questions of {SHARED} are not here; --short does with those of test_data")
    return SHARED / "nq_gold", files


def make_start(folder: Path, files: list[Path], short: bool, index_factory: str = "Flat") -> tuple[Path, Path]:
    """The checkpoint that every training starts from, and the knowledge it searches."""
    models, checkpoint, knowledge = folder / "models", folder / "checkpoint", folder / "knowledge"
    make_models(models)
    make_language_model(models / "language_model")
    if not (knowledge / "index.json").exists():
        passages = folder / "passages.tsv"
        lines = [line for file in files for line in read_lines(file)]
        passages.parent.mkdir(parents=True, exist_ok=True)
        rows = lines[:200] if short else [line.split("\t", 1)[1] for line in lines]
        passages.write_text("".join(f"{row}\n" for row in rows), "utf-8")
        script(
            "use_own_knowledge_dataset", folder / "knowledge.json", csv_path=passages, csv_quoting="none",
            dpr_ctx_encoder_model_name=models / "context_encoder", output_dir=knowledge, index_factory=index_factory,
            recall_queries=0,
        )  # fmt: skip
    make_checkpoint(models, "language_model", checkpoint)
    return checkpoint, knowledge


def make_checkpoint(models: Path, generator: str, dest: Path) -> None:
    """A RAG-Sequence of the question encoder and one of the generators in `models`, unless it is there."""
    if not dest.exists():
        script(
            "consolidate_rag_checkpoint", dest.with_suffix(".json"), model_type="rag_sequence", dest=dest,
            question_encoder_name_or_path=models / "question_encoder", generator_name_or_path=models / generator,
        )  # fmt: skip


def make_fusion(folder: Path, data: Path, **flags: Any) -> Path:
    """A Fusion-in-Decoder that has learned to answer, its question encoder as it was.

    Args:
        flags: the index, and what a short training has of its own.
    """
    checkpoint = folder / "bart"
    make_checkpoint(folder / "models", "generator", checkpoint)
    for name, settings in (("one_passage", READING), ("fused", FUSED_READING)):
        trained = folder / name
        if not list(trained.glob("checkpoint?")):
            paths = {"model_name_or_path": checkpoint, "data_dir": data, "output_dir": trained}
            script("finetune_rag", folder / f"{name}.json", **settings | paths | flags)
        checkpoint = next(trained.glob("checkpoint?"))
    return checkpoint


def as_plain(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags as JSON has them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}


def script(name: str, settings: Path, **flags: Any) -> None:
    """Run a script in a process of its own, what it prints beside its settings."""
    save_json(as_plain(flags), settings)
    words = [sys.executable, f"{name}.py", "--config_file", str(settings)]
    with settings.with_suffix(".log").open("w") as log:
        if subprocess.run(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise UserError(f"{name} failed: see {log.name}")


# --- Training ---------------------------------------------------------------------------------------------------------


def remembering_module(known: Judgments, pages: list[str] | None) -> type:
    """A `GenerativeQAModule` whose teacher is asked about a question and a passage once, whatever it then teaches.

    The generator is frozen and works without dropout: it says the same each time. A Fusion-in-Decoder, whose passages
    are read together, is asked each time.

    Args:
        pages: the title of each training question's gold page, in the place of the generator; None to ask that.
    """
    import torch

    from rag.generation.forward import answer_states, output_layer
    from rag.generation.logprobs import target_logprobs
    from rag.packing import to_device
    from rag.training.qa_module import GenerativeQAModule
    from rag.training.retriever_loss import Teacher

    gold = pages or []

    class Remembering(GenerativeQAModule):
        def negative_log_likelihood(self, batch, label_smoothing=0.0, note_teacher=None):
            if note_teacher is None or (self.is_fused and not pages):  # validation, or nothing to remember
                return super().negative_log_likelihood(batch, label_smoothing, note_teacher)
            contexts = self._retrieve(batch)
            pairs = [
                f"{i} {doc}" for i, docs in zip(batch["index"], contexts.doc_ids.tolist(), strict=True) for doc in docs
            ]
            judged = self._by_labels(batch, contexts) if pages else self._by_generator(batch, contexts, pairs)
            lengths = torch.ones(len(judged)) if pages else to_device(batch["decoder_lengths"], self.device)
            note_teacher(Teacher(judged.unsqueeze(-1), lengths, per_token=False))
            return contexts.doc_scores.new_zeros(len(judged)), contexts

        @torch.no_grad()
        def _by_generator(self, batch, contexts, pairs):
            n_docs = contexts.doc_scores.shape[1]
            new = [place for place, pair in enumerate(pairs) if pair not in known]
            if new:
                rows = torch.tensor(new)
                inputs, targets = (batch[f"decoder_{name}"][rows // n_docs] for name in ("input_ids", "targets"))
                lengths = batch["decoder_lengths"][rows.numpy() // n_docs]
                hidden, answers = answer_states(
                    self.generator, contexts.input_ids[rows], contexts.attention_mask[rows], inputs,
                    decoder_lengths=lengths,
                )  # fmt: skip
                found, _ = target_logprobs(hidden, *output_layer(self.generator), targets, answers)
                found = found.masked_fill(targets == self.generator.config.pad_token_id, 0.0).sum(1)
                known.update(zip([pairs[place] for place in new], found.tolist(), strict=True))
            return torch.tensor([known[pair] for pair in pairs]).view(-1, n_docs)

        def _by_labels(self, batch, contexts):
            titles = [docs["title"] for docs in contexts.docs]
            right = [[title == gold[i] for title in row] for i, row in zip(batch["index"], titles, strict=True)]
            is_right = torch.tensor(right)
            # Of a question whose right passage was not found nothing is known: its teacher is the retriever itself.
            unknown = contexts.doc_scores.detach().log_softmax(1)
            return torch.where(is_right.any(1, keepdim=True), -CERTAIN * ~is_right, unknown)

    return Remembering


def train(loss: str, folder: Path, data: Path, **flags: Any) -> Path:
    """What finetune_rag.py trains, with what the teacher has said before; the trained checkpoint."""
    import finetune_rag
    from rag.training import qa_module

    if not list(folder.glob("checkpoint?")):
        judgments = folder.parent / "judgments.json"
        known: Judgments = json.loads(judgments.read_text()) if judgments.exists() else {}
        settings = folder.with_suffix(".json")
        teacher = loss.removesuffix(BOTH)
        words = {"data_dir": data, "output_dir": folder, "retriever_loss": "pdist" if teacher == CEILING else teacher}
        if loss.endswith(BOTH):
            encoder = folder.parent / "models" / "context_encoder"
            words |= {"train_context_encoder": True, "context_encoder_name_or_path": encoder}
            words |= {"context_encoder_learning_rate": CONTEXT_LEARNING_RATE}
        save_json(as_plain(words | flags), settings)
        pages = read_lines(data / "train.pages") if teacher == CEILING else None
        with patch.object(qa_module, "GenerativeQAModule", remembering_module(known, pages)):
            finetune_rag.main(finetune_rag.parse_args(["--config_file", str(settings)]))
        save_json(known, judgments)
        gc.collect()  # the module is in circles, and would stay beside the next one
    return next(folder.glob("checkpoint?"))


def index_of(knowledge: Path) -> dict[str, str]:
    """The flags that open the index of a folder of knowledge."""
    return knowledge_in(knowledge, read_knowledge(knowledge)).flags


# --- The table --------------------------------------------------------------------------------------------------------


def measure(
    name: str, checkpoint: Path, data: Path, index: dict[str, Any], folder: Path, split: str = "test"
) -> dict[str, Any]:
    """What eval_rag.py leaves beside its predictions."""
    predictions = folder / f"{name}.tsv"
    script(
        "eval_rag", folder / f"{name}.json", eval_mode="retrieval", model_name_or_path=checkpoint,
        evaluation_set=data / f"{split}.source", gold_data_path=data / f"{split}.pages", predictions_path=predictions,
        k=[1, 5, 20], **index,
    )  # fmt: skip
    return json.loads(Path(f"{predictions}.scores.json").read_text())


def line(name: str, scores: dict[str, Any]) -> str:
    def cell(measure: str, times: int) -> str:
        low, high = (100 * times * value for value in scores["intervals"][measure])
        return f"{100 * times * scores['scores'][measure]:.1f} [{low:.1f}, {high:.1f}]"

    cells = [cell(f"precision_at_{k}", k) for k in (1, 5, 20)] + [cell("mrr", 1)]
    return f"| {name} | {' | '.join(cells)} |"


def main(args: BenchmarkArguments) -> None:
    data, files = data_folder(args.short)
    checkpoint, knowledge = make_start(args.folder, files, args.short, args.index_factory)
    index = index_of(knowledge)
    print(header("torch", "transformers", "faiss-cpu"))
    print(f"\n{args.steps} steps, {args.flags}\n")
    print("| | precision@1 | recall@5 | recall@20 | MRR |\n|---|---|---|---|---|")
    print(line(START, measure(START, checkpoint, data, index, args.folder)), flush=True)
    if args.fid:
        checkpoint = make_fusion(args.folder, data, **index, **({"max_steps": args.steps} if args.short else {}))
    flags = TRAINING | index | {"model_name_or_path": checkpoint, "max_steps": args.steps}
    more = json.loads(args.flags)
    told = f"_{json_digest(more)[:8]}" if more else ""
    for loss, seed in product(args.losses, args.seeds):
        name = f"{'fid_' if args.fid else ''}{loss}_{args.steps}_{seed}{told}"
        trained = train(loss, args.folder / name, data, seed=seed, **flags | more)
        searched = index_of(args.folder / name / "knowledge") if loss.endswith(BOTH) else index
        measured = measure(f"{name}_test", trained, data, searched, args.folder)
        print(line(f"{loss}, seed {seed}", measured), flush=True)


if __name__ == "__main__":
    run_script(parse_args, main)
