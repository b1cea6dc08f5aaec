"""Which examples make which batch on which rank, in an order that a resumed run keeps.

    sampler = GlobalBatchSampler(len(dataset), batch_size=8, rank=0, world_size=2, seed=42)
    loader = ResumableDataLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate_fn)

The order depends on seed and epoch alone, whatever the number of ranks. An epoch that was begun on another number of
ranks is gone on with where it was left: no example is skipped or comes twice.
"""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

from torch.utils.data import DataLoader


class GlobalBatchSampler:
    """Which examples make batch b on this rank: each example once an epoch, the same batches on any number of ranks.

    Batch b of W ranks at `batch_size` B is the one-process batch b of W * B, split in order. The order depends on
    (seed, epoch) only. The last batch is split as evenly as it goes; a rank left without an example gets one of
    another rank's, of loss weight 0, so that all ranks take equally many batches, as collectives need.

    Args:
        seed: of the shuffling; None keeps the order of the file.
        lengths: of the examples; given, batches are made of examples of similar length.
    """

    POOL = 50  # batches sorted by length together: enough for little padding, few enough to differ every epoch

    def __init__(
        self,
        n_examples: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        lengths: list[int] | None = None,
    ):
        self.n_examples, self.global_batch_size = n_examples, batch_size * world_size
        self.rank, self.world_size, self.seed, self.lengths = rank, world_size, seed, lengths
        self.epoch, self.position = 0, 0  # the batch that comes next
        # Of an epoch that was begun elsewhere: what came there, and the batches that examples were grouped for.
        self.resumed_at, self.order_size = 0, self.global_batch_size
        self.sampler = self  # where Lightning looks for set_epoch

    def __len__(self) -> int:
        return -(-self.n_examples // self.global_batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for b in range(self.position, len(self)):
            batch = order[slice(*self._bounds(b))]
            start, end = self._share(len(batch))
            yield batch[start:end] or batch[:1]

    def loss_weight(self, b: int) -> float:
        """What to multiply a mean over this rank's examples of batch b by, so that the ranks' mean is the batch's."""
        first, behind = self._bounds(b)
        start, end = self._share(behind - first)
        return (end - start) * self.world_size / (behind - first)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch, also before the rest of a resumed one, whose position stays."""
        if epoch != self.epoch:
            self.resume(epoch, 0, self.global_batch_size)

    @property
    def seen(self) -> int:
        """Examples of this epoch that batches before `position` hold, on all ranks."""
        return self._bounds(self.position)[0]

    def resume(self, epoch: int, seen: int, order_size: int) -> None:
        """Go on with an epoch, of which as many examples were `seen`.

        The batches are those of a whole epoch, of which the first one misses what was seen.

        Args:
            order_size: global batch size where the epoch was begun.
        """
        self.epoch, self.resumed_at, self.order_size = epoch, seen, order_size
        self.position = len(self) if seen >= self.n_examples else seen // self.global_batch_size

    def _bounds(self, b: int) -> tuple[int, int]:
        """Where batch b begins and ends in the order."""
        size = self.global_batch_size
        return min(max(b * size, self.resumed_at), self.n_examples), min((b + 1) * size, self.n_examples)

    def _share(self, n_examples: int) -> tuple[int, int]:
        return n_examples * self.rank // self.world_size, n_examples * (self.rank + 1) // self.world_size

    def _order(self) -> list[int]:
        order = list(range(self.n_examples))
        if self.seed is None:
            return order
        generator = random.Random(f"{self.seed} {self.epoch}")
        generator.shuffle(order)
        return self._by_length(order, self.lengths, generator) if self.lengths else order

    def _by_length(self, order: list[int], lengths: list[int], generator: random.Random) -> list[int]:
        size, pool = self.order_size, self.order_size * self.POOL
        pools = [sorted(order[i : i + pool], key=lambda index: lengths[index]) for i in range(0, len(order), pool)]
        by_length = [index for pool in pools for index in pool]
        batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        whole = len(order) // size  # the last, smaller batch stays the last
        shuffled = generator.sample(batches[:whole], whole) + batches[whole:]
        return [index for batch in shuffled for index in batch]


def prefetched(batches: Iterator[dict[str, Any]], prefetch: Callable[[dict[str, Any]], Future]) -> Iterator[dict]:
    """The batches, each with a "contexts" that is done: it was started while the batch before was worked on."""

    def following() -> dict[str, Any] | None:
        batch = next(batches, None)
        if batch is not None:
            batch["contexts"] = prefetch(batch)
        return batch

    batch = following()
    while batch is not None:
        wait([batch["contexts"]])  # before the next batch is made, too: a tokenizer serves one thread at a time
        ahead = following()
        yield batch
        batch = ahead


class ResumableDataLoader(DataLoader):
    """A loader over a `GlobalBatchSampler` whose place in the epoch is saved with every Lightning checkpoint.

    Batches that have been read ahead do not count, only those handed out. Each gets its "loss_weight" and, where
    `prefetch` is set, what that starts, as "contexts".
    """

    batch_sampler: GlobalBatchSampler
    prefetch: Callable[[dict[str, Any]], Future] | None = None
    renumbered: Callable[[int], None] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # torch wants its own iterator's class
        sampler = self.batch_sampler
        batches = super().__iter__()  # begins with the first batch asked for, after Lightning has set the epoch
        for batch in batches if self.prefetch is None else prefetched(batches, self.prefetch):
            batch["loss_weight"] = sampler.loss_weight(sampler.position)
            sampler.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        sampler = self.batch_sampler
        return {
            "epoch": sampler.epoch,
            "position": sampler.position,
            "seen": sampler.seen,
            "order_size": sampler.order_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Also of another number of ranks; then `renumbered` is told how the number of the next batch differs."""
        size = self.batch_sampler.global_batch_size
        seen = state.get("seen", state["position"] * size)  # missing: an earlier version's, of as many ranks
        self.batch_sampler.resume(state["epoch"], seen, state.get("order_size", size))
        if self.renumbered is not None and (difference := self.batch_sampler.position - state["position"]):
            self.renumbered(difference)
