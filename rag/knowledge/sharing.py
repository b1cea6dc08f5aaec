"""Knowledge for others: a finished folder as a dataset on the Hugging Face hub, with its card.

require_push("alice/knowledge")                       # before it is built
push_knowledge("alice/knowledge", Path("output/my_knowledge"))

`--passages_path hub:alice/knowledge` opens it (rag/index/sources.py).
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from rag.errors import printable
from rag.files import load_json
from rag.hub import CARD_FILE, public_name, push_folder
from rag.index.index_files import DESCRIPTION_FILE, IndexDescription
from rag.knowledge.arguments import PASSAGES_FOLDER, WORDS_KIND
from rag.knowledge.contents import read_knowledge

PATHS = ("csv_path", "encoder")  # what index.json has of the machine's folders
SIZES = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6), ("1M<n<10M", 10**7),
         ("10M<n<100M", 10**8), ("100M<n<1B", 10**9))  # fmt: skip


def push_knowledge(repo: str, output: Path) -> None:
    """Upload passages and index, then their description and card; of paths these have the last part alone.

    index.json comes last: where an upload broke there is none, and the dataset is not opened.

    Raises:
        UserError: the hub refuses it, or the connection broke.
    """
    description = read_knowledge(output)
    told = json.dumps(_without_folders(load_json(output / DESCRIPTION_FILE)), indent=2, ensure_ascii=False)
    last = {CARD_FILE: str(card_of(repo, description)).encode(), DESCRIPTION_FILE: f"{told}\n".encode()}
    patterns = [f"{PASSAGES_FOLDER}/*", description.index, f"{description.index}/*"]
    print(f"{output} is at {push_folder(repo, 'dataset', output, patterns, last)}: --passages_path hub:{repo} opens it")


def _without_folders(content: dict[str, Any]) -> dict[str, Any]:
    """What index.json says, for other machines."""
    short = {name: public_name(content[name]) for name in PATHS if content.get(name)}
    parts = [_without_folders(part) for part in content.get("parts", [])]
    return content | short | ({"parts": parts} if parts else {})


def card_of(repo: str, description: IndexDescription) -> DatasetCard:
    """What the hub shows of the dataset, and reads of it."""
    words = description.factory == WORDS_KIND
    data = DatasetCardData(
        license="unknown",
        pretty_name=repo.partition("/")[2],
        tags=["rag", "bm25" if words else "faiss"],
        size_categories=next((name for name, most in SIZES if description.passages < most), "n>1B"),
        configs=[{"config_name": "default", "data_files": f"{PASSAGES_FOLDER}/*.arrow"}],
    )
    encoder = "" if words else f"\n- Encoder: `{_name(description.encoder)}`, {description.dimension} dimensions"
    kind = ["--index_name bm25 "] if words else []
    command = f"python eval_rag.py {''.join(kind)}--passages_path hub:{repo} --model_name_or_path path/to/rag"
    return DatasetCard(
        f"""---
{data.to_yaml()}
---

# Passages and index for retrieval-augmented generation

- Passages: {description.passages:,}, of {description.documents:,} documents in `{_name(description.csv_path)}`{encoder}
- Index: {printable(description.factory)}{_recall(description)}

```bash
{command} \\
    --evaluation_set questions.txt --gold_data_path answers.txt --gold_data_mode ans
```
"""
    )


def _name(path: str) -> str:
    return " ".join(printable(public_name(path)).replace("`", "'").split()) if path else ""


def _recall(description: IndexDescription) -> str:
    """What the build has measured of the index: recall against an exact search, with growing effort."""
    rows = [", ".join(f"{name} {value:g}" for name, value in row.items()) for row in description.recall or []]
    return "".join(f"\n  - {row}" for row in rows if "queries_per_second" in row)
