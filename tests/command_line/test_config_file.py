"""Settings of a file are read as those of a command line; what is no such file is told in one line."""

import json

import pytest

from rag.command_line.config_file import LARGEST, settings_as_words
from rag.command_line.flags import flag
from rag.command_line.parser import parse_into
from rag.errors import UserError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1}\nb: {<<: *a}\n"


def words(tmp_path, content, name="c.yaml"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return settings_as_words(str(path))


def test_values_become_words(tmp_path):
    content = (
        "n_docs: 3\nk: [1, -5]\nrecalculate: false\nprefix: 'q: '\nname: null\nlr: 1e-4\nempty: ''\nx: &y 2\nz: *y\n"
    )
    expected = [
        "--n_docs=3", "--k", "1", "-5", "--recalculate=False", "--prefix=q: ", "--lr=1e-4", "--empty=",
        "--x=2", "--z=2",
    ]  # fmt: skip
    assert words(tmp_path, content) == words(tmp_path, b"\xef\xbb\xbf" + content.encode()) == expected
    settings = {"n_docs": 3, "k": [1, -5], "recalculate": False, "prefix": "--recalculate", "name": None}
    expected = ["--n_docs=3", "--k", "1", "-5", "--recalculate=False", "--prefix=--recalculate"]
    assert words(tmp_path, json.dumps(settings), "c.json") == expected


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        ("", "c.yaml", "`flag: value` pairs"),
        ("- n_docs", "c.yaml", "`flag: value` pairs"),
        ("n_docs: 3\nn_docs: 2", "c.yaml", "'n_docs' stands there twice"),
        ('{"n_docs": 3, "n_docs": 2}', "c.json", "'n_docs' stands there twice"),
        ("n_docs: 3\nn-docs: 2", "c.yaml", "gives n_docs once too often"),
        ("config_file: c.yaml", "c.yaml", "gives config_file once too often"),
        ("3: 4", "c.yaml", "3: 4 is no setting"),
        ("n_docs: {a: 1}", "c.yaml", "'n_docs': .* is no setting"),
        ("k: [[1]]", "c.yaml", "'k': .* is no setting"),
        ("k: [1, null]", "c.yaml", "'k': .* is no setting"),
        ("k: [1, --recalculate]", "c.yaml", "k has the value --recalculate"),
        ("? [1, 2]\n: 3", "c.yaml", "a key is a list"),
        ("{n_docs: 3", "c.yaml", "cannot be read"),
        ("!!python/object/apply:os.system ['true']", "c.yaml", "cannot be read"),
        ("n: " + "9" * 5000, "c.yaml", "cannot be read"),
        (bytes(range(256)), "c.yaml", "cannot be read as UTF-8"),
        ("n_docs: 3".encode("utf-16"), "c.yaml", "cannot be read as UTF-8"),
        ("[" * 100_000, "c.yaml", "cannot be read"),
        ("[" * 100_000, "c.json", "cannot be read"),
        (BOMB, "c.yaml", "an alias stands for a list"),
        (MERGED, "c.yaml", "an alias stands for a list"),
        (b"#" * (LARGEST + 1), "c.yaml", "is larger than"),
    ],
)
def test_what_is_no_file_of_settings(tmp_path, content, name, problem):
    with pytest.raises(UserError, match=problem) as raised:
        words(tmp_path, content, name)
    assert str(raised.value).startswith(f"--config_file {tmp_path / name}") and "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "problem"), [("none.yaml", "does not exist"), (".", "is no file")])
def test_no_file(tmp_path, name, problem):
    with pytest.raises(UserError, match=problem):
        settings_as_words(str(tmp_path / name))


def test_the_parser_reports_it_as_every_other_mistake(tmp_path, capsys):
    from dataclasses import dataclass

    @dataclass
    class Arguments:
        n_docs: int = flag(5, "Passages.")
        k: list[int] = flag([1], "Several.")

    path = tmp_path / "c.yaml"
    for content, problem in {"- 1": "must hold", "n_docs: [1, 2]": "unrecognized arguments: 2", "k: []": "--k"}.items():
        path.write_text(content)
        with pytest.raises(SystemExit, match="2"):
            parse_into(Arguments, argv=["--config_file", str(path)])
        assert problem in capsys.readouterr().err
    path.write_text("n_docs: 3\nk: [2, 4]")
    assert parse_into(Arguments, argv=["--config_file", str(path), "--k", "7"]) == Arguments(3, [7])
