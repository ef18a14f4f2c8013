"""The backends of products, in the order in which they are asked.

A backend is a module with two functions. ``why_not(request)`` returns the reason to decline a product, or None.
``plan(request)`` returns a :class:`~halo_tensor.kernels.launch.Variant` for the numbers and tensors that
:func:`halo_tensor.kernels.matmul.plan.plan` lists, or None after a warning if it could not be prepared.

A GPU generation with a kernel of its own is a module here and a row in ``BACKENDS``.
"""

from typing import Any, NamedTuple

import torch

from halo_tensor.fences.fast_paths import FAST_PATHS, GLUON
from halo_tensor.kernels.device import runs
from halo_tensor.kernels.matmul import cublas, few_rows, pytorch, sm80, tma
from halo_tensor.kernels.matmul.request import Request, multiprocessors, size_class
from halo_tensor.recipe import FP8_E4M3, INT8
from halo_tensor.reference.codes import code_dtype


class Backend(NamedTuple):
    """A backend that ``HALO_DISABLE`` can switch off by its name, if it is a fast path.

    Attributes:
        name: as in :data:`halo_tensor.fences.fast_paths.FAST_PATHS`.
        module: the module that serves the products; None if it could not be imported.
    """

    name: str
    module: Any

    def why_not(self, request: Any) -> str | None:
        """Return the reason to decline a product, or None."""
        path = FAST_PATHS.get(self.name)
        if path is not None and (reason := path.why_off()) is not None:
            return reason
        return "it could not be imported" if self.module is None else self.module.why_not(request)

    def plan(self, request: Any) -> Any:
        """Return the launch of a product that was not declined; None after a warning if it could not be prepared.
        A request of a grouped product gives a Planned."""
        return self.module.plan(request)


#: The first backend that does not decline serves a product. The last one declines none.
BACKENDS = (
    Backend("few_rows", few_rows),
    Backend("cublas", cublas),
    Backend("gluon", GLUON.load("halo_tensor.kernels.matmul.sm90")),
    Backend("tma", tma),
    Backend("sm80", sm80),
    Backend("pytorch", pytorch),
)


def answers(device: torch.device) -> dict[str, str | None]:
    """Ask each backend for a product of 4096×4096 matrices, in int8 and in fp8, with a scale per row and per column.

    Returns:
        "int8 by tma" and so on -> the reason why the backend does not serve the product; None for the one that does. Formats
        that the device cannot multiply are left out.
    """
    found: dict[str, str | None] = {}
    for format in (INT8, FP8_E4M3):
        if not runs((format,), device):
            continue
        code, size = code_dtype(format), size_class(4096, 4096, multiprocessors(device))._replace(vendor=True)
        request = Request(device, code, code, 4096, 2, 2, False, None, None, None, torch.bfloat16, size)
        serves: str | None = None
        for backend in BACKENDS:
            reason = backend.why_not(request)
            if reason is None and serves is not None:
                reason = f"{serves} serves it"
            elif reason is None:
                serves = backend.name
            found[f"{format} by {backend.name}"] = reason
    return found
