"""What ranks send each other in a training step: each gradient once, questions out and ids back, and nothing more."""

from pathlib import Path

import pytest
import torch

from benchmarks.scaling import Questions, Reduced, Sent, ring_bytes, sharded_bytes
from tests.conftest import DIMENSION
from tests.distributed.many_ranks import run_ranks
from tests.training.rank_runs import train


def train_and_count(rank: int, words: list[str], out: Path, ranks: int) -> list[dict]:
    """A rank's training, as what was moved in each of its batches; "gradients" is the size of those of a step.

    "waits": collective calls since the batch before for which a GPU's process would wait for its device.
    """
    from rag.training.qa_module import GenerativeQAModule

    batches, start, end = [], GenerativeQAModule.on_train_batch_start, GenerativeQAModule.on_train_batch_end
    counters: dict = {"waits": []}

    def note(name: str) -> None:
        function = getattr(torch.distributed, name)

        def noted(*args, **kwargs):
            counters["waits"].append(name)
            return function(*args, **kwargs)

        setattr(torch.distributed, name, noted)

    note("barrier")
    note("broadcast")

    def on_train_batch_start(module, batch, batch_idx):
        start(module, batch, batch_idx)
        if "sent" not in counters:
            counters.update(reduced=Reduced(module.trainer.model), sent=Sent())
        counters["reduced"].bytes = 0
        counters["sent"].to.clear()
        counters["room"] = dict(module.retriever.room)

    def on_train_batch_end(module, outputs, batch, batch_idx):
        end(module, outputs, batch, batch_idx)
        batches.append({
            "gradients": sum(weight.nbytes for weight in module.parameters() if weight.requires_grad),
            "reduced": counters["reduced"].bytes,
            "sent": dict(counters["sent"].to),
            "questions": len(batch["index"]),
            "room": counters["room"].get(rank, 0),
            "waits": counters["waits"],
        })  # fmt: skip
        counters["waits"] = []

    GenerativeQAModule.on_train_batch_start = on_train_batch_start
    GenerativeQAModule.on_train_batch_end = on_train_batch_end
    train(rank, words, out, ranks=ranks)
    return batches


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 2), (4, 1)])
def test_a_step_moves_each_gradient_once_and_what_is_asked_for(ranks, accumulate, words, tmp_path):
    """Three epochs of two batches. Between the batches of one step no gradient is reduced."""
    flags = ["--train_batch_size", 4 // ranks, "--gradient_accumulation_steps", accumulate, "--log_every_n_steps", 99]
    argv = [*words, *map(str, flags), "--output_dir", str(tmp_path / "out")]
    every = run_ranks(train_and_count, ranks, tmp_path, argv, tmp_path / "out", ranks, seconds=120)
    for batches in every:
        assert batches[0]["gradients"] > 10_000
        reduced = [0] * (accumulate - 1) + [batches[0]["gradients"]]
        assert [batch["reduced"] for batch in batches] == reduced * (6 // accumulate)
        assert [batch["waits"] for batch in batches[1::2]] == [[]] * 3  # before the others is a validation
    for number in range(6):
        searcher, *others = (batches[number] for batches in every)
        for rank, batch in enumerate(others, start=1):
            asked = Questions(batch["questions"], 2, DIMENSION)
            assert batch["sent"] == {0: asked.bytes_out(batch["room"])}
            assert searcher["sent"][rank] == asked.bytes_back(with_vectors=False)
        assert len(searcher["sent"]) == len(others)


def train_and_count_slices(rank: int, words: list[str], out: Path) -> list[dict[str, int]]:
    """A rank's training, as bytes of weights gathered and of gradients reduced in each batch, and of both by formula.

    A weight's first dimension travels rounded up to a multiple of the ranks, two.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule

    from rag.training.qa_module import GenerativeQAModule

    batches, end = [], GenerativeQAModule.on_train_batch_end
    moved = {"gathered": 0, "reduced": 0}

    def count(what: str, *names: str) -> None:
        """Of calls of the first of these functions of torch.distributed that there is, which later ones renamed."""
        name = next(name for name in names if hasattr(dist, name))
        function = getattr(dist, name)

        def counted(*args, **kwargs):
            tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
            moved[what] += max(tensor.nbytes for tensor in tensors)
            return function(*args, **kwargs)

        setattr(dist, name, counted)

    count("gathered", "all_gather_single", "all_gather_into_tensor")
    count("reduced", "reduce_scatter_single", "reduce_scatter_tensor")

    def on_train_batch_end(module, outputs, batch, batch_idx):
        end(module, outputs, batch, batch_idx)
        layers = [part for part in module.modules() if isinstance(part, FSDPModule) and part is not module]
        inside = {weight for layer in layers for weight in layer.parameters()}
        sizes = {
            weight: 4 * (weight.shape[0] + weight.shape[0] % 2) * weight[0].numel() for weight in module.parameters()
        }
        in_layers = sum(sizes[weight] for weight in inside)
        batches.append(dict(moved) | {"layers": in_layers, "rest": sum(sizes.values()) - in_layers})
        moved.update(gathered=0, reduced=0)

    GenerativeQAModule.on_train_batch_end = on_train_batch_end
    train(rank, words, out)
    return batches


@pytest.mark.slow
def test_slices_are_gathered_forward_and_backward_and_reduced_once(words, tmp_path):
    argv = [*words, "--train_batch_size", "2", "--output_dir", str(tmp_path / "out"), "--strategy", "fsdp"]
    every = run_ranks(train_and_count_slices, 2, tmp_path, argv, tmp_path / "out", seconds=120)
    for batches in every:
        for batch in batches:
            layers, rest = batch["layers"], batch["rest"]
            assert layers > 0 and rest > 0
            assert (batch["gathered"], batch["reduced"]) == (2 * layers + rest, layers + rest)
            assert sharded_bytes(2, layers // 4, rest // 4) == (batch["gathered"] + batch["reduced"]) / 2


def test_a_ring_sends_less_than_twice_the_gradients():
    assert [ring_bytes(ranks, 800) for ranks in (1, 2, 8)] == [0, 800, 1400]
