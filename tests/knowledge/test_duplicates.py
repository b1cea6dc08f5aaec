"""Only what is equal to the letter, title and text, is a duplicate."""

import numpy as np

from rag.knowledge.duplicates import first_of_equals


def test_the_first_of_equals_stays():
    passages = [("a", "b"), ("a", "c"), ("a", "b"), ("", "ab"), ("ab", ""), ("A", "b"), ("a", "c"), ("a ", "b")]
    keep = first_of_equals(iter(passages))
    assert keep.dtype == bool
    np.testing.assert_array_equal(keep, [True, True, False, True, True, True, False, True])
    keep = first_of_equals(iter(passages), known=iter([("x", "y"), ("a", "c"), ("x", "y")]))
    np.testing.assert_array_equal(keep, [True, False, False, True, True, True, False, True])
    assert first_of_equals(iter([])).shape == (0,)
    assert not first_of_equals(iter([("x", "y")]), known=iter([("x", "y")])).any()
    many = [(str(i % 700), "text") for i in range(2000)]
    assert first_of_equals(iter(many)).sum() == 700
