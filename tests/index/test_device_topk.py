"""The largest of many scores by tiles, beside a full sort of all: the same places, ties included."""

import numpy as np
import pytest
import torch

from rag.index.device_topk import members, rows_of, scores_of, tile_size, to_keys, top_places


def plain_places(scores: np.ndarray, count: int) -> np.ndarray:
    """The places of the largest scores, of equal ones the lower place first, by sorting all of them."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


# A tile holds 128 scores, or 32 where more than 32 places are asked for: all in one tile, whole tiles alone, and with a
# rest; tiles chosen among tiles.
@pytest.mark.parametrize("width", [1, 100, 1024, 1025, 5151, 150_003])
@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("different", [2, 50, 10**6])
def test_places_are_those_of_a_full_sort(width, count, different):
    scores = np.random.default_rng(width).integers(-different, different, (3, width)).astype(np.float32)
    places = top_places(torch.tensor(scores), count)
    np.testing.assert_array_equal(places, plain_places(scores, count))


def test_the_tiles_are_used_in_the_test_above():
    assert tile_size(5, 5151) == 128 and tile_size(40, 150_003) == 32
    assert tile_size(5, 150_003 // 128) == 1 and tile_size(1, 150_003 // 128) == 128
    assert tile_size(5, 5 * 128) == 1


def test_scores_of_one_tile_may_be_all_of_the_best():
    scores = np.zeros((2, 5000), dtype=np.float32)
    scores[0, 4990:4995] = [1, 3, 3, 2, 5]  # behind the last whole tile
    scores[1, 1280:1285] = [1, 3, 3, 2, 5]
    expected = [[4994, 4991, 4992, 4993, 4990], [1284, 1281, 1282, 1283, 1280]]
    np.testing.assert_array_equal(top_places(torch.tensor(scores), 5), expected)


def test_keys_are_in_the_order_of_the_scores_and_give_them_back():
    tiny = np.finfo(np.float32).smallest_subnormal
    scores = np.array([-np.inf, -3e38, -1.5, -tiny, 0.0, tiny, 1.0, np.float32(1.0000001), 3e38, np.inf], np.float32)
    rows = np.array([0, 7, 2**32 - 1, 3, 1, 0, 5, 2, 9, 4])
    keys = to_keys(torch.tensor(scores), torch.tensor(rows))
    assert (keys.diff() > 0).all()
    np.testing.assert_array_equal(scores_of(keys.numpy()), scores)
    np.testing.assert_array_equal(rows_of(keys.numpy()), rows)
    first, second = to_keys(torch.tensor([[0.0, -0.0]]), torch.tensor([8, 9]))[0]
    assert first == second + 1  # equal scores, the lower row first


def test_members_of_tiles_and_the_rest():
    places = members(torch.tensor([[2, 0], [1, 2]]), 3, 11)
    assert places.tolist() == [[6, 7, 8, 0, 1, 2, 9, 10], [3, 4, 5, 6, 7, 8, 9, 10]]
