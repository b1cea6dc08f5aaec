"""What goes to the hub and comes back: checkpoints and knowledge, against an imitation of it on localhost."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard, snapshot_download
from transformers import DPRConfig, RagConfig

import consolidate_rag_checkpoint
import eval_rag
import use_own_knowledge_dataset
from rag import hub as rag_hub
from rag.errors import UserError
from rag.files import write_lines
from rag.index.sources import open_index
from rag.models.checkpoints import load_model
from tests.conftest import DIMENSION, QUESTIONS
from tests.imitation_hub import READ_TOKEN, TOKEN, ImitationHub, use_hub
from tests.training.test_finetune_rag import run


@pytest.fixture
def hub(monkeypatch, tmp_path):
    imitation = ImitationHub()
    use_hub(monkeypatch, imitation.endpoint, tmp_path / "cache")
    yield imitation
    imitation.close()
    rag_hub.hub_is_reachable.cache_clear()


@pytest.fixture
def consolidate(bart_folder, question_encoder_folder, tmp_path):
    def make(*words, repo: str = "alice/rag", dest: Path = tmp_path / "rag") -> Path:
        flags = {"--generator_name_or_path": bart_folder, "--question_encoder_name_or_path": question_encoder_folder}
        flags |= {"--dest": dest, "--push_to_hub": repo}
        argv = [str(word) for flag in flags.items() for word in flag] + list(words)
        return consolidate_rag_checkpoint.main(consolidate_rag_checkpoint.parse_args(argv))

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_no_token(folder: Path, said: str) -> None:
    texts = [said.encode(), *contents(folder).values()]
    assert not any(TOKEN.encode() in text for text in texts)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_as_it_was(hub, consolidate, tmp_path, capfd):
    dest = consolidate()
    said = "".join(capfd.readouterr())
    assert f"{dest} is at {hub.endpoint}/alice/rag\n" in said
    back = Path(snapshot_download("alice/rag"))
    assert contents(back) == contents(dest)
    assert ModelCard.load(back / "README.md").data.library_name == "transformers"
    named, expected = (load_model(str(name)).state_dict() for name in ("alice/rag", dest))
    assert all(torch.equal(weight, expected[name]) for name, weight in named.items())
    assert_no_token(tmp_path, said)


def test_a_broken_upload_goes_on_by_the_same_command(hub, consolidate, tmp_path):
    hub.uploads_left = 0
    with pytest.raises(
        UserError, match=r"^--push_to_hub alice/rag: the hub says '.*403.*'; the same command goes on"
    ) as e:
        consolidate()
    assert "\n" not in str(e.value) and TOKEN not in str(e.value)
    first = contents(tmp_path / "rag")
    assert first and not hub.repositories["models/alice/rag"].files
    hub.uploads_left = None
    dest = consolidate()
    assert contents(dest) == first == contents(Path(snapshot_download("alice/rag")))
    uploads = hub.uploads()
    consolidate()  # all is there
    assert hub.uploads() == uploads and len(hub.repositories["models/alice/rag"].commits) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_checkpoint_is_not_pushed_in_its_place(hub, consolidate):
    consolidate()
    with pytest.raises(UserError, match=r"--dest .*rag already exists"):
        consolidate("--model_type", "rag_token")
    assert len(hub.repositories["models/alice/rag"].commits) == 1


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        ("alice/rag", None, "there is no token of yours; run `hf auth login`, or set HF_TOKEN"),
        ("alice/rag", "hf_wrong", "the hub says 'Invalid user token.*; give another token"),
        ("alice/rag", READ_TOKEN, "your token may read only"),
        ("bob/rag", TOKEN, "your token is not bob's; give alice/rag"),
        ("rag", TOKEN, "does not say whose it is; give YOUR_NAME/rag"),
        ("a/b/c", TOKEN, "'a/b/c' is no name on the hub"),
    ],
)
def test_what_keeps_us_from_pushing_is_told_first(repo, token, message, hub, consolidate, monkeypatch, tmp_path):
    use_hub(monkeypatch, hub.endpoint, tmp_path / "cache", token)
    with pytest.raises(UserError, match=message) as error:
        consolidate(repo=repo)
    assert "\n" not in str(error.value) and "--push_to_hub" in str(error.value)
    assert token is None or token not in str(error.value)
    assert not (tmp_path / "rag").exists() and not hub.repositories


def test_an_organization_takes_a_checkpoint(hub, consolidate):
    consolidate(repo="lab/rag")
    assert hub.repositories["models/lab/rag"].files.keys() > {"config.json", "README.md"}


def test_without_a_hub_one_line_says_so(hub, consolidate, monkeypatch, tmp_path):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(UserError, match=r"--push_to_hub alice/rag: http://127.0.0.1:9 cannot be reached"):
        consolidate()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it"):
        consolidate()
    assert not (tmp_path / "rag").exists()


def test_folders_that_config_json_names_are_told(hub, checkpoint, data_dir, tmp_path, capsys):
    run(checkpoint(), data_dir, tmp_path / "out", "--lora_r", 2, "--num_train_epochs", 1)
    words = ["--merge_adapters", str(tmp_path / "out" / "checkpoint1"), "--dest", str(tmp_path / "rag")]
    argv = [*words, "--push_to_hub", "alice/rag"]
    consolidate_rag_checkpoint.main(consolidate_rag_checkpoint.parse_args(argv))
    assert "config.json names passages_path /" in capsys.readouterr().out
    assert contents(Path(snapshot_download("alice/rag"))) == contents(tmp_path / "rag")


# --- Knowledge --------------------------------------------------------------------------------------------------------


@pytest.fixture
def build(flags):
    def make(**more):
        words = flags | {f"--{name}": value for name, value in more.items()}
        argv = [str(word) for flag in words.items() for word in flag]
        return use_own_knowledge_dataset.main(use_own_knowledge_dataset.parse_args(argv))

    return make


def config_of(passages_path: str, index_name: str = "custom", **paths):
    made = RagConfig(
        question_encoder=DPRConfig().to_dict(), retrieval_vector_size=DIMENSION, index_name=index_name,
        passages_path=passages_path, **paths,
    )  # fmt: skip
    made.question_encoder._name_or_path = ""
    return made


def searched(config):
    index = open_index(config)
    index.init_index()
    queries = np.random.default_rng(1).standard_normal((5, DIMENSION), dtype=np.float32)
    ids, vectors = index.get_top_docs(queries, 4)
    return ids, vectors, index.get_doc_dicts(ids)


@pytest.mark.parametrize("more", [{}, {"num_index_shards": 2, "num_shards": 3}], ids=["one file", "shards"])
def test_knowledge_is_opened_by_its_name_and_mapped(more, hub, build, tmp_path, capfd, monkeypatch):
    knowledge = build(push_to_hub="alice/cities", **more)
    said = "".join(capfd.readouterr())
    assert f"is at {hub.endpoint}/datasets/alice/cities: --passages_path hub:alice/cities opens it" in said
    named = config_of("hub:alice/cities", index_path="/an/old/index")  # of what a checkpoint remembers
    ids, vectors, passages = searched(named)
    expected = searched(config_of(knowledge.passages_path, index_path=knowledge.index_path))
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(vectors, expected[1])
    assert passages == expected[2] and named.passages_path == "hub:alice/cities"

    back, own = Path(snapshot_download("alice/cities", repo_type="dataset")), contents(tmp_path / "out")
    came = contents(back)
    assert came.keys() - own.keys() == {"README.md"}
    assert {name for name in came.keys() & own.keys() if came[name] != own[name]} == {"index.json"}
    assert own.keys() - came.keys() <= {".lock"}
    assert "/" not in json.loads(came["index.json"])["csv_path"] and str(tmp_path).encode() not in came["index.json"]
    assert str(tmp_path).encode() not in came["README.md"]
    mapped = Path("/proc/self/maps").read_text()
    assert str(tmp_path / "cache" / "datasets--alice--cities" / "blobs") in mapped  # the passages, and the index
    assert_no_token(tmp_path, said)

    hub.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    rag_hub.hub_is_reachable.cache_clear()
    np.testing.assert_array_equal(searched(named)[0], expected[0])
    assert not hub.asked


def test_the_card_of_knowledge_is_the_hubs(hub, build, tmp_path):
    build(push_to_hub="alice/cities")
    card = DatasetCard(hub.repositories["datasets/alice/cities"].files["README.md"].decode())
    assert card.data.size_categories == "n<1K" and card.data.tags == ["rag", "faiss"]
    assert "11, of 9 documents in `documents.csv`" in card.text and "hub:alice/cities" in card.text
    loaded = load_dataset("arrow", data_files=str(tmp_path / "out" / card.data.configs[0]["data_files"]), split="train")
    assert len(loaded) == 11


def test_a_broken_upload_of_knowledge_goes_on(hub, build, tmp_path):
    hub.uploads_left = 1
    with pytest.raises(
        UserError, match=r"--push_to_hub alice/cities: the hub says .*; the same command goes on with it"
    ):
        build(push_to_hub="alice/cities", num_shards=3)
    with pytest.raises(UserError, match="hub:alice/cities"):
        open_index(config_of("hub:alice/cities"))
    hub.uploads_left = None
    before = hub.uploads()
    assert build(push_to_hub="alice/cities", num_shards=3).reused
    large = [name for name in hub.repositories["datasets/alice/cities"].files if name.endswith((".arrow", ".faiss"))]
    assert hub.uploads() - before == len(large) - 1  # one was there
    assert len(open_index(config_of("hub:alice/cities"))) == 11


def test_an_index_of_words_is_opened_by_its_name(hub, build, flags):
    del flags["--m"]
    knowledge = build(push_to_hub="alice/words", index_factory="bm25")
    index = open_index(config_of("hub:alice/words", "bm25"))
    index.init_index()
    expected = open_index(config_of(knowledge.passages_path, "bm25"))
    expected.init_index()
    question = ["which river flows through oslo"]
    for ours, theirs in zip(*(one.search(one.encode_questions(question), 3) for one in (index, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(UserError, match="hub:alice/words holds an index of words: give --index_name bm25"):
        open_index(config_of("hub:alice/words"))


def test_an_evaluation_takes_passages_by_name(hub, build, checkpoint, tmp_path):
    knowledge = build(push_to_hub="alice/cities")
    write_lines([question for question, _ in QUESTIONS], tmp_path / "questions.txt")
    write_lines([answer for _, answer in QUESTIONS], tmp_path / "titles.txt")
    folders = ["--passages_path", knowledge.passages_path, "--index_path", knowledge.index_path]
    for name, words in {"named": ["--passages_path", "hub:alice/cities"], "folders": folders}.items():
        argv = f"""--model_name_or_path {checkpoint()} --eval_mode retrieval --k 2 --evaluation_set
        {tmp_path / "questions.txt"} --gold_data_path {tmp_path / "titles.txt"} --predictions_path {tmp_path / name}"""
        eval_rag.main(eval_rag.parse_args([*argv.split(), *words]))
    assert (tmp_path / "named").read_text() == (tmp_path / "folders").read_text()


def test_a_training_takes_passages_by_name_and_its_checkpoint_keeps_the_name(
    hub, build, checkpoint, data_dir, tmp_path
):
    build(push_to_hub="alice/cities")
    words = ("--num_train_epochs", 1, "--passages_path", "hub:alice/cities")
    run(checkpoint(), data_dir, tmp_path / "run", *words)
    exported = tmp_path / "run" / "checkpoint1"
    assert json.loads((exported / "config.json").read_text())["passages_path"] == "hub:alice/cities"
    assert "hub:alice/cities" in (exported / "README.md").read_text()
    with pytest.raises(UserError, match="--index_path x: hub:alice/cities has an index of its own; leave it out"):
        run(checkpoint(), data_dir, tmp_path / "other", *words, "--index_path", "x")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"push_to_hub": "cities"}, "--push_to_hub cities does not say whose it is"),
        ({"push_to_hub": "bob/cities"}, "your token is not bob's; give alice/cities"),
    ],
)
def test_nothing_is_built_where_it_could_not_be_pushed(more, message, hub, build, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        build(**more)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_unknown_knowledge_is_one_line(hub):
    with pytest.raises(UserError, match=r"--passages_path hub:bob/none: the hub answers .*; give a folder") as error:
        open_index(config_of("hub:bob/none"))
    assert "\n" not in str(error.value)
