"""What of a checkpoint's files is the same in two runs of one command."""

import re
from pathlib import Path

from rag.hub import CARD_FILE


def lasting(file: Path) -> bytes:
    """The bytes of a file; of a model's card without its day."""
    content = file.read_bytes()
    return re.sub(rb"(?m)^- Date: .*\n", b"", content) if file.name == CARD_FILE else content
