"""What is found again and is not what was written is made again, to the same bytes, or is told in one line."""

import json
import shutil

import pytest

from rag.errors import UserError
from rag.files import load_json
from rag.knowledge.embedding import PassageEmbedder
from rag.knowledge.shards import JOURNAL, partial_folder
from rag.locks import one_at_a_time
from tests.knowledge.test_folder import contents
from tests.knowledge.test_use_own_knowledge_dataset import run

INDEX = "my_knowledge_dataset_hnsw_index.faiss"
PASSAGES = "my_knowledge_dataset"
SHARD = f"{PASSAGES}/data-00001-of-00003.arrow"


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return b""


def flipped(data: bytes) -> bytes:
    return data[:-40] + bytes([data[-40] ^ 0x55]) + data[-39:]


def damage(path, change):
    path.unlink() if change is None else path.write_bytes(change(path.read_bytes()))


@pytest.fixture
def settings(flags):
    return flags | {"--num_shards": 3, "--recall_queries": 0}


@pytest.fixture
def encoded(monkeypatch):
    """The passages that are encoded from now on, batch by batch."""
    encode, sizes = PassageEmbedder._encode, []
    monkeypatch.setattr(
        PassageEmbedder, "_encode", lambda self, batch: sizes.append(len(batch.rows)) or encode(self, batch)
    )
    return sizes


def test_a_finished_folder_is_mended_to_the_same_bytes(settings, tmp_path, encoded, capsys):
    out = tmp_path / "out"
    run(settings)
    whole = contents(out)
    for name, changes, again in (
        (INDEX, (cut, empty, flipped, None), 0),
        (SHARD, (cut, empty, flipped, None), 4),
        (f"{PASSAGES}/state.json", (cut, None), 0),
        (f"{PASSAGES}/dataset_info.json", (cut, None), 0),
        ("index.json", (None,), 0),
    ):
        for change in changes:
            damage(out / name, change)
            encoded.clear()
            capsys.readouterr()
            run(settings)
            assert contents(out) == whole
            assert sum(encoded) == again
            assert name == "index.json" or "again" in capsys.readouterr().out
            assert run(settings).reused
    damage(out / "index.json", cut)
    with pytest.raises(UserError, match=r"--output_dir .*out: its index.json cannot be read"):
        run(settings)


def test_an_unfinished_folder_is_mended(settings, tmp_path, encoded, capsys):
    out = tmp_path / "out"
    run(settings)
    whole = contents(out)
    digest = load_json(out / "index.json")["digest"]
    shards = load_json(out / PASSAGES / "state.json")["_data_files"]
    for change in (cut, empty, flipped, None):
        begun = partial_folder(out / PASSAGES, digest)
        shutil.copytree(out / PASSAGES, begun)
        shutil.rmtree(out / PASSAGES)
        (out / "index.json").unlink()
        lines = "".join(f"{json.dumps([shard['filename'], shard['checksum']])}\n" for shard in shards)
        (begun / JOURNAL).write_text(lines + '["data-000')  # a line that was cut by the kill
        damage(begun / "data-00001-of-00003.arrow", change)
        encoded.clear()
        run(settings)
        assert contents(out) == whole and sum(encoded) == 4
        assert change is None or "1 files of an earlier run are damaged" in capsys.readouterr().out


def test_verify_reads_all_and_builds_nothing(settings, tmp_path, capsys, encoded):
    out = tmp_path / "out"
    verify = {"--output_dir": out, "--verify": True}
    with pytest.raises(UserError, match=r"--verify: --output_dir .* holds no knowledge"):
        run(verify)
    run(settings)
    encoded.clear()
    assert run(verify).passages == 11
    assert "6 files are as they were written" in capsys.readouterr().out
    damage(out / SHARD, flipped)
    damage(out / INDEX, None)
    with pytest.raises(UserError) as error:
        run(verify)
    assert [line.split(": ")[1].split()[0] for line in str(error.value).splitlines()] == [INDEX, SHARD]
    assert encoded == []
    with pytest.raises(UserError, match="--append and --verify: give one of them"):
        run(settings, **verify, **{"--append": True})


def test_nothing_is_added_to_damaged_knowledge(settings, tmp_path):
    run(settings)
    more = tmp_path / "more.tsv"
    more.write_text("bergen\tbergen lies on the sea\n")
    adding = {"--csv_path": more, "--append": True}
    run(settings, **adding)
    before = contents(tmp_path / "out")
    damage(tmp_path / "out" / INDEX, flipped)
    (tmp_path / "other.tsv").write_text("turin\tturin lies in italy\n")
    with pytest.raises(UserError, match=f"{INDEX} is damaged; run the command that built it"):
        run(settings, **adding | {"--csv_path": tmp_path / "other.tsv"})
    with pytest.raises(UserError, match=f"{INDEX} is damaged; run the command that built it"):
        run(settings, **adding | {"--csv_path": tmp_path / "other.tsv", "--drop_duplicates": True})
    run(settings)
    assert contents(tmp_path / "out")["index.json"]["passages"] == before["index.json"]["passages"] == 12
    damage(tmp_path / "out" / SHARD, flipped)
    with pytest.raises(UserError, match="is damaged, and documents were added since it was built"):
        run(settings)


def test_knowledge_of_an_earlier_version_gets_its_checksums(settings, tmp_path):
    run(settings)
    out = tmp_path / "out"
    whole = contents(out)
    description = load_json(out / "index.json")
    del description["checksums"]
    (out / "index.json").write_text(json.dumps(description))
    state = load_json(out / PASSAGES / "state.json")
    state["_data_files"] = [{"filename": file["filename"]} for file in state["_data_files"]]
    (out / PASSAGES / "state.json").write_text(json.dumps(state))
    assert run(settings).reused
    found = contents(out)["index.json"]["checksums"]
    expected = whole["index.json"]["checksums"]
    state_file = f"{PASSAGES}/state.json"
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == {state_file}


def test_one_at_a_time(settings, tmp_path):
    out = tmp_path / "out"
    with one_at_a_time(out / ".lock", "--output_dir", out):
        for more in ({}, {"--append": True, "--csv_path": tmp_path / "documents.csv"}):
            (out / "index.json").write_text("{}")
            with pytest.raises(UserError, match=r"--output_dir .*out is in use by process \d+"):
                run(settings, **more)


def test_outputs_that_cannot_be_written(settings, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below", "/proc/x"):
        with pytest.raises(UserError, match=f"--output_dir {output}"):
            run(settings, **{"--output_dir": output})


def test_documents_beside_what_is_built_of_them(settings, csv_path, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.copy(csv_path, folder)
    own = {"--csv_path": folder, "--output_dir": folder / "out"}
    run(settings, **own)
    assert run(settings, **own).reused
