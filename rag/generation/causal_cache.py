"""Keys and values of passages, kept from one batch of questions to the next.

    cache = HeadCache()
    token_ids = generate_answers(model, ids, mask, doc_scores, n_docs=5, heads=heads, head_cache=cache)

A head, the part of a prompt that a passage alone decides, is known by its token ids. The cache is one model's: whoever
changes weights drops it. Where its bytes are used up, the head goes that was not asked for the longest.
"""

from collections import OrderedDict

import psutil
import torch

SHARE_OF_FREE_MEMORY = 1 / 8
MOST_BYTES = 4 * 2**30


class HeadCache:
    """Least recently used heads' keys and values, bounded in bytes.

    Args:
        most_bytes: of all tensors; None for an eighth of the memory that is free at the first head, 4 GiB at most.
    """

    def __init__(self, most_bytes: int | None = None):
        self.most_bytes, self.used_bytes = most_bytes, 0
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, token_ids: bytes) -> torch.Tensor | None:
        """A head's keys and values (layers, 2, key heads, tokens, head size), None if it is not there."""
        if token_ids in self._kept:
            self._kept.move_to_end(token_ids)
        return self._kept.get(token_ids)

    def put(self, token_ids: bytes, kept: torch.Tensor) -> None:
        """Keep a head that is not there; one that is larger than the bound is not kept."""
        if self.most_bytes is None:
            self.most_bytes = min(MOST_BYTES, int(SHARE_OF_FREE_MEMORY * _free_bytes(kept.device)))
        if kept.nbytes > self.most_bytes:
            return
        self._kept[token_ids] = kept.contiguous()
        self.used_bytes += kept.nbytes
        while self.used_bytes > self.most_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.used_bytes -= oldest.nbytes


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
