"""wiki_dpr from a folder of exactly the hub's layout, and from an imitation of the hub itself."""

import http.server
import itertools
import json
import shutil
import threading
from collections import namedtuple
from pathlib import Path

import datasets
import faiss
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import DPRConfig, RagConfig
from transformers.models.rag.retrieval_rag import CustomHFIndex

import eval_rag
from rag import hub as rag_hub
from rag.errors import UserError
from rag.files import load_json
from rag.index.arguments import SearchArguments
from rag.index.sources import open_index
from rag.models.checkpoints import load_model, load_tokenizer, save_model
from rag.retrieval.retriever import RagKnowledgeRetriever
from tests.conftest import DIMENSION, assert_equal_but_for_rounding

ROWS, DUMMY_ROWS, SHARDS = 700, 40, 3
KINDS = {"HNSW128_SQ8": "HNSW16_SQ8", "IVF4096_HNSW128_PQ128": "IVF8_HNSW8,PQ8x4"}  # the name's, and ours: small
COMMIT = "84a0be19276747172479fc40bf0841530cc258f3"


def passages(rows: int) -> dict[str, list[str]]:
    numbers = range(1, rows + 1)  # the passages' ids begin at 1, the rows at 0
    return {
        "id": [f"{i}" for i in numbers],
        "text": [f"text {i}" for i in numbers],
        "title": [f"t{i}" for i in numbers],
    }


def vectors(encoding: str, rows: int = ROWS) -> np.ndarray:
    seed = {"nq": 0, "multiset": 1}[encoding]
    return np.random.default_rng(seed).standard_normal((rows, DIMENSION), dtype=np.float32)


def write_shards(folder: Path, rows: int, embeddings: np.ndarray | None, shards: int) -> None:
    folder.mkdir(parents=True)
    table = pa.table(passages(rows))
    if embeddings is not None:
        table = table.append_column("embeddings", pa.array(list(embeddings), type=pa.list_(pa.float32())))
    bounds = np.linspace(0, rows, shards + 1).astype(int)
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        pq.write_table(table.slice(start, end - start), folder / f"train-{i:05d}-of-{shards:05d}.parquet")


@pytest.fixture(scope="module")
def wiki(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wiki_dpr")
    data = folder / "data" / "psgs_w100"
    write_shards(data / "no_embeddings", ROWS, None, 2)
    write_shards(data / "dummy.no_embeddings", DUMMY_ROWS, None, 1)
    (folder / "index").mkdir()
    for encoding in ("nq", "multiset"):
        write_shards(data / encoding, ROWS, vectors(encoding), SHARDS)
        write_shards(data / f"dummy.{encoding}", DUMMY_ROWS, vectors(encoding)[:DUMMY_ROWS], 1)
        for name, factory in KINDS.items():
            index = faiss.index_factory(DIMENSION, factory, faiss.METRIC_INNER_PRODUCT)
            index.train(vectors(encoding))
            index.add(vectors(encoding))
            faiss.write_index(index, str(folder / "index" / f"psgs_w100.{encoding}.{name}-IP-train.faiss"))
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    rag_hub.hub_is_reachable.cache_clear()
    yield
    rag_hub.hub_is_reachable.cache_clear()


def config(dataset, index_name: str = "exact", encoder: str = "", **settings) -> RagConfig:
    made = RagConfig(
        question_encoder=DPRConfig().to_dict(), retrieval_vector_size=DIMENSION, dataset=str(dataset),
        index_name=index_name, **settings,
    )  # fmt: skip
    made.question_encoder._name_or_path = encoder
    return made


def opened(*args, **settings):
    index = open_index(config(*args, **settings))
    index.init_index()
    return index


def queries(count: int = 6) -> np.ndarray:
    return np.random.default_rng(9).standard_normal((count, DIMENSION), dtype=np.float32)


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


# --- Passages and vectors ---------------------------------------------------------------------------------------------


def test_exact_reads_texts_only_and_takes_the_vectors_from_the_index(wiki, tmp_path):
    texts_only = tmp_path / "wiki"
    shutil.copytree(wiki, texts_only, ignore=shutil.ignore_patterns("nq", "multiset", "dummy.*", "*PQ128*"))
    index = opened(texts_only)
    doc_ids, doc_embeds = index.get_top_docs(queries(), 5)
    file = texts_only / "index" / "psgs_w100.nq.HNSW128_SQ8-IP-train.faiss"
    expected = faiss.read_index(str(file)).search(queries(), 5)[1]
    np.testing.assert_array_equal(doc_ids, expected)
    np.testing.assert_allclose(doc_embeds, vectors("nq")[doc_ids], atol=8 / 255)
    assert doc_embeds.dtype == np.float32
    assert index.get_doc_dicts(np.array([[0, -1]])) == [{"id": ["1", ""], "title": ["t1", ""], "text": ["text 1", ""]}]
    assert index.passages.column_names == ["title", "text"] and is_mapped(file)
    assert not index.embeddings.gather(np.array([[-1]])).any()
    assert index.description() == {
        "kind": "IndexHNSWSQ", "passages": ROWS, "dimension": DIMENSION, "ef_search": 16, "vectors_from": "index",
    }  # fmt: skip


def test_compressed_gives_what_transformers_gave(wiki):
    index = opened(wiki, "compressed")
    shards = sorted(str(path) for path in (wiki / "data/psgs_w100/nq").iterdir())
    dataset = datasets.load_dataset("parquet", data_files={"train": shards}, split="train")
    file = wiki / "index" / "psgs_w100.nq.IVF4096_HNSW128_PQ128-IP-train.faiss"
    dataset.load_faiss_index("embeddings", str(file))
    theirs = CustomHFIndex(DIMENSION, dataset)
    for ours, their in zip(index.get_top_docs(queries(), 5), theirs.get_top_docs(queries(), 5), strict=True):
        np.testing.assert_array_equal(ours, their)
    ids = np.array([[3, 699], [5, 5]])
    assert index.get_doc_dicts(ids) == theirs.get_doc_dicts(ids)
    assert is_mapped(file) and index.description()["kind"] == "IndexIVFPQ"


def test_compressed_can_do_with_the_vectors_of_its_index(wiki):
    index = opened(wiki, "compressed", doc_vectors="index", nprobe=8)
    doc_ids, doc_embeds = index.get_top_docs(queries(), 5)
    scores = (queries()[:, None] * doc_embeds).sum(-1)
    assert_equal_but_for_rounding(scores, index.search(queries(), 5)[0])  # those that the search went by
    assert 0.1 < np.abs(doc_embeds - vectors("nq")[doc_ids]).mean() < 1  # and not those of the passages
    assert index.passages.column_names == ["title", "text"]


@pytest.mark.parametrize("index_name", ["exact", "compressed"])
def test_the_dummy_dataset_needs_no_index(wiki, tmp_path, index_name):
    dummy_only = tmp_path / "wiki"
    shutil.copytree(wiki, dummy_only, ignore=shutil.ignore_patterns("nq", "multiset", "no_embeddings", "index"))
    index = opened(dummy_only, index_name, use_dummy_dataset=True, dataset_encoding="multiset")
    known = vectors("multiset")[:DUMMY_ROWS]
    doc_ids, doc_embeds = index.get_top_docs(queries(), 5)
    np.testing.assert_array_equal(doc_ids, np.argsort(-queries() @ known.T, axis=1)[:, :5])
    np.testing.assert_array_equal(doc_embeds, known[doc_ids])
    assert index.description() == {"kind": "IndexFlatIP", "passages": DUMMY_ROWS, "dimension": DIMENSION}


def test_a_second_opening_copies_nothing(wiki, monkeypatch):
    opened(wiki)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    assert len(opened(wiki)) == ROWS


# --- Encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "chosen", "encoding", "warns"),
    [
        ("facebook/dpr-question_encoder-single-nq-base", None, "nq", False),
        ("facebook/dpr-question_encoder-multiset-base", None, "multiset", False),
        ("/models/multiset", "nq", "nq", True),
        ("/models/nq/encoder", "multiset", "multiset", False),  # the folder above says nothing
        ("", None, "nq", False),
    ],
)
def test_the_encoding_follows_the_question_encoder(wiki, caplog, encoder, chosen, encoding, warns):
    settings = {} if chosen is None else {"dataset_encoding": chosen}
    index = opened(wiki, "compressed", encoder, **settings)
    np.testing.assert_array_equal(index.embeddings.gather(np.arange(3)), vectors(encoding)[:3])
    assert ("is of the multiset pair, so that retrieval will suffer" in caplog.text) == warns


# --- Settings of the search -------------------------------------------------------------------------------------------


def test_search_effort_is_set_and_shown(wiki):
    assert opened(wiki, ef_search=77).description()["ef_search"] == 77
    settings = opened(wiki, "compressed", ef_search=33, nprobe=5).description()
    assert (settings["ef_search"], settings["nprobe"]) == (33, 5)


def test_effort_that_an_index_does_not_have_is_refused(wiki):
    with pytest.raises(UserError, match="--nprobe 3: an index of kind IndexHNSWSQ has no such setting; leave it out"):
        opened(wiki, nprobe=3)


# --- What is missing --------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset_split": "validation"}, "0 of any files data/psgs_w100/no_embeddings/validation-.*parquet are there"),
        ({"dataset_encoding": "bm25"}, "--dataset_encoding bm25 is neither of nq, multiset"),
        ({"doc_vectors": "gpu"}, "--doc_vectors gpu is neither of passages, index"),
        ({"index_name": "wiki"}, "--index_name wiki is none of custom, exact, compressed, legacy"),
        ({"dataset": "./nowhere"}, "--dataset ./nowhere is not a folder"),
        ({"retrieval_vector_size": 8, "index_name": "compressed"}, "dimension 16, but the question encoder gives 8"),
    ],
)
def test_what_is_wrong_is_named(wiki, settings, message):
    arguments = config(wiki)
    for name, value in settings.items():
        setattr(arguments, name, value)
    with pytest.raises(UserError, match=message):
        open_index(arguments)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("data/psgs_w100/no_embeddings/train-00001-of-00002.parquet", "1 of 2 files data/psgs_w100/no_embeddings"),
        ("index/psgs_w100.nq.HNSW128_SQ8-IP-train.faiss", "--dataset .*SQ8-IP-train.faiss does not exist; fetch it"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(wiki, tmp_path, lost, message):
    shutil.copytree(wiki, tmp_path / "wiki")
    (tmp_path / "wiki" / lost).unlink()
    with pytest.raises(UserError, match=message):
        open_index(config(tmp_path / "wiki"))


def test_settings_that_are_not_read_are_named(wiki, caplog):
    opened(wiki, index_path="left/over.faiss", dataset_revision="main")
    assert "--index_path left/over.faiss is not read: --index_name exact brings its own" in caplog.text
    assert "--dataset_revision main has no effect on the folder" in caplog.text


def test_a_copy_that_the_disk_cannot_hold_is_not_begun(wiki, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 10_000))
    size = sum(path.stat().st_size for path in (wiki / "data/psgs_w100/nq").iterdir())
    with pytest.raises(UserError, match=rf"{size:,} bytes are needed and 10,000 are free .* --doc_vectors index"):
        open_index(config(wiki, "compressed"))
    assert not list((tmp_path / "datasets").rglob("*.arrow"))


# --- The hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(wiki, monkeypatch):
    """A server that answers as the hub does, with the files of `wiki` as facebook/wiki_dpr; the paths it was asked."""
    files = {str(path.relative_to(wiki)): path for path in wiki.rglob("*") if path.is_file()}
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            api, resolve = "/api/datasets/facebook/wiki_dpr", f"/datasets/facebook/wiki_dpr/resolve/{COMMIT}/"
            if path == f"{api}/revision/main":
                self.answer(json.dumps({"id": "facebook/wiki_dpr", "sha": COMMIT, "siblings": []}).encode(), {})
            elif path == f"{api}/tree/{COMMIT}":
                tree = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": name}
                    for name, file in files.items()
                ]
                self.answer(json.dumps(tree).encode(), {"Content-Type": "application/json"})
            elif path.startswith(resolve) and (name := path.removeprefix(resolve)) in files:
                etag = f'"{name.replace("/", "-")}"'
                self.answer(files[name].read_bytes(), {"ETag": etag, "X-Repo-Commit": COMMIT})
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    yield asked
    server.shutdown()
    server.server_close()


def use_endpoint(monkeypatch, endpoint: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    rag_hub.hub_is_reachable.cache_clear()


def test_only_what_is_needed_is_fetched_and_once(hub, wiki, monkeypatch):
    index = opened("wiki_dpr")  # RagConfig's default name
    expected = opened(wiki).get_top_docs(queries(), 5)
    for ours, theirs in zip(index.get_top_docs(queries(), 5), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    fetched = sorted({line.rsplit("/", 1)[1] for line in hub if line.startswith("GET") and "resolve" in line})
    assert fetched == ["psgs_w100.nq.HNSW128_SQ8-IP-train.faiss", *(f"train-0000{i}-of-00002.parquet" for i in (0, 1))]

    hub.clear()
    assert len(opened("facebook/wiki_dpr")) == ROWS
    assert not any("resolve" in line for line in hub)

    use_endpoint(monkeypatch, "http://127.0.0.1:9")  # nobody listens, and a proxy hides it
    monkeypatch.setattr(rag_hub.urllib.request, "getproxies", lambda: {"http": "proxy"})
    assert len(opened("wiki_dpr")) == ROWS

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    rag_hub.hub_is_reachable.cache_clear()
    assert len(opened("wiki_dpr")) == ROWS
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set, and the cache .* does not hold all of its files"):
        open_index(config("wiki_dpr", "compressed"))


def test_a_disk_too_small_is_noticed_before_anything_is_fetched(hub, wiki, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 20_000))
    texts = sum(path.stat().st_size for path in (wiki / "data/psgs_w100/no_embeddings").iterdir())
    index = (wiki / "index/psgs_w100.nq.HNSW128_SQ8-IP-train.faiss").stat().st_size
    needed = f"{index + texts + 2 * texts:,}"  # fetched, and unpacked
    with pytest.raises(UserError, match=f"--dataset facebook/wiki_dpr: {needed} bytes are needed and 20,000 are free"):
        open_index(config("wiki_dpr"))
    assert not any(line.startswith("GET") and "resolve" in line for line in hub)


def test_an_unknown_dataset_is_one_line(hub):
    with pytest.raises(UserError, match=r"--dataset someone/else: the hub answers .*404") as error:
        open_index(config("someone/else"))
    assert "\n" not in str(error.value)


def test_without_network_and_cache_one_line_says_so(monkeypatch):
    use_endpoint(monkeypatch, "http://127.0.0.1:9")  # nobody listens
    with pytest.raises(UserError, match="the hub cannot be reached, and the cache") as error:
        open_index(config("wiki_dpr"))
    assert "\n" not in str(error.value) and "--index_name custom" in str(error.value)


# --- From a checkpoint and from the command line ----------------------------------------------------------------------


def test_a_retriever_and_a_checkpoint_take_the_settings(wiki, checkpoint, tmp_path):
    chosen = {"index_name": "exact", "dataset": str(wiki), "dataset_encoding": "multiset", "ef_search": 50}
    model = load_model(str(checkpoint()), prepare_config=SearchArguments(**chosen).apply_to)
    save_model(model, tmp_path / "saved", load_tokenizer(str(checkpoint())))
    for path, settings in ((checkpoint(), chosen), (tmp_path / "saved", {})):
        index = RagKnowledgeRetriever.from_pretrained(path, **settings).index
        assert index.description()["ef_search"] == 50
        np.testing.assert_allclose(index.embeddings.gather(np.arange(9)), vectors("multiset")[:9], atol=8 / 255)


def test_evaluation_over_wikipedia(wiki, checkpoint, tmp_path, capsys):
    (tmp_path / "questions").write_text("what is the capital of france\nwho lives in rome\n")
    (tmp_path / "titles").write_text("t1\nt2\tt3\n")
    argv = f"""--model_name_or_path {checkpoint()} --eval_mode retrieval --evaluation_set {tmp_path / "questions"}
    --gold_data_path {tmp_path / "titles"} --predictions_path {tmp_path / "found"} --k {ROWS} --dataset {wiki}"""

    def evaluate(*flags: str) -> float:
        return eval_rag.main(eval_rag.parse_args([*argv.split(), *flags]))[f"precision_at_{ROWS}"]

    # A search that keeps all finds all: three gold titles for two questions.
    assert evaluate("--index_name", "exact", "--ef_search", f"{ROWS}") == pytest.approx(1.5 / ROWS)
    assert f" ef_search {ROWS}, n_docs " in capsys.readouterr().out
    assert load_json(tmp_path / "found.scores.json")["settings"]["dataset"] == str(wiki)
    with pytest.raises(UserError, match=f"was made with ef_search {ROWS}"):
        evaluate("--index_name", "exact")
    compressed = ("--index_name", "compressed", "--nprobe", "8", "--recalculate")
    assert evaluate(*compressed) == pytest.approx(1.5 / ROWS)
    assert " nprobe 8, n_docs " in capsys.readouterr().out
    assert evaluate("--index_name", "exact", "--use_dummy_dataset", "--recalculate") == pytest.approx(1.5 / ROWS)
