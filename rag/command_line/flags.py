"""One flag of a command line, as a field of a dataclass.

    @dataclass
    class EvalArguments:
        num_beams: int = flag(4, "Beams of generation; 1 is greedy.")
        model_name_or_path: str = required_flag("Checkpoint to measure: a folder or a name on the hub.")

`HfArgumentParser` reads name, type and default from the field, and the help from its metadata.
"""

from dataclasses import field
from typing import Any


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A flag that may be left out. `metadata` is `HfArgumentParser`'s, such as `aliases`; a list is copied."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


def trust_flag() -> Any:
    """--trust_remote_code, for every script that loads models. No file of settings may give it, and none keeps it."""
    return flag(
        False,
        "Run the code that lies beside a checkpoint of an encoder or a tokenizer (auto_map), with all that you may do "
        "yourself; only for checkpoints that you trust, and only on the command line.",
    )


def required_flag(help: str) -> Any:
    """A flag that must be given."""
    return field(metadata={"help": help})
