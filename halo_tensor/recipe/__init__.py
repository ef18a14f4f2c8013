"""Methods of training as data: number formats, the language of recipes, and the methods themselves. Nothing here knows of
tensors or kernels."""

from halo_tensor.recipe.formats import (
    FORMATS,
    FP4_E1M2,
    FP4_E3M0,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    INT4,
    INT8,
    Format,
)
from halo_tensor.recipe.language import DIMENSIONS, PLAIN, PRODUCTS, E, Operand, Product, Recipe, Rotation, W, X
from halo_tensor.recipe.methods import RECIPES, halo, hot, ideal, jetfire, lbp_wht, luq, switchback

__all__ = [
    "DIMENSIONS",
    "FORMATS",
    "FP4_E1M2",
    "FP4_E3M0",
    "FP6_E2M3",
    "FP6_E3M2",
    "FP8_E4M3",
    "FP8_E5M2",
    "INT4",
    "INT8",
    "PLAIN",
    "PRODUCTS",
    "RECIPES",
    "E",
    "Format",
    "Operand",
    "Product",
    "Recipe",
    "Rotation",
    "W",
    "X",
    "halo",
    "hot",
    "ideal",
    "jetfire",
    "lbp_wht",
    "luq",
    "switchback",
]
