"""What a training step moves between GPUs: predicted for 1, 8 and 64 of them, counted on 2 and 4 ranks of this machine.

    python benchmarks/scaling.py --short    # 20 seconds on two cores
    python benchmarks/scaling.py            # the same with an accumulated step more, and BART-base's bytes reduced, too

Nothing is timed. BART-large and a DPR question encoder are made without memory (torch's meta device): their parameters
are exact, and the products of a step are counted as torch dispatches them. Times follow from the rates among the flags:
those of an H100 as measured (../shared/gpu/README.md), of NVLink and InfiniBand as sold. The counts are of
DistributedDataParallel's own buckets, and of the messages that a `RagPyTorchDistributedRetriever` sends.
"""

import multiprocessing
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.machine import header
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script

FORK_SERVER = multiprocessing.get_context("forkserver")
FLOAT, ID = 4, 8  # bytes
NODE = 8  # GPUs, each with a network adapter of its own


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "Count one step of each kind, of a small generator.")
    gpus: list[int] = flag([1, 8, 64], "Numbers of GPUs to predict.")
    ranks: list[int] = flag([2, 4], "Numbers of ranks to count on.")
    batch_size: int = flag(16, "Questions a GPU.")
    n_docs: int = flag(5, "Passages a question.")
    context_tokens: int = flag(122, "Tokens of a context, as nq_gold's are in the mean.")
    question_tokens: int = flag(12, "Tokens of a question.")
    answer_tokens: int = flag(8, "Tokens of an answer.")
    shares: list[float] = flag([0.3, 0.4], "Shares of the peak that a step reaches on one GPU.")
    peak: float = flag(780e12, "bfloat16 products of a GPU, FLOP/s.")
    memory: float = flag(3e12, "What a GPU reads of its memory, bytes/s.")
    nvlink: float = flag(450e9, "What a GPU sends inside a node, bytes/s.")
    network: float = flag(50e9, "What a GPU's adapter sends to other nodes, bytes/s: 400 Gb/s.")
    passages: int = flag(21_015_300, "Passages of the index, float16 on a GPU.")
    folder: Path = flag(Path("output/retrieval_backends"), "Where a small index is kept.")


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


# --- What is moved ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """The questions that a rank asks at a time, and what is found."""

    number: int
    n_docs: int
    dimension: int

    def bytes_out(self, room: int | None = None) -> int:
        """Of one rank's messages to rank 0: how many questions and passages, and the vectors.

        Args:
            room: questions that the first message has room for, those of the retrieval before; left out, as many.
        """
        room = self.number if room is None else room
        vectors = room + (self.number if self.number > room else 0)
        return 2 * ID + vectors * self.dimension * FLOAT

    def bytes_back(self, with_vectors: bool) -> int:
        """Of rank 0's answer to one rank: how it went, the ids, and vectors where only rank 0 has them."""
        ids = 2 * ID + self.number * self.n_docs * ID
        return ids + (len("vectors follow") + self.number * self.n_docs * self.dimension * FLOAT) * with_vectors


def ring_bytes(ranks: int, size: int) -> float:
    """What each rank sends where all get the sum of `size` bytes of each (Patarasuk and Yuan 2009)."""
    return 2 * (ranks - 1) / ranks * size


def sharded_bytes(ranks: int, layers: int, rest: int) -> float:
    """What each rank sends in a step of `--strategy fsdp`, of parameters in layers and of the rest, which is gathered
    once: a layer's weights forward, again backward, and every gradient."""
    return (ranks - 1) / ranks * FLOAT * (3 * layers + 2 * rest)


# --- The model, without memory ----------------------------------------------------------------------------------------


@dataclass
class Step:
    """What a step on one GPU takes."""

    parameters: int  # that learn
    in_layers: int  # of them in transformer layers
    last: int  # of them in word embeddings, whose gradients are the last to be ready
    flop: int


def count_step(args: BenchmarkArguments, encoder_learns: bool) -> Step:
    """BART-large, whose contexts have no padding, and a DPR question encoder."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BartConfig, BartForConditionalGeneration, DPRConfig, DPRQuestionEncoder

    with torch.device("meta"):
        bart = BartForConditionalGeneration(BartConfig(vocab_size=50265, attn_implementation="eager"))
        encoder = DPRQuestionEncoder(DPRConfig(attn_implementation="eager")).requires_grad_(encoder_learns)
        contexts = args.batch_size * args.n_docs
        context_ids = torch.zeros(contexts, args.context_tokens, dtype=torch.long)
        answer_ids = torch.zeros(contexts, args.answer_tokens, dtype=torch.long)
        question_ids = torch.zeros(args.batch_size, args.question_tokens, dtype=torch.long)
        # In the form that attention adds: another one would be looked at, which has no values here.
        no_padding = torch.zeros(args.batch_size, 1, args.question_tokens, args.question_tokens)
    with FlopCounterMode(display=False) as counter:
        vectors = encoder(question_ids, attention_mask=no_padding)[0]
        logits = bart(input_ids=context_ids, decoder_input_ids=answer_ids, use_cache=False).logits
        (logits.sum() + vectors.sum()).backward()
    learning = [weight for part in (bart, encoder) for weight in part.parameters() if weight.requires_grad]
    lists = [bart.get_encoder().layers, bart.get_decoder().layers, encoder.question_encoder.bert_model.encoder.layer]
    tables = [bart.get_input_embeddings().weight, encoder.question_encoder.bert_model.embeddings.word_embeddings.weight]
    return Step(
        parameters=sum(weight.numel() for weight in learning),
        in_layers=sum(weight.numel() for layers in lists for weight in layers.parameters() if weight.requires_grad),
        last=sum(weight.numel() for weight in tables if weight.requires_grad),
        flop=counter.get_total_flops(),
    )


# --- Predictions ------------------------------------------------------------------------------------------------------


def predict(args: BenchmarkArguments, gpus: int, share: float, step: Step, encoder_learns: bool) -> dict[str, float]:
    """Seconds: "compute", "reduce" and what of it nothing hides, "exposed", "search" and the whole "step".

    Gradients travel while the backward pass, two thirds of the step, goes on; those of the word embeddings come at its
    end. Rank 0's search for all ranks is one pass over the index or its products, whichever takes longer. An encoder
    that learns waits for it; for one that is frozen another GPU searches beside the step.
    """
    rate = args.nvlink if gpus <= NODE else min(args.nvlink, NODE * args.network)
    compute = step.flop / (share * args.peak)
    reduce, last = (ring_bytes(gpus, FLOAT * count) / rate for count in (step.parameters, step.last))
    exposed = max(reduce - 2 / 3 * compute, last)
    size = args.passages * 768
    search = max(2 * size / args.memory, 2 * size * args.batch_size * gpus / args.peak)
    alone = compute + exposed
    whole = alone + search if encoder_learns else max(alone, search)
    return {"compute": compute, "reduce": reduce, "exposed": exposed, "search": search, "step": whole}


def print_bytes(args: BenchmarkArguments, steps: dict[bool, Step]) -> None:
    questions = Questions(args.batch_size, args.n_docs, 768)
    print(
        "\n| GPUs | gradients a GPU sends, GB: frozen / learning | with fsdp | question vectors to rank 0, KB | ids "
        "back, KB | ids and embeddings back, MB |\n|---|---|---|---|---|---|"
    )
    for gpus in args.gpus:
        frozen, learning = (ring_bytes(gpus, FLOAT * steps[learns].parameters) / 1e9 for learns in (False, True))
        layers = steps[True].in_layers
        sharded = sharded_bytes(gpus, layers, steps[True].parameters - layers) / 1e9
        out, ids, vectors = (
            (gpus - 1) * size for size in (questions.bytes_out(), *map(questions.bytes_back, (False, True)))
        )
        print(
            f"| {gpus} | {frozen:.2f} / {learning:.2f} | {sharded:.2f} | {out / 1e3:,.0f} | {ids / 1e3:,.1f} | "
            f"{vectors / 1e6:,.1f} |"
        )


def print_times(args: BenchmarkArguments, steps: dict[bool, Step]) -> None:
    print(
        "\n| question encoder | share of the peak | GPUs | compute, ms | reduction, ms (not hidden) | search, ms | "
        "step, ms | efficiency |\n|---|---|---|---|---|---|---|---|"
    )
    for learns, name in ((False, "frozen"), (True, "learning")):
        for share in args.shares:
            alone = predict(args, 1, share, steps[learns], learns)["step"]
            for gpus in args.gpus:
                found = predict(args, gpus, share, steps[learns], learns)
                ms = {part: f"{1000 * seconds:.1f}" for part, seconds in found.items()}
                print(
                    f"| {name} | {share:.0%} | {gpus} | {ms['compute']} | {ms['reduce']} ({ms['exposed']}) | "
                    f"{ms['search']} | {ms['step']} | {alone / found['step']:.0%} |"
                )


# --- Counts -----------------------------------------------------------------------------------------------------------


class Reduced:
    """Bytes of gradients that a DistributedDataParallel has reduced, its buckets' own count.

    Args:
        model: before its first step.
    """

    def __init__(self, model):
        self.bytes = 0
        model.register_comm_hook(None, self._reduce)

    def _reduce(self, _, bucket):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        self.bytes += bucket.buffer().nbytes
        return allreduce_hook(None, bucket)  # what happens without a hook


class Sent:
    """Bytes that this process' `Ranks` have sent, to each rank, from now on."""

    def __init__(self) -> None:
        from rag.distributed.ranks import Ranks

        self.to: dict[int, int] = {}
        send = Ranks.send

        def counted(ranks: Ranks, array: Any, to: int, step: str) -> Any:
            self.to[to] = self.to.get(to, 0) + array.nbytes
            return send(ranks, array, to, step)

        Ranks.send = counted  # type: ignore[method-assign]


def count_reduction(args: BenchmarkArguments) -> list[tuple[int, int]]:
    """(counted, formula) of a step of one batch and of a step that collects the gradients of two. Collective."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = (
        {} if not args.short else {"d_model": 64, "vocab_size": 1000, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}
    )
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "d_model": 768} | sizes
    model = BartForConditionalGeneration(BartConfig(**sizes))
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    reduced, rows = Reduced(parallel), []
    ids = torch.arange(3, 15).view(2, 6)
    gradients = sum(weight.nbytes for weight in model.parameters())
    for accumulate in (1, 1, 2) if args.short else (1, 1, 2, 2):  # the second step has the buckets that stay
        reduced.bytes = 0
        for _ in range(accumulate - 1):
            with parallel.no_sync():
                parallel(input_ids=ids, labels=ids).loss.backward()
        between = reduced.bytes
        parallel(input_ids=ids, labels=ids).loss.backward()
        rows.append((reduced.bytes + between, gradients))
    return rows


def count_retrieval(args: BenchmarkArguments, folder: Path, rank: int, size: int) -> list[dict[int, int]]:
    """What this rank sends to each in a retrieval: ids back, and then embeddings, too. Collective."""
    import numpy as np

    from benchmarks.retrieval_backends import make_retriever

    with ExitStack() as stack:
        retriever = make_retriever("pytorch", folder, "flat", _backends(args), size, stack)
        retriever.init_retrieval()
        queries = np.random.default_rng(rank).standard_normal((args.batch_size, 768), dtype=np.float32)
        sent = Sent()
        counts = []
        for vectors_from in ("passages", "index"):
            if rank == 0:
                retriever.index.vectors_from = vectors_from
            for _ in range(2):  # the first makes room for the questions of the second
                sent.to.clear()
                retriever.retrieve(queries, args.n_docs)
            counts.append(dict(sent.to))
    return counts


def _backends(args: BenchmarkArguments):
    from benchmarks import retrieval_backends

    return retrieval_backends.parse_args(
        ["--folder", str(args.folder), "--passages", "1000", "--centers", "0", "--kinds", "flat"]
    )


def rank_main(rank: int, size: int, store: str, args: BenchmarkArguments, folder: Path, writer) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    writer.send((count_reduction(args), count_retrieval(args, folder, rank, size)))
    dist.barrier()


def count(args: BenchmarkArguments, size: int, folder: Path) -> list[tuple[str, int, int]]:
    """What was counted on so many ranks, and its formula's value."""
    from benchmarks.retrieval_backends import run

    store = folder / f"store-{uuid4().hex}"
    try:
        ranks = run(rank_main, [(rank, size, store, args, folder) for rank in range(size)])
    finally:
        store.unlink(missing_ok=True)
    rows = []
    for step in range(1, len(ranks[0][0])):
        what = "gradients reduced, a step of one batch" if step == 1 else "the same, of two batches"
        rows += [(what, *reduced[step]) for reduced, _ in ranks[:1]]
    assert len({tuple(reduced) for reduced, _ in ranks}) == 1, "ranks have reduced different numbers of bytes"
    questions = Questions(args.batch_size, args.n_docs, 768)
    others = size - 1
    for kind, with_vectors in enumerate((False, True)):
        back = sum(ranks[0][1][kind].values())
        what = "ids and embeddings back" if with_vectors else "ids back"
        rows.append((what, back, others * questions.bytes_back(with_vectors)))
        out = sum(sent[kind].get(0, 0) for _, sent in ranks[1:])
        if not with_vectors:
            rows.append(("question vectors to rank 0", out, others * questions.bytes_out()))
    return rows


def main(args: BenchmarkArguments) -> dict[int, list[tuple[str, int, int]]]:
    from benchmarks.retrieval_backends import build

    print(header("torch", "transformers"))
    steps = {learns: count_step(args, learns) for learns in (False, True)}
    for learns, step in steps.items():
        print(
            f"question encoder {'learning' if learns else 'frozen'}: {step.parameters:,} parameters learn, "
            f"{step.in_layers:,} of them in layers; {step.flop / 1e12:.2f} TFLOP a step of {args.batch_size} questions "
            f"with {args.n_docs} contexts of {args.context_tokens} tokens"
        )
    print_bytes(args, steps)
    print_times(args, steps)
    FORK_SERVER.set_forkserver_preload(["torch.distributed", "faiss", "transformers.models.rag.retrieval_rag"])
    folder = build(_backends(args)).resolve()
    counts = {size: count(args, size, folder) for size in args.ranks}
    print("\n| ranks | what | counted, bytes | formula, bytes |\n|---|---|---|---|")
    for size, rows in counts.items():
        for what, counted, formula in rows:
            print(f"| {size} | {what} | {counted:,} | {formula:,} |")
            assert counted == formula, what
    return counts


if __name__ == "__main__":
    run_script(parse_args, main)
