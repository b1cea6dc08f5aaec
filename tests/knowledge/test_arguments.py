"""Settings that cannot be meant are told together, before anything is read."""

import os

from rag.command_line.parser import parse_into
from rag.knowledge.arguments import KnowledgeArguments, flag_problems


def problems(*words) -> list[str]:
    return [line.split()[0].rstrip(":") for line in flag_problems(parse_into(KnowledgeArguments, argv=list(words)))]


def test_all_problems_at_once(tmp_path):
    assert problems() == []
    assert problems("--csv_path", str(tmp_path)) == []
    zeros = ["--num_shards", "--num_index_shards", "--train_sample", "--n_docs", "--num_encoding_processes"]
    words = [word for flag in zeros for word in (flag, "0")]
    assert sorted(problems(*words)) == sorted(zeros)
    assert problems("--recall_queries", "-1", "--gpus_per_task", "-1") == ["--recall_queries", "--gpus_per_task"]
    assert problems("--distributed", "ray", "--num_encoding_processes", "2") == ["--num_encoding_processes"]
    empty = ["--output_dir", str(tmp_path)]
    assert problems("--search", "who?", *empty, "--csv_path", "nowhere") == ["--search"]
    assert problems("--append", *empty, "--csv_path", "nowhere") == ["--csv_path", "--append"]


def test_values_that_name_or_count_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for words in (
        ["--csv_path", ""],
        ["--csv_path", "/dev/null"],
        ["--csv_path", str(tmp_path / "pipe")],
        ["--gpus_per_task", "nan"],
        ["--gpus_per_task", "inf"],
        ["--question", " "],
        ["--index_factory", ""],
        ["--m", "100000"],
        ["--num_proc", str(10**9)],
        ["--max_line_mb", "0"],
        ["--output_dir", ""],
        ["--output_dir", "/proc/x"],
    ):
        assert problems(*words) == [words[0]], words
    assert problems("--batch_size", str(10**9), "--num_shards", str(10**6), "--recall_queries", str(10**9)) == []
