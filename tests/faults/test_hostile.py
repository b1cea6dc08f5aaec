"""Files of an enemy: nothing in them is run, no process dies of them, none takes all memory or all time."""

import gzip
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.faults.makers import Copy, File, Index, Maker, Of, apply, settings
from tests.faults.processes import left_behind, run, tree

pytestmark = pytest.mark.faults
EVAL, FINETUNE, KNOWLEDGE = "eval_rag.py", "finetune_rag.py", "use_own_knowledge_dataset.py"
CONSOLIDATE, PARSE = "consolidate_rag_checkpoint.py", "parse_dpr_relevance_data.py"
LARGEST = 2 << 30  # bytes that a run may take at its peak
ESCAPE = "\x1b]0;PWNED\x07\x1b[2J"
ENDLESS = {"type": "Replace", "pattern": {"Regex": "([a-z ]+)+[0-9]$"}, "content": ""}
EVIL = "open('PWNED', 'w').write('run')"
YAML = f'a: !!python/object/apply:exec ["{EVIL}"]'


class Evil:
    def __reduce__(self):
        return exec, (EVIL,)


PICKLE = pickle.dumps(Evil())


def torch_file(world: Path, folder: Path) -> Path:
    """What `torch.save` makes of an object that runs something when it is unpickled."""
    import torch

    path = folder / "evil.ckpt"
    torch.save({"state_dict": Evil(), "hyper_parameters": {}}, path)
    return path


def lightning_file(version: str | None = None) -> Of:
    """A Lightning checkpoint of plain data, which is that of no run."""

    def make(world: Path, folder: Path) -> Path:
        import torch

        content = {"state_dict": {ESCAPE: torch.zeros(1).expand(10**12)}, "hyper_parameters": {}, "loops": [ESCAPE]}
        content |= {"optimizer_states": ESCAPE, "lr_schedulers": 7, "callbacks": [], "epoch": -1, "global_step": -1}
        torch.save(content | ({} if version is None else {"pytorch-lightning_version": version}), folder / "x.ckpt")
        return folder / "x.ckpt"

    return Of(make)


def with_code(source: str, where: str = "AutoConfig", known: bool = False) -> Copy:
    """A checkpoint whose config asks for code beside it."""
    names = {"auto_map": {where: "evil.C"}} | ({} if known else {"model_type": "evil"})
    return Copy(source, {"config.json": settings(**names)})


def with_pickle(source: str) -> Of:
    """A checkpoint whose weights are a pickle."""

    def make(world: Path, folder: Path) -> Path:
        path = folder / source
        shutil.copytree(world / source, path)
        (path / "model.safetensors").unlink()
        for name in ("pytorch_model.bin", "model.bin", "model.pt"):
            torch_file(world, folder).rename(path / name)
        return path

    return Of(make)


def bomb(line: bytes, times: int, name: str) -> Of:
    """A small compressed file of many equal pieces."""

    def make(world: Path, folder: Path) -> Path:
        with gzip.open(folder / name, "wb", compresslevel=1) as file:
            for _ in range(times):
                file.write(line)
        return folder / name

    return Of(make)


def parquet_bomb(world: Path, folder: Path) -> Path:
    """A Parquet file of some kilobytes whose texts would take gigabytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000_000, pa.int32()), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"text": text}), folder / "x.parquet", row_group_size=2_000_000)
    return folder / "x.parquet"


def elsewhere(name: str) -> Of:
    """A knowledge folder whose index.json names an index outside it."""

    def make(world: Path, folder: Path) -> Path:
        shutil.copytree(world / "passages", folder / "out" / "my_knowledge_dataset")
        victim = folder / "victim"
        victim.mkdir()
        shutil.copy(world / "index.faiss", victim / "x.faiss")
        (folder / "out" / "index.json").write_text(
            json.dumps({"index": name.replace("{victim}", str(victim)), "parts": [{}]})
        )
        return world / "documents.tsv"

    return Of(make)


def random_bytes(source: str, seed: int):
    """A copy of a file or folder of the world with five random bytes changed."""

    def make(world: Path, folder: Path) -> Path:
        draw, path = random.Random(seed), folder / source
        (shutil.copytree if (world / source).is_dir() else shutil.copy)(world / source, path)
        file = next(path.glob("data-*.arrow")) if path.is_dir() else path

        def change(old: bytes) -> bytes:
            new = bytearray(old)
            for _ in range(5):
                new[draw.randrange(len(new))] = draw.randrange(256)
            return bytes(new)

        apply(change, file, file)
        return path

    return Of(make)


def leading_out(files: str) -> Of:
    """A checkpoint of which the list of files names others than its own."""

    def make(world: Path, folder: Path) -> Path:
        shutil.copytree(world / "rag", folder / "rag")
        (folder / "rag" / "model.safetensors").rename(folder / "outside.safetensors")
        with safe_open(folder / "outside.safetensors", "pt") as weights:
            names = dict.fromkeys(weights.keys(), files.replace("{folder}", str(folder)))
        (folder / "rag" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        return folder / "rag"

    return Of(make)


def texts_elsewhere(world: Path, folder: Path) -> Path:
    """Saved passages of which a text is said to lie gigabytes behind the file."""
    import pyarrow as pa

    shutil.copytree(world / "passages", folder / "passages")
    places = pa.array([0, 5, 10, 2**31 - 1, -7, 3, 2, 1, 40], pa.int32()).buffers()[1]
    texts = pa.StringArray.from_buffers(8, places, pa.py_buffer(b"x" * 40))
    (file,) = (folder / "passages").glob("*.arrow")
    rows = pa.record_batch({"text": texts, "title": ["title"] * 8})
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, rows.schema) as stream:
        stream.write_batch(rows)
    (folder / "passages" / "dataset_info.json").write_text("{}")
    return folder / "passages"


def special(source: str, name: str, kind: str = "fifo") -> Of:
    """A copy of a folder of the world in which one file is a pipe, or a link to something else."""

    def make(world: Path, folder: Path) -> Path:
        path = folder / source
        shutil.copytree(world / source, path)
        (path / name).unlink(missing_ok=True)
        os.mkfifo(path / name) if kind == "fifo" else (path / name).symlink_to(kind)
        return path

    return Of(make)


def linked(name: str) -> Of:
    """What the output's files would be, one of them a link to a file elsewhere; the value is of no account."""

    def make(world: Path, folder: Path) -> int:
        (folder / "out").mkdir()
        (folder / "victim").write_text("{}")
        (folder / "out" / name).symlink_to(folder / "victim")
        return 2

    return Of(make)


def huge(source: str, name: str) -> Of:
    """A copy of a folder of the world in which one file has a terabyte, none of which is on the disk."""

    def make(world: Path, folder: Path) -> Path:
        shutil.copytree(world / source, folder / source)
        with open(folder / source / name, "a") as file:
            file.truncate(1 << 40)
        return folder / source

    return Of(make)


def without_blocks(build: str, **changes: int) -> Index:
    """An index of 4-bit codes that says it holds more of them than it does."""

    def make(faiss, vectors):
        index = faiss.index_factory(vectors.shape[1], build, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors.repeat(9, axis=0))
        index.add(vectors)
        for name, value in changes.items():
            setattr(index, name, value)
        return index

    return Index(make)


def deep(layers: int):
    """A RAG config whose generator has so many layers."""

    def change(old: bytes) -> bytes:
        config = json.loads(old)
        config["generator"] |= {"encoder_layers": layers, "decoder_layers": layers}
        return json.dumps(config).encode()

    return change


HERE = {"--passages_path": "{world}/passages", "--index_path": "{world}/index.faiss"}
ROWS = {
    "pickled weights, eval": (EVAL, {"--model_name_or_path": with_pickle("rag")}),
    "pickled weights, finetune": (FINETUNE, {"--model_name_or_path": with_pickle("rag")}),
    "pickled weights, encoder": (KNOWLEDGE, {"--dpr_ctx_encoder_model_name": with_pickle("context_encoder")}),
    "pickled weights, generator": (CONSOLIDATE, {"--generator_name_or_path": with_pickle("generator")}),
    "pickled checkpoint": (FINETUNE, {"--resume_from_checkpoint": Of(torch_file)}),
    "a pickle as checkpoint": (FINETUNE, {"--resume_from_checkpoint": File(PICKLE)}),
    "a pickle as last.ckpt": (FINETUNE, {"--n_val": Of(lambda w, f: _placed(torch_file(w, f), f / "out/last.ckpt"))}),
    "a checkpoint without a version": (FINETUNE, {"--resume_from_checkpoint": lightning_file()}),
    "a checkpoint of a later version": (FINETUNE, {"--resume_from_checkpoint": lightning_file("99.0.0")}),
    "a checkpoint of weights that no model has": (FINETUNE, {"--resume_from_checkpoint": lightning_file("2.0.0")}),
    "a pickle as index": (EVAL, HERE | {"--index_path": File(PICKLE)}),
    "code beside the config": (EVAL, {"--model_name_or_path": with_code("rag")}),
    "code beside the model": (EVAL, {"--model_name_or_path": with_code("rag", "AutoModel", known=True)}),
    "code beside the encoder": (KNOWLEDGE, {"--dpr_ctx_encoder_model_name": with_code("context_encoder")}),
    "code beside the generator": (CONSOLIDATE, {"--generator_name_or_path": with_code("generator")}),
    "code beside a tokenizer": (EVAL, {"--model_name_or_path": Copy("rag", {"*/tokenizer_config.json": settings(
        tokenizer_class="C", auto_map={"AutoTokenizer": ["evil.C", "evil.C"]})})}),
    "code beside the encoder's tokenizer": (KNOWLEDGE, {"--dpr_ctx_encoder_model_name": Copy(
        "context_encoder", {"tokenizer_config.json": settings(auto_map={"AutoTokenizer": ["evil.C", "evil.C"]})})}),
    "passages elsewhere": (EVAL, HERE | {"--passages_path": Copy("passages", {"state.json": settings(
        _data_files=[{"filename": "../../world/passages/data-00000-of-00001.arrow"}])})}),
    "passages by a full path": (EVAL, HERE | {"--passages_path": Copy("passages", {"state.json": settings(
        _data_files=[{"filename": "/etc/passwd"}])})}),
    "passages from a pipe": (EVAL, HERE | {"--passages_path": special("passages", "data-00000-of-00001.arrow")}),
    "documents elsewhere": (KNOWLEDGE, {"--csv_path": Copy("passages", {"state.json": settings(
        _data_files=[{"filename": "../../world/passages/data-00000-of-00001.arrow"}])})}),
    "documents from a pipe": (KNOWLEDGE, {"--csv_path": special("passages", "data-00000-of-00001.arrow")}),
    "texts of no place, BM25": (EVAL, {"--index_name": "bm25", "--passages_path": Of(texts_elsewhere)}),
    "texts of no place, documents": (KNOWLEDGE, {"--csv_path": Of(texts_elsewhere)}),
    "documents with vectors of no length": (KNOWLEDGE, {"--csv_path": Copy("passages", {"dataset_info.json": settings(
        features={name: {"_type": "Value", "dtype": "string"} for name in ("title", "text")} | {"embeddings": {
            "_type": "List", "feature": {"_type": "Value", "dtype": "float32"}, "length": 10**15}})})}),
    "weights elsewhere": (EVAL, {"--model_name_or_path": leading_out("../outside.safetensors")}),
    "weights by a full path": (FINETUNE, {"--model_name_or_path": leading_out("{folder}/outside.safetensors")}),
    "weights from a device": (EVAL, {"--model_name_or_path": leading_out("/dev/zero")}),
    "weights from a pipe": (EVAL, {"--model_name_or_path": special("rag", "model.safetensors")}),
    "a config from a pipe": (CONSOLIDATE, {"--generator_name_or_path": special("generator", "config.json")}),
    "a tokenizer from a device": (KNOWLEDGE, {"--dpr_ctx_encoder_model_name": special(
        "context_encoder", "tokenizer.json", "/dev/zero")}),
    "a config of a terabyte": (EVAL, {"--model_name_or_path": huge("rag", "config.json")}),
    "a tokenizer of a terabyte": (CONSOLIDATE, {"--generator_name_or_path": huge("generator", "tokenizer.json")}),
    "passages' state of a terabyte": (EVAL, HERE | {"--passages_path": huge("passages", "state.json")}),
    "settings that are a link": (EVAL, {"--n_docs": linked("p.txt.settings.json")}),
    "scores that are a link": (EVAL, {"--n_docs": linked("p.txt.scores.json")}),
    "a lock that is a link, eval": (EVAL, {"--n_docs": linked(".p.txt.lock")}),
    "a lock that is a link, finetune": (FINETUNE, {"--n_docs": linked(".lock")}),
    "a run's log that is a link": (FINETUNE, {"--n_docs": linked("training_log.jsonl")}),
    "a description that is a link": (KNOWLEDGE, {"--n_docs": linked("index.json")}),
    "codes beyond an index": (EVAL, HERE | {"--index_path": without_blocks("PQ2x4fs", ntotal2=1 << 40)}),
    "blocks of no size": (EVAL, HERE | {"--index_path": without_blocks("PQ2x4fs", bbs=0)}),
    "codes of more parts": (EVAL, HERE | {"--index_path": without_blocks("PQ2x4fs", M2=1 << 30)}),
    "an escape code as a setting": (EVAL, {"--model_name_or_path": Copy("rag", {"config.json": settings(
        index_name=ESCAPE)})}),
    "half a surrogate pair as a setting": (EVAL, {"--model_name_or_path": Copy("rag", {"config.json": settings(
        doc_sep="\ud800")})}),
    "a name too long as a setting": (EVAL, {"--model_name_or_path": Copy("rag", {"config.json": settings(
        index_path="x" * 10**5, passages_path="y" * 10**5)})}),
    "a first token beyond the words": (EVAL, {"--model_name_or_path": Copy("rag", {"generation_config.json": settings(
        decoder_start_token_id=10**9)})}),
    "a forced token beyond the words": (FINETUNE, {"--model_name_or_path": Copy("rag", {
        "generation_config.json": settings(forced_bos_token_id=10**9)})}),
    "a penalty without measure": (EVAL, {"--model_name_or_path": Copy("rag", {"generation_config.json": settings(
        length_penalty=1e308)})}),
    "a tokenizer that makes texts long": (EVAL, {"--model_name_or_path": Copy("rag", {
        "generator_tokenizer/tokenizer.json": settings(normalizer={"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 9})})}),
    "a million added tokens": (KNOWLEDGE, {"--dpr_ctx_encoder_model_name": Copy("context_encoder", {
        "tokenizer.json": settings(added_tokens=[{"id": 1000 + n, "content": f"<{n}>"} for n in range(10**6)])})}),
    "a tokenizer's pattern without end": (EVAL, {"--model_name_or_path": Copy("rag", {
        "generator_tokenizer/tokenizer.json": settings(normalizer=ENDLESS)})}),
    "an encoder's pattern without end": (KNOWLEDGE, {"--dpr_ctx_encoder_model_name": Copy("context_encoder", {
        "tokenizer.json": settings(normalizer=ENDLESS)})}),
    "stop strings": (EVAL, {"--model_name_or_path": Copy("rag", {"generation_config.json": settings(
        stop_strings=["x"])})}),
    "passages in a huge number of files": (EVAL, HERE | {"--passages_path": Copy("passages", {"state.json": settings(
        _data_files=[{"filename": "data-00000-of-00001.arrow"}] * 10**5)})}),
    "layers without number": (EVAL, {"--model_name_or_path": Copy("rag", {"config.json": deep(10**9)})}),
    "YAML that makes objects": (EVAL, {"--config_file": File(YAML.encode(), "c.yaml")}),
    "a line of a gigabyte": (KNOWLEDGE, {"--csv_path": bomb(b"word " * 2**18, 800, "x.tsv.gz")}),
    "100 million blank lines": (KNOWLEDGE, {"--csv_path": bomb(b"\n" * 10**6, 100, "x.tsv.gz")}),
    "a JSON line of a gigabyte": (KNOWLEDGE, {"--csv_path": bomb(b"[" * 2**20, 1000, "x.jsonl.gz")}),
    "a row group of gigabytes": (KNOWLEDGE, {"--csv_path": Of(parquet_bomb)}),
    "a literal that explodes": (EVAL, {"--gold_data_path": File(b"q\t[" + b"'a'*10**9," * 9 + b"]\n")}),
    "a quote without end": (EVAL, {"--gold_data_path": File(b'q\t"[a' + (b"x" * 60 + b"\n") * 200_000)}),
    "a record of a million titles": (PARSE, {"--src_path": File(b'[{"question":"q","positive_ctxs":[' + b",".join(
        [b'{"title":"t"}'] * 10**6) + b"]}]", "x.json")}),
    "an index elsewhere": (KNOWLEDGE, {"--csv_path": elsewhere("../victim/x.faiss"), "--append": True}),
    "an index by its full path": (KNOWLEDGE, {"--csv_path": elsewhere("{victim}/x.faiss"), "--append": True}),
}  # fmt: skip
ROWS |= {
    f"random bytes in {source}, {seed}": (EVAL, HERE | {flag: random_bytes(source, seed)})
    for source, flag in {"index.faiss": "--index_path", "passages": "--passages_path"}.items()
    for seed in range(20)
}


def _placed(source: Path, target: Path) -> int:
    target.parent.mkdir()
    source.rename(target)
    (target.parent / "hparams.json").write_text("{}")
    return 4


@pytest.mark.parametrize("name", ROWS)
def test_hostile(world, tmp_path, name):
    script, changes = ROWS[name]
    folder = tmp_path / "case"
    folder.mkdir()
    (folder / "evil.py").write_text(f"{EVIL}\nclass C: pass\n")
    made = {flag: value.make(world.folder, folder) if isinstance(value, Maker) else value
            for flag, value in changes.items()}  # fmt: skip
    for value in made.values():
        if isinstance(value, Path) and value.is_dir():
            shutil.copy(folder / "evil.py", value)
    before = tree(folder)
    seen = run(script, world.flags_of(script, folder, made), folder, answer=b"y\n" * 9, memory=LARGEST)
    assert not list(folder.rglob("PWNED")) and not os.path.exists("PWNED")
    assert "\x1b" not in seen.text
    assert not (victim := folder / "victim").is_file() or victim.read_text() == "{}"
    assert seen.status in (0, 2) and not seen.has_traceback, (seen.status, seen.text[-2000:])
    if seen.status == 2:
        assert seen.errors and not left_behind(before, tree(folder)), seen.text[-2000:]
