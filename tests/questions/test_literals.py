"""Lists of answers as Python, JSON, NumPy and csv writers print them come back as the same texts, or not at all."""

import csv
import io
import json
import random

import numpy as np
import pytest

from rag.questions.literals import read_list, unquoted


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("""['Oslo', "Don't"]""", ["Oslo", "Don't"]),
        ("('Oslo',)", ["Oslo"]),
        ("('Oslo', 'Rome')", ["Oslo", "Rome"]),
        ("['Oslo', ]", ["Oslo"]),
        ("[u'S\\xe3o', 'x\\'y\\\\']", ["São", "x'y\\"]),
        ("['\\d+ km']", ["\\d+ km"]),  # Python keeps an escape that is none
        (r'["\ud83d\ude00", "AC\/DC", "\u00e9"]', ["😀", "AC/DC", "é"]),  # JSON's escapes, not Python's
        ('["a", null, "b"]', ["a", "b"]),
        ("['a', None]", ["a"]),
        ("['a' \"b's\"\n 'c d']", ["a", "b's", "c d"]),
        ("array(['a', 'b'], dtype=object)", ["a", "b"]),
        ("array(['a)]'], dtype='<U3')", ["a)]"]),
        ("[np.str_('a'), np.str_(\"b'\")]", ["a", "b'"]),
        ("['a' nan None]", ["a"]),
        ("[]", []),
    ],
)
def test_what_programs_print_is_read(text, texts):
    assert read_list(text) == read_list(f" {text}\t") == texts


@pytest.mark.parametrize(
    "text",
    [
        "", "Oslo", "'Oslo'", '"Oslo"', "('Oslo')", "{'Oslo'}", "{'a': 'b'}", "['Oslo'", "['Oslo']]", "['a']['b']",
        "[1, 2]", "['a', 1]", '["a", 1]', "[['a']]", '[["a"]]', "[True]", "[b'a']", "['a' + 'b']", "[,]", "['a',,'b']",
        "['a''b']", "['a' 'b', 'c']", "['a' ... 'z']", "__import__('os')", r"['\x1']", r'["\ud800"]',
        r"['\ud83d\ude00']",
        "[" * 100_000, "-" * 100_000 + "1", "[" + "9" * 100_000 + "]", '["a", ' + "[" * 100_000, "['''a''']",
    ],
)  # fmt: skip
def test_what_is_no_list_of_texts_is_refused(text):
    with pytest.raises(ValueError):
        read_list(text)


def test_random_texts_survive_every_writer():
    rng = random.Random(0)
    for _ in range(300):
        texts = [
            "".join(rng.choices("""ab '"\\/,[]()\n\té😀\x7f\u2028""", k=rng.randint(0, 6)))
            for _ in range(rng.randint(1, 4))
        ]
        printed = [
            repr(texts),
            json.dumps(texts),
            json.dumps(texts, ensure_ascii=False),
            str(np.array(texts, dtype=object)),
        ]
        printed += [repr(np.array(texts, dtype=object)), repr(tuple(texts)), repr(list(np.array(texts)))]
        for text in printed:
            assert read_list(text) == texts, text
            stream = io.StringIO()
            csv.writer(stream, delimiter="\t", lineterminator="\n").writerow([text])
            assert unquoted(stream.getvalue().removesuffix("\n")) == text


def test_a_field_that_no_csv_writer_has_quoted_stays():
    assert unquoted('"a "b" c"') == '"a "b" c"' and unquoted('"a') == '"a' and unquoted("['a']") == "['a']"
