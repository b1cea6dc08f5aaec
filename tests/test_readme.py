"""The commands of the README are real: each flag is parsed, and what needs no GPU, cluster or hub is run as written."""

import importlib
import json
import os
import re
import shlex
import shutil

import pytest

from tests.conftest import PASSAGES, QUESTIONS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[str]:
    """The lines of all ```bash blocks, continuation lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


PYTHON_COMMANDS = [command for command in commands() if re.search(r"\w+\.py", command)]


def script_and_words(command: str, environment: dict[str, str]) -> tuple:
    expanded = re.sub(r"\$(\w+)", lambda variable: environment[variable[1]], command)
    words = shlex.split(expanded)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return importlib.import_module(words[script].removesuffix(".py")), words[script + 1 :]


@pytest.fixture(scope="module")
def walk(checkpoint, context_encoder_folder, question_encoder_folder, bart_folder, tmp_path_factory):
    """A folder in which the README can be followed, small models under the names of the large ones."""
    folder = tmp_path_factory.mktemp("readme")
    rag = checkpoint("rag_sequence", "bart")
    for name, source in {
        "facebook/rag-sequence-nq": rag,
        "facebook/bart-large-cnn": bart_folder,
        "facebook/dpr-question_encoder-single-nq-base": question_encoder_folder,
        "facebook/dpr-ctx_encoder-single-nq-base": context_encoder_folder,
    }.items():
        shutil.copytree(source, folder / name)
    (folder / "path/to").mkdir(parents=True)
    (folder / "data").mkdir()
    questions = "".join(f"{question}\n" for question, _ in QUESTIONS)
    for split in ("train", "val", "test"):
        (folder / f"data/{split}.source").write_text(questions)
        (folder / f"data/{split}.target").write_text("".join(f"{answer}\n" for _, answer in QUESTIONS))
    (folder / "path/to/test.source").write_text(questions)
    (folder / "path/to/gold_data").write_text("".join(f"{q}\t{[a]!r}\n" for q, a in QUESTIONS))
    (folder / "path/to/my_csv").write_text("".join(f"{title}\t{text}\n" for title, text in PASSAGES))
    records = [{"question": q, "positive_ctxs": [{"title": a, "text": ""}]} for q, a in QUESTIONS]
    (folder / "biencoder-nq-dev.json").write_text(json.dumps(records))
    return folder


ENVIRONMENT = {
    "DATA_DIR": "data",
    "OUTPUT_DIR": "output/run",
    "MODEL_NAME_OR_PATH": "facebook/rag-sequence-nq",
    "HEAD_NODE": "localhost",
    "N": "0",
}
# Stands in for what this machine lacks: a GPU, eight times.
ON_CPU = ["--accelerator", "cpu", "--max_steps", "1", "--num_workers", "0", "--n_docs", "2"]


def on_this_machine(words: list[str]) -> list[str]:
    words = list(words)
    if "--fp16" in words:
        words.remove("--fp16")
        at = words.index("--gpus")
        del words[at : at + 2]
        words += ON_CPU
    return words


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = [command.split()[1] for command in commands() if command.startswith("make ")]
    assert {"quickstart", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:.*## ", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("command", PYTHON_COMMANDS)
def test_every_flag_exists(command, walk, monkeypatch):
    monkeypatch.chdir(walk)
    script, words = script_and_words(command, ENVIRONMENT)
    script.parse_args(words)


def test_following_the_readme(walk, monkeypatch):
    """The commands in their order, but for several nodes; what a later one reads, an earlier one has written."""
    monkeypatch.chdir(walk)
    done = []
    for command in PYTHON_COMMANDS:
        if command.startswith("torchrun") or "ray" in command.split():
            continue
        script, words = script_and_words(command, {**ENVIRONMENT, "OUTPUT_DIR": f"output/run{len(done)}"})
        script.main(script.parse_args(on_this_machine(words)))
        done.append(script.__name__)
    assert done == [
        "finetune_rag",
        "consolidate_rag_checkpoint",
        "parse_dpr_relevance_data",
        "eval_rag",
        "eval_rag",
        "use_own_knowledge_dataset",
        "finetune_rag",
        "use_own_knowledge_dataset",
    ]
    assert len((walk / "path/to/e2e_preds.txt").read_text().splitlines()) == len(QUESTIONS)
    assert (walk / "output/retrieval_preds.tsv").exists() and (walk / "path/to/checkpoint/config.json").exists()


def test_the_files_it_names_exist():
    named = set(re.findall(r"`((?:tests/|benchmarks/)?\w+\.(?:py|sh|md|txt))`", README))
    written_by_runs = {"test_results.txt", "test_generations.txt"}
    assert not {name for name in named - written_by_runs if not (ROOT / name).exists()}


def test_the_launch_scripts_are_good_shell():
    for name in ("finetune_rag.sh", "finetune_rag_ray.sh"):
        assert os.system(f"bash -n {ROOT / name}") == 0
