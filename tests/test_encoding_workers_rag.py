"""Several processes, or a Ray cluster's tasks, embed what one process does."""

import numpy as np
import pytest
from datasets import load_from_disk

from cli_rag import UserError
from encoding_workers_rag import EncoderPlan, NodeWorkers, RayWorkers, encoding_device, encoding_workers
from models_rag import load_encoder, load_tokenizer, weights_digest
from tests.conftest import PASSAGES
from tests.test_use_own_knowledge_dataset import run
from use_own_knowledge_dataset import parse_args


@pytest.fixture
def embedder(context_encoder_folder):
    from embed_passages_rag import PassageEmbedder

    folder = str(context_encoder_folder)
    return PassageEmbedder(load_encoder(folder, "context"), load_tokenizer(folder), batch_size=2)


@pytest.fixture
def plan(context_encoder_folder, embedder):
    return EncoderPlan(str(context_encoder_folder), "auto", weights_digest(embedder.encoder), 2, "cpu")


def embedded(workers) -> dict:
    """The vectors of four shards, by their paths."""
    shards = {"a": PASSAGES[:3], "b": PASSAGES[3:5], "c": PASSAGES[5:], "d": PASSAGES[:1]}
    written = {}
    done = list(
        workers.embed_shards(iter(shards.items()), lambda path, shard, vectors: written.update({path: vectors}))
    )
    assert sum(done) == 9
    return written


def assert_equal_to(expected: dict, found: dict) -> None:
    assert found.keys() == expected.keys()
    for path, vectors in expected.items():
        np.testing.assert_allclose(found[path], vectors, rtol=1e-5, atol=1e-6)


def test_processes_of_this_node(embedder, plan):
    with NodeWorkers(embedder, plan, processes=2) as workers:
        assert_equal_to(embedded(embedder), embedded(workers))
        wrong = EncoderPlan(plan.name, plan.pooling, "of other weights", 2, "cpu")
        workers.plan = wrong
        with pytest.raises(UserError, match="has other weights on"):
            embedded(workers)


def test_tasks_of_a_cluster_of_our_own(embedder, plan, flags, tmp_path):
    ray = pytest.importorskip("ray")
    with RayWorkers(embedder, plan, "auto", gpus_a_task=0) as workers:
        assert_equal_to(embedded(embedder), embedded(workers))
        workers.plan = EncoderPlan(plan.name, plan.pooling, "of other weights", 2, "cpu")
        with pytest.raises(UserError, match="has other weights on"):
            embedded(workers)
        # The script uses the cluster that is there, and leaves it up.
        run(flags, **{"--distributed": "ray", "--num_shards": 4})
        run(flags, **{"--output_dir": tmp_path / "alone", "--num_shards": 4})
        spread, alone = (load_from_disk(tmp_path / name / "my_knowledge_dataset") for name in ("out", "alone"))
        assert spread["text"] == alone["text"]
        np.testing.assert_allclose(np.array(spread["embeddings"]), np.array(alone["embeddings"]), rtol=1e-4, atol=1e-5)
        assert ray.is_initialized()
        with pytest.raises(UserError, match="--gpus_per_task 64 is more than"), RayWorkers(embedder, plan, "auto", 64):
            pass
    assert not ray.is_initialized()


def test_who_embeds(embedder, plan, flags):
    def workers(*words):
        args = parse_args(["--dpr_ctx_encoder_model_name", plan.name, *words])
        return encoding_device(args), encoding_workers(args, embedder, plan.digest)

    device, one = workers()
    with one as workers_or_embedder:
        assert workers_or_embedder is embedder and device == "cpu"
    with workers("--num_encoding_processes", "3")[1] as several:
        assert isinstance(several, NodeWorkers) and several.processes == 3
    device, on_ray = workers("--distributed", "ray", "--gpus_per_task", "0.5")
    assert (device, on_ray.plan.device, on_ray.gpus_a_task) == ("cuda", "cuda", 0.5)
    device, on_ray = workers("--distributed", "ray")
    assert (device, on_ray.gpus_a_task) == ("cpu", 0)
