"""Converting models: ``quantize_`` and ``dequantize_``, the default filter of layers, and the report of a conversion."""

from halo_tensor.convert.conversion import LEAST_SHARE, Conversion, percent, survey, warn_of_share, warn_of_unrotated
from halo_tensor.convert.filter import CHOICE, layer_filter
from halo_tensor.convert.prediction import kind_of, together
from halo_tensor.convert.quantize import dequantize_, quantize_

__all__ = [
    "CHOICE",
    "LEAST_SHARE",
    "Conversion",
    "dequantize_",
    "kind_of",
    "layer_filter",
    "percent",
    "quantize_",
    "survey",
    "together",
    "warn_of_share",
    "warn_of_unrotated",
]
