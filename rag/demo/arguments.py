"""The flags of `demo_rag.py`: which models are asked, and where the page is served."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.errors import raise_problems
from rag.evaluation.arguments import AnswerArguments


@dataclass(kw_only=True)
class DemoArguments(AnswerArguments):
    """Which models are asked, and where the page is served."""

    model_type: Literal["rag_sequence", "rag_token", "fid"] | None = flag(
        None, "Left out, it is read from the checkpoint."
    )
    compare_with: str | None = flag(
        None, "A second RAG checkpoint, whose answers stand beside the first one's; it is opened with the same flags."
    )
    host: str = flag(
        "127.0.0.1",
        "Address to listen on. Behind another than this machine's own is everybody who reaches it: nobody is asked for "
        "a password.",
    )
    port: int = flag(7860, "Port to listen on; 0 takes a free one.")
    open_browser: bool = flag(False, "Open the page in this machine's browser.")


def parse_args(argv: list[str] | None = None, description: str | None = None) -> DemoArguments:
    """Read the command line; raises one `UserError` for all settings that are out of range."""
    args = parse_into(DemoArguments, description=description, argv=argv)
    raise_problems(args.answer_problems() + _address_problems(args))
    return args


def path_problems(args: DemoArguments) -> list[str]:
    """Paths of passages and index that do not exist; what is in them is looked at when they are opened."""
    paths = {"passages_path": args.passages_path}
    if args.index_name != "bm25":  # whose index is built where it is not
        paths["index_path"] = args.index_path
    return [
        f"--{name} {path} does not exist; give what use_own_knowledge_dataset.py wrote"
        for name, path in paths.items()
        if path is not None and not args.is_on_hub and not Path(path).exists()
    ]


def _address_problems(args: DemoArguments) -> list[str]:
    problems = []
    if not 0 <= args.port < 2**16:
        problems.append(f"--port {args.port} is no port; give one from 1 to 65535, or 0 for a free one")
    if not args.host.strip():
        problems.append(f"--host {args.host!r} is no address; give 127.0.0.1, or leave it out")
    return problems
