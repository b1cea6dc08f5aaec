"""Checkpoints: RAG models and bare generators, loaded exactly as they were saved.

    model = load_model("path/to/rag")                      # what was trained is what is loaded, or a UserError
    tokenizer = load_tokenizer("path/to/rag")
    save_model(model, "output/checkpoint0", tokenizer)     # opens with transformers' from_pretrained, too

`transformers` (5.23) alone loses the generation settings of a RAG checkpoint's generator, starts missing weights at
random with a warning, and cannot generate with a T5 whose decoder is not as deep as its encoder; here they are kept,
refused and made to work.
"""

import copy
import logging
import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartForConditionalGeneration,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RagConfig,
    RagSequenceForGeneration,
    RagTokenForGeneration,
    RagTokenizer,
    T5ForConditionalGeneration,
)
from transformers.generation import GenerationMode
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from rag.errors import UserError, raise_problems
from rag.files import atomic_folder, new_digest
from rag.models.adapters import merge_adapters
from rag.models.bases import Base, load_learned, read_base, require_base, save_learned
from rag.models.card import Making, write_card
from rag.models.causal_rag import CAUSAL_CLASSES
from rag.models.custom_code import code_beside, code_files, gather_tokenizer_code, is_custom, save_code
from rag.models.encoders import encoder_dimension
from rag.models.fid_rag import RagFidForGeneration, require_fusable
from rag.models.limits import most_tokens
from rag.models.loading import (
    MODEL_FLAG,
    checkpoint_errors,
    hub_access,
    load_config,
    load_weights,
    read_json,
)
from rag.models.pooled_encoder import reads_forward
from rag.models.prompts import with_template
from rag.models.quantization import quantized_loading
from rag.models.questions import with_prompt
from rag.models.sentence_transformers import transformer_folder
from rag.models.trust import code_is_allowed

logger = logging.getLogger(__name__)

MODEL_CLASSES = {
    "rag_sequence": RagSequenceForGeneration,
    "rag_token": RagTokenForGeneration,
    "fid": RagFidForGeneration,
    "bart": BartForConditionalGeneration,
    "t5": T5ForConditionalGeneration,
    "auto": AutoModelForSeq2SeqLM,  # any other encoder-decoder that transformers knows
    "causal": AutoModelForCausalLM,
}
MOST_GROWTH = 1000  # times; real ones put a character or a few in the place of another
MOST_ADDED = 100_000  # tokens beside a tokenizer's words: each takes as long as thousands of those
RAG_TYPES = ("rag_sequence", "rag_token", "fid")

# The name of a setting in the public suite's flags, where a model calls it otherwise.
SETTING_ALIASES = {"dropout": "dropout_rate"}
# How answers are searched for, and settings that have a use in sampling alone.
SEARCHES = (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH)
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def load_model(
    path: str,
    model_type: str | None = None,
    config_overrides: dict | None = None,
    cache_dir: str | None = None,
    *,
    config_name: str | None = None,
    prepare_config: Callable[[PreTrainedConfig], None] = lambda config: None,
    flag: str = MODEL_FLAG,
    keep_adapters: bool = False,
    quantization: str | None = None,
) -> PreTrainedModel:
    """The checkpoint at `path`, in evaluation mode and float32, its generation settings restored.

    One that holds only what was trained (bases.py) is opened with its base, and adapters are merged into the weights.

    `model.generation_config` is, for a RAG model, the same object as `model.generator.generation_config`.

    Args:
        path: folder or hub name.
        model_type: a key of MODEL_CLASSES; None reads it from the checkpoint.
        config_overrides: settings by their flag's name; those that RagConfig does not have go to the generator's
            config. None leaves a setting as it is.
        config_name: folder or hub name of another config to build the model with.
        prepare_config: changes the config further (`SearchArguments.apply_to`).
        flag: the flag that gave `path`, for the messages.
        keep_adapters: leave them beside the weights, frozen, to be trained on.
        quantization: "4bit" or "8bit" for a generator, on a GPU, whose linear layers are quantized.

    Raises:
        UserError: there is no such checkpoint, or its weights are not exactly those that the model needs.
    """
    config = load_config(config_name or path, cache_dir=cache_dir, flag="--config_name" if config_name else flag)
    model_type = fitting_model_type(config, path, model_type, flag)
    override_config(config, config_overrides or {})
    prepare_config(config)
    _complete(config)
    if isinstance(config, RagConfig):
        readable = most_tokens(config.generator)
        if readable is not None and readable < config.max_combined_length:
            _warn_once(
                f"{flag} {path}: contexts are cut at {readable} tokens, all that its generator reads, not at "
                f"max_combined_length {config.max_combined_length}"
            )
    base = read_base(path, cache_dir, flag)
    source, loading = path, quantized_loading(quantization, config)
    if base is not None:
        require_base(base, path, cache_dir, flag)
        source, loading = base.name_or_path, loading | ({"revision": base.revision} if base.revision else {})
    model = load_weights(class_of(model_type, config), source, flag, config=config, cache_dir=cache_dir, **loading)
    if base is not None:
        load_learned(model, path, base, cache_dir, flag)
        if not keep_adapters:
            _merge(model, base, path, flag)
    restore_generation_settings(model, path, cache_dir, flag)
    _keep_to_search(model.generation_config, path, flag)
    return model


def _merge(model: PreTrainedModel, base: Base, path: str, flag: str) -> None:
    if base.quantization is not None:
        _warn_once(
            f"{flag} {path}: its adapters were trained beside weights in {base.quantization}, and are added to those in"
            " full precision: answers may differ a little from the training's"
        )
    merge_adapters(model)


def class_of(model_type: str, config: PreTrainedConfig) -> type:
    """The class of a model; a RAG model's generator is an encoder-decoder or a causal language model."""
    if model_type in CAUSAL_CLASSES and not config.generator.is_encoder_decoder:
        return CAUSAL_CLASSES[model_type]
    return MODEL_CLASSES[model_type]


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether a config is a causal language model's."""
    return not config.is_encoder_decoder and reads_forward(config)


def fitting_model_type(
    config: PreTrainedConfig, path: str, model_type: str | None = None, flag: str = MODEL_FLAG
) -> str:
    """The key of MODEL_CLASSES to load the checkpoint at `path` by: `model_type` where it is given, else its config's.

    The weights of the RAG models are the same, and so it is said, once, where one is read as another.

    Raises:
        UserError: the checkpoint is of another kind, does not say of which, or its generator cannot be that of one.
    """
    found = _model_type_of(config, path, flag) if model_type is None else _fitting(config, path, model_type, flag)
    if found == "fid":
        require_fusable(config.generator, f"{flag} {path}")
    return found


def _fitting(config: PreTrainedConfig, path: str, model_type: str, flag: str) -> str:
    """The key that `model_type` asks for."""
    kind = "rag" if model_type in RAG_TYPES else model_type
    fits = {"auto": not isinstance(config, RagConfig), "causal": is_causal(config)}
    if not fits.get(kind, kind == config.model_type):
        of = "a RAG checkpoint" if isinstance(config, RagConfig) else f"a {config.model_type} checkpoint"
        raise UserError(f"--model_type {model_type} does not fit {flag} {path}, which is {of}; leave --model_type out")
    if kind == "auto":
        return "causal" if _model_type_of(config, path, flag) == "causal" else "auto"  # it has to be a generator
    trained_as = [name for name in RAG_TYPES if _is_named(name, config)]
    if kind == "rag" and trained_as and model_type not in trained_as:
        _warn_once(f"{flag} {path} is a {trained_as[0]} checkpoint and is read as --model_type {model_type}")
    return model_type


def _is_named(model_type: str, config: PreTrainedConfig) -> bool:
    """Whether the config of a RAG model says that it is of this type."""
    names = [classes[model_type].__name__ for classes in (MODEL_CLASSES, CAUSAL_CLASSES) if model_type in classes]
    return any(name in names for name in config.architectures or [])


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def infer_model_type(path: str, cache_dir: str | None = None, flag: str = MODEL_FLAG) -> str:
    """The key of MODEL_CLASSES for the checkpoint at `path`."""
    return _model_type_of(load_config(path, cache_dir, flag), path, flag)


def _model_type_of(config: PreTrainedConfig, path: str, flag: str) -> str:
    if isinstance(config, RagConfig):
        for model_type in RAG_TYPES:
            if _is_named(model_type, config):
                return model_type
        raise UserError(
            f"{flag} {path} does not say which RAG model it is; give --model_type rag_sequence, rag_token or fid"
        )
    if config.model_type in MODEL_CLASSES:
        return config.model_type
    if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        return "auto"
    if is_causal(config):
        return "causal"
    raise UserError(
        f"{flag} {path} is a {config.model_type} model, neither RAG nor an encoder-decoder or causal language model"
    )


def override_config(config: PreTrainedConfig, overrides: dict) -> None:
    """Set what is not None; settings that RagConfig does not have go to the generator's config.

    Raises:
        UserError: the model has no such setting.
    """
    problems = []
    generator = config.generator if isinstance(config, RagConfig) else config
    for name, value in overrides.items():
        if value is None:
            continue
        for target, key in ((config, name), (generator, name), (generator, SETTING_ALIASES.get(name, name))):
            if hasattr(target, key):
                setattr(target, key, value)
                break
        else:
            problems.append(f"--{name} {value}: a {generator.model_type} model has no such setting; leave it out")
    raise_problems(problems)


def _complete(config: PreTrainedConfig) -> None:
    """Add to a config what transformers needs of it and its author left out."""
    generator = config.generator if isinstance(config, RagConfig) else config
    if not hasattr(generator, "bos_token_id"):
        generator.bos_token_id = None  # T5 has none, and RAG-Sequence's loss asks for it
    if hasattr(generator, "num_decoder_layers") and not hasattr(generator, "decoder_layers"):
        # T5: generate's cache counts the decoder's layers by BART's name and else takes the encoder's number.
        generator.decoder_layers = generator.num_decoder_layers
    if isinstance(config, RagConfig):
        for name in (*SPECIAL_TOKENS, "vocab_size"):
            if getattr(config, name, None) is None:
                setattr(config, name, getattr(generator, name, None))


def compose_rag(model_type: str, question_encoder, generator, config: RagConfig | None = None) -> PreTrainedModel:
    """A RAG model of two loaded parts, whose weights and generation settings it takes over.

    Args:
        config: retrieval settings and separators; the parts' own configs replace its question_encoder and generator.
            None takes RagConfig's defaults.
    """
    _complete(generator.config)
    retrieval = {} if config is None else config.to_dict()
    parts = {
        # a config whose class is code beside a checkpoint cannot be built again of its dict
        "question_encoder": copy.deepcopy(question_encoder.config),
        "generator": generator.config.to_dict(),
    }
    config = RagConfig(**retrieval | parts | {"retrieval_vector_size": encoder_dimension(question_encoder)})
    for name in (*SPECIAL_TOKENS, "vocab_size"):
        setattr(config, name, getattr(generator.config, name, None))
    _complete(config)
    model = class_of(model_type, config)(config=config, question_encoder=question_encoder, generator=generator)
    model.generation_config = generator.generation_config
    return model.eval()


def restore_generation_settings(
    model: PreTrainedModel, path: str, cache_dir: str | None = None, flag: str = MODEL_FLAG
) -> PreTrainedModel:
    """Give a RAG model, and its generator, the generation settings that were saved with it."""
    saved = read_json(path, "generation_config.json", cache_dir, flag)  # transformers passes over what it cannot read
    if not isinstance(model.config, RagConfig):
        return model
    generator = model.generator
    if saved is None:  # older checkpoints keep them in the generator's part of config.json
        saved = (read_json(path, "config.json", cache_dir, flag) or {}).get("generator", {})
    known = GenerationConfig().to_dict().keys() - {"transformers_version"}
    generation_kwargs = {name: value for name, value in saved.items() if name in known and value is not None}
    with checkpoint_errors(flag, path):
        generator.generation_config.update(**generation_kwargs)
    model.generation_config = generator.generation_config
    return model


def _keep_to_search(settings: GenerationConfig, path: str, flag: str) -> None:
    """Answers are searched for, greedily or by beams, also where a checkpoint's settings ask for samples."""
    if settings.do_sample:
        _warn_once(f"{flag} {path}: its generation settings ask for samples; answers are searched for all the same")
        for name in ("do_sample", *SAMPLING):
            setattr(settings, name, None)
    if (mode := settings.get_generation_mode()) not in SEARCHES:
        raise UserError(
            f"{flag} {path}: its generation settings ask for {mode.value.replace('_', ' ')}, and answers are found by "
            "greedy or beam search; mend its generation_config.json"
        )


def save_model(
    model: PreTrainedModel,
    directory: str | os.PathLike,
    tokenizer=None,
    base: Base | None = None,
    making: Making | None = None,
) -> None:
    """Write a checkpoint that `load_model` and transformers' `from_pretrained` open; whole or not at all.

    Args:
        base: that of a model of which not all was trained: only that is written, and `load_model` alone opens it.
        making: what its card tells of its making; None writes no card.
    """
    generator = model.generator if isinstance(model.config, RagConfig) else model
    settings = generator.generation_config
    with atomic_folder(directory) as folder:
        if base is not None:
            save_learned(model, folder, base)
        else:
            # transformers reads settings without effect, as a penalty on length without beams, and refuses to write
            # them.
            model.generation_config = GenerationConfig()
            try:
                model.save_pretrained(folder)
            finally:
                model.generation_config = settings
        settings.to_json_file(folder / "generation_config.json")
        save_code(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
            gather_tokenizer_code(folder)
        if making is not None:
            write_card(folder, model, making)


def load_tokenizer(
    path: str,
    model_type: str | None = None,
    cache_dir: str | None = None,
    flag: str = MODEL_FLAG,
    pads: bool = True,
):
    """A `RagTokenizer` (its .question_encoder and .generator) for a RAG checkpoint, else an `AutoTokenizer`.

    Args:
        model_type: a key of MODEL_CLASSES; None looks at the checkpoint's config, which a bare tokenizer need not have.
        pads: whether it must have a padding token; a causal language model's may lack one (`settle_language_model`).
    """
    if model_type is None and (read_json(path, "config.json", cache_dir, flag) or {}).get("model_type") == "rag":
        model_type = "rag_sequence"
    if model_type in RAG_TYPES:
        config = load_config(path, cache_dir, flag)
        if not isinstance(config, RagConfig):
            raise UserError(f"{flag} {path} has one tokenizer, a RAG model two; give the folder of a RAG checkpoint")
        parts = {
            "question_encoder": {"config": config.question_encoder, "subfolder": "question_encoder_tokenizer"},
            "generator": {"config": config.generator, "subfolder": "generator_tokenizer"},
        }
        tokenizers = {name: _load_tokenizer(path, cache_dir, flag, part) for name, part in parts.items()}
        with_prompt(tokenizers["question_encoder"], config.question_encoder)
        with_template(tokenizers["generator"], config.generator)
        return RagTokenizer(**tokenizers)
    return _load_tokenizer(
        transformer_folder(path, cache_dir, flag), cache_dir, flag, {}, pads and model_type != "causal"
    )


def _load_tokenizer(path: str, cache_dir: str | None, flag: str, part: dict, pads: bool = True):
    access = {"cache_dir": cache_dir, **hub_access(path)}
    run = code_is_allowed()
    folder = f"{part['subfolder']}/" if part else ""
    settings = read_json(path, f"{folder}tokenizer_config.json", cache_dir, flag) or {}
    state = read_json(path, f"{folder}tokenizer.json", cache_dir, flag) or {}
    with checkpoint_errors(flag, path), code_beside(path, **access):
        if max(_growth(state.get("normalizer")), _growth(state.get("decoder"))) > MOST_GROWTH:
            raise ValueError(f"its tokenizer makes texts more than {MOST_GROWTH:,} times as long")
        names = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")
        added = [state.get("added_tokens"), *map(settings.get, names)]
        if (most := max(len(tokens or ()) for tokens in added)) > MOST_ADDED:
            raise ValueError(f"its tokenizer adds {most:,} tokens to its words, which would take minutes")
        if not run and _is_custom_tokenizer(settings, of_rag=bool(part)):
            raise ValueError("its tokenizer is code, and trust_remote_code was not given")
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=run, **access, **part)
        if not is_custom(type(tokenizer)):
            tokenizer.init_kwargs.pop("auto_map", None)  # it is saved as what it was read as
        # transformers makes an empty one where the files are missing
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise OSError("it holds no tokenizer")
        tokenizer("a ?")  # some faults of its files show only here
        tokenizer("a word of many " * 20 + "?")  # and patterns without end only in a longer text
        if pads and tokenizer.pad_token_id is None:
            raise ValueError("its tokenizer has no padding token")
    return tokenizer


def _growth(step: Any) -> int:
    """How many times as long a step of a tokenizer.json, and those inside it, can make a text; none checks it."""
    if not isinstance(step, dict):
        return 1
    inside = step.get("normalizers") or step.get("decoders") or []
    return max(len(step.get("content") or step.get("prepend") or ""), 1) * math.prod(map(_growth, inside))


def _is_custom_tokenizer(settings: dict, of_rag: bool) -> bool:
    """Whether a tokenizer's class is code beside it; transformers would take its own base class without a word.

    One that has a class of transformers, too, is read by that, but not in a RAG checkpoint: `save_model` names code
    only where it was run.
    """
    named, kind = settings.get("auto_map"), settings.get("tokenizer_class")
    if not named or (isinstance(named, dict) and "AutoTokenizer" not in named):
        return False
    return of_rag or (isinstance(kind, str) and tokenizer_class_from_name(kind) is None)


def weights_digest(model: PreTrainedModel) -> str:
    """One digest of every tensor that a model saves, by its name and its bits, and of the code beside it that runs."""
    digest = new_digest()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.flatten().contiguous().view(torch.uint8).numpy())  # NumPy knows no bfloat16
    for file in code_files(model):
        digest.update(file.read_bytes())
    return digest.hexdigest()
