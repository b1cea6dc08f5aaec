"""Data sets of the hub by name, against an imitation of it on localhost; from the cache where it cannot be reached."""

import json

import datasets
import pytest

import eval_rag
from rag import hub as rag_hub
from rag.errors import UserError
from rag.files import read_lines
from rag.questions.arguments import DatasetArguments
from rag.questions.columns import read_examples
from rag.questions.reading import read_splits
from tests.conftest import QUESTIONS
from tests.imitation_hub import ImitationHub, Repository, use_hub
from tests.training.test_named_data import train_on

CONFIGS = """---
configs:
- config_name: open
  data_files: open.jsonl
- config_name: closed
  data_files: closed.jsonl
---
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    imitation = ImitationHub()
    use_hub(monkeypatch, imitation.endpoint, tmp_path / "cache", token=None)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", imitation.endpoint)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache" / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    yield imitation
    imitation.close()
    rag_hub.hub_is_reachable.cache_clear()


def lines(*questions):
    return "".join(f"{json.dumps({'question': q, 'answers': [a, a.title()]})}\n" for q, a in questions).encode()


@pytest.fixture
def cities(hub):
    repository = hub.repositories["datasets/alice/cities"] = Repository()
    repository.files |= {"train.jsonl": lines(*QUESTIONS), "validation.jsonl": lines(*QUESTIONS[:3])}
    return repository


def unreachable(hub):
    hub.close()
    hub.asked.clear()
    rag_hub.hub_is_reachable.cache_clear()


def test_a_training_and_an_evaluation_by_name(hub, cities, checkpoint, tmp_path):
    model, out = checkpoint(), tmp_path / "out"
    train_on(model, "alice/cities", out, "--num_train_epochs", 1)
    assert "\ndatasets:\n- alice/cities\n" in (out / "checkpoint1" / "README.md").read_text()
    (folder,) = (out / "dataset").iterdir()
    assert read_lines(folder / "train.source") == [question for question, _ in QUESTIONS]
    assert read_lines(folder / "test.target") == [answer for _, answer in QUESTIONS[:3]]
    flags = {
        "model_name_or_path": model,
        "dataset_name": "alice/cities",
        "predictions_path": tmp_path / "p",
        "n_docs": 2,
    }
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    scores = eval_rag.main(eval_rag.parse_args(words))
    assert len(read_lines(tmp_path / "p")) == 3

    unreachable(hub)
    train_on(model, "alice/cities", out, "--num_train_epochs", 2)  # goes on
    assert eval_rag.main(eval_rag.parse_args(words)) == scores


def test_configurations_are_named(hub, cities):
    cities.files = {"README.md": CONFIGS.encode(), "open.jsonl": lines(*QUESTIONS), "closed.jsonl": lines(QUESTIONS[0])}
    args = DatasetArguments(dataset_name="alice/cities", dataset_config="closed")
    assert read_examples(args, read_splits(args)["train"]).answers == [["paris", "Paris"]]
    for config, message in ((None, "has several configurations"), ("half", "has no configuration half")):
        with pytest.raises(
            UserError, match=f"^--dataset_name alice/cities {message}; give --dataset_config, one of: "
        ) as e:
            read_splits(DatasetArguments(dataset_name="alice/cities", dataset_config=config))
        assert "open" in str(e.value) and "closed" in str(e.value) and "\n" not in str(e.value)


def test_what_the_hub_does_not_have(hub, cities):
    for name, message in {
        "alice/none": r"cannot be loaded from the hub \(Dataset 'alice/none' doesn't exist",
        "x" * 300: "is no path and no name on the hub",
        "a b": "is no path and no name on the hub",
    }.items():
        with pytest.raises(UserError, match=f"^--dataset_name {name} {message}") as error:
            read_splits(DatasetArguments(dataset_name=name))
        assert "\n" not in str(error.value) and ".jsonl" in str(error.value)


def test_code_is_never_run(hub, cities, tmp_path):
    cities.files["cities.py"] = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    with pytest.raises(UserError, match=r"is read by code of its own, which is not run; save its rows as .jsonl"):
        read_splits(DatasetArguments(dataset_name="alice/cities"))
    assert not (tmp_path / "ran").exists()


def test_without_the_hub_it_is_its_cache_or_one_line(hub, cities):
    first = read_splits(DatasetArguments(dataset_name="alice/cities"))["train"][0].cells("question")
    unreachable(hub)
    assert read_splits(DatasetArguments(dataset_name="alice/cities"))["train"][0].cells("question") == first
    with pytest.raises(
        UserError, match=r"^--dataset_name alice/none is no path, the hub cannot be reached and its cache"
    ):
        read_splits(DatasetArguments(dataset_name="alice/none"))
    assert not hub.asked
