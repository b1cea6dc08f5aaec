"""Passages to vectors: ours beside the public way, and memory that does not grow with the documents.

    python benchmarks/embedding.py --short      # small encoder, under a minute
    python benchmarks/embedding.py              # DPR-base size: five minutes for the speed, three for the memory

The public way: `DPRContextEncoder` over batches of 16 in the order of the file, each padded to its longest. Ours sorts
2,048 passages (a shard) by length, cuts them into batches by their tokens and reads these without padding. Passages are
those of ../shared/data/nq_gold (of test_data where it is missing), the tokenizer is BERT's, weights are random. Padding
is counted over all passages, without encoding them; speed over the first --passages, in turns of a quarter each, the
public way in float32, ours in --precision. Memory is the peak of a process that runs use_own_knowledge_dataset.py on
texts of 30 words with an encoder of 64 dimensions (VmHWM, so mapped files count, too).
"""

import copy
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.index_kinds import passages_of, real_passages
from benchmarks.machine import header, status_mib
from benchmarks.training_step import make_tokenizer
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.files import save_json

ROOT = Path(__file__).resolve().parent.parent
PUBLIC_BATCH = 16
TINY = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "Two layers, 128 passages; 2,000 and 8,000 for memory.")
    folder: Path = flag(Path("output/embedding"), "Where it is built; removed at the end.")
    passages: int = flag(1024, "Passages that are encoded to measure the speed; 0: none.")
    precision: Literal["auto", "fp32", "bf16"] = flag("fp32", "As use_own_knowledge_dataset.py's, on this CPU.")
    tokens_per_batch: int | None = flag(None, "As use_own_knowledge_dataset.py's.")
    counts: list[int] = flag([50_000, 200_000], "Passages of which memory is measured; 0: none.")

    def __post_init__(self):
        if self.short:
            self.passages, self.counts = 128, [2_000, 8_000]
        self.counts = [count for count in self.counts if count]


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


def make_encoder(**sizes):
    """A DPR context encoder of random weights, DPR-base's size unless told otherwise, and BERT's tokenizer."""
    import torch
    from transformers import DPRConfig, DPRContextEncoder

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    return DPRContextEncoder(DPRConfig(vocab_size=len(tokenizer), **sizes)).eval(), tokenizer


# --- Speed ------------------------------------------------------------------------------------------------------------


def public_way(encoder, tokenizer, passages):
    """Vectors (n, d) in the order of the file."""
    import numpy as np
    import torch

    vectors = []
    with torch.no_grad():
        for start in range(0, len(passages), PUBLIC_BATCH):
            titles, texts = map(list, zip(*passages[start : start + PUBLIC_BATCH], strict=True))
            tokens = tokenizer(titles, texts, truncation=True, padding="longest", return_tensors="pt")
            ids = tokens["input_ids"].to(encoder.device)
            vectors.append(encoder(ids, return_dict=True).pooler_output.cpu().numpy())
    return np.concatenate(vectors)


def our_way(embedder, passages):
    """The same vectors."""
    import numpy as np

    vectors = np.empty((len(passages), embedder.dimension), dtype=np.float32)
    for rows, batch in embedder(passages):
        vectors[rows] = batch
    return vectors


def public_padding(tokenizer, passages) -> float:
    """The share of the encoded tokens that is padding, with batches of 16 in the order of the file."""
    import numpy as np

    lengths = np.array(
        [len(ids) for ids in tokenizer(*map(list, zip(*passages, strict=True)), truncation=True).input_ids]
    )
    batches = np.split(lengths, range(PUBLIC_BATCH, len(lengths), PUBLIC_BATCH))
    return 1 - lengths.sum() / sum(len(batch) * batch.max() for batch in batches)


def our_padding(embedder, passages) -> float:
    """The same of our batches: the tokens that an encoder is given, without encoding them."""
    batches = embedder.batches(passages)
    sizes = [(batch.lengths.sum(), batch.inputs["input_ids"].numel()) for batch in batches]
    real, encoded = map(sum, zip(*sizes, strict=True))
    return 1 - real / encoded


def compare_speed(args) -> dict:
    import numpy as np

    from rag.knowledge.embedding import PassageEmbedder
    from rag.models.precision import dtype_of, name_of

    encoder, tokenizer = make_encoder(**({"num_hidden_layers": 2} if args.short else {}))
    passages = real_passages()
    precision = dtype_of(args.precision, "cpu")
    embedder = PassageEmbedder(
        copy.deepcopy(encoder), tokenizer, device="cpu", precision=precision, tokens_per_batch=args.tokens_per_batch
    )
    wasted = {"public": public_padding(tokenizer, passages), "ours": our_padding(embedder, passages)}
    print(f"ours: {name_of(precision)}, {embedder.tokens_per_batch:,} tokens a batch\n")
    ways = {
        "public": lambda part: public_way(encoder, tokenizer, part),
        "ours": lambda part: our_way(embedder, part),
    }
    seconds, largest = {"public": [], "ours": []}, 0.0
    for way in ways.values():
        way(passages[: 2 * PUBLIC_BATCH])
    for part in np.array_split(np.arange(args.passages), 4):
        part, vectors = [passages[i] for i in part], {}
        for name, way in ways.items():
            start = time.perf_counter()
            vectors[name] = way(part)
            seconds[name].append(time.perf_counter() - start)
        difference = np.abs(vectors["ours"] - vectors["public"]).max() / np.abs(vectors["public"]).max()
        largest = max(largest, float(difference))
    speed = {name: args.passages / sum(times) for name, times in seconds.items()}
    print("| way | passages/s | padding |\n|---|---|---|")
    for name in ways:
        print(f"| {name} | {speed[name]:.2f} | {100 * wasted[name]:.1f}% |")
    turns = ", ".join(f"{public / ours:.2f}" for public, ours in zip(seconds["public"], seconds["ours"], strict=True))
    print(
        f"\nours / public: {speed['ours'] / speed['public']:.2f}x (turns: {turns}); largest difference of a coordinate "
        f"{largest:.1e} of the largest coordinate\n",
        flush=True,
    )
    return {"passages_per_second": speed, "padding": wasted, "largest_difference": largest}


# --- Memory -----------------------------------------------------------------------------------------------------------


def peak_of_building(args, count: int) -> dict:
    """MiB at most of a process that makes knowledge of `count` passages, and of their index."""
    documents, output = args.folder / f"{count}.tsv", args.folder / str(count)
    with open(documents, "w", encoding="utf-8") as file:
        for number, (title, text) in enumerate(passages_of(count)):
            file.write(f"{title}\t{' '.join(text.split()[:29])} {number}\n")
    command = [
        sys.executable, str(ROOT / "use_own_knowledge_dataset.py"), "--csv_path", str(documents), "--output_dir",
        str(output), "--dpr_ctx_encoder_model_name", str(args.folder / "encoder"), "--precision", args.precision,
    ]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = allocated = 0.0
    while process.poll() is None:
        try:
            peak, allocated = (
                max(peak, status_mib("VmHWM", process.pid)),
                max(allocated, status_mib("RssAnon", process.pid)),
            )
        except (FileNotFoundError, ProcessLookupError, IndexError):  # it has just ended
            break
        time.sleep(0.05)
    assert process.wait() == 0
    index = (output / "my_knowledge_dataset_hnsw_index.faiss").stat().st_size / 2**20
    return {
        "passages": count, "peak_mib": peak, "allocated_mib": allocated, "index_mib": index,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def compare_memory(args) -> list[dict]:
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    encoder, tokenizer = make_encoder(**TINY)
    encoder.save_pretrained(args.folder / "encoder")
    tokenizer.save_pretrained(args.folder / "encoder")
    print("| passages | peak, MiB (allocated) | index, MiB | s |\n|---|---|---|---|")
    rows = []
    for count in args.counts:
        row = peak_of_building(args, count)
        rows.append(row)
        print(
            f"| {count:,} | {row['peak_mib']:,.0f} ({row['allocated_mib']:,.0f}) | {row['index_mib']:,.0f} | "
            f"{row['seconds']:.0f} |",
            flush=True,
        )
    few, many = rows[0], rows[-1]
    allowed = 1.2 * few["peak_mib"] + many["index_mib"]
    print(
        f"\n{many['peak_mib']:,.0f} MiB of 1.2 x {few['peak_mib']:,.0f} + {many['index_mib']:,.0f} = {allowed:,.0f} MiB"
    )
    shutil.rmtree(args.folder)
    return rows


def main(args: BenchmarkArguments) -> dict:
    print(f"{header('torch', 'transformers', 'faiss-cpu')}\n")
    results = {}
    if args.passages:
        results["speed"] = compare_speed(args)
    if args.counts:
        results["memory"] = compare_memory(args)
    save_json(results, args.folder.with_name(f"{args.folder.name}.json"))
    return results


if __name__ == "__main__":
    run_script(parse_args, main)
