"""Every passage gets its own vector, in its own row, whatever was killed in between."""

import collections
import copy
import json
import shutil

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from tokenizers.processors import TemplateProcessing
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, BertTokenizerFast

from rag.errors import UserError
from rag.index.columns import EmbeddingColumn
from rag.knowledge import embedding, shards
from rag.knowledge.embedding import Coming, PassageEmbedder, embed
from rag.knowledge.shards import JOURNAL, ShardPlan, digest_of, partial_folder, publish, shard_checksums, write_dataset
from rag.models.encoders import load_encoder
from rag.models.pooled_encoder import PooledEncoder, PooledEncoderConfig
from tests.conftest import DIMENSION, PASSAGES


@pytest.fixture(scope="module")
def passages():
    """Forty passages of very different lengths."""
    return [(title, " ".join([text] * (1 + i % 3))) for i, (title, text) in enumerate(PASSAGES * 5)]


@pytest.fixture
def embedder(context_encoder_folder, bert_tokenizer):
    """With its sums in float64, so that what padding and batch change of the rounding does not reach the vectors."""
    embedder = PassageEmbedder(load_encoder(str(context_encoder_folder), "context"), bert_tokenizer, batch_size=4)
    embedder.encoder.double()
    return embedder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "PASSAGES_PER_SHARD", 7)


def one_by_one(embedder, passages):
    """What the encoder gives for each passage alone, without padding."""
    vectors = []
    for title, text in passages:
        words = (title, text) if embedder.reader.as_pair else (f"{title} {text}",)
        tokens = embedder.reader.tokenizer(*words, truncation=True, max_length=embedder.max_length, return_tensors="pt")
        with torch.no_grad():
            vectors.append(embedder.encoder(**tokens)[0][0].numpy())
    return np.stack(vectors)


def assert_float32_of(vectors, expected):
    """Vectors float32 are those that were computed in float64, but for the last bit."""
    assert vectors.dtype == np.float32 and expected.dtype == np.float64
    np.testing.assert_allclose(vectors, expected, rtol=2**-23, atol=1e-10)


def test_a_batch_of_documents_is_embedded_in_its_order(embedder, bert_tokenizer, context_encoder_folder, passages):
    titles, texts = map(list, zip(*passages[:9], strict=True))
    encoder = load_encoder(str(context_encoder_folder), "context")
    found = embed({"title": titles, "text": texts}, encoder, bert_tokenizer)
    np.testing.assert_allclose(found["embeddings"], one_by_one(embedder, passages[:9]), rtol=1e-4, atol=1e-5)
    assert found["embeddings"].dtype == np.float32 and encoder.dtype == torch.float32
    assert embed({"title": [], "text": []}, encoder, bert_tokenizer)["embeddings"].shape == (0, DIMENSION)


def test_rows_are_in_order_and_do_not_depend_on_their_batch(embedder, passages, small_shards, tmp_path):
    write_dataset(iter(passages), embedder, tmp_path / "out", "digest", ShardPlan(len(passages)))
    dataset = load_from_disk(str(tmp_path / "out"))
    assert dataset.column_names == ["title", "text", "embeddings"]
    assert dataset.features["embeddings"].length == DIMENSION
    assert list(zip(dataset["title"], dataset["text"], strict=True)) == passages
    vectors = np.array(dataset["embeddings"], dtype=np.float32)
    assert_float32_of(vectors, one_by_one(embedder, passages))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"data-{i:05d}-of-00006.arrow" for i in range(6)] + ["dataset_info.json", "state.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert digest_of(tmp_path / "out") == "digest"


def test_batches_hold_texts_of_like_length(embedder, passages):
    encode, batches = embedder._encode, []
    embedder._encode = lambda batch: batches.append(batch) or encode(batch)
    rows = np.concatenate([rows for rows, _ in embedder(passages)])
    assert sorted(rows) == list(range(len(passages)))
    tokens = sum(len(ids) for ids in embedder.reader.tokenizer(*map(list, zip(*passages, strict=True)))["input_ids"])
    assert tokens == sum(batch.lengths.sum() for batch in batches)
    assert tokens / sum(batch.inputs["input_ids"].numel() for batch in batches) > 0.9
    assert max(len(batch.rows) for batch in batches) == 4


SIZES = {
    "one by one": {"batch_size": 1},
    "seven": {"batch_size": 7},
    "few tokens": {"tokens_per_batch": 30},
    "many tokens": {"tokens_per_batch": 10_000},
    "both": {"tokens_per_batch": 100, "batch_size": 3},
    "as the machine has room": {},
}


@pytest.mark.parametrize("beside", [False, True], ids=["in turn", "beside the device"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("size", SIZES)
def test_vectors_do_not_depend_on_how_they_are_made(embedder, passages, monkeypatch, size, packed, beside):
    """What a GPU does, in a CPU's plain form: the same rows in the same order, the same vectors."""
    monkeypatch.setattr(embedding, "PIECE", 9)
    monkeypatch.setattr(embedding, "FIRST_PIECE", 3)
    expected = one_by_one(embedder, passages)
    other = PassageEmbedder(embedder.encoder, embedder.reader.tokenizer, packed=packed, **SIZES[size])
    other.encoder.double()
    assert other.packed == packed and not other.pieces_ahead and not other.batches_behind
    if beside:
        other.pieces_ahead, other.batches_behind = embedding.PIECES_AHEAD, embedding.BATCHES_BEHIND
    vectors, order = np.empty((len(passages), DIMENSION), dtype=np.float32), []
    for rows, found in other(passages):
        vectors[rows] = found
        order += rows.tolist()
    assert_float32_of(vectors, expected)
    first = 3 if packed and beside else 0  # which leaves the rows of the other pieces where they would be
    pieces = [(row - first) // 9 for row in order[first:]]
    assert sorted(order[:first]) == list(range(first)) and pieces == sorted(pieces)
    written = {}
    shards_of = {"a": passages[:11], "b": passages[11:12], "c": passages[12:]}
    counts = list(other.embed_shards(shards_of.items(), lambda path, shard, found: written.update({path: found})))
    assert sum(counts) == len(passages) and list(written) == ["a", "b", "c"]
    assert_float32_of(np.concatenate(list(written.values())), expected)


READS = ("_local_scalar_dense", "item", "is_nonzero", "equal")  # operators that wait for a number


class Counter(TorchDispatchMode):
    """Counts the operators that are called, by their names."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[str(function).removeprefix("aten.").split(".")[0]] += 1
        return function(*args, **kwargs or {})


def counted(embedder, passages) -> tuple[collections.Counter, list]:
    """The operators that embedding takes, and the batches."""
    encode, batches = embedder._encode, []
    embedder._encode = lambda batch: batches.append(batch) or encode(batch)
    with Counter() as counter:
        assert sum(len(rows) for rows, _ in embedder(passages)) == len(passages)
    return counter.calls, batches


def test_operators_of_packed_passages(context_encoder_folder, bert_tokenizer, passages):
    """On a GPU each is a kernel that Python launches, and a read of a number would wait for all before it."""
    many = passages * 8
    calls, batches = {}, {}
    for name, sizes in {
        "padded, sixteen passages": {"batch_size": 16, "packed": False},
        "packed, all that a GPU has room for": {"tokens_per_batch": 8192},
    }.items():
        encoder = load_encoder(str(context_encoder_folder), "context")
        calls[name], batches[name] = counted(PassageEmbedder(encoder, bert_tokenizer, **sizes), many)
    padded, packed = calls
    encoded = {name: sum(batch.inputs["input_ids"].numel() for batch in batches[name]) for name in calls}
    tokens = sum(batch.lengths.sum() for batch in batches[padded])
    assert encoded[packed] == tokens < encoded[padded]
    reads = {name: sum(calls[name][operator] for operator in READS) for name in calls}
    assert reads[packed] == 0 < reads[padded]  # transformers looks whether there is padding
    assert calls[packed].total() < calls[padded].total() / 4


@pytest.mark.cuda
def test_a_gpu_gives_the_vectors_of_a_cpu(context_encoder_folder, bert_tokenizer, passages):
    def embedder(**more):
        return PassageEmbedder(load_encoder(str(context_encoder_folder), "context"), bert_tokenizer, **more)

    def vectors(one):
        found = np.empty((len(passages), DIMENSION), dtype=np.float32)
        for rows, batch in one(passages):
            found[rows] = batch
        return found

    exact = vectors(embedder(device="cpu", precision=torch.float32))
    for more in ({}, {"packed": False}, {"tokens_per_batch": 50}, {"precision": torch.bfloat16}):
        one = embedder(**more)
        assert one.device.type == "cuda" and one.pieces_ahead
        epsilon = torch.finfo(one.precision).eps
        np.testing.assert_allclose(vectors(one), exact, rtol=0, atol=20 * epsilon * np.abs(exact).max())


@pytest.mark.cuda
def test_a_gpu_is_not_waited_for(context_encoder_folder, bert_tokenizer, passages):
    encoder = load_encoder(str(context_encoder_folder), "context")
    embedder = PassageEmbedder(encoder, bert_tokenizer, tokens_per_batch=100)
    assert embedder.packed
    list(embedder(passages))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        calls, batches = counted(embedder, passages)
    assert not any(calls[operator] for operator in READS)
    copies = sum(event.count for event in profile.key_averages() if event.key.startswith("Memcpy DtoH"))
    assert copies == len(batches) > 5


def test_a_text_without_a_token_has_its_own_vector(embedder):
    """Of a tokenizer that adds no tokens: nothing in a row stands for it."""
    tokenizer = copy.deepcopy(embedder.reader.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    vectors = {}
    for packed in (False, True):
        other = PassageEmbedder(embedder.encoder, tokenizer, packed=packed)
        other.encoder.double()
        ((rows, found),) = other([("oslo", "the city"), ("", ""), ("rome", "")])
        vectors[packed] = found[np.argsort(rows)]
    np.testing.assert_array_equal(vectors[True], vectors[False])


def test_a_batch_that_does_not_fit_is_told(embedder, monkeypatch, passages):
    def full(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for more, flag in (({"batch_size": 4}, "--batch_size 4"), ({"tokens_per_batch": 99}, "--tokens_per_batch 99")):
        other = PassageEmbedder(embedder.encoder, embedder.reader.tokenizer, **more)
        monkeypatch.setattr(other, "_vectors", full)
        with pytest.raises(UserError, match=f"{flag}: the GPU has no room for such a batch; give less"):
            list(other(passages))


def test_title_and_text_are_of_one_token_type(embedder, passages, bert_tokenizer, tmp_path):
    expected = np.concatenate([vectors for _, vectors in embedder(passages)])
    bert_tokenizer.save_pretrained(tmp_path)
    embedder.reader.tokenizer = BertTokenizerFast.from_pretrained(
        tmp_path, model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
    assert max(embedder.reader.tokenizer(*passages[0])["token_type_ids"]) == 1
    np.testing.assert_array_equal(np.concatenate([vectors for _, vectors in embedder(passages)]), expected)


def test_a_killed_run_goes_on(embedder, passages, small_shards, tmp_path):
    encode, encoded = embedder._encode, []

    def killed(batch):
        encoded.append(len(batch.rows))
        if sum(encoded) > 20:
            raise KeyboardInterrupt
        return encode(batch)

    embedder._encode = killed
    with pytest.raises(KeyboardInterrupt):
        write_dataset(iter(passages), embedder, tmp_path / "out", "digest", ShardPlan(len(passages)))
    assert not (tmp_path / "out").exists()
    partial = partial_folder(tmp_path / "out", "digest")
    kept = {path.name: path.stat().st_mtime_ns for path in partial.iterdir()}
    assert len(kept.keys() - {JOURNAL}) == 2  # of 7 passages each; the third was cut off

    # A run with other settings takes nothing of it.
    embedder._encode = encode
    write_dataset(iter(passages[:3]), embedder, tmp_path / "other", "other digest", ShardPlan(3))
    assert {path.name: path.stat().st_mtime_ns for path in partial.iterdir()} == kept

    again = []
    embedder._encode = lambda batch: again.append(len(batch.rows)) or encode(batch)
    write_dataset(iter(passages), embedder, tmp_path / "out", "digest", ShardPlan(len(passages)))
    assert sum(again) == len(passages) - 14
    vectors = np.array(load_from_disk(str(tmp_path / "out"))["embeddings"], dtype=np.float32)
    assert_float32_of(vectors, one_by_one(embedder, passages))


def test_many_passages_make_few_shards(embedder, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PASSAGES_PER_SHARD", 2)
    monkeypatch.setattr(shards, "MOST_SHARDS", 3)
    write_dataset(iter(PASSAGES), embedder, tmp_path / "out", "digest", ShardPlan(len(PASSAGES)))
    state = json.loads((tmp_path / "out" / "state.json").read_text())
    assert len(state["_data_files"]) == 3
    assert len(load_from_disk(str(tmp_path / "out"))) == len(PASSAGES)


def test_sentence_encoders_read_title_and_text_as_one(bert_tokenizer, passages):
    torch.manual_seed(0)
    sizes = {"hidden_size": DIMENSION, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=len(bert_tokenizer), max_position_embeddings=32, **sizes))
    encoder = PooledEncoder(PooledEncoderConfig(backbone=bert.config), bert).eval()
    embedder = PassageEmbedder(encoder, bert_tokenizer, batch_size=8)
    encoder.double()
    assert not embedder.reader.as_pair and embedder.max_length == 32
    vectors = np.empty((len(passages), DIMENSION), dtype=np.float32)
    for rows, batch in embedder(passages):
        vectors[rows] = batch
    assert_float32_of(vectors, one_by_one(embedder, passages))
    long = sum(len(bert_tokenizer(f"{title} {text}")["input_ids"]) >= 32 for title, text in passages)
    assert embedder.cut == long > 0


def test_no_passage_is_lost_to_an_odd_count(embedder, small_shards, tmp_path):
    for count in (1, 7, 8):
        write_dataset(iter(PASSAGES[:count]), embedder, tmp_path / str(count), "digest", ShardPlan(count))
        assert len(load_from_disk(str(tmp_path / str(count)))) == count


def test_a_number_of_shards_and_half_precision(embedder, passages, tmp_path):
    plan = ShardPlan(len(passages), num_shards=3, dtype="float16")
    write_dataset(iter(passages), embedder, tmp_path / "out", "digest", plan)
    dataset = load_from_disk(str(tmp_path / "out"))
    assert dataset.features["embeddings"].feature.dtype == "float16"
    assert [len(chunk) for chunk in dataset.data.column("embeddings").chunks] == [14, 14, 12]
    vectors = EmbeddingColumn(dataset.data.column("embeddings"), DIMENSION).gather(np.arange(len(passages)))
    assert vectors.dtype == np.float32
    # Half precision rounds by 2**-11 of a value, and by 2**-25 at least.
    np.testing.assert_allclose(vectors, one_by_one(embedder, passages), rtol=2**-10.9, atol=2**-24)
    embedder._encode = lambda batch: Coming(torch.full((len(batch.rows), DIMENSION), 7e4), None)
    with pytest.raises(UserError, match="--half_precision: a vector holds 70000"):
        write_dataset(iter(passages), embedder, tmp_path / "large", "digest", plan)


def test_shards_of_another_cut_are_not_part_of_the_dataset(embedder, passages, tmp_path):
    partial = partial_folder(tmp_path / "out", "digest")
    partial.mkdir()
    (partial / "data-00000-of-00002.arrow").write_bytes(b"of a run with two shards")
    write_dataset(iter(passages), embedder, tmp_path / "out", "digest", ShardPlan(len(passages), num_shards=4))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.arrow")) == [
        f"data-{i:05d}-of-00004.arrow" for i in range(4)
    ]


def test_a_killed_run_with_another_number_of_shards_is_gone_on_with(embedder, passages, tmp_path):
    """Both make two files of the same names; what does not fit is embedded again."""
    plan = ShardPlan(len(passages), num_shards=2)
    partial = partial_folder(tmp_path / "out", "digest")
    write_dataset(iter(passages[:5]), embedder, tmp_path / "five", "other", ShardPlan(5, num_shards=1))
    partial.mkdir(parents=True)
    shutil.copy(tmp_path / "five" / "data-00000-of-00001.arrow", partial / plan.names()[0])
    write_dataset(iter(passages), embedder, tmp_path / "out", "digest", plan)
    assert load_from_disk(str(tmp_path / "out"))["text"] == [text for _, text in passages]


def test_what_others_keep_beside_the_dataset_stays(embedder, passages, tmp_path):
    folder = tmp_path / "out"
    write_dataset(iter(passages[:5]), embedder, folder, "digest", ShardPlan(5))
    (folder / "NOTES.md").write_text("mine")
    (folder / ".ipynb_checkpoints").mkdir()
    publish(folder, shard_checksums(folder), "digest")
    assert (folder / "NOTES.md").exists() and len(load_from_disk(str(folder))) == 5
