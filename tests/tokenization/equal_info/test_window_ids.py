"""Codes of windows as ids of 8 or 16 bits, and back."""

import numpy as np
import pytest

from tokenization.equal_info import window_ids, windows


@pytest.mark.parametrize('window_bits', windows.WINDOW_BITS)
@pytest.mark.parametrize('bits', [8, 16])
@pytest.mark.parametrize('number', [0, 1, 2, 5])
def test_ids_hold_the_codes(window_bits, bits, number):
    codes = np.random.default_rng(0).integers(1, 256, (number, window_bits // 8), np.uint8)
    ids = window_ids.to_ids(codes, bits)
    assert len(ids) == -(-number * window_bits // bits)
    np.testing.assert_array_equal(window_ids.from_ids(ids, bits, window_bits), codes)


def test_an_id_may_straddle_two_windows():
    codes = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    assert window_ids.to_ids(codes, 16).tolist() == [0x0102, 0x0304, 0x0506]


@pytest.mark.parametrize(('ids', 'bits'), [([1, 2, 3], 8), ([1, 2, 256], 8), ([1, 2], 16)])
def test_ids_that_are_no_windows_are_refused(ids, bits):
    with pytest.raises(ValueError, match=r'whole windows|out of range'):
        window_ids.from_ids(np.array(ids), bits, 16 if bits == 8 else 24)
