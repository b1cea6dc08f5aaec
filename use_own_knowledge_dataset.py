"""Make knowledge for a RAG model of your own documents: passages, their embeddings and a FAISS index.

    python use_own_knowledge_dataset.py \\
        --csv_path path/to/my_knowledge_dataset.csv \\
        --dpr_ctx_encoder_model_name facebook/dpr-ctx_encoder-single-nq-base \\
        --output_dir path/to/my_knowledge \\
        --rag_model_name path/to/rag_checkpoint --question "Which river flows through Paris?"

The file has a line `title TAB text` for each document; nothing in it is quoted, and a header `title TAB text` is
skipped. Texts are cut into passages of 100 words. Written to --output_dir: my_knowledge_dataset (title, text,
embeddings), my_knowledge_dataset_hnsw_index.faiss and index.json, which says what made them. A killed run goes on when
the same command is given again; a finished one is reused. Without --rag_model_name nothing is asked at the end.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from cli_rag import UserError, check_file, parse_into, raise_problems, run_script
from utils_rag import progress

PASSAGES_FOLDER = "my_knowledge_dataset"
INDEX_FILE = "my_knowledge_dataset_hnsw_index.faiss"
ENCODER_FLAG = "--dpr_ctx_encoder_model_name"


@dataclass
class KnowledgeArguments:
    csv_path: str = field(
        default=str(Path(__file__).parent / "test_data" / "my_knowledge_dataset.csv"),
        metadata={
            "help": "Documents: a file `title TAB text` a line, DPR's TSV, JSON lines or Parquet (title, text), .gz or "
            ".zst of these, a dataset's folder, or a folder of them all."
        },
    )
    question: str | None = field(default=None, metadata={"help": "Question to ask in the end, of --rag_model_name."})
    rag_model_name: str | None = field(
        default=None, metadata={"help": "RAG checkpoint (folder or hub name) that is to answer --question."}
    )
    # Departure from the public suite: its default is the "multiset" encoder, whose vectors do not match the question
    # encoder of the published RAG models, which is of the "single-nq" pair.
    dpr_ctx_encoder_model_name: str = field(
        default="facebook/dpr-ctx_encoder-single-nq-base",
        metadata={"help": "Folder or hub name of the context encoder; the RAG model's question encoder must match."},
    )
    ctx_encoder_pooling: str = field(
        default="auto",
        metadata={
            "help": "How token vectors become one vector, as consolidate_rag_checkpoint's --question_encoder_pooling.",
            "choices": ["auto", "cls", "mean", "max"],
        },
    )
    output_dir: str = field(
        default="output/my_knowledge", metadata={"help": "Folder for the passages and their index."}
    )
    num_proc: int = field(default=1, metadata={"help": "Threads that tokenise; more pays beside a GPU."})
    batch_size: int = field(default=16, metadata={"help": "Passages encoded at a time."})
    d: int | None = field(
        default=None, metadata={"help": "Dimension of the embeddings; the encoder's, and never another."}
    )
    m: int = field(
        default=128, metadata={"help": "Links of a passage in the HNSW index: more find better, for 8 bytes each."}
    )


@dataclass
class Knowledge:
    """What `main` made.

    Attributes:
        passages_path: folder of the passages, for `--passages_path`.
        index_path: the FAISS file, for `--index_path`.
        documents: lines of the file.
        passages: pieces they were cut into.
        dimension: d of the embeddings.
        reused: whether all of it was there from an earlier run.
        answer: of the RAG model; None where none was asked.
    """

    passages_path: str
    index_path: str
    documents: int
    passages: int
    dimension: int
    reused: bool = False
    answer: str | None = None


def parse_args(argv: list[str] | None = None) -> KnowledgeArguments:
    return parse_into(KnowledgeArguments, description=__doc__, argv=argv)


def main(args: KnowledgeArguments) -> Knowledge:
    """Passages, index and, with a RAG checkpoint at hand, an answer.

    Raises:
        UserError: a setting or a line of the file is faulty, the encoder cannot be loaded or does not fit, the disk is
            too small, or `output_dir` holds knowledge made otherwise.
    """
    survey = check_arguments(args)
    print(f"{args.csv_path}: {survey.documents:,} documents, {survey.passages:,} passages")
    # Threads of the tokenizer, which reads these when it is first used.
    os.environ.update(TOKENIZERS_PARALLELISM=str(args.num_proc > 1).lower(), RAYON_NUM_THREADS=str(args.num_proc))

    rag_config = open_rag_config(args)
    embedder, description = open_encoder(args, survey, rag_config)
    knowledge = build(args, survey, embedder, description)
    flags = {"index_name": "custom", "passages_path": knowledge.passages_path, "index_path": knowledge.index_path}
    model = {} if rag_config is None else {"model_name_or_path": args.rag_model_name}
    print("Next: python finetune_rag.py", *(f"--{k} {shlex.quote(v)}" for k, v in (model | flags).items()), "...")

    if args.rag_model_name is None or args.question is None:
        missing = "--rag_model_name" if args.rag_model_name is None else "--question"
        print(f"No question is asked: {missing} was not given")
    elif rag_config is not None:
        knowledge.answer = ask(args.question, args.rag_model_name, flags)
    return knowledge


def check_arguments(args: KnowledgeArguments):
    """Read the whole file and look at every setting before anything is loaded; the survey of the file."""
    from passages_rag import survey_documents

    problems = [] if Path(args.csv_path).is_dir() else check_file("--csv_path", args.csv_path, "give your documents")
    for name in ("num_proc", "batch_size", "d", "m"):
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value} must be at least 1")
    survey = None if problems else survey_documents(args.csv_path)
    raise_problems(problems or survey.problems)
    return survey


# --- Models -----------------------------------------------------------------------------------------------------------


def open_rag_config(args: KnowledgeArguments):
    """The config of the RAG checkpoint, or None, saying why, where none is given or reachable."""
    if args.rag_model_name is None:
        return None

    from transformers import RagConfig

    from models_rag import load_config

    try:
        config = load_config(args.rag_model_name, flag="--rag_model_name")
    except UserError as error:
        print(f"--question will not be asked: {error}")
        return None
    if not isinstance(config, RagConfig):
        raise UserError(f"--rag_model_name {args.rag_model_name} is a {config.model_type} model; give a RAG checkpoint")
    return config


def open_encoder(args: KnowledgeArguments, survey, rag_config):
    """The embedder, and all that decides what comes out of it, to go into index.json."""
    from embed_passages_rag import PassageEmbedder
    from models_rag import load_encoder, load_tokenizer, weights_digest
    from passages_rag import WORDS_PER_PASSAGE

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
    for warning in mismatches(args, encoder.config, rag_config):
        print(f"Warning: {warning}")
    description = {
        "encoder": name,
        "encoder_digest": encoder_digest,
        **pooling_of(encoder.config),
        **embedder.settings(),
        "dimension": d,
        "csv_path": args.csv_path,
        "csv_digest": survey.digest,
        "words_a_passage": WORDS_PER_PASSAGE,
        "documents": survey.documents,
        "passages": survey.passages,
    }
    return embedder, description


def pooling_of(config) -> dict:
    """How an encoder with this config makes one vector; DPR's is the first token's."""
    if config.model_type == "pooled_encoder":
        return {"pooling": config.pooling, "normalize": config.normalize}
    return {"pooling": "cls", "normalize": False}


def mismatches(args: KnowledgeArguments, context_config, rag_config) -> list[str]:
    """Signs that the RAG model's question encoder and the context encoder were not trained together.

    DPR's published pairs are "single-nq" and "multiset"; across them up to 11 points of top-20 recall are lost.
    """
    if rag_config is None:
        return []
    found = []
    question_name = rag_config.question_encoder._name_or_path
    if args.rag_model_name.startswith("facebook/rag-"):
        question_name = "facebook/dpr-question_encoder-single-nq-base"
    ours, theirs = (re.findall("single-nq|multiset", name) for name in (args.dpr_ctx_encoder_model_name, question_name))
    if ours and theirs and ours != theirs:
        found.append(
            f"{ENCODER_FLAG} is of the {ours[0]} pair, the question encoder of {args.rag_model_name} of {theirs[0]}: "
            f"retrieval will suffer; give facebook/dpr-ctx_encoder-{theirs[0]}-base"
        )
    ours, theirs = pooling_of(context_config), pooling_of(rag_config.question_encoder)
    if ours != theirs:
        found.append(f"passages are pooled by {ours}, questions of {args.rag_model_name} by {theirs}")
    return found


# --- Files ------------------------------------------------------------------------------------------------------------


def build(args: KnowledgeArguments, survey, embedder, description: dict) -> Knowledge:
    """Embed the passages and index them, or take what an earlier run left."""
    from datasets import load_from_disk

    from embed_passages_rag import embed_passages, is_complete, partial_folder
    from index_rag import (
        DESCRIPTION_FILE,
        EmbeddingColumn,
        build_faiss_index,
        read_description,
        write_description,
        write_faiss_index,
    )
    from passages_rag import read_passages

    output = Path(args.output_dir)
    passages_path, index_path = output / PASSAGES_FOLDER, output / INDEX_FILE
    own = {name: value for name, value in description.items() if name not in ("csv_path", "encoder")}
    digest = hashlib.blake2b(json.dumps(own, sort_keys=True).encode(), digest_size=16).hexdigest()
    description |= {"digest": digest, "metric": "inner product", "factory": f"HNSW{args.m},Flat", "m": args.m}
    knowledge = Knowledge(str(passages_path), str(index_path), survey.documents, survey.passages, embedder.dimension)

    embedded = is_complete(passages_path, digest)
    made_by = read_description(index_path) if index_path.is_file() else {}
    if embedded and all(made_by.get(name) == description[name] for name in ("digest", "factory")):
        print(f"{output} holds this knowledge already and is reused")
        knowledge.reused = True
        return knowledge
    if passages_path.exists() and not embedded:
        raise UserError(
            f"--output_dir {output} holds knowledge of other documents, another encoder or other settings; "
            "give another folder or remove it"
        )
    check_space(args, survey, embedder.dimension, partial_folder(passages_path, digest))

    output.mkdir(parents=True, exist_ok=True)
    (output / DESCRIPTION_FILE).unlink(missing_ok=True)  # from here on it would describe an index that is no more
    if not embedded:
        embed_passages(read_passages(args.csv_path), survey.passages, embedder, passages_path, digest)
        if embedder.cut:
            print(f"{embedder.cut:,} passages reach the encoder's {embedder.max_length} tokens; the rest is not read")
    vectors = EmbeddingColumn(load_from_disk(str(passages_path)).data.column("embeddings"), embedder.dimension)
    blocks = progress(vectors.blocks(1024), total=len(vectors), desc="Indexing", unit="passages", size=len)
    write_faiss_index(build_faiss_index(blocks, embedder.dimension, args.m), index_path)
    versions = {name: version(name) for name in ("torch", "transformers", "datasets", "faiss-cpu")}
    write_description(output, description | {"versions": versions})
    return knowledge


def check_space(args: KnowledgeArguments, survey, dimension: int, partial: Path) -> None:
    """Refuse what the disk or the memory cannot hold, before hours of embedding; roughly, and rather too late."""
    import psutil

    index = survey.passages * (4 * dimension + 8 * args.m)  # FAISS: float32 vectors, 2 m links of 4 bytes
    dataset = survey.passages * 4 * dimension + survey.text_bytes
    written = sum(file.stat().st_size for file in partial.glob("data-*.arrow"))
    existing = next(folder for folder in (partial, *partial.parents) if folder.exists())
    free, memory = shutil.disk_usage(existing).free, psutil.virtual_memory().available
    problems = []
    if dataset + index - written > free:
        problems.append(
            f"--output_dir {args.output_dir}: {dataset + index - written:,} bytes are needed and {free:,} are free; "
            "give a folder on a larger disk"
        )
    if index > memory:
        problems.append(
            f"--m {args.m}: the index takes {index:,} bytes of memory while it is built and {memory:,} are free; "
            "give a smaller --m, fewer documents or a larger machine"
        )
    raise_problems(problems)


# --- One question -----------------------------------------------------------------------------------------------------


def ask(question: str, rag_model_name: str, index_flags: dict) -> str:
    """Print the passages that a RAG model finds for a question, their scores, and its answer; return the answer."""
    import torch

    from decoding_rag import generate_answers
    from models_rag import load_model, load_tokenizer
    from retriever_rag import RagKnowledgeRetriever, retrieve_contexts

    flag = "--rag_model_name"
    model = load_model(rag_model_name, config_overrides=index_flags, flag=flag)
    tokenizer = load_tokenizer(rag_model_name, flag=flag)
    retriever = RagKnowledgeRetriever(model.config, tokenizer.question_encoder, tokenizer.generator)
    retriever.init_retrieval()
    n_docs = min(model.config.n_docs, len(retriever.index))
    tokens = tokenizer.question_encoder(question, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        found = retrieve_contexts(model.rag, retriever, tokens["input_ids"], tokens["attention_mask"], n_docs)
        ids = generate_answers(model, found.input_ids, found.attention_mask, found.doc_scores, n_docs=n_docs)
    answer = tokenizer.generator.decode(ids[0], skip_special_tokens=True).strip()
    print(f"Question: {question}")
    for score, title, text in zip(found.doc_scores[0].tolist(), *found.docs[0].values(), strict=True):
        print(f"  {score:8.3f}  {title}: {text}")
    print(f"Answer: {answer}")
    return answer


if __name__ == "__main__":
    run_script(parse_args, main)
