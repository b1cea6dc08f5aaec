"""The floors of the house: a file imports only from floors below its own; scripts import nothing heavy at the top."""

import ast

import pytest

from tests.conftest import ROOT

FLOORS = [
    {
        "cli_rag",
        "utils_rag",
        "parse_dpr_relevance_data",
        "quickstart_data",
        "trainer_flags_rag",
        "knowledge_arguments_rag",
        "distinct_passages_rag",
        "batches_rag",
        "beams_rag",
        "eval_arguments_rag",
        "predictions_rag",
        "pooled_encoder",
        "documents_rag",
        "ranks_rag",
        "generator_rag",
        "hub_rag",
        "device_search_rag",
        "columns_rag",
        "mapped_index_rag",
    },
    {
        "finetune_arguments_rag",
        "index_rag",
        "models_rag",
        "token_trees",
        "loss_rag",
        "warm_start",
        "passages_rag",
        "launch_rag",
    },
    {"wiki_dpr_rag", "legacy_index_rag", "bm25_index_rag", "build_index_rag", "decoding_rag"},
    {"open_index_rag"},
    {"retriever_rag", "embed_passages_rag", "retrieval_actor_rag"},
    {
        "distributed_pytorch_retriever",
        "distributed_ray_retriever",
        "lightning_base",
        "callbacks_rag",
    },
    {"generative_qa_rag", "predictors_rag", "search_knowledge_rag", "encoding_workers_rag"},
    {"knowledge_files_rag"},
    {"finetune_rag", "eval_rag", "use_own_knowledge_dataset", "consolidate_rag_checkpoint"},
    {"quickstart"},
]
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}
# These share the lowest floor's vocabulary of arguments and files with their neighbours.
SHARED_BY_ALL = {"cli_rag", "utils_rag"}
SCRIPTS = [
    "finetune_rag",
    "eval_rag",
    "use_own_knowledge_dataset",
    "consolidate_rag_checkpoint",
    "parse_dpr_relevance_data",
    "quickstart",
]
ARGUMENTS = ["trainer_flags_rag", "finetune_arguments_rag", "eval_arguments_rag", "knowledge_arguments_rag"]
HEAVY = {"torch", "transformers", "datasets", "faiss", "pytorch_lightning", "ray"}


def imported(nodes) -> set[str]:
    """The top-level names of the modules that these statements, or any inside them, import."""
    found = set()
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Import):
                found |= {alias.name.split(".")[0] for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom) and inner.module:
                found.add(inner.module.split(".")[0])
    return found


def body(name: str):
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body


def test_every_file_has_one_floor():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == sorted(name for floor in FLOORS for name in floor)


@pytest.mark.parametrize("name", FLOOR_OF)
def test_imports_go_downwards(name):
    for other in imported(body(name)) & set(FLOOR_OF):
        if name not in SHARED_BY_ALL and other in SHARED_BY_ALL:
            continue
        assert FLOOR_OF[other] < FLOOR_OF[name] or name in SHARED_BY_ALL, f"{name}.py imports {other}.py"


@pytest.mark.parametrize("name", [*SCRIPTS, "cli_rag", "utils_rag", *ARGUMENTS])
def test_light_files_import_nothing_heavy_at_the_top(name):
    top = [node for node in body(name) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not imported(top) & HEAVY
    light = {"cli_rag", "utils_rag", "finetune_arguments_rag", "parse_dpr_relevance_data"}
    light |= {"knowledge_arguments_rag", "eval_arguments_rag", "predictions_rag", "trainer_flags_rag"}
    assert imported(top) & set(FLOOR_OF) <= light


@pytest.mark.parametrize("name", FLOOR_OF)
def test_every_file_says_its_job(name):
    assert ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))


def test_evaluation_needs_no_lightning():
    assert "pytorch_lightning" not in imported(body("eval_rag") + body("predictors_rag"))
