"""The generator against its published vectors and a reference in plain integers, for NumPy and torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_ntk.compute.projection.philox import key_of, philox, split

#: Known answers of philox4x32-10, from ``kat_vectors`` of Random123: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

WORD = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
COUNTER, KEY = st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD)


def plain_philox(counter, key):
    """Salmon et al. 2011 in whole numbers of any size: nothing to wrap and nothing to mask but the words themselves."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for number in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        weyl0, weyl1 = (k0 + number * 0x9E3779B9) % 2**32, (k1 + number * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = right // 2**32 ^ c1 ^ weyl0, right % 2**32, left // 2**32 ^ c3 ^ weyl1, left % 2**32
    return c0, c1, c2, c3


def by_numpy(counter, key):
    found = philox(tuple(np.array([word], dtype=np.int64) for word in counter), key)
    return tuple(int(word[0]) for word in found)


def by_torch(counter, key):
    found = philox(tuple(torch.tensor([word], dtype=torch.int64) for word in counter), key)
    return tuple(int(word[0]) for word in found)


@pytest.mark.parametrize("make", [plain_philox, by_numpy, by_torch])
@pytest.mark.parametrize(("counter", "key", "words"), KNOWN, ids=["zeros", "ones", "digits of pi"])
def test_known_answers(counter, key, words, make):
    assert make(counter, key) == words


@settings(max_examples=100, deadline=None)
@given(counters=st.lists(COUNTER, min_size=1, max_size=5), key=KEY)
def test_random_counters(counters, key):
    """NumPy and torch give what plain integers give, for arrays of counters; words stay below 2³² and int64."""
    wanted = np.array([plain_philox(counter, key) for counter in counters]).T
    columns = np.array(counters, dtype=np.int64).T
    for words in (philox(tuple(columns), key), philox(tuple(torch.from_numpy(columns.copy())), key)):
        assert all(word.dtype in (np.int64, torch.int64) for word in words)
        np.testing.assert_array_equal(np.stack([np.asarray(word) for word in words]), wanted)


def test_counters_broadcast():
    first, second = np.arange(3)[:, None], np.arange(2**32 - 4, 2**32)[None]
    found = philox((first, np.array([[5]]), second, np.array([[7]])), (11, 13))
    for i in range(3):
        for j in range(4):
            wanted = plain_philox((i, 5, 2**32 - 4 + j, 7), (11, 13))
            assert tuple(int(np.broadcast_to(word, (3, 4))[i, j]) for word in found) == wanted


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**40 + 3, 2**64 - 1])
def test_the_key_is_both_words_of_the_seed(seed):
    low, high = key_of(seed)
    assert 0 <= low < 2**32
    assert 0 <= high < 2**32
    assert low + 2**32 * high == seed


def test_numbers_are_split_into_words():
    numbers = np.array([0, 1, 2**32 - 1, 2**32, 2**33 + 5, 2**62 + 9])
    for given_numbers in (numbers, torch.from_numpy(numbers)):
        low, high = split(given_numbers)
        assert [int(a) + 2**32 * int(b) for a, b in zip(low, high, strict=True)] == numbers.tolist()
        assert int(low.max()) < 2**32
