"""An evaluation of the tiny models: the files that it reads, and `eval_rag.py` with flags as keyword arguments."""

import pytest

import eval_rag
from rag.evaluation import predictors
from rag.files import write_lines
from tests.conftest import QUESTIONS

ASKED, ANSWERS = zip(*QUESTIONS, strict=True)


@pytest.fixture(scope="module")
def rag_folder(checkpoint):
    return checkpoint("rag_sequence", "bart")


@pytest.fixture
def files(tmp_path):
    """Question file, and a gold file of each kind."""
    write_lines(ASKED, tmp_path / "q")
    write_lines(ANSWERS, tmp_path / "ans")
    write_lines([f"{q}\t{[a, 'the ' + a.title()]}" for q, a in QUESTIONS], tmp_path / "qa")
    write_lines([f'"{a}"\tanother' for a in ANSWERS], tmp_path / "pages")
    return tmp_path


@pytest.fixture
def run(files):
    """Evaluate; keyword arguments are flags, None leaves one out. Returns what `main` returns."""

    def run(model, gold="ans", predictions="predictions.txt", **flags):
        flags = {
            "model_name_or_path": model,
            "evaluation_set": files / "q",
            "gold_data_path": files / gold,
            "gold_data_mode": "qa" if gold == "qa" else "ans",
            "eval_mode": "retrieval" if gold == "pages" else "e2e",
            "predictions_path": files / predictions,
            "num_beams": 2,
            "max_length": 8,
            "n_docs": 3,
            "eval_batch_size": 3,
        } | flags
        argv = []
        for name, value in flags.items():
            if value is None:
                continue
            values = [] if value is True else value if isinstance(value, list) else [value]
            argv += [f"--{name}", *map(str, values)]
        return eval_rag.main(eval_rag.parse_args(argv))

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Fail where a model is loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(predictors, "load_predictor", refuse)
