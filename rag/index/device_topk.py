"""The largest of many scores, exactly, without a selection among all of them.

    places = top_places(scores, count=5)    # (B, N) float32 to (B, 5) int64, best first

Scores are cut into tiles of neighbors. Of each tile the largest score is taken, which is one pass and no sorting; the
`count` tiles of the largest maxima are chosen; only what they hold is looked at again. With more than some thousand
tiles, they are chosen in the same way.

The order is one without ties: a larger score comes first, of equal scores the lower place. Tiles are ordered likewise,
by their maxima, then by their places. **The first `count` scores lie in the first `count` tiles.** Let x be a score
in a tile t that was not chosen. Each of the `count` chosen tiles comes before t, so it holds either a score above t's
maximum, hence above x, or one that equals t's maximum, hence is at least x, at a lower place than all of t. So `count`
scores come before x.

torch is imported where it is used, as in the rest of this room.
"""

import numpy as np

# Scores of a tile: the larger, the fewer maxima; the smaller, the fewer scores are looked at again.
TILE, TILE_OF_MANY = 128, 32
MANY = 32
LAST_ROW = 2**32 - 1


def tile_size(count: int, scores: int) -> int:
    """Scores of a tile, 1 where the chosen tiles would hold a good part of all scores."""
    tile = TILE if count <= MANY else TILE_OF_MANY
    return tile if scores >= 8 * count * tile else 1


def to_keys(scores, rows):
    """Whole numbers in the order of the scores, of equal scores the lower row first: largest is best.

    A score and its row are selected, sorted and copied to the host as one number.

    Args:
        scores: (B, N) float32, no NaN.
        rows: int64 from 0 to `LAST_ROW`, of a shape that broadcasts to `scores`.

    Returns:
        (B, N) int64.
    """
    import torch

    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # the bits of negative numbers grow as these fall
    return bits.long() * 2**32 + (LAST_ROW - rows)


def rows_of(keys):
    """The rows in the keys, a tensor or an array."""
    return LAST_ROW - (keys & LAST_ROW)


def scores_of(keys: np.ndarray) -> np.ndarray:
    """The scores in the keys, float32."""
    bits = (keys >> 32).astype(np.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32)


def members(tiles, tile: int, scores: int):
    """The places in the chosen tiles (B, n) int64, and those behind the last whole tile, which are always looked at.

    Returns:
        (B, n * tile + scores % tile) int64.
    """
    import torch

    inside = tiles.unsqueeze(2) * tile + torch.arange(tile, device=tiles.device)
    rest = torch.arange(scores // tile * tile, scores, device=tiles.device)
    return torch.cat([inside.flatten(1), rest.expand(len(tiles), -1)], dim=1)


def top_places(scores, count: int):
    """The places of the largest scores, best first, of equal ones the lower place first.

    Args:
        scores: (B, N) float32, no NaN.
        count: at least 1.

    Returns:
        (B, min(count, N)) int64.
    """
    import torch

    width = scores.shape[1]
    tile = tile_size(count, width)
    if tile == 1:
        keys = to_keys(scores, torch.arange(width, device=scores.device))
    else:
        maxima = scores[:, : width // tile * tile].unflatten(1, (-1, tile)).amax(2)
        places = members(top_places(maxima, count), tile, width)
        keys = to_keys(scores.gather(1, places), places)
    return rows_of(keys.topk(min(count, width)).values)
