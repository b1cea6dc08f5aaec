"""Which passages are encoded together, by their tokens; and work that is done beside the device.

for rows in cut_batches(lengths, tokens=65_536): ...
for batches in ahead(prepare, pieces, depth=2): ...
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

# So many tokens of BERT-base are encoded in the least time a token on two cores, and their vectors stay in the cache.
CPU_TOKENS = 1024
# More than these do not make a GPU faster; where there is padding, the larger the batch the more of it.
PACKED_TOKENS, PADDED_TOKENS = 65_536, 8_192
SHARE_OF_FREE_MEMORY = 0.5  # that a batch may take

Item = TypeVar("Item")
Result = TypeVar("Result")


def tokens_that_fit(encoder: PreTrainedModel, device: torch.device, packed: bool) -> int:
    """Tokens of a batch: as many as keep a device busy, if half of its free memory holds what a layer makes of them.

    At its largest that is eight vectors of the hidden size for each token (a layer's input, queries, keys, values, what
    attention and its projection give, and two sums) and three of the feed-forward layer's size.
    """
    if device.type != "cuda":
        return CPU_TOKENS
    config = encoder.config if encoder.config.model_type == "dpr" else encoder.config.backbone
    hidden = config.hidden_size
    values = 8 * hidden + 3 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    free, _ = torch.cuda.mem_get_info(device)
    fitting = int(SHARE_OF_FREE_MEMORY * free) // (values * encoder.dtype.itemsize)
    return max(1, min(fitting, PACKED_TOKENS if packed else PADDED_TOKENS))


def cut_batches(
    lengths: np.ndarray, passages: int | None = None, tokens: int | None = None, packed: bool = False
) -> list[np.ndarray]:
    """The rows of each batch; batches hold texts of like length, the longest first.

    Args:
        lengths: (N) tokens of each passage.
        passages: of a batch, at most; None for no limit.
        tokens: of a batch of more than one passage, at most; None for no limit.
        packed: whether passages lie in a row; else each takes as many tokens as the longest of its batch.
    """
    order = np.argsort(-lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    batches, start = [], 0
    while start < len(order):
        count = len(order) if passages is None else passages
        if tokens is not None and packed:
            before = ends[start - 1] if start else 0
            count = min(count, int(np.searchsorted(ends, before + tokens, "right")) - start)
        elif tokens is not None:
            count = min(count, tokens // max(int(lengths[order[start]]), 1))
        batches.append(order[start : start + max(count, 1)])
        start += max(count, 1)
    return batches


def ahead(work: Callable[[Item], Result], items: Iterable[Item], depth: int) -> Iterator[Result]:
    """`work` of each item, in order; the next `depth` items are taken, and worked on, in a thread meanwhile."""
    if not depth:
        yield from map(work, items)
        return
    source = iter(items)

    def next_result() -> list[Result]:
        return [work(item) for item in islice(source, 1)]  # none at the end

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        under_way = deque(pool.submit(next_result) for _ in range(depth))
        try:
            while result := under_way.popleft().result():
                under_way.append(pool.submit(next_result))
                yield result[0]
        finally:  # nobody wants the rest
            for future in under_way:
                future.cancel()
