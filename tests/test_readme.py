"""The commands of the README and the docs are real: each flag is parsed, and what needs no GPU or hub is run."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PASSAGES, QUESTIONS, ROOT

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "RELIABILITY.md",
    "SECURITY.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
MODULES = {"quickstart": "quickstart.__main__"} | {
    f"{name}.py": name
    for name in (
        "finetune_rag",
        "eval_rag",
        "use_own_knowledge_dataset",
        "consolidate_rag_checkpoint",
        "parse_dpr_relevance_data",
        "report_rag",
        "demo_rag",
    )
}
# What each page's commands run, in their order, but for what needs several processes, a cluster or a GPU to search on,
# and for the demo, which runs until it is interrupted.
RUN_ON_EACH_PAGE = {
    "README.md": [
        "use_own_knowledge_dataset",
        "consolidate_rag_checkpoint",
        "finetune_rag",
        "eval_rag",
        "eval_rag",
    ],
    "docs/finetuning.md": [
        "finetune_rag",
        "finetune_rag",
        "finetune_rag",
        "consolidate_rag_checkpoint",
        "finetune_rag",
    ],
    "docs/language_models.md": [
        "consolidate_rag_checkpoint",
        "finetune_rag",
        "eval_rag",
        "consolidate_rag_checkpoint",
        "eval_rag",
    ],
    "docs/fusion_in_decoder.md": ["consolidate_rag_checkpoint", "finetune_rag", "eval_rag"],
    "docs/retrievers.md": ["use_own_knowledge_dataset"],
    "docs/training_the_retriever.md": ["finetune_rag", "eval_rag"],
    "docs/knowledge.md": [
        "use_own_knowledge_dataset",
        "finetune_rag",
        "use_own_knowledge_dataset",
        "use_own_knowledge_dataset",
        "use_own_knowledge_dataset",
        "use_own_knowledge_dataset",
        "use_own_knowledge_dataset",
        "use_own_knowledge_dataset",
        "use_own_knowledge_dataset",
    ],
    "docs/better_passages.md": ["eval_rag", "eval_rag"],
    "docs/report.md": ["eval_rag", "eval_rag", "report_rag"],
    "docs/evaluation.md": [
        "eval_rag",
        "eval_rag",
        "eval_rag",
        "eval_rag",
        "eval_rag",
        "parse_dpr_relevance_data",
        "parse_dpr_relevance_data",
        "eval_rag",
        "eval_rag",
        "eval_rag",
        "eval_rag",
    ],
}
VARIABLES = {
    "DATA_DIR": "data",
    "OUTPUT_DIR": "output/run",
    "MODEL_NAME_OR_PATH": "facebook/rag-sequence-nq",
    "HEAD_NODE": "localhost",
    "N": "0",
}
# Stands in for what this machine lacks: a GPU, eight times, and time.
ON_CPU = ["--accelerator", "cpu", "--max_steps", "1", "--num_workers", "0"]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(page), flags=re.DOTALL | re.MULTILINE)


def commands(page: str) -> list[str]:
    """The lines of all ```bash blocks, continuation lines joined."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip()]


def script_and_words(command: str, variables: dict[str, str]):
    """The name of the script of ours that a command calls and the words behind it; None where it calls none."""
    words = shlex.split(re.sub(r"\$(\w+)", lambda variable: variables[variable[1]], command))
    at = next((i for i, word in enumerate(words) if word in MODULES), None)
    if at is None or not {"python", "torchrun"} & set(words[:at]):
        return None
    return MODULES[words[at]], words[at + 1 :]


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]
OURS = list(dict.fromkeys(command for _, command in COMMANDS if script_and_words(command, VARIABLES)))


def needs_more_than_this_process(command: str) -> bool:
    words = command.split()
    others = {"quickstart", "demo_rag.py", "ray", "--devices", "--index_device"}
    return words[0] == "torchrun" or bool(others & set(words))


def on_this_machine(script: str, words: list[str]) -> list[str]:
    words = list(words)
    if "--fp16" in words:
        words.remove("--fp16")
        at = words.index("--gpus")
        del words[at : at + 2]
    return words + ON_CPU if script == "finetune_rag" else words


# --- A folder in which the pages can be followed ----------------------------------------------------------------------


def write_questions(folder: Path) -> None:
    """The files of test_data, small."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = {
        "source": [question for question, _ in QUESTIONS],
        "target": [answer for _, answer in QUESTIONS],
        "qa": [f"{question}\t{[answer]!r}" for question, answer in QUESTIONS],
        "pages": [answer for _, answer in QUESTIONS],
    }
    for split in ("train", "val", "test"):
        for ending, rows in lines.items():
            (folder / f"{split}.{ending}").write_text("".join(f"{row}\n" for row in rows))
    (folder / "my_knowledge_dataset.csv").write_text("".join(f"{title}\t{text}\n" for title, text in PASSAGES))
    shutil.copy(ROOT / "test_data" / "biencoder-sample.json", folder)


@pytest.fixture(scope="module")
def small_world(
    checkpoint, context_encoder_folder, question_encoder_folder, bart_folder, llama_folder, knowledge, tmp_path_factory
):
    """Small models under the names of the large ones, and what the quickstart leaves."""
    folder = tmp_path_factory.mktemp("readme")
    rag = checkpoint("rag_sequence", "bart")
    for name, source in {
        "facebook/rag-sequence-nq": rag,
        "facebook/bart-large-cnn": bart_folder,
        "HuggingFaceTB/SmolLM2-135M-Instruct": llama_folder,
        "facebook/dpr-question_encoder-single-nq-base": question_encoder_folder,
        "facebook/dpr-ctx_encoder-single-nq-base": context_encoder_folder,
        "output/quickstart/checkpoint": rag,
        "output/quickstart/finetuned/checkpoint1": rag,
        "output/quickstart/models/generator": bart_folder,
        "output/quickstart/models/question_encoder": question_encoder_folder,
        "output/quickstart/models/context_encoder": context_encoder_folder,
        "output/quickstart/knowledge": Path(knowledge["passages_path"]).parent,
    }.items():
        shutil.copytree(source, folder / name)
    for name in ("data", "test_data", "path/to"):
        write_questions(folder / name)
    shutil.copy(folder / "path/to/test.qa", folder / "path/to/gold_data")
    shutil.copy(folder / "path/to/my_knowledge_dataset.csv", folder / "path/to/my_csv")
    records = [{"question": q, "positive_ctxs": [{"title": a, "text": ""}]} for q, a in QUESTIONS]
    (folder / "biencoder-nq-dev.json").write_text(json.dumps(records))
    records = [{"question": q, "titles": [a], "texts": [dict(PASSAGES)[a]], "scores": [1]} for q, a in QUESTIONS]
    (folder / "path/to/found.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / "path/to/my_questions").mkdir()
    for split in ("train", "validation"):
        named = "".join(f"{json.dumps({'question': q, 'answers': [a]})}\n" for q, a in QUESTIONS)
        (folder / f"path/to/my_questions/{split}.jsonl").write_text(named)
    records = [{"input": q, "output": [{"answer": a, "provenance": [{"title": a}]}]} for q, a in QUESTIONS]
    (folder / "path/to/nq-dev-kilt.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return folder


@pytest.fixture
def walk(small_world, tmp_path, monkeypatch):
    """A copy of it, for one page."""
    folder = shutil.copytree(small_world, tmp_path / "walk")
    monkeypatch.chdir(folder)
    return folder


# --- Commands ---------------------------------------------------------------------------------------------------------


def test_make_targets_exist():
    makefile = text_of("Makefile")
    targets = [command.split()[1] for _, command in COMMANDS if command.startswith("make ")]
    assert {"quickstart", "test"} <= set(targets)
    assert all(re.search(rf"^{target}:.*## ", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize("command", OURS)
def test_every_flag_exists(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script, words = script_and_words(command, VARIABLES)
    importlib.import_module(script).parse_args(words)


@pytest.mark.parametrize("page", RUN_ON_EACH_PAGE)
def test_following_a_page(page, walk):
    """The commands in their order; what a later one reads, an earlier one or the quickstart has written."""
    done = []
    for command in commands(page):
        if command.startswith("printf "):
            subprocess.run(command, shell=True, check=True)
        called = script_and_words(command, {**VARIABLES, "OUTPUT_DIR": f"output/run{len(done)}"})
        if called is None or needs_more_than_this_process(command):
            continue
        script, words = called
        module = importlib.import_module(script)
        module.main(module.parse_args(on_this_machine(script, words)))
        done.append(script)
    assert done == RUN_ON_EACH_PAGE[page]
    if page == "docs/evaluation.md":
        assert len((walk / "path/to/e2e_preds.txt").read_text().splitlines()) == len(QUESTIONS)
        assert (walk / "output/retrieval_preds.tsv").exists()
    if page == "docs/finetuning.md":
        assert (walk / "path/to/checkpoint/config.json").exists()


def test_pages_that_run_nothing_are_known():
    calls = {page for page, command in COMMANDS if command in OURS and not needs_more_than_this_process(command)}
    assert calls == set(RUN_ON_EACH_PAGE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_examples_run(page, walk, capsys):
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_launch_scripts_are_good_shell():
    for name in ("finetune_rag.sh", "finetune_rag_ray.sh"):
        assert os.system(f"bash -n {ROOT / name}") == 0


# --- Names, links, drawings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_the_files_it_names_exist(page):
    named = set(re.findall(r"`((?:tests/|benchmarks/|docs/)?\w+\.(?:py|sh|md|txt|toml))`", text_of(page)))
    named |= set(re.findall(r"(?<!\S)((?:tests|benchmarks|docs|test_data)/[\w./-]+)", "".join(blocks(page, "bash"))))
    written_by_runs = {"test_results.txt", "test_generations.txt", "answers.txt"}
    folders = [ROOT, ROOT / "docs", *(path.parent for path in (ROOT / "rag").glob("**/__init__.py"))]
    assert not {name for name in named - written_by_runs if not any((folder / name).exists() for folder in folders)}


@pytest.mark.parametrize("page", PAGES)
def test_its_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", text_of(page))
    files = {target.partition("#")[0] for target in targets if not re.match(r"https?://|#", target)}
    assert not {file for file in files if not ((ROOT / page).parent / file).exists()}


def test_the_architecture_names_every_module():
    named, room = set(), ""
    for cells in re.findall(r"^\| (`rag[.\w]*`)? ?\| `(\w+)` \|", text_of("docs/architecture.md"), flags=re.MULTILINE):
        room = cells[0].strip("`") or room
        named.add(f"{room}.{cells[1]}")
    modules = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "rag").rglob("*.py"))
    assert named == {".".join(module.parts) for module in modules if module.name != "__init__"}


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 250


def test_plots_are_those_of_the_committed_figures(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    images = tmp_path / "docs" / "images"
    for name in ("index_kinds.svg", "quickstart_em.svg"):
        if f"Matplotlib v{matplotlib.__version__}," not in (images / name).read_text():
            pytest.skip(f"{name} was drawn by another matplotlib")
        (images / name).unlink()
    subprocess.run([sys.executable, tmp_path / "docs" / "plots.py"], check=True)
    for image in (ROOT / "docs" / "images").iterdir():
        assert (images / image.name).read_bytes() == image.read_bytes(), image.name
