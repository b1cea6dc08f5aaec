"""Make one RAG checkpoint, ready for finetuning, of a question encoder and a generator.

    python consolidate_rag_checkpoint.py \\
        --model_type rag_sequence \\
        --generator_name_or_path facebook/bart-large-cnn \\
        --question_encoder_name_or_path facebook/dpr-question_encoder-single-nq-base \\
        --dest path/to/checkpoint

Both parts may be local folders or hub names. The generator is an encoder-decoder or a causal language model (Llama,
Qwen, ...), which reads passages in a prompt (--prompt_template); the question encoder is a DPR encoder, a
sentence-transformers model (pooled and normalized as its authors meant) or any BERT-like encoder. The folder appears
only when it is whole and its reload gave back the very weights of the two parts.

    python consolidate_rag_checkpoint.py --merge_adapters output/checkpoint3 --dest path/to/checkpoint

writes whole what a training with --lora_r, --question_encoder_lora_r or --freeze_generator has exported.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from filecmp import cmpfiles
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent
from typing import Literal, NoReturn

from rag.command_line.flags import flag, required_flag, trust_flag
from rag.command_line.parser import parse_into
from rag.command_line.script import run_script
from rag.errors import UserError, raise_problems
from rag.files import atomic_folder, load_json, shown
from rag.hub import CARD_FILE, push_folder, push_name_problems, require_push
from rag.index.arguments import HUB_PREFIX
from rag.models.trust import allow_code
from rag.outputs import output_folder_problems, writing


@dataclass
class ConsolidateArguments:
    dest: str = required_flag("Folder to write the checkpoint to; it must not exist or be empty.")
    generator_name_or_path: str | None = flag(
        None, "Folder or hub name of an encoder-decoder or of a causal language model; needed, as the encoder is."
    )
    question_encoder_name_or_path: str | None = flag(None, "Folder or hub name of an encoder.")
    merge_adapters: str | None = flag(
        None, "In place of the two parts: a checkpoint of a training with --lora_r, to be written with merged weights."
    )
    model_type: Literal["rag_sequence", "rag_token", "fid"] = flag(
        "rag_sequence", "Which RAG model to make; fid is a Fusion-in-Decoder, of a BART, T5 or mT5."
    )
    generator_tokenizer_name_or_path: str | None = flag(None, "Tokenizer of the generator, where it is not beside it.")
    question_encoder_tokenizer_name_or_path: str | None = flag(
        None, "Tokenizer of the question encoder, where it is not beside it."
    )
    config_name_or_path: str | None = flag(
        None, "RAG checkpoint whose settings (n_docs, separators, index) to take; else RagConfig's."
    )
    question_encoder_pooling: Literal["auto", "cls", "mean", "max", "last"] = flag(
        "auto",
        "How token vectors become one vector. auto: a DPR encoder as it is, a sentence-transformers model "
        "as its authors meant, any other by its first token; the others do not normalize.",
    )
    question_encoder_prompt: str | None = flag(
        None, "Text before every question; left out, the one that the encoder's sentence-transformers folder names."
    )
    question_encoder_scale: float | None = flag(
        None,
        "Number above 0 that scores are multiplied by, of any encoder but DPR's: inner products of normalized vectors "
        "lie between -1 and 1, too close for p(z|x); 10 or more tells passages apart. Left out, the encoder's own, 1.",
    )
    prompt_template: str = flag(
        "plain",
        "What a causal language model reads: plain; chat, its tokenizer's own; or a file with {title}, {text} and, "
        "behind these, {question}. The checkpoint keeps it.",
    )
    push_to_hub: str | None = flag(
        None,
        "YOUR_NAME/NAME: upload the checkpoint to the Hugging Face hub, too; an upload that broke goes on by the same "
        "command.",
    )
    trust_remote_code: bool = trust_flag()


def parse_args(argv: list[str] | None = None) -> ConsolidateArguments:
    return parse_into(ConsolidateArguments, description=__doc__, argv=argv)


def main(args: ConsolidateArguments) -> Path:
    """Write the checkpoint and return its folder.

    Raises:
        UserError: `--dest` is taken, or a part cannot be loaded whole or does not fit its tokenizer, or the hub takes
            nothing from us.
    """
    raise_problems(
        output_folder_problems("--dest", args.dest)
        + _scale_problems(args.question_encoder_scale)
        + _choice_problems(args)
        + push_name_problems(args.push_to_hub)
    )
    allow_code(args.trust_remote_code)
    dest = Path(args.dest)
    if _is_taken(dest) and args.push_to_hub is None:
        raise _taken(dest)
    if args.push_to_hub is not None:
        require_push(args.push_to_hub)
    if args.merge_adapters is not None:
        merge(args, args.merge_adapters, dest)
    else:
        compose(args, dest)
    if args.push_to_hub is not None:
        _push(args.push_to_hub, dest)
    return dest


def compose(args: ConsolidateArguments, dest: Path) -> None:
    """Write a checkpoint of two parts.

    Raises:
        UserError: a part cannot be loaded whole or does not fit its tokenizer.
    """
    assert args.generator_name_or_path is not None and args.question_encoder_name_or_path is not None

    from transformers import RagTokenizer
    from transformers.utils import logging

    from rag.models.checkpoints import compose_rag, is_causal, load_model, save_model, weights_digest
    from rag.models.encoders import describe_encoder, encoder_dimension, load_encoder
    from rag.models.fit import complete_start, generator_problems, require_reading, vocabulary_problems
    from rag.models.limits import most_tokens
    from rag.models.prompts import read_template, settle_language_model
    from rag.models.questions import with_prompt

    logging.disable_progress_bar()
    _require_parts(args)
    config = _rag_config(args)
    tokenizers = RagTokenizer(
        question_encoder=_tokenizer(args, "question_encoder"), generator=_tokenizer(args, "generator")
    )
    question_encoder = load_encoder(
        args.question_encoder_name_or_path,
        pooling=args.question_encoder_pooling,
        prompt=args.question_encoder_prompt,
        scale=args.question_encoder_scale,
    )
    generator = load_model(args.generator_name_or_path, flag="--generator_name_or_path")
    sources = [" ".join(_tokenizer_source(args, part)) for part in ("question_encoder", "generator")]
    if is_causal(generator.config):
        template = read_template(args.prompt_template, tokenizers.generator, sources[1])
        settle_language_model(generator, tokenizers.generator, template, sources[1])
        print(f"Prompt, kept in the checkpoint:\n{indent(template, '  ')}")
    elif args.prompt_template != "plain":
        raise UserError(f"--prompt_template {args.prompt_template} is for causal language models; leave it out")
    raise_problems(
        vocabulary_problems(question_encoder, tokenizers.question_encoder, sources[0], "question encoder")
        + vocabulary_problems(generator, tokenizers.generator, sources[1], "generator")
        + generator_problems(generator, tokenizers.generator, sources[1])
    )
    with_prompt(tokenizers.question_encoder, question_encoder.config)
    require_reading(
        question_encoder,
        partial(_vectors, question_encoder, tokenizers.question_encoder),
        f"--question_encoder_name_or_path {args.question_encoder_name_or_path}",
    )
    complete_start(generator, tokenizers.generator, f"--generator_name_or_path {args.generator_name_or_path}")
    weights = weights_digest(question_encoder), weights_digest(generator)
    model = compose_rag(args.model_type, question_encoder, generator, config)
    readable = most_tokens(generator.config)
    if readable is not None and readable < model.config.max_combined_length:
        print(
            f"max_combined_length is {readable}, all that the generator reads, not {model.config.max_combined_length}"
        )
        model.config.max_combined_length = readable
    parts = {
        "question_encoder": args.question_encoder_name_or_path,
        "generator": args.generator_name_or_path,
    }
    with _folder_for(dest) as folder:
        save_model(model, folder, tokenizers, making=_making(args, parts))
        reloaded = load_model(str(folder), args.model_type)
        again = weights_digest(reloaded.question_encoder), weights_digest(reloaded.generator)
        assert again == weights, "the reload changed weights"

    print(
        f"{shown(dest)}: {type(model).__name__}, {model.num_parameters() / 1e6:,.1f}M parameters; "
        "the reload gives the same."
    )
    print(f"  question encoder  {describe_encoder(question_encoder)}, {encoder_dimension(question_encoder)}-d")
    print(f"  generator         {type(generator).__name__}")


def merge(args: ConsolidateArguments, path: str, dest: Path) -> None:
    """Write a checkpoint of adapters, or of a frozen generator, whole: as any other, without its base.

    Raises:
        UserError: it is no such checkpoint, or cannot be read.
    """
    from transformers.utils import logging

    from rag.models.bases import read_base
    from rag.models.card import read_results
    from rag.models.checkpoints import load_model, load_tokenizer, save_model, weights_digest
    from rag.models.loading import load_config

    logging.disable_progress_bar()
    load_config(path, flag="--merge_adapters")
    if (base := read_base(path, flag="--merge_adapters")) is None:
        raise UserError(f"--merge_adapters {path} is a whole checkpoint, and has nothing to merge; use it as it is")
    model = load_model(path, flag="--merge_adapters")
    with _folder_for(dest) as folder:
        making = replace(_making(args, {"checkpoint": path}), results=read_results(path))
        save_model(model, folder, load_tokenizer(path, flag="--merge_adapters"), making=making)
        assert weights_digest(load_model(str(folder))) == weights_digest(model), "the reload changed weights"
    print(
        f"{dest}: {type(model).__name__}, {model.num_parameters() / 1e6:,.1f}M parameters: those of {base.name_or_path}"
        f" and what {path} has learned; the reload gives the same."
    )


def consolidate(
    model_type: str,
    generator_name_or_path: str,
    question_encoder_name_or_path: str,
    dest_dir: str | os.PathLike,
    config_name_or_path: str | None = None,
    generator_tokenizer_name_or_path: str | None = None,
    question_encoder_tokenizer_name_or_path: str | None = None,
) -> Path:
    """`main` for settings that other code gives, in the public suite's order."""
    return main(
        ConsolidateArguments(
            generator_name_or_path=generator_name_or_path,
            question_encoder_name_or_path=question_encoder_name_or_path,
            dest=str(dest_dir),
            model_type=model_type,
            generator_tokenizer_name_or_path=generator_tokenizer_name_or_path,
            question_encoder_tokenizer_name_or_path=question_encoder_tokenizer_name_or_path,
            config_name_or_path=config_name_or_path,
        )
    )


def _push(repo: str, dest: Path) -> None:
    """Upload the checkpoint; a training's config.json remembers folders of this machine, and so that is said."""
    config = load_json(dest / "config.json")
    for name in ("passages_path", "index_path"):
        if config.get(name) and not config[name].startswith(HUB_PREFIX):
            print(f"{dest / 'config.json'} names {name} {config[name]}, which those who open {repo} will read, too")
    print(f"{dest} is at {push_folder(repo, 'model', dest)}")


@contextmanager
def _folder_for(dest: Path) -> Iterator[Path]:
    """The folder that takes --dest's place; where an earlier command wrote that and its upload broke, one to compare.

    Raises:
        UserError: --dest holds something else.
    """
    if not _is_taken(dest):
        with writing("--dest", dest), atomic_folder(dest) as folder:
            yield folder
        return
    with writing("--dest", dest), TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as name:
        yield Path(name)
        if not _are_same(dest, Path(name)):
            raise _taken(dest)


def _is_taken(dest: Path) -> bool:
    return dest.exists() and not (dest.is_dir() and not any(dest.iterdir()))


def _taken(dest: Path) -> UserError:
    return UserError(f"--dest {dest} already exists; give the name of a new folder or remove it")


def _are_same(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same files, apart from the card, which has the time in it."""
    files, theirs = ({file.relative_to(one) for file in one.rglob("*") if file.is_file()} for one in (folder, other))
    compared = sorted(map(str, files - {Path(CARD_FILE)}))
    return files == theirs and cmpfiles(folder, other, compared, shallow=False)[0] == compared


def _making(args: ConsolidateArguments, parts: dict[str, str]):
    """What the card of the checkpoint tells."""
    import torch

    from rag.models.card import Making, changed_flags, hardware

    settings = changed_flags(args, ("dest", "push_to_hub", "trust_remote_code"))
    return Making("consolidate_rag_checkpoint.py", parts, settings, hardware=hardware(torch.device("cpu")))


def _scale_problems(scale: float | None) -> list[str]:
    if scale is None or 0 < scale < math.inf:
        return []
    return [f"--question_encoder_scale {scale:g} must be a number above 0; 1 leaves scores as they are"]


def _choice_problems(args: ConsolidateArguments) -> list[str]:
    """Two parts, or one checkpoint."""
    parts = ("generator_name_or_path", "question_encoder_name_or_path")
    if args.merge_adapters is None:
        missing = " and ".join(f"--{name}" for name in parts if getattr(args, name) is None)
        return [f"{missing} must be given: a folder or a hub name (or --merge_adapters CHECKPOINT)"] if missing else []
    others = {field.name for field in fields(args) if getattr(args, field.name) != field.default}
    given = sorted(others - {"merge_adapters", "dest", "push_to_hub", "trust_remote_code"})
    return [f"--merge_adapters writes a checkpoint as it is; leave --{' and --'.join(given)} out"] if given else []


def _require_parts(args: ConsolidateArguments) -> None:
    """Raise what is wrong with the parts by their configs, before any of them is loaded."""
    from rag.models.encoders import read_encoder_config

    problems = []
    for name, look in {
        "generator_name_or_path": partial(_require_generator, args.model_type),
        "question_encoder_name_or_path": read_encoder_config,
    }.items():
        try:
            look(getattr(args, name), flag=f"--{name}")
        except UserError as error:
            problems.append(str(error))
    raise_problems(problems)


def _require_generator(model_type: str, path: str, flag: str) -> None:
    from rag.generation.families import require_family
    from rag.models.checkpoints import RAG_TYPES, fitting_model_type
    from rag.models.fid_rag import require_fusable
    from rag.models.loading import load_config

    config = load_config(path, flag=flag)
    if fitting_model_type(config, path, flag=flag) in RAG_TYPES:
        raise UserError(f"{flag} {path} is a whole RAG checkpoint; give a bare generator")
    require_family(config, f"{flag} {path}")
    if model_type == "fid":
        require_fusable(config, f"{flag} {path}")


def _rag_config(args: ConsolidateArguments):
    """The `RagConfig` of --config_name_or_path, or None for the defaults."""
    from transformers import RagConfig

    from rag.models.loading import load_config

    if args.config_name_or_path is None:
        return None
    config = load_config(args.config_name_or_path, flag="--config_name_or_path", for_other_parts=True)
    if not isinstance(config, RagConfig):
        raise UserError(
            f"--config_name_or_path {args.config_name_or_path} is the config of a {config.model_type} model; "
            "give a RAG checkpoint, or leave it out"
        )
    return config


def _tokenizer(args: ConsolidateArguments, part: str):
    from rag.models.checkpoints import load_tokenizer

    flag, path = _tokenizer_source(args, part)
    return load_tokenizer(path, flag=flag, pads=part == "question_encoder")


def _tokenizer_source(args: ConsolidateArguments, part: str) -> tuple[str, str]:
    """The flag that names the tokenizer of a part, and its value."""
    given, beside = f"{part}_tokenizer_name_or_path", f"{part}_name_or_path"
    name = given if getattr(args, given) is not None else beside
    return f"--{name}", getattr(args, name)


def _vectors(encoder, tokenizer, questions: list[str]):
    import torch

    from rag.models.questions import encode_questions

    tokens = encode_questions(tokenizer, questions, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"])[0]


def consolidate_and_go_on(args: ConsolidateArguments) -> None:
    """`main`, then, on a command line, the flags to go on with."""
    dest = main(args)
    if args.merge_adapters is None:
        model = f"--model_name_or_path {shown(dest)} --model_type {args.model_type}"
        print(f"Next: python finetune_rag.py {model} --data_dir ...")


def cli() -> NoReturn:
    """The command `rag-consolidate`."""
    run_script(parse_args, consolidate_and_go_on)


if __name__ == "__main__":
    cli()
