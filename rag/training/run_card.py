"""What the card of a checkpoint tells of the run that trained it.

save_model(model, folder, tokenizer, base, making_of(module))
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult
from transformers import RagConfig

from rag.files import read_lines
from rag.hub import public_name
from rag.index.arguments import SEARCH_FLAGS
from rag.models.card import Making, changed_flags, hardware
from rag.training.run_folder import FREE_TO_CHANGE, precision_of

if TYPE_CHECKING:
    from rag.training.qa_module import GenerativeQAModule

# Of a validation's means: the metric's name on the hub, ours, and what it is multiplied by.
METRICS = {
    "avg_em": ("exact_match", "exact match, %", 100),
    "avg_f1": ("f1", "F1, %", 100),
    "avg_loss": ("loss", "loss a question, nats", 1),
}
# Where a machine searches, and keeps what it has fetched.
OF_THE_MACHINE = {"cache_dir", *FREE_TO_CHANGE["retrieval"]}
WIKIPEDIA = ("exact", "compressed")


def measured(metrics: dict[str, float], questions: int, step: int, epoch: int) -> dict[str, float]:
    """What a validation says of the weights, for their card."""
    means = {name: float(metrics[f"val_{name}"]) for name in METRICS if f"val_{name}" in metrics}
    return {"questions": questions, "step": step, "epoch": epoch} | means


def making_of(module: "GenerativeQAModule") -> Making:
    """What made the weights that a module has now."""
    args = module.args
    groups = (args.model, args.retrieval, args.data, args.training, args.trainer)
    settings: dict[str, Any] = {}
    for group in groups:
        settings |= changed_flags(group, OF_THE_MACHINE)
    if args.data.dataset_name is not None:
        settings.pop("data_dir", None)  # which nobody gave
    index = index_of(module)
    return Making(
        "finetune_rag.py",
        {"checkpoint": args.model.model_name_or_path},
        settings,
        args.data.name,
        _sizes(module),
        index,
        _results(module, index),
        hardware(module.device),
        args.model.cache_dir,
    )


def index_of(module: "GenerativeQAModule") -> dict[str, Any]:
    """What bears on a search; kind and effort as the open index has them, where this process searches."""
    config, index = module.model.config, getattr(module.retriever, "index", None)
    if not isinstance(config, RagConfig) or index is None:
        return {}
    known: dict[str, Any] = {"index_name": config.index_name}
    if config.index_name in WIKIPEDIA:
        known["dataset"] = config.dataset
    elif config.passages_path:
        known["passages_path"] = public_name(config.passages_path)
    effort = {name: getattr(config, name, None) for name in SEARCH_FLAGS}
    known |= {name: value for name, value in effort.items() if value is not None}
    if hasattr(index, "description") and index.is_initialized():
        return known | index.description()
    return known


def _sizes(module: "GenerativeQAModule") -> dict[str, int]:
    """Examples used of each split that a training reads."""
    data, sizes = module.args.data, {}
    if data.data_dir is None:  # a module from the checkpoint of a run by --dataset_name
        return {}
    for split, most in {"train": data.n_train, "val": data.n_val}.items():
        file = Path(data.data_dir, f"{split}.source")
        if file.is_file():
            count = len(read_lines(file))
            sizes[split] = count if most < 0 else min(count, most)
    return sizes


def _results(module: "GenerativeQAModule", index: dict[str, Any]) -> list[EvalResult]:
    """The scores of the last validation, by the names of eval_rag.py's flags with all that bears on them."""
    found, data = module.measured, module.args.data
    passages = {"n_docs": module.model.config.n_docs} | index if index else {}
    settings = passages | {
        "num_beams": data.num_beams,
        "max_length": data.val_max_target_length,
        "max_source_length": data.max_source_length,
        "precision": precision_of(module.args.to_dict()),
    }
    if data.prefix:
        settings["prefix"] = data.prefix
    if module.rescore is not None:
        settings["reranker"] = public_name(module.args.retrieval.reranker or "")
        settings["rerank_depth"] = module.rescore.depth
    name = public_name(data.name)
    return [
        EvalResult(
            task_type="question-answering",
            dataset_type=name,
            dataset_name=name,
            dataset_split="validation",
            dataset_args={count: int(found[count]) for count in ("questions", "step", "epoch")},
            metric_type=kind,
            metric_name=title,
            metric_value=round(found[measure] * factor, 4),
            metric_args=settings,
        )
        for measure, (kind, title, factor) in METRICS.items()
        if measure in found
    ]
