"""Passages that are there, embedded by another encoder, and an index over them of the kind of the one that they have.

    python -m rag.knowledge.reembedding --passages_path my_knowledge_dataset --index_path my_index.faiss \\
        --encoder output/refresh/step_500/context_encoder --output_dir output/refresh/step_500/knowledge

What a training starts beside itself when its context encoder has learned (`rag/training/refresh.py`), and at its end.
`--output_dir` becomes a folder as use_own_knowledge_dataset.py leaves it, of title, text and embeddings, and a run that
was killed is resumed as there, shard by shard. Kind, number format and shards of the index are those that the
`index.json` beside the old one tells; of an index of another origin that script's defaults.
"""

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rag.command_line.flags import flag, required_flag, trust_flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.errors import UserError
from rag.knowledge.arguments import OUTPUT_NAMES, PASSAGES_FOLDER, KnowledgeArguments

if TYPE_CHECKING:
    from rag.index.index_files import IndexDescription
    from rag.knowledge.contents import Knowledge
    from rag.knowledge.embedding import PassageEmbedder
    from rag.knowledge.passages import DocumentsSurvey

ENCODER = "--encoder"
TRIES = 4  # of a build of which a process was killed: each loses the shards that were under way
SECONDS_BETWEEN_LOOKS = 0.5  # at whether the training still runs
PATIENCE = 20.0  # seconds that such a process may still hold the folder
NICENESS = 10  # beside a training


@dataclass
class ReembeddingArguments:
    passages_path: str = required_flag("Folder of the passages.")
    index_path: str = required_flag("Their FAISS file or folder of shards, whose index.json tells the kind.")
    encoder: str = required_flag("Folder of the context encoder.")
    output_dir: str = required_flag("Folder for passages with the new embeddings, and for their index.")
    processes: int = flag(1, "Processes that embed.")
    ray_address: str | None = flag(None, "HOST:PORT of a Ray cluster, or auto, to embed by tasks on its cores.")
    parent: int | None = flag(None, "Process with whose end this one ends.")
    beside: bool = flag(False, "Leave the cores to other work where there is some.")
    trust_remote_code: bool = trust_flag()


@dataclass
class SavedPassages:
    """The passages of a dataset, as a source of a `KnowledgeFolder`."""

    path: str
    count: int
    survey: "DocumentsSurvey"
    batch: int = field(default=1000)

    def passages(self) -> Iterator[tuple[str, str]]:
        from rag.index.passage_checks import open_passages

        for rows in open_passages(self.path).select_columns(["title", "text"]).iter(self.batch):
            titles = (title or "" for title in rows["title"])
            yield from zip(titles, rows["text"], strict=True)


def main(args: ReembeddingArguments) -> "Knowledge":
    """Build the folder, or take what is there of it.

    Raises:
        UserError: passages or encoder cannot be read, or the folder cannot be written.
    """
    if args.parent is not None:
        threading.Thread(target=_end_with, args=(args.parent,), daemon=True).start()
    if args.beside:
        _step_back()
    from rag.models.trust import allow_code
    from rag.outputs import writing

    allow_code(args.trust_remote_code)
    output = Path(args.output_dir)
    with writing("--output_dir", output), ExitStack() as stack:
        _hold(output, stack)
        for tries_left in reversed(range(TRIES)):
            try:
                return _build(args, output)
            except UserError as error:
                if not isinstance(error.__cause__, BrokenProcessPool) or not tries_left:
                    raise
                print(f"{error}; going on", flush=True)
    raise AssertionError("the last try returns or raises")


def _hold(output: Path, stack: ExitStack) -> None:
    """Hold the folder, which the process of a killed training lets go of within a moment."""
    from rag.locks import one_at_a_time

    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            stack.enter_context(one_at_a_time(output / ".lock", "--output_dir", output))
            return
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(SECONDS_BETWEEN_LOOKS)


def _step_back() -> None:
    """Let a training have the cores that it asks for, this process and those that it starts."""
    os.nice(NICENESS)
    # Where Linux shares cores out among sessions first, that counts within this one alone, which has a rank of its own.
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICENESS))


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone; what it has written is gone on with."""
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _build(args: ReembeddingArguments, output: Path) -> "Knowledge":
    from rag.index.build import IndexPlan
    from rag.index.index_files import read_description
    from rag.knowledge.folder import KnowledgeFolder
    from rag.knowledge.precision import OF_NAME
    from rag.knowledge.workers import EncoderPlan, EncodingResources, encoding_workers

    on_ray = args.ray_address is not None
    resources = EncodingResources(
        "ray" if on_ray else None,
        None if on_ray else args.processes,
        args.ray_address or "auto",
        0.0 if on_ray else None,
    )
    earlier = read_description(args.index_path)
    source = _open_source(args, earlier)
    embedder, description = _open_encoder(args, source, earlier, resources.device)
    _remove_others(output, description)
    plan = EncoderPlan(
        args.encoder, "auto", description.encoder_digest, None, resources.device, OF_NAME[description.precision],
        run_code=args.trust_remote_code,
    )  # fmt: skip
    folder = KnowledgeFolder(output, embedder, partial(encoding_workers, embedder, plan, resources))
    factory = earlier.factory or f"HNSW{KnowledgeArguments.m},Flat"
    if not earlier.factory:
        print(f"{args.index_path} does not say of which kind it is: {factory} is built")
    index_plan = IndexPlan(factory, embedder.dimension, earlier.shards, earlier.train_sample)
    return folder.build(source, description, index_plan)  # type: ignore[arg-type]


def _open_source(args: ReembeddingArguments, earlier: "IndexDescription") -> SavedPassages:
    """The passages, with what `index.json` tells of the documents that they are of."""
    from rag.index.passage_checks import open_passages
    from rag.index.passage_rows import fingerprint_of
    from rag.knowledge.passages import DocumentsSurvey

    dataset = open_passages(args.passages_path)
    count = len(dataset)
    survey = DocumentsSurvey(
        documents=earlier.documents or count,
        passages=count,
        text_bytes=sum(dataset.data.column(name).nbytes for name in ("title", "text")),
        digest=fingerprint_of(dataset),
    )
    return SavedPassages(args.passages_path, count, survey)


def _open_encoder(
    args: ReembeddingArguments, source: SavedPassages, earlier: "IndexDescription", device: str
) -> tuple["PassageEmbedder", "IndexDescription"]:
    """The embedder, and all that decides what comes out of it."""
    import torch

    from rag.index.index_files import IndexDescription, pooling_of
    from rag.knowledge.embedding import PassageEmbedder
    from rag.knowledge.precision import OF_NAME, machine_precision
    from rag.models.checkpoints import load_tokenizer, weights_digest
    from rag.models.encoders import encoder_dimension, load_encoder
    from rag.models.passages import PassageReader
    from rag.models.precision import name_of

    encoder = load_encoder(args.encoder, "context", flag=ENCODER)
    tokenizer = load_tokenizer(args.encoder, flag=ENCODER)
    precision = OF_NAME.get(earlier.precision) or machine_precision("auto", device)
    if precision == torch.float16 and device == "cpu":  # an index of a GPU, made anew on a CPU, which is slow in that
        precision = machine_precision("auto", device)
    description = IndexDescription(
        encoder=args.encoder,
        encoder_digest=weights_digest(encoder),
        **pooling_of(encoder.config),
        **PassageReader(encoder, tokenizer, ENCODER).description(),
        precision=name_of(precision),
        embeddings=earlier.embeddings or "float32",
        dimension=encoder_dimension(encoder),
        csv_path=earlier.csv_path or args.passages_path,
        csv_digest=source.survey.digest,
        drop_duplicates=earlier.drop_duplicates,
        words_a_passage=earlier.words_a_passage,
        documents=source.survey.documents,
        passages=source.count,
    )
    return PassageEmbedder(encoder, tokenizer, device=device, precision=precision), description


def _remove_others(output: Path, description: "IndexDescription") -> None:
    """Remove what the folder holds of an encoder with other weights, as a run was taken up before that was made, and
    what is so damaged that it does not tell what made it: all of it can be made again."""
    from rag.files import remove
    from rag.knowledge.contents import read_knowledge
    from rag.knowledge.shards import digest_of

    passages, wanted = output / PASSAGES_FOLDER, description.passages_digest()
    there = digest_of(passages)
    try:
        known = [part.digest for part in read_knowledge(output).parts[:1]]
        is_known = there is not None or not passages.exists()
    except UserError:
        known, is_known = [], False
    if not is_known or {there, *known} - {None, wanted}:
        for name in OUTPUT_NAMES:
            remove(output / name)


def parse_args(argv: list[str] | None = None) -> ReembeddingArguments:
    return parse_into(ReembeddingArguments, description=__doc__, argv=argv)


def cli() -> NoReturn:
    run_script(parse_args, main)


if __name__ == "__main__":
    cli()
