"""How much a device is given at a time while answers are decoded, and when it is asked how far it is.

    pace = pace_of(torch.device("cuda"))
    pace.chunk_tokens           # tokens that one pass decodes

A CPU wants what fits into its caches, and an answer from it costs nothing. A GPU wants few and large passes, and never
to be waited for. Both ways give the same answers; tests run the GPU's on a CPU.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Pace:
    """The habits of one kind of device."""

    chunk_tokens: int  # candidates' tokens decoded in one pass, padding included
    pass_cost: int  # what one pass more costs, as tokens that could be decoded in its time
    chunk_logits: int  # logits in one pass over a vocabulary, where documents' are summed up
    looks_late: bool  # whether it is asked for the step before, while it works on this one


PACES = {
    # 2048 tokens keep the cores busy, and their padding small.
    "cpu": Pace(chunk_tokens=2048, pass_cost=64, chunk_logits=2**20, looks_late=False),
    # The largest products are at their peak with 32,768 tokens; their logits, 8192 words at a time, take 3 GB.
    "cuda": Pace(chunk_tokens=2**15, pass_cost=4096, chunk_logits=2**27, looks_late=True),
}


def pace_of(device: torch.device) -> Pace:
    return PACES.get(device.type, PACES["cuda"])


class Watch:
    """Counts the items that are over, for the price of one read of the device a step.

    Where the device is asked late, the answer is that of the step before: what is over stays over, so that a step more
    changes no result, and the device has work while the answer is on its way.
    """

    def __init__(self, device: torch.device):
        self._looks_late = pace_of(device).looks_late
        self._before: tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None] | None = None
        self._dropped = 0  # since they were counted

    def look(self, over: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The newest (I) bool of which it is known how many are True, and how many; at first it may be none."""
        if not self._looks_late:
            return over, int(over.sum())
        count, arrived = over.sum().to("cpu", non_blocking=True), None  # into pinned memory
        if over.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(over.device))
        before, dropped = self._before, self._dropped
        self._before, self._dropped = (over, count, arrived), 0
        if before is None:
            return over, 0
        over, count, arrived = before
        if arrived is not None:
            arrived.synchronize()
        return over, int(count) - dropped

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with some rows; all others are over."""
        if self._before is not None:
            over, count, arrived = self._before
            self._before, self._dropped = (over[rows], count, arrived), len(over) - len(rows)
