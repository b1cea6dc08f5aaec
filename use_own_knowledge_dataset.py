"""Make knowledge for a RAG model of your own documents: passages, their embeddings and a FAISS index.

    python use_own_knowledge_dataset.py \\
        --csv_path path/to/my_knowledge_dataset.csv \\
        --dpr_ctx_encoder_model_name facebook/dpr-ctx_encoder-single-nq-base \\
        --output_dir path/to/my_knowledge \\
        --rag_model_name path/to/rag_checkpoint --question "Which river flows through Paris?"
    python use_own_knowledge_dataset.py --output_dir path/to/my_knowledge --append --csv_path path/to/more.jsonl
    python use_own_knowledge_dataset.py --output_dir path/to/my_knowledge --search "Which river flows through Paris?"

    python use_own_knowledge_dataset.py --output_dir path/to/my_words --csv_path path/to/docs.tsv --index_factory bm25

The file has a line `title TAB text` for each document, or columns that a header names (other sources, and what is
quoted: docs/knowledge.md). Texts are cut into passages of 100 words. The script writes to --output_dir:
my_knowledge_dataset (title, text, embeddings), the index (a FAISS file, or a folder of --num_index_shards) and
index.json, which says what made them. If a run is killed, the same command resumes it; a finished folder is checked and
reused. At the end the index is compared with an exact search, and the RAG model answers --question, if both are given.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.errors import UserError, raise_problems
from rag.files import shown
from rag.knowledge.arguments import (
    ENCODER_FLAG,
    OUTPUT_FLAG,
    PASSAGES_FOLDER,
    WORDS_KIND,
    KnowledgeArguments,
    flag_problems,
)
from rag.models.trust import allow_code
from rag.public_names import module_getattr

if TYPE_CHECKING:
    from rag.index.index_files import IndexDescription
    from rag.knowledge.contents import Knowledge
    from rag.knowledge.embedding import PassageEmbedder
    from rag.knowledge.passages import PassageSource

ELSEWHERE = {
    "embed": "rag.knowledge.embedding",
    "split_documents": "rag.knowledge.passages",
    "split_text": "rag.knowledge.passages",
}
ALL_IN_ONE = "rag.knowledge.arguments.KnowledgeArguments has the settings of all three"
REPLACED = {
    "device": "a context encoder's device is `ctx_encoder.device`",
    "RagExampleArguments": ALL_IN_ONE,
    "ProcessingArguments": ALL_IN_ONE,
    "IndexHnswArguments": ALL_IN_ONE,
}
__getattr__ = module_getattr(__name__, ELSEWHERE, REPLACED)


def parse_args(argv: list[str] | None = None) -> KnowledgeArguments:
    return parse_into(KnowledgeArguments, description=__doc__, argv=argv)


def main(args: KnowledgeArguments) -> Knowledge | list[list[dict]]:
    """Passages, index and, with a RAG checkpoint at hand, an answer; or, with --search, passages for questions.

    Returns:
        a `Knowledge`; with --search a list of the passages for each question (see rag/knowledge/search.py).

    Raises:
        UserError: a setting or a line of the file is faulty, the encoder cannot be loaded or does not fit, the disk is
            too small or full, `output_dir` holds knowledge made otherwise, is damaged, or another process is at it.
    """
    raise_problems(flag_problems(args))
    allow_code(args.trust_remote_code)
    if args.search:
        return search(args)

    from rag.hub import require_push
    from rag.knowledge.contents import verify
    from rag.knowledge.sharing import push_knowledge
    from rag.locks import one_at_a_time
    from rag.outputs import writing

    output = Path(args.output_dir)
    if args.verify:
        return verify(output)
    if args.push_to_hub is not None:
        require_push(args.push_to_hub)
    with writing(OUTPUT_FLAG, output), one_at_a_time(output / ".lock", OUTPUT_FLAG, output):
        source = read_source(args)
        rag_config = open_rag_config(args)
        knowledge = build(args, source, rag_config)
        if args.push_to_hub is not None:
            push_knowledge(args.push_to_hub, output)
    return ask(args, knowledge, rag_config)


def ask(args: KnowledgeArguments, knowledge: Knowledge, rag_config) -> Knowledge:
    """Ask --question, if there is one, of the RAG model; keep its answer."""
    if (args.rag_model_name is None) != (args.question is None):
        missing = "--rag_model_name" if args.rag_model_name is None else "--question"
        print(f"No question is asked: {missing} was not given")
    elif rag_config is not None:
        from rag.knowledge.search import answer_question

        assert args.question is not None and args.rag_model_name is not None
        knowledge.answer = answer_question(args.question, args.rag_model_name, knowledge.flags)
    return knowledge


def build_and_go_on(args: KnowledgeArguments) -> None:
    """`main`, then, on a command line, the flags to go on with."""
    knowledge = main(args)
    if args.mode in ("--search", "--verify"):
        return
    assert not isinstance(knowledge, list)
    finetune = "rag-finetune" if Path(sys.argv[0]).name == "rag-knowledge" else "python finetune_rag.py"
    model = {} if args.rag_model_name is None else {"model_name_or_path": args.rag_model_name}
    flags = {name: shown(value) for name, value in (model | knowledge.flags).items()}
    print(f"Next: {finetune}", *(f"--{name} {shlex.quote(value)}" for name, value in flags.items()), "...")


def search(args: KnowledgeArguments) -> list[list[dict]]:
    """--search: print the passages that --output_dir has for each question."""
    from rag.index.index_files import read_description

    assert args.search is not None
    output = Path(args.output_dir)
    description = read_description(output / PASSAGES_FOLDER, OUTPUT_FLAG)
    if not description.index:
        raise UserError(f"--search: the index of {output} is not finished; run the command that was building it first")
    rescore = None
    if args.reranker is not None:
        from rag.knowledge.reranking import SearchReranker

        rescore = SearchReranker(args.reranker, args.depth_for(args.n_docs), args.rag_model_name)
    if description.factory == WORDS_KIND:
        if args.index_name is not None:
            raise UserError(f"--index_name {args.index_name}: {output} has words alone and no vectors; leave it out")
        from rag.knowledge.words import search_words

        return search_words(output, args.search, args.n_docs, args.columns, rescore)

    from rag.index.arguments import fusion_of
    from rag.knowledge.search import load_question_encoder, search_passages

    encoder, tokenizer = load_question_encoder(
        description,
        args.question_encoder_name_or_path,
        args.question_encoder_pooling,
        args.rag_model_name,
        args.question_encoder_prompt,
    )
    effort = {"ef_search": args.ef_search, "nprobe": args.nprobe}
    fusion = None if args.index_name is None else fusion_of(args)
    return search_passages(
        output, description, encoder, tokenizer, args.search, args.n_docs, args.columns, fusion, rescore, **effort
    )


def read_source(args: KnowledgeArguments) -> PassageSource:
    """Read the documents once, or twice to find duplicates, before anything else is loaded."""
    from rag.knowledge.passages import open_source
    from rag.knowledge.records import ReadingOptions

    output = Path(args.output_dir)
    known = None
    if args.drop_duplicates:
        from rag.knowledge.contents import read_knowledge, read_known

        earlier = read_knowledge(output)
        known = read_known(output, earlier.passages) if args.append and earlier.parts else ()
    return open_source(
        args.csv_path, known, ReadingOptions(args.csv_quoting, args.max_line_mb, args.skip_empty, output)
    )


def build(args: KnowledgeArguments, source: PassageSource, rag_config) -> Knowledge:
    """Embed and index the passages of --csv_path, or with --append add them to what is there."""
    from rag.knowledge.contents import read_knowledge

    if args.of_words or (args.append and read_knowledge(Path(args.output_dir)).factory == WORDS_KIND):
        return build_words(args, source)

    from rag.index.build import IndexPlan
    from rag.knowledge.folder import KnowledgeFolder
    from rag.knowledge.precision import OF_NAME, precision_problems
    from rag.knowledge.workers import EncoderPlan, EncodingResources, encoding_workers

    resources = EncodingResources(args.distributed, args.num_encoding_processes, args.ray_address, args.gpus_per_task)
    raise_problems(precision_problems(args.precision, resources.device, Path(args.output_dir)))
    # Threads of the tokenizer, which reads these when it is first used.
    threads = resources.tokenizer_threads(args.num_proc)
    os.environ.update(TOKENIZERS_PARALLELISM=str(threads > 1).lower(), RAYON_NUM_THREADS=str(threads))
    factory = args.index_factory or f"HNSW{args.m},Flat"
    if dimension := dimension_of_config(args):  # all that can be told before the weights are loaded
        raise_problems(dimension_problems(args, dimension, rag_config))
        if not args.append:
            early_plan = IndexPlan(factory, dimension, args.num_index_shards, args.train_sample)
            raise_problems(early_plan.problems(source.count))
    embedder, description = open_encoder(args, source, rag_config, resources.device)
    plan = EncoderPlan(
        args.dpr_ctx_encoder_model_name,
        args.ctx_encoder_pooling,
        description.encoder_digest,
        args.batch_size,
        resources.device,
        OF_NAME[description.precision],
        args.tokens_per_batch,
        args.ctx_encoder_prompt,
        args.trust_remote_code,
    )
    folder = KnowledgeFolder(
        Path(args.output_dir),
        embedder,
        partial(encoding_workers, embedder, plan, resources),
        args.num_shards,
        args.recall_queries,
        args.n_docs,
    )
    if args.append:
        return folder.append(source, description, args.index_factory)
    index_plan = IndexPlan(factory, embedder.dimension, args.num_index_shards, args.train_sample)
    return folder.build(source, description, index_plan)


def build_words(args: KnowledgeArguments, source: PassageSource) -> Knowledge:
    """Passages and their index of words, for which no encoder is needed."""
    from rag.index.bm25 import words_of
    from rag.index.index_files import IndexDescription
    from rag.knowledge.words import WordsFolder, WordsPlan

    folder = WordsFolder(Path(args.output_dir), args.num_shards)
    description = IndexDescription(**documents_fields(args, source))
    if args.append:
        return folder.append(source, description, args.index_factory)
    if not any(words_of(f"{title} {text}") for title, text in source.passages()):
        raise UserError(f"--csv_path {args.csv_path} has no words that BM25 could find; give other documents")
    return folder.build(source, description, WordsPlan())


def documents_fields(args: KnowledgeArguments, source: PassageSource) -> dict:
    """Fields of `IndexDescription`: the documents and the passages that they were cut into."""
    from rag.knowledge.passages import WORDS_PER_PASSAGE

    return {
        "csv_path": args.csv_path,
        "csv_digest": source.survey.digest,
        "drop_duplicates": args.drop_duplicates,
        "words_a_passage": WORDS_PER_PASSAGE,
        "documents": source.survey.documents,
        "passages": source.count,
    }


# --- Models -----------------------------------------------------------------------------------------------------------


def open_rag_config(args: KnowledgeArguments):
    """The config of the RAG checkpoint, or None, saying why, where none is given or reachable."""
    if args.rag_model_name is None:
        return None

    from transformers import RagConfig

    from rag.models.loading import load_config

    try:
        config = load_config(args.rag_model_name, flag="--rag_model_name")
    except UserError as error:
        print(f"--question will not be asked: {error}")
        return None
    if not isinstance(config, RagConfig):
        raise UserError(f"--rag_model_name {args.rag_model_name} is a {config.model_type} model; give a RAG checkpoint")
    return config


def dimension_of_config(args: KnowledgeArguments) -> int | None:
    """d as the config of the encoder says; None where it does not.

    Raises:
        UserError: there is no such model.
    """
    from rag.models.encoders import read_encoder_config
    from rag.models.limits import vector_size

    config, card = read_encoder_config(args.dpr_ctx_encoder_model_name, flag=ENCODER_FLAG)
    if args.ctx_encoder_pooling == "auto" and card is not None and card.settings["dense"]:
        return card.settings["dense"][-1]["out_features"]
    if args.ctx_encoder_pooling != "auto" and config.model_type == "pooled_encoder":
        config = config.backbone  # its dense layers are left out
    return vector_size(config)


def dimension_problems(args: KnowledgeArguments, d: int, rag_config) -> list[str]:
    """What does not fit an encoder of d dimensions."""
    name = args.dpr_ctx_encoder_model_name
    problems = []
    if args.d not in (None, d):
        problems.append(f"--d {args.d}, but {ENCODER_FLAG} {name} gives {d} dimensions; leave --d out")
    if rag_config is not None and rag_config.retrieval_vector_size != d:
        problems.append(
            f"{ENCODER_FLAG} {name} gives {d} dimensions, but --rag_model_name {args.rag_model_name} asks with "
            f"{rag_config.retrieval_vector_size}; give the context encoder that its question encoder was trained with"
        )
    return problems


def open_encoder(
    args: KnowledgeArguments, source: PassageSource, rag_config, device: str
) -> tuple[PassageEmbedder, IndexDescription]:
    """The embedder, and all that decides what comes out of it; `device` is where passages are embedded."""
    import torch

    from rag.index.index_files import IndexDescription, pooling_of
    from rag.knowledge.embedding import PassageEmbedder
    from rag.knowledge.precision import settle_precision
    from rag.models.checkpoints import load_tokenizer, weights_digest
    from rag.models.encoders import describe_encoder, encoder_dimension, load_encoder
    from rag.models.fit import require_reading, vocabulary_problems
    from rag.models.passages import PassageReader
    from rag.models.precision import name_of

    name = args.dpr_ctx_encoder_model_name
    encoder = load_encoder(name, "context", args.ctx_encoder_pooling, flag=ENCODER_FLAG, prompt=args.ctx_encoder_prompt)
    tokenizer = load_tokenizer(name, flag=ENCODER_FLAG)
    raise_problems(vocabulary_problems(encoder, tokenizer, f"{ENCODER_FLAG} {name}"))
    print(f"Context encoder {shown(name)}: {describe_encoder(encoder)}")
    d = encoder_dimension(encoder)
    raise_problems(dimension_problems(args, d, rag_config))
    description = IndexDescription(
        encoder=name,
        encoder_digest=weights_digest(encoder),
        **pooling_of(encoder.config),
        **PassageReader(encoder, tokenizer).description(),
        embeddings="float16" if args.half_precision else "float32",
        dimension=d,
        **documents_fields(args, source),
    )
    precision = settle_precision(args.precision, device, Path(args.output_dir), description)
    description = replace(description, precision=name_of(precision))
    print(f"Passages are encoded in {description.precision}")
    if device == "cuda" and not torch.cuda.is_available():  # GPUs of other nodes; this one encodes a few queries
        precision = None
    embedder = PassageEmbedder(
        encoder, tokenizer, args.batch_size, precision=precision, tokens_per_batch=args.tokens_per_batch
    )
    require_reading(encoder, embedder.read, f"{ENCODER_FLAG} {name}")
    if rag_config is not None:
        published = args.rag_model_name.startswith("facebook/rag-")  # whose config does not name its question encoder
        theirs = "facebook/dpr-question_encoder-single-nq-base" if published else None
        for warning in description.encoder_mismatches(rag_config.question_encoder, theirs):
            print(f"Warning: {warning}")
    return embedder, description


def cli() -> NoReturn:
    """The command `rag-knowledge`."""
    run_script(parse_args, build_and_go_on)


if __name__ == "__main__":
    cli()
