"""The flags of use_own_knowledge_dataset.py: documents, encoder, where it runs, the index, and questions to it.

    args = parse_into(KnowledgeArguments, description=__doc__)
    raise_problems(flag_problems(args))

Nothing is read but names and numbers.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rag.command_line.flags import flag
from rag.errors import file_problems
from rag.index.arguments import EffortArguments

ENCODER_FLAG = "--dpr_ctx_encoder_model_name"
AT_LEAST_ONE = (
    "num_proc", "batch_size", "num_encoding_processes", "num_shards", "d", "m", "train_sample", "num_index_shards",
    "n_docs",
)  # fmt: skip
PASSAGES_FOLDER = "my_knowledge_dataset"  # in --output_dir


@dataclass
class KnowledgeArguments(EffortArguments):
    csv_path: str = flag(
        str(Path(__file__).resolve().parents[2] / "test_data" / "my_knowledge_dataset.csv"),
        "Documents: a file `title TAB text` a line, DPR's TSV, JSON lines or Parquet (title, text), .gz or "
        ".zst of these, a dataset's folder, or a folder of them all.",
    )
    question: str | None = flag(None, "Question to ask in the end, of --rag_model_name.")
    rag_model_name: str | None = flag(None, "RAG checkpoint (folder or hub name) that is to answer --question.")
    # Departure from the public suite: its default is the "multiset" encoder, whose vectors do not match the question
    # encoder of the published RAG models, which is of the "single-nq" pair.
    dpr_ctx_encoder_model_name: str = flag(
        "facebook/dpr-ctx_encoder-single-nq-base",
        "Folder or hub name of the context encoder; the RAG model's question encoder must match.",
    )
    ctx_encoder_pooling: Literal["auto", "cls", "mean", "max", "last"] = flag(
        "auto", "How token vectors become one vector, as consolidate_rag_checkpoint's --question_encoder_pooling."
    )
    ctx_encoder_prompt: str | None = flag(
        None, "Text before every passage; left out, the one that the encoder's sentence-transformers folder names."
    )
    output_dir: str = flag("output/my_knowledge", "Folder for the passages and their index.")
    append: bool = flag(False, "Add the documents of --csv_path to the knowledge that --output_dir holds.")
    drop_duplicates: bool = flag(False, "Leave out passages that are equal, title and text, to an earlier one.")
    num_proc: int = flag(1, "Threads that tokenize; more pays beside a GPU.")
    batch_size: int = flag(16, "Passages encoded at a time.")
    num_shards: int | None = flag(
        None, "Files of embeddings, the least that a killed run loses; left out, one in 2,048 passages."
    )
    num_encoding_processes: int | None = flag(
        None, "Processes of this node that encode; left out, one for each GPU, or one."
    )
    distributed: Literal["ray"] | None = flag(
        None, "ray: encode shards on all nodes of a Ray cluster; the suite must be there."
    )
    ray_address: str = flag("auto", "HOST:PORT of a Ray cluster; auto: the running one, else one of our own.")
    gpus_per_task: float | None = flag(
        None, "GPUs, or a share of one, for each shard on Ray; left out, 1 if this node has any, else 0."
    )
    half_precision: bool = flag(False, "Store embeddings as float16, in half the bytes; an index is made of those.")
    d: int | None = flag(None, "Dimension of the embeddings; the encoder's, and never another.")
    m: int = flag(128, "Links of a passage in the HNSW index: more find better, for 8 bytes each.")
    index_factory: str | None = flag(
        None,
        "Kind of index as FAISS's factory writes it: Flat, HNSW32,SQ8, IVF4096,Flat, "
        "OPQ64_256,IVF4096,PQ64, ...; left out, HNSW{m},Flat.",
    )
    train_sample: int | None = flag(
        None, "Passages to train on; left out, 65,536 or 50 a list of IVF, whichever is more."
    )
    num_index_shards: int = flag(1, "Files of the index; building takes memory for one of them.")
    recall_queries: int = flag(
        256, "Pieces of passages on which the index is compared with an exact search; 0 for none."
    )
    n_docs: int = flag(5, "Passages that --search shows and that recall is counted over.")
    search: list[str] | None = flag(
        None, "Questions: print the passages that --output_dir has for them, build nothing."
    )
    question_encoder_name_or_path: str | None = flag(
        None, "Encoder of --search; left out, --rag_model_name's, or the passages' own if it is no DPR."
    )
    question_encoder_pooling: Literal["auto", "cls", "mean", "max", "last"] = flag("auto", "As --ctx_encoder_pooling.")
    question_encoder_prompt: str | None = flag(None, "Text before every question of --search; left out, the encoder's.")


def flag_problems(args: KnowledgeArguments) -> list[str]:
    """What is wrong with the flags, as far as names and numbers show it."""
    problems = []
    if not args.search and not Path(args.csv_path).is_dir():
        problems += _documents_problems(args.csv_path)
    for name in AT_LEAST_ONE:
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value} must be at least 1")
    problems += args.effort_problems()
    if args.recall_queries < 0:
        problems.append(f"--recall_queries {args.recall_queries} must be at least 0")
    if args.m == 1:
        problems.append("--m 1 makes no graph that can be searched; give 2 or more")
    if args.append and args.csv_path == KnowledgeArguments.csv_path:
        problems.append("--append needs --csv_path: the documents that are to be added")
    if (args.gpus_per_task or 0) < 0:
        problems.append(f"--gpus_per_task {args.gpus_per_task:g} must be at least 0")
    if args.distributed == "ray" and args.num_encoding_processes is not None:
        problems.append("--num_encoding_processes: with --distributed ray, Ray starts as many as fit; leave one out")
    if args.distributed == "ray" and importlib.util.find_spec("ray") is None:
        problems.append("--distributed ray: Ray is not installed; pip install ray")
    if (args.append or args.search) and not (Path(args.output_dir) / "index.json").is_file():
        mode = "--append" if args.append else "--search"
        problems.append(
            f"{mode}: --output_dir {args.output_dir} holds no knowledge (no index.json); build it without {mode}"
        )
    return problems


def _documents_problems(csv_path: str) -> list[str]:
    if csv_path == KnowledgeArguments.csv_path and not Path(csv_path).exists():
        return ["--csv_path is needed: your documents; the example, its default, is in a checkout's test_data only"]
    return file_problems("--csv_path", csv_path, "give your documents")
