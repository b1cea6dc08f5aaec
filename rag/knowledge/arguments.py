"""The settings of use_own_knowledge_dataset.py: documents, encoder, where it runs, the index, and questions to it.

args = parse_into(KnowledgeArguments, description=__doc__)
raise_problems(settings_problems(args))
"""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

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
    csv_path: str = field(
        default=str(Path(__file__).resolve().parents[2] / "test_data" / "my_knowledge_dataset.csv"),
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
    append: bool = field(
        default=False, metadata={"help": "Add the documents of --csv_path to the knowledge that --output_dir holds."}
    )
    drop_duplicates: bool = field(
        default=False, metadata={"help": "Leave out passages that are equal, title and text, to an earlier one."}
    )
    num_proc: int = field(default=1, metadata={"help": "Threads that tokenise; more pays beside a GPU."})
    batch_size: int = field(default=16, metadata={"help": "Passages encoded at a time."})
    num_shards: int | None = field(
        default=None,
        metadata={"help": "Files of embeddings, the least that a killed run loses; left out, one in 2,048 passages."},
    )
    num_encoding_processes: int | None = field(
        default=None, metadata={"help": "Processes of this node that encode; left out, one for each GPU, or one."}
    )
    distributed: str | None = field(
        default=None,
        metadata={
            "help": "ray: encode shards on all nodes of a Ray cluster; the suite must be there.",
            "choices": ["ray"],
        },
    )
    ray_address: str = field(
        default="auto", metadata={"help": "HOST:PORT of a Ray cluster; auto: the running one, else one of our own."}
    )
    gpus_per_task: float | None = field(
        default=None,
        metadata={"help": "GPUs, or a share of one, for each shard on Ray; left out, 1 if this node has any, else 0."},
    )
    half_precision: bool = field(
        default=False, metadata={"help": "Store embeddings as float16, in half the bytes; an index is made of those."}
    )
    d: int | None = field(
        default=None, metadata={"help": "Dimension of the embeddings; the encoder's, and never another."}
    )
    m: int = field(
        default=128, metadata={"help": "Links of a passage in the HNSW index: more find better, for 8 bytes each."}
    )
    index_factory: str | None = field(
        default=None,
        metadata={
            "help": "Kind of index as FAISS's factory writes it: Flat, HNSW32,SQ8, IVF4096,Flat, "
            "OPQ64_256,IVF4096,PQ64, ...; left out, HNSW{m},Flat."
        },
    )
    train_sample: int | None = field(
        default=None,
        metadata={"help": "Passages to train on; left out, 65,536 or 50 a list of IVF, whichever is more."},
    )
    num_index_shards: int = field(
        default=1, metadata={"help": "Files of the index; building takes memory for one of them."}
    )
    recall_queries: int = field(
        default=256,
        metadata={"help": "Pieces of passages on which the index is compared with an exact search; 0 for none."},
    )
    n_docs: int = field(default=5, metadata={"help": "Passages that --search shows and that recall is counted over."})
    search: list[str] | None = field(
        default=None, metadata={"help": "Questions: print the passages that --output_dir has for them, build nothing."}
    )
    question_encoder_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Encoder of --search; left out, --rag_model_name's, or the passages' own if it is no DPR."},
    )
    question_encoder_pooling: str = field(
        default="auto",
        metadata={"help": "As --ctx_encoder_pooling.", "choices": ["auto", "cls", "mean", "max"]},
    )


def settings_problems(args: KnowledgeArguments) -> list[str]:
    """What can be said against the settings without reading anything but names."""
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
        flag = "--append" if args.append else "--search"
        problems.append(
            f"{flag}: --output_dir {args.output_dir} holds no knowledge (no index.json); build it without {flag}"
        )
    return problems


def _documents_problems(csv_path: str) -> list[str]:
    if csv_path == KnowledgeArguments.csv_path and not Path(csv_path).exists():
        return ["--csv_path is needed: your documents; the example, its default, is in a checkout's test_data only"]
    return file_problems("--csv_path", csv_path, "give your documents")
