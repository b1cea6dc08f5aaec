"""How every script of the suite reads its arguments and reports its user's mistakes.

A script declares its settings in a dataclass and needs four lines to become a command line:

    def parse_args(argv=None): return parse_into(EvalArguments, description=__doc__, argv=argv)
    def main(args): ...
    def cli(): run_script(parse_args, main)
    if __name__ == "__main__": cli()

Nothing heavy is imported here, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import contextlib
import difflib
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from rag.errors import UserError, printable


def _load_hf_argument_parser():
    """`HfArgumentParser` from its own file: importing all of transformers would take 0.6 s of every `--help`."""
    package = importlib.util.find_spec("transformers")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "hf_argparser.py"
    spec = importlib.util.spec_from_file_location("hf_argparser", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HfArgumentParser


HfArgumentParser: Any = _load_hf_argument_parser()


def program_name() -> str:
    """What the user called: `finetune_rag.py`, `rag-finetune` or, in a package, `python -m quickstart`."""
    path = Path(sys.argv[0])
    if path.name == "__main__.py":
        return f"python -m {path.parent.name}"
    return f"python -m {path.parent.name}.{path.stem}" if path.with_name("__init__.py").is_file() else path.name


def options_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a parser by each of their spellings."""
    return parser._option_string_actions


class RagArgumentParser(HfArgumentParser):
    """`HfArgumentParser` that reads defaults from `--config_file` and says in one line what is wrong.

    Flags may be written with dashes or underscores and are never abbreviated; the command line wins over the file.
    """

    def __init__(self, *dataclass_types, description: str | None = None):
        super().__init__(
            dataclass_types,
            prog=program_name(),
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--config_file",
            "--config-file",
            default=None,
            metavar="FILE",
            help="YAML or JSON file of settings, named as the flags; flags on the command line win.",
        )

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split() if "unrecognized" in message else []
        if unknown:  # it may be an empty word
            close = difflib.get_close_matches(unknown[0].split("=")[0], options_of(self), n=1, cutoff=0.7)
            message += f"; did you mean {close[0]}?" if close else ""
        sys.stderr.write(f"{self.prog}: error: {printable(message)} (--help lists every flag)\n")
        sys.exit(2)

    def parse(self, argv: list[str] | None = None) -> tuple:
        """Parse `argv` into the dataclasses, in their order, then a namespace of the other flags if there are any."""
        argv = sys.argv[1:] if argv is None else list(argv)
        config_file = _value_of("--config_file", argv)
        settings = [] if config_file is None else self._settings_as_words(config_file)
        for words in (settings, argv):
            self._refuse_two_values_of_one_setting(words)
        self.words = argv = settings + argv
        *parsed, rest, unknown = self.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        del rest.config_file
        return (*parsed, rest) if vars(rest) else tuple(parsed)

    def _settings_as_words(self, config_file: str) -> list[str]:
        from rag.command_line.config_file import settings_as_words  # and with it YAML, which `--help` does not need

        try:
            return settings_as_words(config_file)
        except UserError as error:
            self.error(str(error))

    def in_given_names(self, message: str) -> str:
        """A message about settings, each under the name by which `parse` was given it, not the first that it has."""
        for action in dict.fromkeys(options_of(self).values()):
            first, *others = dict.fromkeys(option.replace("-", "_") for option in action.option_strings)
            words = {word.split("=")[0].replace("-", "_") for word in self.words}
            if given := next((other for other in others if other in words), None):
                message = re.sub(f"--{first.strip('_')}(?![\\w-])", f"--{given.strip('_')}", message)
        return message

    def _refuse_two_values_of_one_setting(self, argv: list[str]) -> None:
        """Of a setting that has several names argparse would take the last value given, whatever the others."""
        for action in dict.fromkeys(options_of(self).values()):
            long_options = [option for option in action.option_strings if option.startswith("--")]
            names = dict.fromkeys(f"--{option[2:].replace('-', '_')}" for option in long_options)
            if len(names) == 1:
                continue
            read: Any = action.type
            given = {name: text for name in names if (text := _value_of(name, argv)) is not None}
            with contextlib.suppress(ValueError, TypeError, argparse.ArgumentTypeError):  # reported by the parsing
                if len({read(text) for text in given.values()}) > 1:
                    pairs = " and ".join(f"{name} {text}" for name, text in given.items())
                    self.error(f"{pairs} are one setting under two names; give one of them")


def _value_of(flag: str, argv: list[str]) -> str | None:
    """The last value given to `flag`, before the whole command line can be parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, flag.replace("_", "-"), dest="value", nargs="?")
    return parser.parse_known_args(argv)[0].value


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The docstring of a script as it was written, and each flag's default behind its help."""


def parse_into(*dataclass_types, description: str | None = None, argv: list[str] | None = None):
    """Parse the command line into one dataclass (returned bare) or several (returned as a tuple)."""
    parsed = RagArgumentParser(*dataclass_types, description=description).parse(argv)
    return parsed[0] if len(parsed) == 1 else parsed
