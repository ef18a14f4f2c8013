"""Configs of recipes by name."""

import pytest

from halo_tensor import (
    recipe_config,
)
from halo_tensor.recipe import RECIPES


def test_unknown_recipes_are_named():
    with pytest.raises(ValueError, match="name must be one of " + ", ".join(map(repr, RECIPES))):
        recipe_config("mine")
