"""The card of a checkpoint: a `README.md` whose metadata the hub reads, and whose text says what made the weights.

    write_card(folder, model, Making(script="finetune_rag.py", parts={"checkpoint": "facebook/rag-token-nq"}, ...))
    read_card("path/to/rag").get("license")

It names no user and no folder of the machine: of a path it has the last part. Two runs of one command give the same
card but for the line "- Time:". The card is for readers; nothing that is loaded depends on it.
"""

import math
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel, RagConfig, RagSequenceForGeneration, RagTokenForGeneration

from rag.errors import printable
from rag.hub import CARD_FILE, is_hub_name, public_name
from rag.models.fid_rag import RagFidForGeneration
from rag.models.loading import checkpoint_file

PARTS = ("question_encoder", "generator", "checkpoint")
PARTS_KEY = "rag_parts"  # in the metadata: what the parts are from, for the cards of what is trained from there
LARGEST_CARD = 1 << 20  # bytes of a stranger's card that are read
UNKNOWN_LICENSE, LONGEST_LICENSE = "unknown", 200  # characters
LICENSE_FIELDS = ("license", "license_name", "license_link")
RESULT_TYPES: dict[str, Any] = {
    "task_type": str, "dataset_type": str, "dataset_name": str, "dataset_split": str, "dataset_args": dict,
    "metric_type": str, "metric_name": str, "metric_value": int | float, "metric_args": dict,
}  # fmt: skip
PACKAGES = ("rag-suite", "torch", "transformers", "datasets", "faiss-cpu", "pytorch-lightning", "peft", "bitsandbytes")
PAPER = "[Lewis et al., 2020](https://arxiv.org/abs/2005.11401)"
FUSION_PAPER = "[Izacard and Grave, 2021](https://arxiv.org/abs/2007.01282)"
# The first that fits counts.
KINDS: dict[type, str] = {
    RagTokenForGeneration: "RAG-Token",
    RagFidForGeneration: "Fusion-in-Decoder",
    RagSequenceForGeneration: "RAG-Sequence",
}
HERE = "path/to/this/folder"
# What scores depend on, by the names that eval_rag.py has for it, too.
EVAL_FLAGS = (
    "ef_search",
    "nprobe",
    "num_beams",
    "max_length",
    "max_source_length",
    "prefix",
    "reranker",
    "rerank_depth",
)
INDEX_FLAGS = {  # how an index is named to eval_rag.py; where it lies is the reader's
    "custom": {"passages_path": "path/to/passages", "index_path": "path/to/index"},
    "bm25": {"passages_path": "path/to/passages"},
    "hybrid": {"passages_path": "path/to/passages", "index_path": "path/to/index"},
    "legacy": {"index_path": "path/to/index"},
}


@dataclass(frozen=True)
class Making:
    """What a script knows of the making of a checkpoint beside the model.

    Attributes:
        script: the file that made it.
        parts: folder or hub name of "question_encoder" and "generator", or of the "checkpoint" that had both.
        settings: flags that were not left at their defaults, by name.
        data: folder of the examples; None where nothing was trained.
        data_sizes: examples by split.
        index: what bears on a search: kind, passages, effort.
        results: scores that were measured with these very weights.
        hardware: what it was made on, without the machine's name.
        cache_dir: where cards of parts on the hub are kept.
    """

    script: str
    parts: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    data_sizes: dict[str, int] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)
    results: list[EvalResult] = field(default_factory=list)
    hardware: str = ""
    cache_dir: str | None = None


def write_card(folder: Path, model: PreTrainedModel, making: Making) -> None:
    """Write the card into the folder of a checkpoint whose weights lie there."""
    data = metadata(folder, model, making)
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(folder, model, making, data)}")
    card.save(folder / CARD_FILE)


def read_card(path: str, cache_dir: str | None = None) -> dict[str, Any]:
    """The metadata of the card of a model (folder or hub name); empty where it has none that can be read."""
    return _card_on_hub(path, cache_dir) if is_hub_name(path) else _read_card(path, cache_dir)


@cache
def _card_on_hub(path: str, cache_dir: str | None) -> dict[str, Any]:
    """Asked for once: a training that exports does not wait for the hub each time."""
    return _read_card(path, cache_dir)


def _read_card(path: str, cache_dir: str | None) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        file = checkpoint_file(path, CARD_FILE, cache_dir)
        if file is not None and Path(file).is_file() and os.path.getsize(file) <= LARGEST_CARD:
            return metadata_load(file) or {}
    return {}


def read_results(path: str) -> list[EvalResult]:
    """The scores on the card of a checkpoint, which those of the same weights in another form are, too."""
    results: list[EvalResult] = []
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # it is no card of ours
        results = ModelCardData(**read_card(path)).eval_results or []
    ours = [EvalResult(**{name: getattr(one, name) for name in RESULT_TYPES}) for one in results]
    return [one for one in ours if _is_of_our_kind(one)]


def _is_of_our_kind(result: EvalResult) -> bool:
    """Whether it has what our results have; of a stranger's YAML a value may be anything, and of any size."""
    plain = all(isinstance(getattr(result, name), kind) for name, kind in RESULT_TYPES.items())
    return plain and all(
        isinstance(name, str) and isinstance(value, str | int | float)
        for settings in (result.metric_args, result.dataset_args)
        for name, value in settings.items()  # type: ignore[union-attr]
    )


def changed_flags(arguments: Any, left_out: Iterable[str] = ()) -> dict[str, Any]:
    """The settings of a dataclass of flags that are not their defaults, by name; those without a default, too."""
    return {
        one.name: value
        for one in fields(arguments)
        if one.init and one.name not in left_out and (value := getattr(arguments, one.name)) != _default(one)
    }


def _default(one: Any) -> Any:
    return one.default if one.default_factory is MISSING else one.default_factory()


def hardware(device: torch.device) -> str:
    """What a process computes on, as "2 x NVIDIA H200" or the name of the processor with the threads that it uses."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if together else 1
    if device.type == "cuda":
        return f"{ranks} x {torch.cuda.get_device_name(device)}"
    processes = f"{ranks} processes of " if ranks > 1 else ""
    threads = torch.get_num_threads()
    return f"{_processor()}, {processes}{threads} thread{'' if threads == 1 else 's'}"


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


# --- Metadata ---------------------------------------------------------------------------------------------------------


def metadata(folder: Path, model: PreTrainedModel, making: Making) -> ModelCardData:
    """What the hub reads of a checkpoint."""
    cards = {name: read_card(path, making.cache_dir) for name, path in making.parts.items()}
    parts = _origins(making.parts, cards)
    kept: dict[str, Any] = {PARTS_KEY: parts} if parts else {}
    tags = ["rag", "retrieval-augmented-generation"] if isinstance(model.config, RagConfig) else ["closed-book"]
    tags += [config.model_type for config in _part_configs(model.config).values()]
    if any(folder.glob("*_adapter")):
        tags.append("lora")
    learned = "" if making.data is None else f", finetuned on {plain_text(public_name(making.data))}"
    return ModelCardData(
        **_license(list(cards.values())),
        library_name="transformers",
        pipeline_tag="question-answering" if isinstance(model.config, RagConfig) else "text-generation",
        tags=tags,
        base_model=_base_models(making.parts, cards) or None,
        datasets=_datasets(making),
        model_name=f"{kind_of(model)} of {' and '.join(parts.values())}{learned}",
        eval_results=making.results or None,
        **kept,
    )


def _part_configs(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    if isinstance(config, RagConfig):
        return {"question_encoder": config.question_encoder, "generator": config.generator}
    return {"generator": config}


def kind_of(model: PreTrainedModel) -> str:
    """What is made of the parts, in the paper's words."""
    if not isinstance(model.config, RagConfig):
        return "Closed-book generator"
    return next(name for kind, name in KINDS.items() if isinstance(model, kind))


def _origins(parts: dict[str, str], cards: dict[str, dict]) -> dict[str, str]:
    """What each part is from: of a checkpoint whose card says so, what that was made of."""
    origins: dict[str, str] = {}
    for name, path in parts.items():
        known = cards[name].get(PARTS_KEY)
        known = known if isinstance(known, dict) else {name: public_name(path)}
        origins |= {key: plain_text(known[key]) for key in known if key in PARTS and isinstance(known[key], str)}
    return origins


def _base_models(parts: dict[str, str], cards: dict[str, dict]) -> list[str]:
    """Names on the hub, which refuses any other: of a folder those that its own card has."""
    names: list[str] = []
    for name, path in parts.items():
        known = cards[name].get("base_model")
        inherited = [known] if isinstance(known, str) else known if isinstance(known, list) else []
        names += [path] if is_hub_name(path) else [one for one in inherited if isinstance(one, str)]
    return [name for name in dict.fromkeys(names) if is_hub_name(name)]


def _license(cards: list[dict]) -> dict[str, Any]:
    """The license that all parts have; "unknown" where one names none, and "other" where they differ."""
    licenses = [
        {
            name: text
            for name in LICENSE_FIELDS
            if isinstance(text := card.get(name), str) and len(text) < LONGEST_LICENSE
        }
        for card in cards
    ]
    if not licenses or not all("license" in one for one in licenses):
        return {"license": UNKNOWN_LICENSE}
    return licenses[0] if all(one == licenses[0] for one in licenses) else {"license": "other"}


def _datasets(making: Making) -> list[str] | None:
    """Data sets on the hub that were trained on, or whose passages were read."""
    names = [making.data, making.index.get("dataset")]
    return [name for name in names if isinstance(name, str) and "/" in name and is_hub_name(name)] or None


# --- Text -------------------------------------------------------------------------------------------------------------


def _text(folder: Path, model: PreTrainedModel, making: Making, data: ModelCardData) -> str:
    sections = {
        f"# {plain_text(data.model_name)}": _summary(folder, model, making),
        "## Parts": _table(("part", "kind", "from"), _part_rows(model, making, data.get(PARTS_KEY, {}))),
        "## Data": _data_lines(making),
        "## Scores": _score_lines(making.results),
        "## Settings": _settings_lines(making),
        "## How it was made": _origin_lines(making),
        "## How to load it": _loading_lines(model, making),
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items() if text) + "\n"


def _summary(folder: Path, model: PreTrainedModel, making: Making) -> str:
    what = f"A retrieval-augmented generation model ({PAPER}): it finds passages for a question and answers from them."
    if isinstance(model, RagFidForGeneration):
        what = f"A Fusion-in-Decoder ({FUSION_PAPER}): it finds passages for a question and reads them all at once."
    if not isinstance(model.config, RagConfig):
        what = "A language model that answers questions without passages, the closed-book baseline of RAG."
    held = "all weights of it"
    if (folder / "base.json").is_file():
        held = "those weights alone that were trained; `base.json` names the checkpoint that has the others"
    return f"{what} Made by `{making.script}`. This folder holds {held}: {_stored_values(folder):,} numbers."


def _stored_values(folder: Path) -> int:
    """How many numbers the weights beside the card have."""
    count = 0
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count


def _part_rows(model: PreTrainedModel, making: Making, origins: dict[str, str]) -> list[tuple[str, str, str]]:
    rows = [
        (name.replace("_", " "), f"`{config.model_type}`", _code(origins[name]) if name in origins else "")
        for name, config in _part_configs(model.config).items()
    ]
    start = making.parts.get("checkpoint")
    return rows + ([] if start is None else [("made from", f"`{model.config.model_type}`", _code(public_name(start)))])


def _data_lines(making: Making) -> str:
    lines = []
    if making.data is not None:
        sizes = ", ".join(f"{count:,} {split}" for split, count in making.data_sizes.items())
        lines.append(f"- Questions: {_code(public_name(making.data))}: {sizes}")
    if making.index:
        lines.append(f"- Index: {_described(making.index)}")
    return "\n".join(lines)


def _score_lines(results: list[EvalResult]) -> str:
    """A table for each lot of scores that were measured together."""
    tables: dict[str, list[tuple[str, ...]]] = {}
    for one in results:
        measured = f"{_code(one.dataset_name)}, {plain_text(one.dataset_split)}: {_described(one.dataset_args or {})}"
        title = f"{measured}. Measured with {_described(one.metric_args or {})}."
        tables.setdefault(title, []).append((plain_text(one.metric_name), f"{one.metric_value:g}"))
    return "\n\n".join(f"{title}\n\n{_table(('score', 'value'), rows)}" for title, rows in tables.items())


def _settings_lines(making: Making) -> str:
    if not making.settings:
        return ""
    flags = [_flag(name, value) for name, value in making.settings.items()]
    return "\n".join(["Flags that were not left at their defaults:", "", "```text", *flags, "```"])


def _origin_lines(making: Making) -> str:
    packages = [f"{name} {found}" for name in PACKAGES if (found := _version(name)) is not None]
    return "\n".join(
        [
            *([f"- Hardware: {plain_text(making.hardware)}"] if making.hardware else []),
            f"- Date: {datetime.now(UTC):%Y-%m-%d}",  # no more: a resumed run leaves the unbroken card
            f"- Packages: Python {platform.python_version()}, {', '.join(packages)}",
        ]
    )


def _loading_lines(model: PreTrainedModel, making: Making) -> str:
    command = {"model_name_or_path": HERE, "evaluation_set": "questions.txt", "gold_data_path": "answers.txt"}
    if isinstance(model.config, RagConfig):
        name = model.config.index_name
        command |= {"index_name": name, **INDEX_FLAGS.get(name, {}), "n_docs": model.config.n_docs}
    measured_with = making.results[0].metric_args or {} if making.results else {}
    command |= {"gold_data_mode": "ans"} | {name: measured_with[name] for name in EVAL_FLAGS if name in measured_with}
    return f"""```python
from rag.models.checkpoints import load_model, load_tokenizer

folder = "{HERE}"
model, tokenizer = load_model(folder), load_tokenizer(folder)
```

```bash
python eval_rag.py {" ".join(_flag(flag, value) for flag, value in command.items())}
```"""


def _flag(name: str, value: Any) -> str:
    """A setting as words of a command line."""
    values = value if isinstance(value, list | tuple) else [] if value is True else [value]
    return " ".join([f"--{name}", *(shlex.quote(_quotable(_shown(one))) for one in values)])


def _quotable(text: str) -> str:
    """A text as it is, with the spaces at its ends, unless it could end the block of code that it stands in."""
    return plain_text(text) if "\n" in text or "`" in text else printable(text)


def _shown(value: Any) -> str:
    """A value without the folders of the machine."""
    text = str(value)
    if not isinstance(value, str) or text.startswith("path/to/"):
        return text
    is_path = os.sep in text and (text.startswith((os.sep, "~", ".")) or text.count(os.sep) > 1)
    return public_name(text) if text.strip() and (is_path or os.path.exists(text)) else text


def _described(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {plain_text(_shown(value))}" for name, value in settings.items())


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows))


def _code(name: str) -> str:
    return f"`{plain_text(name)}`"


def plain_text(text: Any) -> str:
    """A stranger's text on one line, that ends no code, no cell of a table and no metadata."""
    return " ".join(printable(str(text)).replace("`", "'").replace("|", "/").split())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
