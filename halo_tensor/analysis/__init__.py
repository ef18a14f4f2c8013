"""What a recipe costs and loses: counted from shapes, predicted for a GPU, and measured on batches."""

from halo_tensor.analysis.cost import Saved, Shape, bit_operations, measure_saved, saved_bytes, shapes

__all__ = ["Saved", "Shape", "bit_operations", "measure_saved", "saved_bytes", "shapes"]
