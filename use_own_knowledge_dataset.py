"""Make knowledge for a RAG model of your own documents: passages, their embeddings and a FAISS index.

    python use_own_knowledge_dataset.py \\
        --csv_path path/to/my_knowledge_dataset.csv \\
        --dpr_ctx_encoder_model_name facebook/dpr-ctx_encoder-single-nq-base \\
        --output_dir path/to/my_knowledge \\
        --rag_model_name path/to/rag_checkpoint --question "Which river flows through Paris?"
    python use_own_knowledge_dataset.py --output_dir path/to/my_knowledge --append --csv_path path/to/more.jsonl
    python use_own_knowledge_dataset.py --output_dir path/to/my_knowledge --search "Which river flows through Paris?"

The file has a line `title TAB text` for each document; nothing in it is quoted, and a header `title TAB text` is
skipped (other sources: rag/knowledge/documents.py). Texts are cut into passages of 100 words. Written to --output_dir:
my_knowledge_dataset (title, text, embeddings), the index (a FAISS file, or a folder of --num_index_shards) and
index.json, which says what made them. A killed run goes on when the same command is given again; a finished one is
reused. In the end the index is compared with an exact search, and the RAG model asked, if there is one.
"""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.errors import UserError, raise_problems
from rag.knowledge.arguments import ENCODER_FLAG, KnowledgeArguments, settings_problems
from rag.public_names import module_getattr

if TYPE_CHECKING:
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


def main(args: KnowledgeArguments):
    """Passages, index and, with a RAG checkpoint at hand, an answer; or, with --search, passages for questions.

    Returns:
        a `Knowledge`; with --search a list of the passages for each question (see rag/knowledge/search.py).

    Raises:
        UserError: a setting or a line of the file is faulty, the encoder cannot be loaded or does not fit, the disk is
            too small, or `output_dir` holds knowledge made otherwise.
    """
    raise_problems(settings_problems(args))
    if args.search:
        from rag.knowledge.search import search_passages

        return search_passages(args)
    from rag.knowledge.folder import append, build, read_made_by

    made_by = read_made_by(args)
    source = read_source(args, made_by)
    # Threads of the tokenizer, which reads these when it is first used.
    os.environ.update(TOKENIZERS_PARALLELISM=str(args.num_proc > 1).lower(), RAYON_NUM_THREADS=str(args.num_proc))

    rag_config = open_rag_config(args)
    embedder, description = open_encoder(args, source, rag_config)
    knowledge = (append if args.append else build)(args, source, embedder, description, made_by)
    flags = {"index_name": "custom", "passages_path": knowledge.passages_path, "index_path": knowledge.index_path}
    model = {} if rag_config is None else {"model_name_or_path": args.rag_model_name}
    print("Next: python finetune_rag.py", *(f"--{k} {shlex.quote(v)}" for k, v in (model | flags).items()), "...")

    if args.rag_model_name is None or args.question is None:
        missing = "--rag_model_name" if args.rag_model_name is None else "--question"
        print(f"No question is asked: {missing} was not given")
    elif rag_config is not None:
        from rag.knowledge.search import ask

        knowledge.answer = ask(args.question, args.rag_model_name, flags)
    return knowledge


# --- Documents --------------------------------------------------------------------------------------------------------


def read_source(args: KnowledgeArguments, made_by: dict) -> PassageSource:
    """Read the documents once, or twice to find duplicates, before anything else is loaded."""
    from rag.knowledge.passages import PassageSource, read_passages, survey_documents

    survey = survey_documents(args.csv_path)
    raise_problems(survey.problems)
    print(f"{args.csv_path}: {survey.documents:,} documents, {survey.passages:,} passages")
    source = PassageSource(args.csv_path, survey)
    if args.drop_duplicates:
        from rag.knowledge.duplicates import first_of_equals
        from rag.knowledge.folder import read_known

        known = read_known(args, made_by) if args.append and made_by else ()
        source.keep = first_of_equals(read_passages(args.csv_path), known)
        print(f"{survey.passages - source.count:,} exact duplicates among them are left out")
    return source


# --- Models -----------------------------------------------------------------------------------------------------------


def open_rag_config(args: KnowledgeArguments):
    """The config of the RAG checkpoint, or None, saying why, where none is given or reachable."""
    if args.rag_model_name is None:
        return None

    from transformers import RagConfig

    from rag.models.checkpoints import load_config

    try:
        config = load_config(args.rag_model_name, flag="--rag_model_name")
    except UserError as error:
        print(f"--question will not be asked: {error}")
        return None
    if not isinstance(config, RagConfig):
        raise UserError(f"--rag_model_name {args.rag_model_name} is a {config.model_type} model; give a RAG checkpoint")
    return config


def open_encoder(args: KnowledgeArguments, source: PassageSource, rag_config):
    """The embedder, and all that decides what comes out of it, to go into index.json."""
    from rag.index.index_files import encoder_mismatches, pooling_of
    from rag.knowledge.embedding import PassageEmbedder
    from rag.knowledge.passages import WORDS_PER_PASSAGE
    from rag.knowledge.workers import encoding_device
    from rag.models.checkpoints import load_encoder, load_tokenizer, weights_digest

    name = args.dpr_ctx_encoder_model_name
    encoder = load_encoder(name, "context", args.ctx_encoder_pooling, flag=ENCODER_FLAG)
    encoder_digest = weights_digest(encoder)
    embedder = PassageEmbedder(encoder, load_tokenizer(name, flag=ENCODER_FLAG), args.batch_size)
    d = embedder.dimension
    problems = []
    if args.d not in (None, d):
        problems.append(f"--d {args.d}, but {ENCODER_FLAG} {name} gives {d} dimensions; leave --d out")
    if rag_config is not None and rag_config.retrieval_vector_size != d:
        problems.append(
            f"{ENCODER_FLAG} {name} gives {d} dimensions, but --rag_model_name {args.rag_model_name} asks with "
            f"{rag_config.retrieval_vector_size}; give the context encoder that its question encoder was trained with"
        )
    raise_problems(problems)
    description = {
        "encoder": name,
        "encoder_digest": encoder_digest,
        **pooling_of(encoder.config),
        **embedder.settings(encoding_device(args)),
        "embeddings": "float16" if args.half_precision else "float32",
        "dimension": d,
        "csv_path": args.csv_path,
        "csv_digest": source.survey.digest,
        "drop_duplicates": args.drop_duplicates,
        "words_a_passage": WORDS_PER_PASSAGE,
        "documents": source.survey.documents,
        "passages": source.count,
    }
    if rag_config is not None:
        published = args.rag_model_name.startswith("facebook/rag-")  # whose config does not name its question encoder
        theirs = "facebook/dpr-question_encoder-single-nq-base" if published else None
        for warning in encoder_mismatches(description, rag_config.question_encoder, theirs):
            print(f"Warning: {warning}")
    return embedder, description


if __name__ == "__main__":
    run_script(parse_args, main)
