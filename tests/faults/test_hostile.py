"""Files of an enemy: nothing in them is run, no process dies of them, none takes all memory or all time."""

import gzip
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest

from tests.faults.makers import Copy, File, Of, apply, settings
from tests.faults.processes import left_behind, run, tree

pytestmark = pytest.mark.faults
EVAL, FINETUNE, KNOWLEDGE = "eval_rag.py", "finetune_rag.py", "use_own_knowledge_dataset.py"
CONSOLIDATE, PARSE = "consolidate_rag_checkpoint.py", "parse_dpr_relevance_data.py"
LARGEST = 2 << 30  # bytes that a run may take at its peak
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
    "passages in a huge number of files": (EVAL, HERE | {"--passages_path": Copy("passages", {"state.json": settings(
        _data_files=[{"filename": "data-00000-of-00001.arrow"}] * 10**5)})}),
    "layers without number": (EVAL, {"--model_name_or_path": Copy("rag", {"config.json": deep(10**9)})}),
    "YAML that makes objects": (EVAL, {"--config_file": File(YAML.encode(), "c.yaml")}),
    "a line of a gigabyte": (KNOWLEDGE, {"--csv_path": bomb(b"word " * 2**18, 800, "x.tsv.gz")}),
    "100 million blank lines": (KNOWLEDGE, {"--csv_path": bomb(b"\n" * 10**6, 100, "x.tsv.gz")}),
    "a JSON line of a gigabyte": (KNOWLEDGE, {"--csv_path": bomb(b"[" * 2**20, 1000, "x.jsonl.gz")}),
    "a row group of gigabytes": (KNOWLEDGE, {"--csv_path": Of(parquet_bomb)}),
    "a literal that explodes": (EVAL, {"--gold_data_path": File(b"q\t[" + b"'a'*10**9," * 9 + b"]\n")}),
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
    made = {flag: value.make(world.folder, folder) if isinstance(value, Of | Copy | File) else value
            for flag, value in changes.items()}  # fmt: skip
    for value in made.values():
        if isinstance(value, Path) and value.is_dir():
            shutil.copy(folder / "evil.py", value)
    before = tree(folder)
    seen = run(script, world.flags_of(script, folder, made), folder, answer=b"y\n" * 9, memory=LARGEST)
    assert not list(folder.rglob("PWNED")) and not os.path.exists("PWNED")
    assert seen.status in (0, 2) and not seen.has_traceback, (seen.status, seen.text[-2000:])
    if seen.status == 2:
        assert seen.errors and not left_behind(before, tree(folder)), seen.text[-2000:]
