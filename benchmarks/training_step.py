"""A training step of `finetune_rag.py` beside the public way's: seconds, where they go, loss, padding and peak memory.

    python benchmarks/training_step.py --short                     # two minutes on two cores
    python benchmarks/training_step.py --rounds 5
    python benchmarks/training_step.py --device cuda --bf16

A step is question encoder, retrieval, tokenizing, generator, loss, backward pass, AdamW and zero_grad. The public way
is transformers' `RagSequenceForGeneration` with `RagRetriever` (contexts padded to 300) and AdamW as its script builds
it. Weights are random, of the sizes of BART-base (dropout as in its config) and DPR; questions, answers and passages
are those of ../shared/data/nq_gold, in the WordPiece tokens of all-MiniLM-L6-v2, or made-up ones where it is not there.
Each side runs in processes of its own, in turn, and takes the same batches; medians are over all steps but the first.
"""

import itertools
import json
import os
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from benchmarks.machine import header, in_its_own_process, status_mib
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.errors import UserError
from rag.files import atomic_folder, read_lines

NQ_GOLD = Path(__file__).resolve().parents[2] / "shared" / "data" / "nq_gold"
SIDES = ("public", "ours")
PARTS = ("encode", "retrieve", "tokenize", "forward", "backward", "optimizer")


@dataclass
class BenchmarkArguments:
    short: bool = flag(False, "One round of two steps a side, of which one counts.")
    rounds: int = flag(3, "Processes a side; each is a new one, so that memory is its own.")
    steps: int = flag(6, "Steps a process; the first is not counted.")
    batch_size: int = flag(4, "Questions a step.")
    n_docs: int = flag(5, "Passages a question.")
    size: str = flag("base", "BART's size: base, large or small (for a trial).")
    dropout: float = flag(0.1, "All of the generator's dropouts; BART-base has 0.1.")
    attention_dropout: float | None = flag(None, "Its attention's, where it is another.")
    device: str = flag("cpu", "cpu or cuda.")
    bf16: bool = flag(False, "Both sides in mixed precision with bfloat16.")
    flags: list[str] = flag([], "Flags of finetune_rag.py for our side, without dashes.")
    side: str | None = flag(None, "Run one side in this process and print JSON.")
    folder: Path = flag(Path("output/training_step"), "Where passages are kept.")

    def __post_init__(self):
        if self.short:
            self.rounds, self.steps = 1, 2


def parse_args(argv=None) -> BenchmarkArguments:
    return parse_into(BenchmarkArguments, description=__doc__, argv=argv)


# --- Examples and passages --------------------------------------------------------------------------------------------


def examples() -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Questions, answers, and passages of at most 100 words with their titles."""
    from rag.knowledge.passages import split_text

    if NQ_GOLD.is_dir():
        rows = [line.split("\t") for line in read_lines(NQ_GOLD / "passages.tsv")]
        passages = [(title, piece) for _, title, text in rows for piece in split_text(text)]
        return read_lines(NQ_GOLD / "train.source"), read_lines(NQ_GOLD / "train.target"), passages
    rng = random.Random(0)
    words = ["ba", "lorem", "ipsum", "dolor", "amet", "tower", "river", "city", "1901", "of", "the", "in"]

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(least, most)))

    passages = [(text(1, 4), text(20, 100)) for _ in range(2700)]
    return [text(6, 14) for _ in range(2000)], [text(1, 5) for _ in range(2000)], passages


def build_knowledge(args: BenchmarkArguments, encoder, tokenizer, questions, passages) -> Path:
    """Passages with random vectors and their flat index, written once.

    A random encoder gives all questions nearly the same vector; the passages' vectors have no part along that common
    direction, so that each question finds other passages.
    """
    import datasets
    import faiss
    import numpy as np
    import torch

    folder = args.folder / f"{len(passages)}-{encoder.config.hidden_size}"
    if folder.is_dir():
        return folder
    with torch.no_grad():
        some = tokenizer(questions[:64], padding=True, return_tensors="pt").to(encoder.device)
        common = encoder(some.input_ids, some.attention_mask)[0].mean(0)
    common = (common / common.norm()).cpu().numpy()
    vectors = np.random.default_rng(0).standard_normal((len(passages), len(common)), dtype=np.float32)
    vectors -= np.outer(vectors @ common, common)
    index = faiss.IndexFlatIP(len(common))
    index.add(vectors)
    with atomic_folder(folder) as unfinished:
        titles, texts = zip(*passages, strict=True)
        features = {"title": datasets.Value("string"), "text": datasets.Value("string")}
        features["embeddings"] = datasets.List(datasets.Value("float32"), length=len(common))
        columns = {"title": titles, "text": texts, "embeddings": vectors}
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(unfinished / "passages")
        faiss.write_index(index, str(unfinished / "index.faiss"))
    return folder


def make_tokenizer():
    """all-MiniLM-L6-v2's; where its package is missing one like it, learned from `examples`: fewer tokens a word."""
    from transformers import AutoTokenizer, BertTokenizerFast

    from quickstart.__main__ import minilm_folder

    try:
        return AutoTokenizer.from_pretrained(minilm_folder())
    except UserError:
        questions, answers, passages = examples()
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    texts = itertools.chain(questions, answers, *passages)
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=30522, special_tokens=specials))
    return BertTokenizerFast(vocab=tokenizer.get_vocab(), model_max_length=512)


def make_parts(args: BenchmarkArguments, tokenizer):
    """A question encoder of DPR's size and a generator of BART's, both with random weights."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration, DPRConfig, DPRQuestionEncoder

    torch.manual_seed(0)
    width, layers, heads = {"base": (768, 6, 12), "large": (1024, 12, 16), "small": (64, 2, 4)}[args.size]
    bart = BartConfig(
        d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, dropout=args.dropout,
        attention_dropout=args.dropout if args.attention_dropout is None else args.attention_dropout,
        activation_dropout=args.dropout, vocab_size=50265,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.cls_token_id,
    )  # fmt: skip
    dpr = DPRConfig() if args.size != "small" else DPRConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    return DPRQuestionEncoder(dpr), BartForConditionalGeneration(bart)


def make_config(args: BenchmarkArguments, encoder, generator, folder: Path):
    """The RagConfig of these parts over the knowledge of `build_knowledge`."""
    from transformers import RagConfig

    return RagConfig.from_question_encoder_generator_configs(
        encoder.config, generator.config, n_docs=args.n_docs, index_name="custom",
        retrieval_vector_size=encoder.config.hidden_size, max_combined_length=300,
        passages_path=str(folder / "passages"), index_path=str(folder / "index.faiss"),
    )  # fmt: skip


def make_batches(args: BenchmarkArguments, tokenizer, questions: list[str], answers: list[str]) -> list[dict]:
    """The batches of `args.steps` steps."""
    padded = {"padding": True, "return_tensors": "pt"}
    batches = []
    for start in range(0, args.steps * args.batch_size, args.batch_size):
        batch = tokenizer(questions[start : start + args.batch_size], **padded)
        labels = tokenizer(text_target=answers[start : start + args.batch_size], **padded).input_ids
        batches.append({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels})
    return batches


# --- One side ---------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of the parts of a step; a part inside another is not counted twice."""

    def __init__(self, device: str):
        self.device, self.steps, self.inside = device, [], []

    def part(self, name: str, function, *args, **kwargs):
        self.inside.append(0.0)
        start = self.now()
        result = function(*args, **kwargs)
        seconds = self.now() - start
        self.steps[-1][name] += seconds - self.inside.pop()
        if self.inside:
            self.inside[-1] += seconds
        return result

    def watch(self, owner, method: str, name: str) -> None:
        function = getattr(owner, method)
        setattr(owner, method, lambda *args, **kwargs: self.part(name, function, *args, **kwargs))

    def start(self) -> None:
        self.steps.append(dict.fromkeys(PARTS, 0.0))

    def now(self) -> float:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


def public_side(args: BenchmarkArguments, config, parts, tokenizer):
    """Loss of each example of a batch as transformers computes it, the model, and the public script's AdamW."""
    import torch
    from transformers import RagRetriever, RagSequenceForGeneration

    from rag.training.loss import decoder_inputs_and_targets

    retriever = RagRetriever(config, tokenizer, tokenizer)
    model = RagSequenceForGeneration(config, *parts, retriever=retriever)
    no_decay = [parameter for name, parameter in model.named_parameters() if name.endswith(("bias", "norm.weight"))]
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith(("bias", "norm.weight"))]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": no_decay, "weight_decay": 0.0}]

    def losses(batch):
        labels, _ = decoder_inputs_and_targets(batch["labels"], model.config.generator)
        return model(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss

    return losses, model, retriever, lambda: torch.optim.AdamW(groups, lr=5e-5, eps=1e-8)


def our_side(args: BenchmarkArguments, config, parts, tokenizer):
    """The same of `GenerativeQAModule`."""
    from transformers import RagSequenceForGeneration, RagTokenizer

    from rag.retrieval.retriever import RagKnowledgeRetriever
    from rag.training.arguments import parse_args as parse_finetune_args
    from rag.training.optimizer import build_optimizer
    from rag.training.qa_module import GenerativeQAModule

    retriever = RagKnowledgeRetriever(config, tokenizer, tokenizer)
    model = RagSequenceForGeneration(config, *parts)
    needed = ["--model_name_or_path", "m", "--data_dir", "d", "--output_dir", "o"]
    settings = parse_finetune_args(needed + [f"--{flag}" for flag in args.flags])
    module = GenerativeQAModule(settings, model, RagTokenizer(tokenizer, tokenizer), retriever)

    def losses(batch):
        return module.negative_log_likelihood(batch)[0]

    return losses, module, retriever, lambda: build_optimizer(module, settings.training)


def on_device(module, batch: dict, device: str) -> dict:
    """A batch from a loader as a step of this module gets it from Lightning."""
    import torch
    from lightning_fabric.utilities import move_data_to_device

    if hasattr(module, "on_before_batch_transfer"):  # the public way's is a bare model here
        batch = module.on_before_batch_transfer(batch, 0)
    return move_data_to_device(batch, torch.device(device))


def measure(args: BenchmarkArguments) -> dict:
    """Run `args.side` and return what it took."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = make_tokenizer()
    encoder, generator = make_parts(args, tokenizer)
    questions, answers, passages = examples()
    folder = build_knowledge(args, encoder.eval(), tokenizer, questions, passages)
    config = make_config(args, encoder, generator, folder)
    side = {"public": public_side, "ours": our_side}[args.side]
    losses, module, retriever, make_optimizer = side(args, config, (encoder, generator), tokenizer)
    module.to(args.device).eval()
    clock = Clock(args.device)
    rag = module.rag if args.side == "public" else module.model.rag
    batches = make_batches(args, tokenizer, questions, answers)
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.bf16)
    with torch.no_grad(), autocast:
        equal = losses(on_device(module, batches[0], args.device)).tolist()

    clock.watch(rag.question_encoder, "forward", "encode")
    clock.watch(retriever, "retrieve", "retrieve")
    clock.watch(retriever, "postprocess_docs", "tokenize")
    tokens = ContextTokens(retriever, rag.generator)
    optimizer = make_optimizer()
    module.train()
    seconds = []
    for batch in batches:
        clock.start()
        start = clock.now()
        with autocast:
            loss = clock.part("forward", lambda: losses(on_device(module, batch, args.device))).mean()  # noqa: B023
        clock.part("backward", loss.backward)
        clock.part("optimizer", lambda: (optimizer.step(), optimizer.zero_grad()))
        seconds.append(clock.now() - start)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    peak = torch.cuda.max_memory_allocated() / 2**20 if args.device == "cuda" else status_mib("VmHWM")
    return {
        "losses": equal, "seconds": seconds[1:], "parts": clock.steps[1:], "peak": peak,
        "weights": weights / 2**20, "padding": tokens.padding, "tokens": tokens.read / len(seconds),
    }  # fmt: skip


class ContextTokens:
    """How many context tokens were read, and how many the generator's encoder computed, padding included.

    The device is not asked: the retriever's mask is on the host, and the encoder's token ids have a shape.
    """

    def __init__(self, retriever, generator):
        self.read = self.computed = 0
        postprocess = retriever.postprocess_docs

        def watched(*args, **kwargs):
            ids, mask = postprocess(*args, **kwargs)
            self.read += int(mask.sum())
            return ids, mask

        def count(module, inputs) -> None:
            self.computed += inputs[0].numel()

        retriever.postprocess_docs = watched
        generator.get_encoder().embed_tokens.register_forward_pre_hook(count)

    @property
    def padding(self) -> float:
        """Share of what was computed."""
        return 1 - self.read / max(self.computed, 1)

    def restart(self) -> None:
        self.read = self.computed = 0


# --- Both sides -------------------------------------------------------------------------------------------------------


def run_side(args: BenchmarkArguments, side: str) -> dict:
    names = ("steps", "batch_size", "n_docs", "size", "dropout", "device", "folder")
    if args.attention_dropout is not None:
        names += ("attention_dropout",)
    words = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    words += ["--bf16"] * args.bf16 + (["--flags", *args.flags] if args.flags else [])
    return in_its_own_process(__file__, "--side", side, *words)


def main(args: BenchmarkArguments) -> dict:
    if args.side is not None:
        print(json.dumps(measure(args)))
        return {}
    import torch

    where = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU"
    print(
        f"{header('torch', 'transformers', threads=torch.get_num_threads())}\n"
        f"BART-{args.size} on {where}, batch {args.batch_size}, {args.n_docs} documents, dropout {args.dropout}; "
        f"{'nq_gold' if NQ_GOLD.is_dir() else f'made-up text, as {NQ_GOLD} is not there'}",
        flush=True,
    )
    runs: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            runs[side].append(run_side(args, side))
    return report(runs)


def report(runs: dict[str, list[dict]]) -> dict:
    """The table, and the bars it is held against."""
    median, rows = statistics.median, {}
    for side, results in runs.items():
        row = {part: median(step[part] for result in results for step in result["parts"]) for part in PARTS}
        row["step"] = median(seconds for result in results for seconds in result["seconds"])
        row |= {name: median(result[name] for result in results) for name in ("peak", "weights", "padding", "tokens")}
        rows[side] = row
    print(f"\n| side | {' | '.join(PARTS)} | step, s | padding | peak, MiB | without weights |\n|{'---|' * 11}")
    for side, row in rows.items():
        parts = " | ".join(f"{row[part]:.3f}" for part in PARTS)
        print(
            f"| {side} | {parts} | {row['step']:.2f} | {row['padding']:.1%} | {row['peak']:.0f} | "
            f"{row['peak'] - row['weights']:.0f} |"
        )
    public, ours = rows["public"], rows["ours"]
    pairs = zip(runs["public"][0]["losses"], runs["ours"][0]["losses"], strict=True)
    difference = max(abs(mine / theirs - 1) for theirs, mine in pairs)
    result = {
        "speed": public["step"] / ours["step"], "memory": ours["peak"] / public["peak"], "padding": ours["padding"],
        "loss_difference": difference, "tokens_a_second": ours["tokens"] / ours["step"],
    }  # fmt: skip
    print(
        f"\n{result['speed']:.2f}x as fast (bar 1.5), peak memory {result['memory']:.2f}x (bar 0.75), padding "
        f"{result['padding']:.1%} (bar 10%), losses differ by {difference:.1e} of themselves (bar 1e-5); "
        f"{result['tokens_a_second']:.0f} context tokens a second"
    )
    return result


if __name__ == "__main__":
    run_script(parse_args, main)
