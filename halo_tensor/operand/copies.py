"""The ops that copy, move, cast and transpose an operand."""

from typing import Any

import torch

from halo_tensor.fences.pytorch import return_and_correct_aliasing
from halo_tensor.kernels.device import check_scales
from halo_tensor.operand.tensor import HadamardQuantTensor

aten = torch.ops.aten
_OTHER_AXIS = {"rows": "columns", "columns": "rows"}


@HadamardQuantTensor.implements(
    [aten.detach.default, aten.clone.default, aten.alias.default, aten._pin_memory.default, aten.empty_like.default]
)
def _(func: Any, types: Any, args: tuple, kwargs: dict) -> HadamardQuantTensor:
    new = args[0]._apply_fn_to_data(lambda t: func(t, *args[1:], **kwargs))
    return return_and_correct_aliasing(func, args, kwargs, new)


@HadamardQuantTensor.implements(aten._to_copy.default)
def _(func: Any, types: Any, args: tuple, kwargs: dict) -> HadamardQuantTensor:
    self = args[0]
    kwargs = dict(kwargs)
    dtype = kwargs.pop("dtype", None)  # of the matrix that it stands for; the codes keep theirs
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"a HadamardQuantTensor cannot stand for {dtype}; take dequantize().to({dtype})")
    if kwargs.get("device") is not None:
        check_scales((self.granularity,), kwargs["device"])
    return self._with(dtype=dtype)._apply_fn_to_data(lambda t: func(t, **kwargs))


@HadamardQuantTensor.implements([aten.t.default, aten.transpose.int])
def _(func: Any, types: Any, args: tuple, kwargs: dict) -> HadamardQuantTensor:
    self = args[0]
    if func is aten.transpose.int and args[1] % 2 == args[2] % 2:
        return aten.alias.default(self)
    return _transpose(func, types, args, kwargs)


# Above the dispatcher as well: an operand shared from outside of inference mode may then be transposed inside of it.
@HadamardQuantTensor.implements_torch_function([torch.Tensor.t, torch.t])
def _transpose(func: Any, types: Any, args: tuple, kwargs: dict | None) -> HadamardQuantTensor:
    self = args[0].unpacked()
    scale = self.scale.t().contiguous() if self.granularity.is_blocked and self.scale is not None else self.scale
    return self._with(
        size=(self.shape[1], self.shape[0]),
        codes=self.codes_t,
        codes_t=self.codes,
        scale=scale,
        granularity=self.granularity.transposed,
        row_rotation=self.column_rotation,
        column_rotation=self.row_rotation,
        gain_axis=_OTHER_AXIS.get(self.gain_axis or ""),
        flat=_OTHER_AXIS.get(self.flat or ""),
    )
