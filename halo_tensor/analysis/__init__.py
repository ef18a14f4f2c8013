"""The cost and the errors of a recipe: counted from shapes, predicted for a GPU, and measured on batches."""

from halo_tensor.analysis.cost import Shape, bit_operations, saved_bytes, shapes
from halo_tensor.analysis.peak import PeakMemory, predict_peak
from halo_tensor.analysis.saved_memory import Saved, measure_saved

__all__ = ["PeakMemory", "Saved", "Shape", "bit_operations", "measure_saved", "predict_peak", "saved_bytes", "shapes"]
