"""In which precision passages are encoded: the one that their folder was begun in, whatever the machine would choose.

raise_problems(precision_problems(args.precision, device, output))      # before an encoder is loaded
dtype = settle_precision(args.precision, device, output, description)

Vectors of two precisions are never mixed in a folder.
"""

from dataclasses import replace
from pathlib import Path

import torch

from rag.errors import UserError
from rag.index.index_files import IndexDescription
from rag.knowledge.arguments import OUTPUT_FLAG, PASSAGES_FOLDER
from rag.knowledge.contents import read_knowledge
from rag.knowledge.shards import digest_of, partial_folder
from rag.models.precision import DTYPES, dtype_of, name_of

OF_NAME = {name_of(dtype): dtype for dtype in DTYPES.values() if dtype is not None}  # as index.json has them


def machine_precision(asked: str, device: str) -> torch.dtype:
    """What a word of --precision stands for where nothing has been begun.

    auto is float16 on a GPU: a layer of BERT's kind stays far from its range, and it rounds to an eighth of bfloat16's.
    """
    return torch.float16 if asked == "auto" and device == "cuda" else dtype_of(asked, device)


def precision_problems(asked: str, device: str, output: Path) -> list[str]:
    """What is wrong with --precision, as far as the machine and a finished folder show it."""
    begun = OF_NAME.get(read_knowledge(output).precision)
    if begun is not None:
        return _other_precision(asked, begun, output)
    if DTYPES[asked] == torch.float16 and device == "cpu":
        return [f"--precision {asked}: on a CPU it is several times slower than fp32; leave it out, or use a GPU"]
    return []


def settle_precision(asked: str, device: str, output: Path, description: IndexDescription) -> torch.dtype:
    """The precision in which the passages of a folder are encoded.

    Args:
        asked: the word of --precision.
        device: cuda or cpu, where passages are encoded.
        description: what makes the passages; its precision is not looked at.

    Raises:
        UserError: they were begun in another one than that is asked for.
    """
    own = machine_precision(asked, device)
    begun = OF_NAME.get(read_knowledge(output).precision) or _begun_in(own, output, description)
    if begun is None:
        return own
    if problems := _other_precision(asked, begun, output):
        raise UserError(problems[0])
    if begun == torch.float16 and device == "cpu":
        print(f"{OUTPUT_FLAG} {output} was begun in float16, which is slow on a CPU")
    return begun


def _begun_in(own: torch.dtype, output: Path, description: IndexDescription) -> torch.dtype | None:
    """The precision of these passages where a killed run has left some, in a folder that names it in its digest."""
    passages = output / PASSAGES_FOLDER
    for dtype in sorted(OF_NAME.values(), key=lambda dtype: dtype != own):  # its own first
        digest = replace(description, precision=name_of(dtype)).passages_digest()
        if digest_of(passages) == digest or any(partial_folder(passages, digest).glob("data-*.arrow")):
            return dtype
    return None


def _other_precision(asked: str, begun: torch.dtype, output: Path) -> list[str]:
    if DTYPES[asked] in (None, begun):
        return []
    return [
        f"--precision {asked}: the passages in {OUTPUT_FLAG} {output} were begun in {name_of(begun)}; leave "
        "--precision out to go on with them, or give another folder"
    ]
