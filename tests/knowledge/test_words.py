"""Knowledge of words: no encoder, no vectors, and the passages that share words with a question."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from datasets import load_from_disk

from rag.errors import UserError
from rag.index.sources import open_index
from tests.conftest import PASSAGES, ROOT
from tests.knowledge.test_folder import contents
from tests.knowledge.test_use_own_knowledge_dataset import arguments, run
from use_own_knowledge_dataset import build_and_go_on


@pytest.fixture
def settings(csv_path, tmp_path):
    return {"--csv_path": csv_path, "--output_dir": tmp_path / "out", "--index_factory": "BM25"}


def found(index, question):
    ids, _ = index.get_top_docs(index.encode_questions([question]), 1)
    return index.get_doc_dicts(ids)[0]["title"]


def test_passages_and_index_are_made_and_searched(settings, tmp_path, capsys):
    knowledge = run(settings)
    out = tmp_path / "out"
    assert load_from_disk(knowledge.passages_path).column_names == ["title", "text"]
    build_and_go_on(arguments(settings))
    printed = capsys.readouterr().out
    assert f"Next: python finetune_rag.py --index_name bm25 --passages_path {out}/my_knowledge_dataset ..." in printed
    assert knowledge.passages == 11 and run(settings).reused
    (passages,) = run({"--output_dir": out, "--search": "the river seine"})
    assert passages[0]["title"] == "paris" and passages[0]["score"] > 0
    assert all({"seine", "river", "the"} & set(passage["text"].split()) for passage in passages)
    (nothing,) = run({"--output_dir": out, "--search": "zzz"})
    assert nothing == []
    assert run({"--output_dir": out, "--verify": True}).passages == 11


def test_it_is_opened_as_every_bm25_index(settings):
    knowledge = run(settings)
    config = SimpleNamespace(index_name="bm25", passages_path=knowledge.passages_path, index_path=None)
    index = open_index(config)
    index.init_index()
    assert index.folder.name == "my_knowledge_dataset_bm25"
    assert [found(index, f"{title} {text}") for title, text in PASSAGES] == [[title] for title, _ in PASSAGES]


def test_documents_are_added(settings, tmp_path):
    run(settings)
    (tmp_path / "more.tsv").write_text("bergen\tbergen lies on the fjord\n")
    more = {"--csv_path": tmp_path / "more.tsv", "--output_dir": tmp_path / "out", "--append": True}
    assert run(more).passages == 12
    assert run(more).reused
    (passages,) = run({"--output_dir": tmp_path / "out", "--search": "fjord"})
    assert [passage["title"] for passage in passages] == ["bergen"]
    assert run(settings).passages == 12


def test_damage_is_mended(settings, tmp_path):
    run(settings)
    whole = contents(tmp_path / "out")
    for name in ("my_knowledge_dataset_bm25/words.arrow", "my_knowledge_dataset/data-00000-of-00001.arrow"):
        path = tmp_path / "out" / name
        path.write_bytes(path.read_bytes()[:-30])
        assert not run(settings).reused
        assert contents(tmp_path / "out") == whole


def test_flags_of_vectors_have_no_use(settings, flags):
    with pytest.raises(UserError) as error:
        run(settings, **{"--half_precision": True, "--num_index_shards": 2})
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["--num_index_shards", "--half_precision"]
    run(flags)
    with pytest.raises(UserError, match="holds knowledge of other documents, another encoder or other settings"):
        run(settings)


def test_no_model_is_imported(settings):
    words = [str(word) for flag in settings.items() for word in flag]
    code = (
        "import sys, use_own_knowledge_dataset as script; script.main(script.parse_args(sys.argv[1:])); "
        "print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_documents_without_words_are_told_before_anything_is_written(settings, tmp_path):
    (tmp_path / "signs.tsv").write_text("a\t? !\n")
    with pytest.raises(UserError, match=r"^--csv_path .*signs.tsv has no words that BM25 could find"):
        run(settings | {"--csv_path": tmp_path / "signs.tsv"})
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
