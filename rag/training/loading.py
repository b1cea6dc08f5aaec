"""What a finetuning run begins with, and what one has left: model and tokenizer, weights and settings.

    model, tokenizer = load_model_and_tokenizer(args)
    args, weights = read_lightning_checkpoint("output/checkpoint3.ckpt")

Nothing is unpickled.
"""

import os
import pickle
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, RagConfig

from rag.errors import UserError, one_line, raise_problems
from rag.files import load_json
from rag.generation.families import require_family
from rag.generation.trial import require_runs
from rag.models.adapters import (
    LoraPlan,
    add_adapters,
    has_adapters,
    is_adapter_weight,
    parts_of,
    plan_of,
    require_plan,
)
from rag.models.bases import Base, base_of, read_base
from rag.models.checkpoints import fitting_model_type, load_model, load_tokenizer
from rag.models.fit import complete_start, require_fit, settle_prompt
from rag.models.limits import beams_problems, length_problems
from rag.models.loading import MODEL_FLAG
from rag.models.precision import dtype_of
from rag.models.questions import with_prompt
from rag.packing import PADDED
from rag.retrieval.retriever import RagKnowledgeRetriever
from rag.training.arguments import FinetuneArguments, ModelArguments
from rag.training.context_encoder import FOLDER as CONTEXT_ENCODER
from rag.training.namespaces import group_settings
from rag.training.retrieval_problems import closed_book_problems, fusion_problems
from rag.training.run_folder import begun_precision, is_rank_zero
from rag.training.seals import is_whole


def load_model_and_tokenizer(args: FinetuneArguments) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer that training starts from, the settings that flags override put into the model's config."""
    path, model_args = args.model.model_name_or_path, args.model
    names = ("encoder_layerdrop", "decoder_layerdrop", "dropout", "attention_dropout")
    overrides = {name: getattr(model_args, name) for name in names}
    overrides |= {name: getattr(args.retrieval, name) for name in ("n_docs", "max_combined_length")}
    source = f"{MODEL_FLAG} {path}"

    def prepare(config: PreTrainedConfig) -> None:
        args.retrieval.apply_to(config)
        if isinstance(config, RagConfig):
            require_family(config.generator, source)
        else:
            raise_problems(closed_book_problems(args, source))
        is_fused = fitting_model_type(config, path, model_args.model_type) == "fid"
        raise_problems(_size_problems(args, config, source) + fusion_problems(args, is_fused, source))

    model = load_model(
        path,
        model_args.model_type,
        overrides,
        model_args.cache_dir,
        config_name=model_args.config_name,
        prepare_config=prepare,
        keep_adapters=_trains_adapters(args),
        quantization=model_args.quantization,
    )
    adapt(model, args)
    name = model_args.tokenizer_name
    tokenizer_path, flag = (path, MODEL_FLAG) if name is None else (name, "--tokenizer_name")
    model_type = fitting_model_type(model.config, path, model_args.model_type)
    tokenizer = load_tokenizer(tokenizer_path, model_type, model_args.cache_dir, flag)
    settle_prompt(model, tokenizer, f"{flag} {tokenizer_path}")
    require_fit(model, tokenizer, f"{flag} {tokenizer_path}")
    complete_start(model, tokenizer, source)
    if model_args.attn_implementation != "auto":
        _choose_attention(model, model_args.attn_implementation)
    require_runs(model, tokenizer, source, train=True, num_beams=args.data.num_beams)
    if isinstance(model.config, RagConfig):  # --tokenizer_name may be of an encoder with another prompt
        with_prompt(tokenizer.question_encoder, model.config.question_encoder)
    return model, tokenizer


def _trains_adapters(args: FinetuneArguments) -> bool:
    """Whether those of the checkpoint, if it has any, stay apart: a test of a checkpoint alone reads them merged."""
    model = args.model
    return args.run.do_train or model.lora_r is not None or model.question_encoder_lora_r is not None


def lora_plans(model_args: ModelArguments) -> dict[str, LoraPlan]:
    """What the flags say of the adapters of each part of a model."""
    plans, r, encoder_r = {}, model_args.lora_r, model_args.question_encoder_lora_r
    if r is not None:
        alpha, targets = model_args.lora_alpha, model_args.lora_target_modules
        plans["generator"] = LoraPlan(
            r, 2 * r if alpha is None else alpha, model_args.lora_dropout, None if targets is None else tuple(targets)
        )
    if encoder_r is not None:
        plans["question_encoder"] = LoraPlan(encoder_r, 2 * encoder_r, model_args.lora_dropout)
    return plans


def adapt(model: PreTrainedModel, args: FinetuneArguments) -> None:
    """Add the adapters that the flags ask for; those that the checkpoint brought are trained on.

    Raises:
        UserError: the model has no such layers or parts, or its adapters are not those that the flags ask for.
    """
    plans, source = lora_plans(args.model), f"{MODEL_FLAG} {args.model.model_name_or_path}"
    for name, part in parts_of(model).items():
        flags = "lora" if name == "generator" else "question_encoder_lora"
        plan = plans.pop(name, None)
        if has_adapters(part):
            if plan is None:
                r = plan_of(part).r
                raise UserError(
                    f"{source} has adapters of its {name.replace('_', ' ')}; give --{flags}_r {r} to train them on, or "
                    "merge them first (consolidate_rag_checkpoint.py --merge_adapters)"
                )
            require_plan(part, plan, source, flags)
            for weight_name, weight in part.named_parameters():
                weight.requires_grad_(is_adapter_weight(weight_name))
        elif plan is not None:
            add_adapters(part, plan)
    if plans:
        raise UserError(
            f"--question_encoder_lora_r: {source[len(MODEL_FLAG) + 1 :]} has no question encoder; leave it out"
        )


def base_of_run(args: FinetuneArguments) -> Base:
    """The checkpoint whose weights are those that a run does not train.

    Raises:
        UserError: it cannot be read, or an earlier training began beside weights that were quantized otherwise.
    """
    path, cache_dir, kind = args.model.model_name_or_path, args.model.cache_dir, args.model.quantization
    earlier = read_base(path, cache_dir)
    if earlier is not None and earlier.quantization != kind:
        remedy = f"give --load_in_{earlier.quantization}" if kind is None else f"leave --load_in_{kind} out"
        raise UserError(
            f"{MODEL_FLAG} {path} was trained beside weights in {earlier.quantization or 'full precision'}; {remedy}, "
            "or merge its adapters first (consolidate_rag_checkpoint.py --merge_adapters)"
        )
    if earlier is not None and args.model.lora_r is not None and any(".generator." in name for name in earlier.changed):
        # They would be written again, and may be held in half precision or quantized by now.
        raise UserError(
            f"{MODEL_FLAG} {path} has a generator that was trained in full, which adapters cannot be added to as it is;"
            " make it a whole checkpoint first (consolidate_rag_checkpoint.py --merge_adapters)"
        )
    return base_of(path, kind, cache_dir)


def _choose_attention(model: PreTrainedModel, name: str) -> None:
    try:
        model.set_attn_implementation(PADDED if name == "sdpa" else name)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"--attn_implementation {name} cannot be used here ({one_line(error, 200)}); leave it out"
        ) from error


def settle_precision(args: FinetuneArguments, device: torch.device) -> None:
    """Put what --precision auto stands for in its place: what the run was begun in, else what the device is fast in."""
    if args.trainer.precision != "auto":
        return
    fastest = "bf16-mixed" if dtype_of("auto", device) == torch.bfloat16 else "32-true"
    args.trainer.precision = begun_precision(args.run.resume_from_checkpoint) or fastest  # type: ignore[assignment]
    if is_rank_zero():
        print(f"--precision auto: {args.trainer.precision}", flush=True)


def _size_problems(args: FinetuneArguments, config: PreTrainedConfig, source: str) -> list[str]:
    """Flags that ask for more than the model can read or write."""
    names = ("max_source_length", "max_target_length", "val_max_target_length", "test_max_target_length")
    lengths = {name: getattr(args.data, name) for name in names}
    generator = config.generator if isinstance(config, RagConfig) else config
    return length_problems(
        config, lengths | {"max_combined_length": args.retrieval.max_combined_length}, source
    ) + beams_problems(generator, args.data.num_beams)


def open_retriever(model: PreTrainedModel, tokenizer: Any) -> RagKnowledgeRetriever | None:
    """A retriever that searches in this process, opened; None for a model without retrieval."""
    if model.config.model_type != "rag":
        return None
    retriever = RagKnowledgeRetriever(model.config, tokenizer.question_encoder, tokenizer.generator)
    retriever.init_retrieval()
    return retriever


def read_lightning_checkpoint(
    path: str | os.PathLike, hparams_file: str | os.PathLike | None = None, **changes: Any
) -> tuple[FinetuneArguments, dict[str, torch.Tensor]]:
    """The settings and the weights of a checkpoint that `finetune_rag.py` wrote; nothing is unpickled.

    The folder `checkpointN` beside `checkpointN.ckpt` holds model and tokenizer in Hugging Face format: where it is
    there, it takes the place of what the training started from, which may be gone.

    Args:
        hparams_file: `hparams.json` to read the settings of, in place of the checkpoint's.
        changes: settings to take instead, by their names (passages_path="moved/here").

    Raises:
        UserError: there is no such file, it is no such checkpoint, or a change is no setting.
    """
    checkpoint = read_checkpoint(path)
    settings = checkpoint["hyper_parameters"] if hparams_file is None else load_json(hparams_file)
    exported = Path(path).with_suffix("")
    if (exported / "config.json").is_file() and "model_name_or_path" not in changes:
        changes |= {"model_name_or_path": str(exported), "config_name": None, "tokenizer_name": None}
    if (exported / CONTEXT_ENCODER / "config.json").is_file():
        changes.setdefault("context_encoder_name_or_path", str(exported / CONTEXT_ENCODER))
    args = group_settings(settings, **changes)
    if (digest := checkpoint.get("base")) is not None and base_of_run(args).digest != digest:
        raise UserError(
            f"{path} holds what was trained of another base than {args.model.model_name_or_path}, whose weights have "
            "changed since; give model_name_or_path=FOLDER of the one that it was trained on"
        )
    return args, checkpoint["state_dict"]


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """What Lightning saved of a run of `finetune_rag.py`, its bytes verified first; nothing is unpickled.

    Raises:
        UserError: there is no such file, it is damaged, or it is no such checkpoint.
    """
    remedy = "give checkpointN.ckpt as finetune_rag.py wrote it, or start from a Hugging Face checkpoint"
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; {remedy}")
    if not is_whole(path):
        raise UserError(f"{path} is damaged, or no Lightning checkpoint; {remedy}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{path} is no checkpoint that could be read without running what is in it; {remedy}"
        ) from error
    if not isinstance(checkpoint, dict) or not {"hyper_parameters", "state_dict"} <= checkpoint.keys():
        raise UserError(f"{path} is no checkpoint of finetune_rag.py; {remedy}")
    return checkpoint


@contextmanager
def going_back_to(path: str | os.PathLike | None) -> Iterator[None]:
    """Turn what Lightning and torch raise where a checkpoint does not fit the run into one line.

    They check little of it, and fail wherever they use it first.

    Args:
        path: of the checkpoint; None where there is none.
    """
    try:
        yield
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        is_other = type(error) is RuntimeError and not str(error).startswith("Error(s) in loading state_dict")
        places = {(Path(frame.filename).name, frame.name) for frame in traceback.extract_tb(error.__traceback__)}
        is_restored = any(
            file == "checkpoint_connector.py" and name.lstrip("_").startswith(("restore", "resume_start"))
            for file, name in places
        )
        if path is None or isinstance(error, UserError) or is_other or not is_restored:
            raise
        raise UserError(
            f"--resume_from_checkpoint {path} does not fit the model and its settings ({one_line(error, 300)}); give a "
            "checkpoint of this run, or start from a Hugging Face checkpoint by --model_name_or_path"
        ) from error


def load_trained_parts(
    path: str | os.PathLike, args: FinetuneArguments, model: Any = None, tokenizer: Any = None
) -> tuple[PreTrainedModel, Any]:
    """Model, whose weights are still to be replaced by those of the checkpoint at `path`, and tokenizer.

    Raises:
        UserError: they cannot be found.
    """
    if model is not None and tokenizer is not None:
        return model, tokenizer
    try:
        loaded = load_model_and_tokenizer(args)
    except UserError as error:
        raise UserError(
            f"{path}: the model that its training started from cannot be loaded ({error}); give model_name_or_path="
            "FOLDER of the same model"
        ) from error
    return tuple(mine if given is None else given for given, mine in zip((model, tokenizer), loaded, strict=True))
