"""Embeddings as a device holds them, and their inner products with questions.

    vectors = STORES["fp16"](rows=21_015_300, dimension=768, device=device)
    largest = vectors.put(0, chunk)                # (n, d) float32, on the device
    queries = vectors.prepare(queries)             # (B, d) float32, on the device
    vectors.scores(queries, 0, 4096)               # (B, 4096) float32
    vectors.scores_of(queries, rows)               # rows (B, N) int64 to (B, N) float32

fp16 is half precision: products are summed in float32. int8 is a whole number from -127 to 127 for each coordinate and
a scale for each vector: half the bytes again, products are summed in whole numbers, and they rank candidates only.
On the CPU, where few processors multiply these types fast, both are widened to float32.
"""

# Bytes of embeddings that are picked out at a time.
PICKED_AT_A_TIME = 2**28
# CUDA's product of int8 takes more than 16 rows, and whole multiples of 8 else.
LEAST_QUERIES, MULTIPLE = 32, 8
LARGEST_INT8 = 127.0


class HalfVectors:
    """Embeddings in half precision.

    Args:
        rows: how many.
        dimension: d.
        device: a torch device.

    Attributes:
        values: (rows, d) float16.
        largest: the largest magnitude of a coordinate that can be held.
        is_exact: whether scores are those of the embeddings but for rounding, so that no re-ranking is needed.
    """

    largest = 65504.0
    is_exact = True
    name = "half precision"

    def __init__(self, rows: int, dimension: int, device):
        import torch

        self.device = device
        self.values = torch.empty((rows, dimension), dtype=torch.float16, device=device)

    @staticmethod
    def bytes_needed(rows: int, dimension: int) -> int:
        return 2 * rows * dimension

    def put(self, start: int, chunk):
        """Keep the rows from `start` on; returns the largest magnitude in them, a tensor, NaN where one is NaN."""
        self.values[start : start + len(chunk)] = chunk
        return chunk.abs().amax()

    def prepare(self, queries):
        """Queries (B, d) float32 as the products want them."""
        return queries if self.device.type == "cpu" else queries.half()

    def scores(self, queries, start: int, stop: int):
        """Products with consecutive rows, (B, stop - start) float32."""
        import torch

        values = self.values[start:stop]
        if self.device.type == "cpu":
            return queries @ values.float().T
        return torch.mm(queries, values.T, out_dtype=torch.float32)

    def scores_of(self, queries, rows):
        """Products with the rows (B, N) int64 that were chosen for each query, (B, N) float32."""
        return _picked_scores(self.values, queries, rows)


class Int8Vectors:
    """Embeddings as int8 with a scale each; scores lack the query's own scale, which changes no order.

    Args, attributes: as `HalfVectors`; `scales` (rows) float32.
    """

    largest = 3e38
    is_exact = False
    name = "int8"

    def __init__(self, rows: int, dimension: int, device):
        import torch

        self.device = device
        self.dimension = dimension
        size = (_rounded_up(rows), _rounded_up(dimension))
        self.values = torch.zeros(size, dtype=torch.int8, device=device)
        self.scales = torch.zeros(size[0], dtype=torch.float32, device=device)

    @staticmethod
    def bytes_needed(rows: int, dimension: int) -> int:
        return _rounded_up(rows) * (_rounded_up(dimension) + 4)

    def put(self, start: int, chunk):
        whole, scales = _to_int8(chunk)
        self.values[start : start + len(chunk), : self.dimension] = whole
        self.scales[start : start + len(chunk)] = scales
        return scales.amax() * LARGEST_INT8

    def prepare(self, queries):
        """Queries as whole numbers, on a GPU with as many of zeros behind them as its product asks for."""
        import torch

        whole, _ = _to_int8(queries)
        on_cpu = self.device.type == "cpu"
        missing_rows = 0 if on_cpu else max(0, LEAST_QUERIES - len(whole))
        whole = torch.nn.functional.pad(whole, (0, self.values.shape[1] - self.dimension, 0, missing_rows))
        return whole if on_cpu else whole.to(torch.int8)

    def scores(self, queries, start: int, stop: int):
        import torch

        if self.device.type == "cpu":
            products = queries @ self.values[start:stop].float().T
        else:
            products = torch._int_mm(queries, self.values[start : _rounded_up(stop - start) + start].T)
        return products[:, : stop - start] * self.scales[start:stop]  # int32 to float32 in the same kernel

    def scores_of(self, queries, rows):
        # Whole numbers up to 127 are exact in half precision, and so are the sums of their products in float32.
        queries = queries if self.device.type == "cpu" else queries.half()
        return _picked_scores(self.values, queries, rows) * self.scales[rows]


STORES: dict[str, type[HalfVectors] | type[Int8Vectors]] = {"fp16": HalfVectors, "int8": Int8Vectors}


def _picked_scores(values, queries, rows):
    """Products of each query (B, d) with rows (B, N) of `values`, in float32; a part of the queries at a time."""
    import torch

    at_a_time = max(1, PICKED_AT_A_TIME // (2 * rows.shape[1] * values.shape[1]))
    parts = []
    for some_queries, some_rows in zip(queries.split(at_a_time), rows.split(at_a_time), strict=True):
        picked = values.index_select(0, some_rows.flatten()).to(queries.dtype).unflatten(0, some_rows.shape)
        columns = some_queries.unsqueeze(2)
        if values.device.type == "cpu":
            products = torch.bmm(picked, columns)
        else:
            products = torch.bmm(picked, columns, out_dtype=torch.float32)
        parts.append(products.squeeze(2))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _to_int8(vectors):
    """Vectors (n, d) float32 as whole numbers from -127 to 127, float32, and the scale of each, (n)."""
    scales = vectors.abs().amax(1) / LARGEST_INT8
    # Of a vector of zeros the scale is 0; what is so small that its scale is not normal counts as zeros.
    return (vectors / scales.clamp_min(1e-37).unsqueeze(1)).round(), scales


def _rounded_up(number: int) -> int:
    return -(-number // MULTIPLE) * MULTIPLE
