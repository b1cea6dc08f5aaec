"""The DPR relevance file is streamed into two files that stay in step, or into none."""

import gzip
import json
import random
import resource
import tracemalloc
from pathlib import Path

import pytest

import parse_dpr_relevance_data as script
from rag.errors import UserError
from rag.evaluation.arguments import parse_args
from rag.evaluation.gold import read_data
from rag.files import read_lines
from rag.locks import lock_beside, one_at_a_time
from tests.conftest import ROOT


@pytest.fixture
def parse(tmp_path):
    """Parse a JSON text (or bytes); return the counts and the lines of both files."""

    def run(source, name="src.json"):
        (tmp_path / name).write_bytes(source if isinstance(source, bytes) else source.encode())
        questions, pages = tmp_path / "out" / "questions", tmp_path / "out" / "pages"
        argv = ["--src_path", tmp_path / name, "--evaluation_set", questions, "--gold-data-path", pages]
        counts = script.main(script.parse_args([str(word) for word in argv]))
        return counts, read_lines(questions), read_lines(pages)

    return run


def record(question, *titles):
    return {"question": question, "positive_ctxs": [{"title": title, "text": "..."} for title in titles], "answers": []}


def test_the_sample_gives_questions_and_titles(parse, capsys):
    counts, questions, pages = parse((ROOT / "test_data" / "biencoder-sample.json").read_bytes())
    assert counts == {"written": 2, "skipped": 1}
    assert questions == ["which river flows through vienna", "what is the capital of são tomé and príncipe"]
    assert pages == ["Vienna\tDanube", "São Tomé\tSão Tomé"]
    assert "1 of 3 records have no positive passage" in capsys.readouterr().out


def test_tabs_and_newlines_do_not_shift_lines_or_titles(parse):
    records = [record("who\nwas\r\nit", "A\tB", "C\nD", ""), record("none", "", "\ufeff"), record("u\u2028v", "E  F")]
    counts, questions, pages = parse(json.dumps(records))
    assert counts == {"written": 2, "skipped": 1}
    assert questions == ["who was it", "u\u2028v"] and pages == ["A B\tC D", "E  F"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_the_cut_of_the_chunks_does_not_matter(parse, monkeypatch, chunk, ensure_ascii):
    monkeypatch.setattr(script, "CHUNK_BYTES", chunk)
    rng = random.Random(chunk)
    letters = 'aé"\\/[]{},:😀\u2028 '
    records = [record("".join(rng.choices(letters, k=12)), "".join(rng.choices(letters, k=5)) + "x") for _ in range(9)]
    for one in records:
        one.update(score=-1.5e-7, ok=True, nothing=None, big=float("inf"))
    counts, questions, pages = parse(json.dumps(records, indent=rng.choice([None, 2]), ensure_ascii=ensure_ascii))
    assert counts == {"written": 9, "skipped": 0}
    assert questions == [one["question"] for one in records]
    assert pages == [one["positive_ctxs"][0]["title"] for one in records]


def test_an_empty_array_gives_empty_files(parse):
    assert parse(" [ ]\n") == ({"written": 0, "skipped": 0}, [], [])


def test_a_byte_order_mark_counts_as_white_space(parse):
    source = json.dumps([record("q", "A"), record("r", "B")]).encode()
    assert parse(b"\xef\xbb\xbf" + source) == ({"written": 2, "skipped": 0}, ["q", "r"], ["A", "B"])
    with pytest.raises(UserError, match=rf"the file ends .* at byte {len(source) + 2}$"):
        parse(b"\xef\xbb\xbf" + source[:-1])


def test_what_only_python_writes_is_read_and_words_in_texts_stay(parse):
    records = [record("NaN } -Infinity, NaN", 'Infinity \\" NaN'), record("Infinity", "NaN")]
    records[0].update(score=[float("nan"), float("-inf"), 10**30, 1e300], text='"NaN"')
    _, questions, pages = parse(json.dumps(records))
    assert questions == ["NaN } -Infinity, NaN", "Infinity"] and pages == ['Infinity \\" NaN', "NaN"]


def test_texts_may_hold_anything(parse):
    odd = "[{" * 2000 + "7" * 3000 + " \\ud800 \U0001f600"
    _, questions, pages = parse(json.dumps([record(odd, "A"), record("b", odd)]))
    assert questions == [odd, "b"] and pages == ["A", odd]


def test_an_object_is_no_array_even_with_ijsons_name_for_elements(parse):
    with pytest.raises(UserError, match=r"'{' stands where \[ is expected, at byte 1"):
        parse(" " + json.dumps({"item": record("q", "A")}))


GOOD = json.dumps(record("é?", "A"), ensure_ascii=False)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", r"the file ends where \[ is expected, at byte 0"),
        ('{"question": 1}', r"'{' stands where \[ is expected, at byte 0"),
        (f"[{GOOD}", rf"the file ends where , or \] is expected, at byte {len(GOOD.encode()) + 1}$"),
        (f"[{GOOD} {GOOD}]", rf"'{{' stands where , or \] is expected, at byte {len(GOOD.encode()) + 2}$"),
        (f"[{GOOD}, {GOOD[:-9]}", r"at byte \d+"),
        (f'[{GOOD}, {{"question" 3}}]', rf"Expecting ':' delimiter, at byte {len(GOOD.encode()) + 15}$"),
        (f"[{GOOD},]", rf"Expecting value, at byte {len(GOOD.encode()) + 2}$"),
        (f"[{GOOD}]\n{GOOD}", rf"behind the end of the array, at byte {len(GOOD.encode()) + 3}$"),
        (b"\x8b\x08", r"not UTF-8 text \(of archives only .gz is read\), at byte 0$"),
        (f"[{GOOD}, ".encode() + b'{"\xff', rf"not UTF-8 text .* at byte {len(GOOD.encode()) + 5}$"),
        (f'[{GOOD}, {{"question": "\\udc00"}}]', rf"half of a surrogate pair .* at byte {len(GOOD.encode()) + 3}$"),
        (f'[{GOOD}, {{"question": "no positives"}}]', "record 2, which ends at byte .*needs a `question`"),
        (f"[{GOOD}, 7]", "record 2, which ends at byte .*needs a `question`"),
        ('[{"question": null, "positive_ctxs": []}]', "record 1, .*needs a `question`"),
        ('[{"question": "q", "positive_ctxs": [{"title": null}]}]', "record 1, .*needs a `question`"),
        ('[{"question": " \\n", "positive_ctxs": [{"title": "t"}]}]', "record 1, .*its `question` is blank"),
        ('[{"question": "\\ufeff", "positive_ctxs": [{"title": "t"}]}]', "record 1, .*its `question` is blank"),
        (f'[{GOOD}, {{"question": "\\ud800 a"}}]', rf"half of a surrogate pair .* at byte {len(GOOD.encode()) + 3}$"),
        (f'[{GOOD}, {{"id": {"9" * 2000}}}]', "a number of 1,000 digits or more, behind byte"),
        ("[" * 2000, "more than 1,000 brackets in each other, behind byte 0"),
        ('[{"a": ' * 2000, "more than 1,000 brackets in each other, behind byte 0"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_fault_is_named_with_its_byte_and_nothing_is_written(parse, monkeypatch, tmp_path, source, message, chunk):
    monkeypatch.setattr(script, "CHUNK_BYTES", chunk)
    with pytest.raises(UserError, match=message):
        parse(source)
    assert {path.suffix for path in (tmp_path / "out").iterdir()} <= {".lock"}


def test_a_fault_early_in_a_long_file_does_not_read_the_rest(parse, monkeypatch):
    monkeypatch.setattr(script, "CHUNK_BYTES", 1 << 10)
    read = []
    monkeypatch.setattr(script, "progress", lambda chunks, *args, **kwargs: (read.append(c) or c for c in chunks))
    with pytest.raises(UserError, match="Expecting property name"):
        parse(f"[{GOOD}, {{'single': 1}}, " + ", ".join([GOOD] * 2000) + "]")
    assert len(read) <= 2


def test_a_gz_file_is_read_as_it_is(parse):
    source = json.dumps([record(f"q{n}", "A" * n) for n in range(1, 2000)]).encode()
    assert parse(gzip.compress(source)) == parse(source) and parse(gzip.compress(source))[0]["written"] == 1999
    packed = gzip.compress(source)
    for damaged in (
        packed[:-9],
        packed[: len(packed) // 2],
        packed[:20] + b"\xff" * 9 + packed[29:],
        b"\x1f\x8b" + b"\xff" * 99,
    ):
        with pytest.raises(UserError, match=r"^--src_path .* is a damaged .gz file \(.*; download it again$"):
            parse(damaged)
    with pytest.raises(UserError, match=r"Expecting value, at byte 1$"):
        parse(gzip.compress(b"[x]"))


def test_a_record_a_line_is_read_where_the_name_says_so(parse, monkeypatch):
    records = [record("q1", "A", "B"), record("NaN } é", "C") | {"score": float("nan")}, record("q3", "D")]
    lines = "\n".join(map(json.dumps, records)) + "\n\n"
    for chunk in (1, 1 << 20):
        monkeypatch.setattr(script, "CHUNK_BYTES", chunk)
        expected = ({"written": 3, "skipped": 0}, ["q1", "NaN } é", "q3"], ["A\tB", "C", "D"])
        assert parse(lines, "src.jsonl") == parse(gzip.compress(lines.encode()), "src.jsonl.gz") == expected
    with pytest.raises(UserError, match=r"a record a line must be named .jsonl$"):
        parse(lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question" 3}', rf"has no JSON record a line: Expecting ':' delimiter, at byte {len(GOOD.encode()) + 13}$"),
        (GOOD[:-9], r"has no JSON record a line: .*at byte \d+$"),
        ('{"question": "\\ud800 a"}', rf"half of a surrogate pair in the record, at byte {len(GOOD.encode()) + 1}$"),
        ("[" * 2000, "has no JSON record a line: more than 1,000 brackets in each other, behind byte"),
        ('{"question": "no positives"}', "record 2, which ends at byte .*needs a `question`"),
        ("7", "record 2, which ends at byte .*needs a `question`"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_faulty_line_is_named_with_its_byte(parse, monkeypatch, line, message, chunk):
    monkeypatch.setattr(script, "CHUNK_BYTES", chunk)
    with pytest.raises(UserError, match=message):
        parse(f"{GOOD}\n{line}\n", "src.jsonl")


def test_a_record_of_gigabytes_is_refused_at_a_limit(parse, monkeypatch):
    monkeypatch.setattr(script, "LONGEST_RECORD", 3 << 20)
    assert parse(json.dumps([record("q " * (1 << 20), "A")]))[0] == {"written": 1, "skipped": 0}
    with pytest.raises(UserError, match=r"a record of more than 3 MB, behind byte 0$"):
        parse(gzip.compress(json.dumps([record("q " * (2 << 20), "A")]).encode()))


def test_eval_reads_what_is_written(parse, tmp_path):
    """Whatever is in the source: blank titles and questions, byte order marks, line ends of other kinds, NULs."""
    odd = ["\ufeffq", "a\u2028b\0c", "d\x0b\x0c\x85e", '"quoted"', "f\rg\th", "['x']", "who\t['x']"]
    records = [record(text, title) for text in odd for title in [*odd, ' "" ', '"']]
    counts, questions, _ = parse(b"\xef\xbb\xbf" + json.dumps(records, ensure_ascii=False).encode())
    assert counts == {"written": len(odd) ** 2, "skipped": 2 * len(odd)}
    words = ["--model_name_or_path", "m", "--eval_mode", "retrieval", "--predictions_path", tmp_path / "p"]
    words += ["--evaluation_set", tmp_path / "out" / "questions", "--gold_data_path", tmp_path / "out" / "pages"]
    data = read_data(parse_args([str(word) for word in words]))
    assert data.questions == questions and len(data.gold) == len(odd) ** 2


def test_two_runs_on_one_output_are_kept_apart(parse, tmp_path):
    for name in ("questions", "pages"):
        with (
            one_at_a_time(lock_beside(tmp_path / "out" / name), "--x", "y"),
            pytest.raises(UserError, match="in use by"),
        ):
            parse("[]")
    assert parse("[]")[0] == {"written": 0, "skipped": 0}


def test_outputs_that_cannot_be_written_are_named_by_their_flag(tmp_path):
    (tmp_path / "src.json").write_text(json.dumps([record("q" * 99, "t")] * 999))
    (tmp_path / "file").touch()
    good = str(tmp_path / "good")
    for path in (tmp_path / "file" / "q", "/proc/q", "", " ", tmp_path / ("x" * 252), "/dev/null"):
        for flags in (
            {"evaluation_set": path, "gold_data_path": good},
            {"evaluation_set": good, "gold_data_path": path},
        ):
            with pytest.raises(UserError) as error:
                script.main(
                    script.ParseArguments(src_path=str(tmp_path / "src.json"), **{k: str(v) for k, v in flags.items()})
                )
            (wrong,) = (name for name in flags if flags[name] != good)
            assert str(error.value).startswith(f"--{wrong} ") and "\n" not in str(error.value)
    assert not (tmp_path / "good").exists() and Path("/dev/null").is_char_device()


@pytest.mark.parametrize("full", ["evaluation_set", "gold_data_path"])
def test_a_full_disk_is_told_by_the_flag_of_its_file(tmp_path, full):
    """A limit on the size of files that only the larger one of the two meets."""
    short, long = ("q", "t" * 99) if full == "gold_data_path" else ("q" * 99, "t")
    (tmp_path / "src.json").write_text(json.dumps([record(short, long)] * 999))
    args = script.ParseArguments(str(tmp_path / "q"), str(tmp_path / "p"), str(tmp_path / "src.json"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=f"^--{full} .* cannot be written: the disk is full; make room"):
            script.main(args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.suffix for path in tmp_path.iterdir()} == {".lock", ".json"}
    assert script.main(args) == {"written": 999, "skipped": 0}


def test_wrong_arguments_are_named_together(tmp_path):
    argv = ["--src_path", "nowhere.json", "--evaluation_set", str(tmp_path), "--gold_data_path", str(tmp_path)]
    with pytest.raises(UserError) as error:
        script.main(script.parse_args(argv))
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        "--src_path", "--evaluation_set", "--gold_data_path", "--src_path,",
    ]  # fmt: skip


def test_memory_does_not_grow_with_the_file(tmp_path):
    one = json.dumps(record("q" * 1000, "T" * 1000))
    (tmp_path / "src.json").write_text(f"[{', '.join([one] * 10000)}]")  # 21 MB
    args = script.ParseArguments(str(tmp_path / "q"), str(tmp_path / "p"), str(tmp_path / "src.json"))
    tracemalloc.start()
    script.main(args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * script.CHUNK_BYTES
