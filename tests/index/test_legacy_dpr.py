"""DPR's legacy files: results equal to transformers' own reader, and pickles that would run something refused."""

import builtins
import os
import pickle
import shutil
from pathlib import Path

import datasets
import faiss
import numpy as np
import pytest
from transformers import RagConfig
from transformers.models.rag import retrieval_rag

import eval_rag
from rag.errors import UserError
from rag.index.legacy_dpr import IDS_FILE, INDEX_FILE, PASSAGES_PICKLE, PASSAGES_TSV, load_plain_pickle, read_dpr_tsv
from rag.index.sources import open_index
from tests.conftest import DIMENSION

ROWS = 60
TEXTS = {number: f'text "{number}"\tof many, {number}' for number in range(1, ROWS + 1)}
TITLES = {number: f'"title {number}"' if number % 3 else f"title, {number}" for number in range(1, ROWS + 1)}
ORDER = np.random.default_rng(1).permutation(np.arange(1, ROWS + 1))  # of the ids in the index


def quoted(field: str) -> str:
    return '"' + field.replace('"', '""') + '"'


@pytest.fixture(scope="module")
def pickled(tmp_path_factory) -> Path:
    """A folder as DPR left it: inner products turned to distances by a dimension more, both parts pickled."""
    folder = tmp_path_factory.mktemp("legacy")
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIMENSION), dtype=np.float32)
    squares = (vectors**2).sum(1)
    longer = np.hstack([vectors, np.sqrt(squares.max() - squares)[:, None]]).astype(np.float32)
    index = faiss.IndexHNSWSQ(DIMENSION + 1, faiss.ScalarQuantizer.QT_8bit, 16)
    index.train(longer)
    index.add(longer)
    faiss.write_index(index, str(folder / INDEX_FILE))
    (folder / IDS_FILE).write_bytes(pickle.dumps([str(number) for number in ORDER]))
    passages = {str(number): (TEXTS[number], TITLES[number]) for number in TEXTS}
    (folder / PASSAGES_PICKLE).write_bytes(pickle.dumps(passages))
    return folder


@pytest.fixture(scope="module")
def with_tsv(pickled, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("legacy_tsv")
    for name in (INDEX_FILE, IDS_FILE):
        shutil.copy(pickled / name, folder)
    rows = [f"{number}\t{quoted(TEXTS[number])}\t{quoted(TITLES[number])}\n" for number in TEXTS]
    (folder / PASSAGES_TSV).write_text("id\ttext\ttitle\n" + "".join(rows), newline="")
    return folder


@pytest.fixture(autouse=True)
def trusting(tmp_path, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "True")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def config(folder, **settings) -> RagConfig:
    return RagConfig(
        index_name="legacy",
        index_path=None if folder is None else str(folder),
        retrieval_vector_size=DIMENSION,
        **settings,
    )


def opened(folder, **settings):
    index = open_index(config(folder, **settings))
    index.init_index()
    return index


def queries(count: int = 7) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((count, DIMENSION), dtype=np.float32)


@pytest.mark.parametrize("source", ["pickled", "with_tsv"])
def test_results_are_those_of_transformers(source, pickled, request):
    ours = opened(request.getfixturevalue(source))
    theirs = retrieval_rag.LegacyIndex(DIMENSION, str(pickled))
    theirs.init_index()
    for our, their in zip(ours.get_top_docs(queries(), 5), theirs.get_top_docs(queries(), 5), strict=True):
        np.testing.assert_array_equal(our, their)
    doc_ids, doc_embeds = ours.get_top_docs(queries(), 5)
    assert doc_ids.dtype == np.int64 and doc_embeds.dtype == np.float32 and doc_embeds.shape == (7, 5, DIMENSION)
    assert ours.get_doc_dicts(doc_ids) == theirs.get_doc_dicts(doc_ids)


def test_passages_come_best_first_by_inner_product(pickled):
    scores, doc_ids = opened(pickled).search(queries(), 5)
    vectors = np.random.default_rng(0).standard_normal((ROWS, DIMENSION), dtype=np.float32)
    products = queries() @ vectors.T
    np.testing.assert_array_equal(doc_ids[:, 0], ORDER[products.argmax(1)])
    np.testing.assert_allclose(scores[:, 0], products.max(1), atol=0.2)
    assert (np.diff(scores) < 0.2).all()  # the extra dimension is rounded, too


def test_slots_without_a_passage(pickled):
    index = opened(pickled)
    doc_ids, doc_embeds = index.get_top_docs(queries(2), ROWS + 3)
    missing = doc_ids == -1
    assert missing[:, ROWS:].all() and (doc_ids[~missing] > 0).all() and not missing[:, :5].any()
    np.testing.assert_array_equal(missing, ~doc_embeds.any(-1))
    assert index.get_doc_dicts(np.array([[-1, 2]])) == [{"title": ["", TITLES[2]], "text": ["", TEXTS[2]]}]
    assert index.get_top_docs(queries(0), 4)[0].shape == (0, 4)


def test_the_index_is_mapped_and_described(pickled):
    index = opened(pickled, ef_search=40)
    assert str(pickled / INDEX_FILE) in Path("/proc/self/maps").read_text()
    assert len(index) == ROWS and index.description() == {
        "kind": "IndexHNSWSQ", "passages": ROWS, "dimension": DIMENSION, "ef_search": 40, "vectors_from": "index",
    }  # fmt: skip


def test_passages_are_unpacked_once_and_again_when_they_changed(with_tsv, tmp_path, monkeypatch):
    folder = tmp_path / "legacy"
    shutil.copytree(with_tsv, folder)
    opened(folder)
    with monkeypatch.context() as patch:
        patch.setattr("rag.index.dpr_tsv.csv.reader", None)
        opened(folder)
    text = (folder / PASSAGES_TSV).read_text()
    (folder / PASSAGES_TSV).write_text(text.replace("of many", "of them"))
    assert "of them" in opened(folder).get_doc_dicts(np.array([[1]]))[0]["text"][0]


def test_evaluation_over_legacy_files(with_tsv, checkpoint, tmp_path, capsys):
    (tmp_path / "questions").write_text("what is the capital of france\nwho lives in rome\n")
    (tmp_path / "titles").write_text("title 1\ntitle, 3\n")
    argv = f"""--model_name_or_path {checkpoint()} --eval_mode retrieval --evaluation_set {tmp_path / "questions"}
    --gold_data_path {tmp_path / "titles"} --predictions_path {tmp_path / "found"} --k {ROWS} --ef_search 100
    --index_name legacy --index_path {with_tsv}"""
    scores = eval_rag.main(eval_rag.parse_args(argv.split()))
    assert 0 < scores[f"precision_at_{ROWS}"] <= 1 / ROWS
    assert ", index HNSWSQ ef_search 100, " in capsys.readouterr().out


# --- Pickles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, "False", "0", "perhaps"])
def test_pickles_are_read_only_where_that_is_asked_for(pickled, monkeypatch, value):
    monkeypatch.delenv("TRUST_REMOTE_CODE") if value is None else monkeypatch.setenv("TRUST_REMOTE_CODE", value)
    with pytest.raises(UserError, match=r"is a pickle, which is read only if .* set TRUST_REMOTE_CODE=True"):
        open_index(config(pickled))


class Runs:
    """Pickles as a call of `function` on `arguments`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(mark: Path) -> dict[str, object]:
    touch = f"touch {mark}"
    return {
        "system": Runs(os.system, touch),
        "nested": {"1": ("text", "title"), "2": [("deep", {"er": Runs(os.system, touch)})]},
        "eval": Runs(builtins.eval, f"open({str(mark)!r}, 'w')"),
        "getattr": Runs(getattr, Runs(__import__, "os"), "system"),
        "harmless class": Path("passages"),
        "numpy": np.arange(3),
    }


@pytest.mark.parametrize("kind", hostile(Path()))
@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_a_pickle_that_would_run_something_is_refused_before_it_does(tmp_path, kind, protocol):
    path, mark = tmp_path / "passages.pkl", tmp_path / "mark"
    path.write_bytes(pickle.dumps(hostile(mark)[kind], protocol=protocol))
    with pytest.raises(UserError, match=r"is refused: it would run [\w.]+; only a pickle of plain lists") as error:
        load_plain_pickle(path)
    assert not mark.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [IDS_FILE, PASSAGES_PICKLE])
def test_a_hostile_file_in_the_folder_is_refused(pickled, tmp_path, name):
    folder, mark = tmp_path / "legacy", tmp_path / "mark"
    shutil.copytree(pickled, folder)
    (folder / name).write_bytes(pickle.dumps({"1": Runs(os.system, f"touch {mark}")}))
    with pytest.raises(UserError, match=rf"{name} is refused: it would run posix.system"):
        open_index(config(folder))
    assert not mark.exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(["1"] * 99)[:50], b"\x80\x04Pid\n."])
def test_bytes_that_are_no_pickle_are_refused(tmp_path, content):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(UserError, match=r"p is refused: .*; only a pickle of plain lists"):
        load_plain_pickle(tmp_path / "p")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_content_survives(tmp_path, protocol):
    content = {"1": ("text", "title"), 2: [1.5, None, True, b"x", {"a": ()}], "né": 10**20}
    if protocol < 3:
        content[2].remove(b"x")  # old protocols write bytes as a call
    (tmp_path / "p").write_bytes(pickle.dumps(content, protocol=protocol))
    assert load_plain_pickle(tmp_path / "p") == content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IDS_FILE, ["1", "two"], "holds other things than a list of passage ids"),
        (IDS_FILE, 5, "holds other things than a list of passage ids"),
        (IDS_FILE, ["99"] * ROWS, "names 1 passages, 99 first, that the file of passages lacks"),
        (PASSAGES_PICKLE, ["text"], "holds a list, not a dict of passages by their id"),
        (PASSAGES_PICKLE, {"1": "text"}, "holds other things than {id: "),
        (PASSAGES_PICKLE, {"wiki:1": ("text", "title")}, "holds other things than {id: "),
    ],
)
def test_plain_pickles_of_something_else_are_named(pickled, tmp_path, name, content, message):
    shutil.copytree(pickled, tmp_path / "legacy")
    (tmp_path / "legacy" / name).write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        open_index(config(tmp_path / "legacy"))


# --- Files ------------------------------------------------------------------------------------------------------------


def test_the_tsv_is_read_as_dpr_wrote_it(tmp_path):
    rows = 'id\ttext\ttitle\n1\t"He said ""no"".\tThen"\t"""Q"" film"\n3\tNA\tnull\n2\tplain "quotes"\t\n'
    (tmp_path / "p.tsv").write_text(rows, newline="")
    assert [tuple(row.values()) for row in read_dpr_tsv(tmp_path / "p.tsv")] == [
        (1, 'He said "no".\tThen', '"Q" film'), (3, "NA", "null"), (2, 'plain "quotes"', ""),
    ]  # fmt: skip


@pytest.mark.parametrize("line", ['2\t"open\ttitle\n', "2\ttext\n", "two\ttext\ttitle\n", '2\t"a"b\ttitle\n'])
def test_a_row_of_another_form_is_named(with_tsv, tmp_path, line):
    shutil.copytree(with_tsv, tmp_path / "legacy")
    (tmp_path / "legacy" / PASSAGES_TSV).write_text(f"id\ttext\ttitle\n1\ta\tb\n{line}", newline="")
    with pytest.raises(UserError, match=f"{PASSAGES_TSV} line 3 is not `number TAB text TAB title`"):
        open_index(config(tmp_path / "legacy"))


def test_what_a_folder_lacks_is_named(tmp_path):
    for folder in (None, tmp_path / "nowhere"):
        with pytest.raises(
            UserError, match=r"is not a folder; --index_name legacy needs one that holds .*psgs_w100\.tsv"
        ):
            open_index(config(folder))
    with pytest.raises(UserError) as error:
        open_index(config(tmp_path))
    assert all(name in str(error.value) for name in (INDEX_FILE, IDS_FILE, PASSAGES_TSV, PASSAGES_PICKLE))


def test_an_index_of_another_size_is_refused(pickled, tmp_path):
    shutil.copytree(pickled, tmp_path / "legacy")
    (tmp_path / "legacy" / IDS_FILE).write_bytes(pickle.dumps(["1", "2"]))
    with pytest.raises(UserError, match="holds 60 vectors, but there are 2 passages"):
        opened(tmp_path / "legacy")
    wrong = config(pickled)
    wrong.retrieval_vector_size = 8
    with pytest.raises(UserError, match="has dimension 16, but the question encoder gives 8"):
        open_index(wrong).init_index()
