"""Stand-ins for the buffers of a graph, on which the body of an op runs while Inductor compiles it.

Private API: ``torch._inductor.ir`` (ExternKernel, FixedLayout) and ``torch._inductor.lowering`` (empty_strided, full). Tested
with torch 2.11 to 2.15.
"""

from dataclasses import dataclass
from typing import Any

import sympy
from torch._inductor import ir, lowering

from halo_tensor.kernels.stand_ins import Memory, Unsupported
from halo_tensor.kernels.stand_ins import StandIn as PlainStandIn


@dataclass(eq=False)
class Buffer(Memory):
    """A buffer of the graph, or one that will be allocated.

    Attributes:
        box: Inductor's representation of the buffer; None until :meth:`realized` allocates it.
    """

    box: Any = None

    def realized(self) -> Any:
        """Return the buffer, allocated."""
        if self.box is None:
            size, dtype, device = [*self.shape], self.dtype, self.device
            if self.fill is None:
                self.box = lowering.empty_strided(size, [*self.stride], dtype=dtype, device=device)
            else:
                self.box = lowering.full(size, self.fill, dtype=dtype, device=device)
                self.box.realize()
        return self.box


class StandIn(PlainStandIn):
    """A stand-in for a buffer.

    Attributes:
        producer: of the first tensor of an op: the function that computes its elements (and those of the second tensor, if the
            op takes two), and stand-ins for what that function reads; None if there is none. If the body passes the function
            to a launch instead of the tensor, nothing reads the tensor's buffer, and Inductor drops it.
    """

    memory_type = Buffer

    @classmethod
    def of(cls, recording: list[tuple], box: Any) -> "StandIn":
        """Return the stand-in for an argument of the op, with its strides settled."""
        box = ir.ExternKernel.realize_input(box)
        box.freeze_layout()
        layout = box.get_layout()
        if not all(isinstance(n, (int, sympy.Integer)) for n in (*layout.size, *layout.stride)):
            raise Unsupported("a dynamic shape")
        shape, stride = (tuple(map(int, sizes)) for sizes in (layout.size, layout.stride))
        return cls(recording, Buffer(shape, stride, layout.dtype, layout.device, box=box, given=True))
