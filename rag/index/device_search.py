"""Exact search on an accelerator: all passages' embeddings in half precision, compared with every question.

    search = DeviceSearch(embeddings.blocks(), rows=len(embeddings), dimension=768, device="cuda:0")
    scores, rows = search.search(queries, n_docs=5)

Half precision halves the memory and the time of a pass, which reads every embedding once; products are summed in
float32. The answers are those of FAISS's Flat index over float32 vectors but where two scores differ by less than the
rounding of the embeddings. The same code runs on the CPU. torch is imported where it is used: what searches without a
device does not wait for it.
"""

from collections.abc import Iterable

import numpy as np

# Scores that are held at a time: 2**26 of 4 bytes are 256 MiB.
SCORES_AT_A_TIME = 2**26
# Embeddings that a CPU widens to float32 at a time: they stay in its cache.
CPU_CHUNK = 4096
LARGEST_HALF = 65504.0


class DeviceUnavailableError(RuntimeError):
    """There is no such device, or it cannot hold the embeddings; the message says which, and the bytes needed."""


def usable_device(name: str):
    """The torch device of this name.

    Raises:
        DeviceUnavailableError: there is no such device.
    """
    import torch

    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such device, or torch built without it
        raise DeviceUnavailableError(f"there is no such device ({str(error).splitlines()[0]})") from error


class DeviceSearch:
    """Exact inner-product search over embeddings that are held on a device.

    Args:
        blocks: the embeddings in order, float32 arrays (any, dimension).
        rows: how many there are in all.
        dimension: d.
        device: "cpu", "cuda" (the current one) or "cuda:1".

    Raises:
        DeviceUnavailableError: see there.
    """

    def __init__(self, blocks: Iterable[np.ndarray], rows: int, dimension: int, device: str):
        import torch

        self.device = usable_device(device)
        _require_memory(2 * rows * dimension + 4 * SCORES_AT_A_TIME, self.device)
        try:
            self.embeddings = torch.empty((rows, dimension), dtype=torch.float16, device=self.device)
        except RuntimeError as error:  # torch.cuda.OutOfMemoryError is one
            raise DeviceUnavailableError(str(error).splitlines()[0]) from error
        end = 0
        for block in blocks:
            if np.abs(block).max(initial=0.0) > LARGEST_HALF:
                raise DeviceUnavailableError(f"half precision ends at {LARGEST_HALF:g}, an embedding goes beyond it")
            self.embeddings[end : end + len(block)] = torch.from_numpy(block.astype(np.float16))
            end += len(block)
        assert end == rows, f"{end} embeddings instead of {rows}"

    def search(self, queries: np.ndarray, n_docs: int) -> tuple[np.ndarray, np.ndarray]:
        """The largest inner products, best first.

        Args:
            queries: (B, d) float32.
            n_docs: passages a query.

        Returns:
            scores (B, n_docs) float32 and rows (B, n_docs) int64; -inf and -1 where there are fewer passages.
        """
        import torch

        count = min(n_docs, len(self.embeddings))
        scores = np.full((len(queries), n_docs), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), n_docs), -1, dtype=np.int64)
        if count and len(queries):
            with torch.inference_mode():
                best_scores, best_rows = self._search(torch.tensor(queries, device=self.device), count)
            scores[:, :count], rows[:, :count] = best_scores.cpu().numpy(), best_rows.cpu().numpy()
        return scores, rows

    def _search(self, queries, count: int):
        """Chunk by chunk the best of each, then the best of these: (B, count) each, on the device."""
        import torch

        chunk = max(count, SCORES_AT_A_TIME // len(queries))
        if self.device.type == "cpu":
            chunk = max(count, CPU_CHUNK)
        best = []
        for start in range(0, len(self.embeddings), chunk):
            scores = self._scores(queries, self.embeddings[start : start + chunk])  # (B, chunk)
            chunk_scores, chunk_rows = scores.topk(min(count, scores.shape[1]))
            best.append((chunk_scores, chunk_rows + start))
        scores, rows = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
        scores, places = scores.topk(count)
        return scores, rows.gather(1, places)

    def _scores(self, queries, embeddings):
        import torch

        with torch.autocast(self.device.type, enabled=False):
            if self.device.type == "cpu":  # few of them multiply half precision faster than float32
                return queries @ embeddings.float().T
            return torch.mm(queries.half(), embeddings.T, out_dtype=torch.float32)

    def description(self) -> dict:
        """What bears on a score."""
        return {"kind": f"all embeddings, float16 on {self.device}"}


def _require_memory(needed: int, device) -> None:
    import psutil
    import torch

    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        raise DeviceUnavailableError(f"the embeddings in half precision need {needed:,} bytes there, {free:,} are free")
