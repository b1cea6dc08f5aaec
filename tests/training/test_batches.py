"""Batches: every example once, the same on any number of ranks, a new order an epoch, a place to go on from."""

from itertools import chain

import pytest

from rag.training.batches import GlobalBatchSampler, ResumableDataLoader


def epoch(n_examples, batch_size, rank=0, world_size=1, epoch=0, position=0, **settings):
    sampler = GlobalBatchSampler(n_examples, batch_size, rank, world_size, **settings)
    sampler.set_epoch(epoch)
    sampler.position = position
    return list(sampler)


@pytest.mark.parametrize("lengths", [None, [i * 7 % 5 for i in range(23)]])
@pytest.mark.parametrize("batch_size", [1, 4, 23, 40])
def test_every_example_comes_once_an_epoch_and_in_another_order_the_next(batch_size, lengths):
    first, second, again = (epoch(23, batch_size, seed=1, lengths=lengths, epoch=number) for number in (0, 1, 0))
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(23))
    assert first == again != second
    assert {len(batch) for batch in first[:-1]} <= {batch_size} and len(first) == -(-23 // batch_size)
    assert epoch(23, batch_size, seed=2, lengths=lengths) != first


def test_without_a_seed_the_order_is_the_files():
    assert epoch(5, 2) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("n_examples", [24, 25, 23, 13, 2])
def test_ranks_share_the_batches_of_one_process(n_examples, world_size):
    size, weights = 12 // world_size, []
    alone = epoch(n_examples, 12, seed=1)
    ranks = [epoch(n_examples, size, rank, world_size, seed=1) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(alone)}  # collectives stay in step
    for b, batch in enumerate(alone):
        weights = [GlobalBatchSampler(n_examples, size, rank, world_size).loss_weight(b) for rank in range(world_size)]
        shares = [ranks[rank][b] for rank in range(world_size)]
        counted = [share for share, weight in zip(shares, weights, strict=True) if weight]
        assert list(chain(*counted)) == batch
        means = [sum(share) / len(share) for share in shares]  # the index stands for the loss of an example
        mean = sum(mean * weight for mean, weight in zip(means, weights, strict=True)) / world_size
        assert mean == pytest.approx(sum(batch) / len(batch))
    if n_examples % 12 == 0:
        assert set(weights) == {1.0}


def test_batches_by_length_hold_similar_lengths():
    lengths = [i * 37 % 101 for i in range(400)]

    def spread(batches):
        return sum(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches)

    assert spread(epoch(400, 8, seed=1, lengths=lengths)) < spread(epoch(400, 8, seed=1)) / 5


def collate(examples):
    return {"index": examples}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_goes_on_behind_the_batch_it_handed_out_last(num_workers):
    def loader():
        sampler = GlobalBatchSampler(11, 2, seed=1)
        return ResumableDataLoader(range(11), batch_sampler=sampler, collate_fn=collate, num_workers=num_workers)

    killed = loader()
    killed.batch_sampler.set_epoch(3)
    batches = iter(killed)
    seen = [next(batches)["index"] for _ in range(2)]  # workers have read further than that
    resumed = loader()
    resumed.load_state_dict(killed.state_dict())
    resumed.batch_sampler.set_epoch(3)
    assert len(resumed) == 6
    seen += [batch["index"] for batch in resumed]
    assert seen == epoch(11, 2, seed=1, epoch=3)
    resumed.batch_sampler.set_epoch(4)
    assert [batch["index"] for batch in resumed] == epoch(11, 2, seed=1, epoch=4)
