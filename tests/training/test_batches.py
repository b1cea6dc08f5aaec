"""Batches: every example once, the same on any number of ranks, a new order an epoch, a place to go on from."""

from itertools import chain, islice

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


@pytest.mark.parametrize("lengths", [None, [i * 7 % 5 for i in range(23)]])
@pytest.mark.parametrize(("before", "after"), [((2, 1), (2, 2)), ((2, 2), (2, 1)), ((1, 3), (1, 2)), ((2, 4), (2, 3))])
@pytest.mark.parametrize("done", [0, 1, 2, 3, 9])
def test_another_number_of_ranks_goes_on_where_the_others_were(before, after, done, lengths):
    """No example is skipped or comes twice, in this epoch and, resumed again, in its rest; then all is as ever."""

    def loaders(size, world_size):
        samplers = [
            GlobalBatchSampler(23, size, rank, world_size, seed=1, lengths=lengths) for rank in range(world_size)
        ]
        return [ResumableDataLoader(range(23), batch_sampler=one, collate_fn=collate) for one in samplers]

    def examples(ranks, batches):
        """What counts of so many batches, and the weights of each."""
        shares = [list(islice(iter(rank), batches)) for rank in ranks]
        assert len({len(share) for share in shares}) == 1
        for same in zip(*shares, strict=True):
            assert sum(batch["loss_weight"] for batch in same) == pytest.approx(len(ranks))
        return [i for share in shares for batch in share if batch["loss_weight"] for i in batch["index"]]

    first, told = loaders(*before), []
    seen = examples(first, done)
    second, third = loaders(*after), loaders(*before)
    for rank in second:
        rank.renumbered = told.append
        rank.load_state_dict(first[0].state_dict())
        rank.batch_sampler.set_epoch(0)
    seen += examples(second, 1)
    for rank in third:
        rank.load_state_dict(second[0].state_dict())
    seen += examples(third, 99)
    assert sorted(seen) == list(range(23))
    position = second[0].state_dict()["position"] - (done < len(first[0].batch_sampler))
    difference = position - min(done, len(first[0].batch_sampler))
    assert set(told) == ({difference} if difference else set())
    third[0].batch_sampler.set_epoch(1)
    alone = GlobalBatchSampler(23, *before[:1], 0, before[1], seed=1, lengths=lengths)
    alone.set_epoch(1)
    assert list(third[0].batch_sampler) == list(alone)
