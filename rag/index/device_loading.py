"""Embeddings from a mapped file to a device, at the pace of the disk or of the bus.

    largest = load(embeddings.blocks(dtype=None), vectors, dimension=768)

Threads copy what is read into one of two buffers while the device copies the other, so that reading, the bus and the
device work at the same time. For a GPU the buffers are pinned: it copies from these by itself. Whatever has to be
computed of an embedding is computed there: the host only copies.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

# Bytes of a buffer, float32; on the bus half a millisecond. Readers: one core copies less than the bus carries, and
# what is not yet in memory is asked of the disk by several at once.
BUFFER_BYTES = 2**25
READERS = 8


class Buffer:
    """Rows (n, d) float32 on their way to a device; `wait` returns when what was last sent has been copied."""

    def __init__(self, rows: int, dimension: int, device):
        import torch

        self.device = device
        self.is_pinned = device.type == "cuda"
        self.tensor = torch.empty((rows, dimension), dtype=torch.float32, pin_memory=self.is_pinned)
        self.array = self.tensor.numpy()
        self.sent = torch.cuda.Event() if self.is_pinned else None

    def send(self, rows: int):
        """The first rows on the device; on the CPU they are the buffer's own."""
        import torch

        chunk = self.tensor[:rows].to(self.device, non_blocking=True)
        if self.sent is not None:
            self.sent.record(torch.cuda.current_stream(self.device))
        return chunk

    def wait(self) -> None:
        if self.sent is not None:
            self.sent.synchronize()


def load(blocks: Iterable[np.ndarray], vectors, dimension: int) -> tuple[int, float]:
    """Put all embeddings into `vectors`, from row 0 on.

    Args:
        blocks: the embeddings in order, arrays (any, d) of any type of numbers; views of a mapped file are read by
            threads.
        vectors: see rag/index/device_vectors.py.
        dimension: d.

    Returns:
        How many there were, and the largest magnitude of a coordinate: NaN where one is NaN. The device is asked for
        it once, at the end.
    """
    import torch

    largest = torch.zeros((), device=vectors.device)
    start = 0
    for buffer, rows in _filled(blocks, dimension, vectors.device):
        largest = torch.maximum(largest, vectors.put(start, buffer.send(rows)))
        start += rows
    return start, largest.item()


def _filled(blocks: Iterable[np.ndarray], dimension: int, device) -> Iterator[tuple[Buffer, int]]:
    """Two buffers in turn, each filled but the last, and the rows in it; the other is filled meanwhile."""
    size = max(READERS, BUFFER_BYTES // (4 * dimension))
    buffers = [Buffer(size, dimension, device) for _ in range(2)]
    with ThreadPoolExecutor(READERS, thread_name_prefix="embeddings") as readers:
        before: tuple[Buffer, list[Future], int] | None = None
        for number, pieces in enumerate(_groups(blocks, size)):
            buffer = buffers[number % 2]
            buffer.wait()
            copies, end = [], 0
            for piece in pieces:
                copies.append(readers.submit(_copy, buffer.array[end : end + len(piece)], piece))
                end += len(piece)
            if before is not None:
                yield _complete(*before)
            before = buffer, copies, end
        if before is not None:
            yield _complete(*before)


def _complete(buffer: Buffer, copies: list[Future], rows: int) -> tuple[Buffer, int]:
    for copy in copies:
        copy.result()
    return buffer, rows


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    with np.errstate(over="ignore", invalid="ignore"):  # what is infinite then is told where it matters
        np.copyto(target, source)


def _groups(blocks: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """The blocks, cut into pieces for the readers, in groups that are `size` rows together, but the last."""
    group: list[np.ndarray] = []
    room = size
    for block in blocks:
        start = 0
        while start < len(block):
            piece = block[start : start + min(room, -(-size // READERS))]
            group.append(piece)
            start, room = start + len(piece), room - len(piece)
            if not room:
                yield group
                group, room = [], size
    if group:
        yield group
