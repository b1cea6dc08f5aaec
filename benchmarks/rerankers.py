"""What rerankers are worth: precision and recall of what is found, before and after, and what they cost.

    python benchmarks/rerankers.py                # trains a CrossEncoder, then a line of the table each; half an hour
    python benchmarks/rerankers.py --short        # two steps, eight questions of test_data, two minutes

Passages of ../shared/data/nq_gold and distractors_2wiki are found by MiniLM read as a DPR encoder, exactly, the start
of `retriever_losses.py`, and by both it and BM25 (`--index_name hybrid`). Rerankers are SmolLM2-135M-Instruct as its
authors left it (upr), and a CrossEncoder, which no package at hand holds and which is therefore made here of MiniLM: it
learns from nq_gold's training questions and titles which of the passages that were found is the right one.
Each line of the table is a call of eval_rag.py; the seconds are its own, opening and searching included.
"""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import header
from benchmarks.retriever_losses import data_folder, index_of, line, make_start, measure
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.files import atomic_folder, read_lines, write_lines

FOUND = 10  # passages of a training question, of which one is right
GROUP = 5  # of these, the right one among them, that the CrossEncoder compares at a time
QUESTIONS = 8  # a step; asked, with --short
LEARNING_RATE = 5e-5


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "Two steps, eight questions, of test_data.")
    folder: Path = flag(Path("output/retriever_losses"), "Models, knowledge, predictions; retriever_losses.py's.")
    steps: int = flag(250, "Of the CrossEncoder's training, of 8 questions.")
    depths: list[int] = flag([20, 50], "--rerank_depth of the CrossEncoder; upr's is the first.")
    seed: int = flag(42, "Of the CrossEncoder's training.")

    def __post_init__(self):
        if self.short:
            self.steps, self.folder, self.depths = 2, self.folder / "short", [20]


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


# --- A CrossEncoder ---------------------------------------------------------------------------------------------------


def make_cross_encoder(
    folder: Path, records: list[dict], gold: list[str], knowledge: Path, steps: int, seed: int
) -> None:
    """Train MiniLM to put the passage with the right title first: softmax over one right and four wrong ones."""
    import torch
    from datasets import load_from_disk
    from transformers import AutoTokenizer, BertForSequenceClassification

    from quickstart.weights import minilm_folder
    from rag.progress import progress
    from rag.retrieval.reranking import text_of

    torch.manual_seed(seed)
    draw = random.Random(seed)
    passages = load_from_disk(str(knowledge / "my_knowledge_dataset"))
    model = BertForSequenceClassification.from_pretrained(minilm_folder(), num_labels=1).train()
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    groups = []
    for record, title in zip(records, gold, strict=True):
        docs, titles = record["doc_ids"][:FOUND], record["titles"][:FOUND]
        right = [doc for doc, found in zip(docs, titles, strict=True) if found == title]
        wrong = [doc for doc in docs if doc not in right]
        if right and len(wrong) >= GROUP - 1:
            groups.append((record["question"], [right[0], *draw.sample(wrong, GROUP - 1)]))
    for _ in progress(range(steps), steps, "CrossEncoder", "steps"):
        batch = draw.sample(groups, QUESTIONS)
        rows = [passages[doc] for _, docs in batch for doc in docs]
        questions = [question for question, docs in batch for _ in docs]
        texts = [text_of(row["title"], row["text"]) for row in rows]
        tokens = tokenizer(questions, texts, max_length=256, truncation=True, padding=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**tokens).logits
        loss = -logits.float().view(QUESTIONS, GROUP).log_softmax(1)[:, 0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with atomic_folder(folder) as half_written:
        model.save_pretrained(half_written)
        tokenizer.save_pretrained(half_written)


# --- The table --------------------------------------------------------------------------------------------------------


def few_questions(data: Path, folder: Path) -> Path:
    """A folder with the first test questions alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("test.source", "test.pages"):
        write_lines(read_lines(data / name)[:QUESTIONS], folder / name)
    return folder


def main(args: BenchmarkArguments) -> None:
    data, files = data_folder(args.short)
    checkpoint, knowledge = make_start(args.folder, files, args.short)
    index = index_of(knowledge)
    cross_encoder = args.folder / f"cross_encoder_{args.steps}_{args.seed}"
    if not cross_encoder.exists():
        split = "test" if args.short else "train"  # test_data has no other titles
        measure(f"{split}_found", checkpoint, data, index, args.folder, split)
        records = [json.loads(record) for record in read_lines(args.folder / f"{split}_found.tsv.jsonl")]
        gold = read_lines(data / f"{split}.pages")
        make_cross_encoder(cross_encoder, records, gold, knowledge, args.steps, args.seed)
    if args.short:
        data = few_questions(data, args.folder / "questions")
    print(header("torch", "transformers", "faiss-cpu"))
    print("\n| | precision@1 | recall@5 | recall@20 | MRR | s a question |\n|---|---|---|---|---|---|")
    for found, kind in (("vectors", {}), ("vectors and words", {"index_name": "hybrid"})):
        rerankers = {"": {}} | {
            f", CrossEncoder of {depth}": {"reranker": cross_encoder, "rerank_depth": depth} for depth in args.depths
        }
        rerankers[f", upr of {args.depths[0]}"] = {"reranker": "upr", "rerank_depth": args.depths[0]}
        for told, reranker in rerankers.items():
            name = f"{found}{told}"
            began = time.monotonic()
            flags = index | kind | reranker | {"precision": "auto"}
            scores = measure(name.replace(",", "").replace(" ", "_"), checkpoint, data, flags, args.folder)
            seconds = (time.monotonic() - began) / scores["questions"]
            print(f"{line(name, scores)} {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    run_script(parse_args, main)
