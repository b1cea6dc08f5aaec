"""The flags of use_own_knowledge_dataset.py: documents, encoder, where it runs, the index, and questions to it.

    args = parse_into(KnowledgeArguments, description=__doc__)
    raise_problems(flag_problems(args))

Nothing is read but names and numbers.
"""

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rag.command_line.flags import flag, trust_flag
from rag.errors import file_problems
from rag.hub import push_name_problems
from rag.index.arguments import FUSION_FLAGS, EffortArguments, FusionArguments
from rag.outputs import output_folder_problems
from rag.retrieval.arguments import UPR, RerankArguments

ENCODER_FLAG = "--dpr_ctx_encoder_model_name"
OUTPUT_FLAG = "--output_dir"
AT_LEAST_ONE = (
    "max_line_mb", "num_proc", "batch_size", "tokens_per_batch", "num_encoding_processes", "num_shards", "d", "m",
    "train_sample", "num_index_shards", "n_docs",
)  # fmt: skip
# What is in --output_dir beside index.json.
PASSAGES_FOLDER = "my_knowledge_dataset"
HNSW_FILE = "my_knowledge_dataset_hnsw_index.faiss"
INDEX_FILE = "my_knowledge_dataset_index.faiss"
SHARDS_FOLDER = "my_knowledge_dataset_index"
WORDS_FOLDER = "my_knowledge_dataset_bm25"
INDEXES = {HNSW_FILE, INDEX_FILE, SHARDS_FOLDER}  # FAISS's
OUTPUT_NAMES = {"index.json", PASSAGES_FOLDER, WORDS_FOLDER, *INDEXES}
WORDS_KIND = "bm25"  # an --index_factory that is not FAISS's
# What an index of words has no use for.
VECTOR_FLAGS = (
    "d", "train_sample", "num_index_shards", "half_precision", "precision", "tokens_per_batch", "distributed",
    "num_encoding_processes", "ef_search", "nprobe",
)  # fmt: skip
MOST = {"m": 10_000, "num_proc": 1024, "num_encoding_processes": 1024}


# What belongs to --search alone.
SEARCH_ONLY = ("index_name", *FUSION_FLAGS, "reranker", "rerank_depth")


@dataclass
class KnowledgeArguments(EffortArguments, FusionArguments, RerankArguments):
    csv_path: str = flag(
        str(Path(__file__).resolve().parents[2] / "test_data" / "my_knowledge_dataset.csv"),
        "Documents: a file `title TAB text` a line or with a header, DPR's TSV, JSON lines or Parquet (title, text), "
        ".gz, .bz2 or .zst of these, a dataset's or a BEIR folder, or a folder of them all.",
    )
    csv_quoting: Literal["auto", "csv", "none"] = flag(
        "auto", "Quotation marks in tab-separated files: csv takes off what csv writers add; auto looks at the file."
    )
    max_line_mb: int = flag(64, "Longest line or row, in million characters; a Parquet row group: 16 times as much.")
    skip_empty: bool = flag(False, "Pass over rows that have no text, and count them.")
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
    trust_remote_code: bool = trust_flag()
    output_dir: str = flag("output/my_knowledge", "Folder for the passages and their index.")
    append: bool = flag(False, "Add the documents of --csv_path to the knowledge that --output_dir holds.")
    drop_duplicates: bool = flag(False, "Leave out passages that are equal, title and text, to an earlier one.")
    num_proc: int | None = flag(None, "Threads that tokenize; left out, all cores beside a GPU, else one.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "auto",
        "Number format in which passages are encoded; auto: the one that --output_dir was begun in, "
        "else fp16 on a GPU, bf16 on a CPU with AMX or AVX512-BF16, fp32 on any other.",
    )
    batch_size: int | None = flag(None, "Passages encoded at a time, at most; left out, as many as --tokens_per_batch.")
    tokens_per_batch: int | None = flag(
        None, "Tokens encoded at a time, at most; left out, what keeps the device busy and fits in its memory."
    )
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
        "OPQ64_256,IVF4096,PQ64, ...; bm25: of words, without any encoder; left out, HNSW{m},Flat.",
    )
    train_sample: int | None = flag(
        None, "Passages to train on; left out, 65,536 or 50 a list of IVF, whichever is more."
    )
    num_index_shards: int = flag(1, "Files of the index; building takes memory for one of them.")
    recall_queries: int = flag(
        256, "Pieces of passages on which the index is compared with an exact search; 0 for none."
    )
    n_docs: int = flag(5, "Passages that --search shows and that recall is counted over.")
    push_to_hub: str | None = flag(
        None,
        "YOUR_NAME/NAME: upload passages and index to the Hugging Face hub, as a dataset that --passages_path "
        "hub:YOUR_NAME/NAME opens; an upload that broke goes on by the same command.",
    )
    search: list[str] | None = flag(
        None, "Questions: print the passages that --output_dir has for them, build nothing."
    )
    columns: int | None = flag(
        None, "Length of the line on which --search prints a passage, 40 or more; left out, all of its text."
    )
    verify: bool = flag(False, "Read all files of --output_dir and say whether they are as written, build nothing.")
    question_encoder_name_or_path: str | None = flag(
        None, "Encoder of --search; left out, --rag_model_name's, or the passages' own if it is no DPR."
    )
    question_encoder_pooling: Literal["auto", "cls", "mean", "max", "last"] = flag("auto", "As --ctx_encoder_pooling.")
    question_encoder_prompt: str | None = flag(None, "Text before every question of --search; left out, the encoder's.")
    index_name: Literal["hybrid"] | None = flag(
        None, "hybrid: --search by vectors and by BM25's words together, as --index_name of the other scripts."
    )

    @property
    def of_words(self) -> bool:
        """Whether an index of words is asked for."""
        return (self.index_factory or "").lower() == WORDS_KIND

    @property
    def mode(self) -> str | None:
        """The flag that says that nothing is built of --csv_path alone."""
        return next((f"--{name}" for name in ("append", "search", "verify") if getattr(self, name)), None)


def flag_problems(args: KnowledgeArguments) -> list[str]:
    """What is wrong with the flags, as far as names and numbers show it."""
    problems = []
    if args.mode in (None, "--append"):
        problems += _documents_problems(args.csv_path) + output_folder_problems(OUTPUT_FLAG, args.output_dir)
        if "::" in str(Path(args.output_dir).absolute()):
            problems.append(
                f"{OUTPUT_FLAG} {args.output_dir}: datasets cannot read a path with '::'; give another folder"
            )
    for name in AT_LEAST_ONE:
        value = getattr(args, name)
        if value is not None and value < 1:
            problems.append(f"--{name} {value} must be at least 1")
        if value is not None and value > MOST.get(name, value):
            problems.append(f"--{name} {value} must be at most {MOST[name]:,}")
    if args.columns is not None and args.columns < 40:
        problems.append(f"--columns {args.columns} must be at least 40")
    problems += args.effort_problems()
    if args.recall_queries < 0:
        problems.append(f"--recall_queries {args.recall_queries} must be at least 0")
    if args.m == 1:
        problems.append("--m 1 makes no graph that can be searched; give 2 or more")
    if args.append and args.csv_path == KnowledgeArguments.csv_path:
        problems.append("--append needs --csv_path: the documents that are to be added")
    gpus = args.gpus_per_task
    if gpus is not None and not 0 <= gpus < math.inf:
        problems.append(f"--gpus_per_task {gpus:g} must be at least 0, and a number")
    if args.distributed == "ray" and args.num_encoding_processes is not None:
        problems.append("--num_encoding_processes: with --distributed ray, Ray starts as many as fit; leave one out")
    if args.distributed == "ray" and importlib.util.find_spec("ray") is None:
        problems.append("--distributed ray: Ray is not installed; pip install ray")
    if args.index_factory is not None and not args.index_factory.strip():
        problems.append("--index_factory '' names no kind of index; leave it out for HNSW")
    if args.of_words:
        given = [name for name in VECTOR_FLAGS if getattr(args, name) != getattr(KnowledgeArguments, name)]
        problems += [
            f"--{name} has no use with --index_factory bm25, which has no vectors; leave it out" for name in given
        ]
    asked = [("question", text) for text in (args.question,) if text is not None]
    asked += [("search", text) for text in args.search or ()]
    problems += [
        f"--{name} '' asks nothing; give a question, or leave it out" for name, text in asked if not text.strip()
    ]
    if args.push_to_hub is not None and args.mode in ("--search", "--verify"):
        problems.append(f"--push_to_hub {args.push_to_hub}: {args.mode} makes nothing to upload; leave one of them out")
    problems += push_name_problems(args.push_to_hub) + _search_problems(args)
    return problems + _mode_problems(args)


def _search_problems(args: KnowledgeArguments) -> list[str]:
    """Flags of --search that have nothing to be about."""
    if not args.search:
        given = {name: value for name in SEARCH_ONLY if (value := getattr(args, name)) is not None}
        return [f"--{name} {value} is for --search; leave it out" for name, value in given.items()]
    problems = args.fusion_problems(args.index_name or "custom") + args.rerank_problems(args.n_docs)
    if args.reranker == UPR and args.rag_model_name is None:
        problems.append(f"--reranker {UPR} needs a generator; give --rag_model_name, too, or a CrossEncoder")
    return problems


def _mode_problems(args: KnowledgeArguments) -> list[str]:
    given = [f"--{name}" for name in ("append", "search", "verify") if getattr(args, name)]
    if len(given) > 1:
        return [f"{' and '.join(given)}: give one of them"]
    if given and not (Path(args.output_dir) / "index.json").is_file():
        place = f"--output_dir {args.output_dir}"
        return [f"{args.mode}: {place} holds no knowledge (no index.json); build it without {args.mode}"]
    return []


def _documents_problems(csv_path: str) -> list[str]:
    if csv_path == KnowledgeArguments.csv_path and not Path(csv_path).exists():
        return ["--csv_path is needed: your documents; the example, its default, is in a checkout's test_data only"]
    if not csv_path.strip() or "\0" in csv_path:
        return [f"--csv_path {csv_path!r} names nothing; give your documents"]
    path = Path(csv_path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        return [f"--csv_path {csv_path} is a device or a pipe, which is not read; give a file or a folder of documents"]
    return [] if path.is_dir() else file_problems("--csv_path", csv_path, "give your documents")
