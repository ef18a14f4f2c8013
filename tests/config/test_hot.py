"""The config of HOT."""

import pytest

from halo_tensor import (
    hot_config,
)


@pytest.mark.parametrize("arguments", [{"rank": 4.0}, {"rank": True}, {"seed": 1.0, "rank": None}, {"block_size": 16.0}])
def test_numbers_that_are_no_integers(arguments):
    """4.0 would share a cached recipe with 4."""
    with pytest.raises(ValueError, match=r"must be (an integer|a power of two|one of)"):
        hot_config(**arguments)


def test_a_field_of_0_1_0_is_named_by_its_present_name():
    with pytest.raises(ValueError, match="no field 'scale' .'scale' is now 'grad_output_granularity'.; its fields are rank"):
        hot_config(scale="tokens")
