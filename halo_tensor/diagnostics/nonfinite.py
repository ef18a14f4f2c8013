"""``find_nonfinite``: find where the first NaN or Inf of a training step comes from."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from halo_tensor.layers.experts import is_experts
from halo_tensor.weight.tensor import dense_value


@dataclass(frozen=True)
class Finding:
    """A tensor with a NaN or Inf.

    Attributes:
        layer: the qualified name of the module, "" for the model itself.
        module: the name of its class.
        phase: "forward" or "backward".
        product: "output", "grad_input" or "grad_weight" of a linear layer; "output" or "grad_input" of another module.
        operand: the operand of the product that has the NaN or Inf: "X", "W", "E" or "bias" of a linear layer, "input",
            "grad_output" or the name of a parameter of another module. None if the product made it from finite operands.
        nan: how many elements are NaN.
        inf: how many elements are infinite.
        shape: of the tensor.
        dtype: of the tensor.
    """

    layer: str
    module: str
    phase: str
    product: str
    operand: str | None
    nan: int
    inf: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def made_here(self) -> bool:
        """Whether the product made the NaN or Inf from finite operands."""
        return self.operand is None

    def __str__(self) -> str:
        what = " and ".join(f"{n} {kind}" for n, kind in ((self.nan, "NaN"), (self.inf, "Inf")) if n)
        tensor = f"{what} in {self.operand or self.product} {list(self.shape)} {str(self.dtype).removeprefix('torch.')}"
        where = f"{self.phase}, {self.layer or 'the model'} ({self.module})"
        if self.made_here:
            return f"{where}: {tensor}, made by the product {self.product} out of finite operands"
        return f"{where}: {tensor}, which {self._origin()}"

    def _origin(self) -> str:
        if self.operand in ("W", "bias"):
            return f"is a parameter that {self.product} reads: it was there before this step's products"
        return f"arrived at {self.product}: it was made between here and what was last seen finite"


@dataclass
class Findings:
    """What :func:`find_nonfinite` has found so far.

    Attributes:
        all: findings in the order of events. A result is not listed if an operand of its module was found.
        last_finite: the last finite tensor before the first finding, for example "output of layers.3.mlp".
    """

    all: list[Finding] = field(default_factory=list)
    last_finite: str | None = None

    @property
    def first(self) -> Finding | None:
        """The first finding, or None."""
        return self.all[0] if self.all else None

    def __bool__(self) -> bool:
        return bool(self.all)

    def __str__(self) -> str:
        if self.first is None:
            return "no NaN or Inf"
        last = f"\n  last seen finite: {self.last_finite}" if self.last_finite else ""
        more = f"\n  and {len(self.all) - 1} more that came later" if len(self.all) > 1 else ""
        return f"{self.first}{last}{more}"


class NonFiniteError(ArithmeticError):
    """Raised by ``find_nonfinite(model, stop=True)``.

    Attributes:
        finding: the first finding, which says where the NaN or Inf is.

    Example:
        >>> import torch
        >>> from halo_tensor import NonFiniteError, find_nonfinite
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 1))
        >>> try:
        ...     with find_nonfinite(model, stop=True):
        ...         model(torch.full((4, 16), torch.nan))
        ... except NonFiniteError as error:
        ...     print(error.finding.layer, error.finding.operand)
        0 X
    """

    def __init__(self, findings: Findings):
        super().__init__(str(findings))
        self.finding = findings.first


@contextmanager
def find_nonfinite(model: nn.Module, *, stop: bool = False) -> Iterator[Findings]:
    """Watch the forwards and backwards inside the block for NaN and Inf.

    For a linear layer, plain or converted, the operands X, W, E and the bias are checked, and the products output, grad_input
    and grad_weight. For experts of a mixture, and for any other module without children, inputs, parameters, outputs and
    gradients are checked. The first finding is therefore either a product that made the NaN or Inf from finite operands, or an
    operand that had it already; ``last_finite`` then names the tensor after which it was made.

    Modules run eagerly inside the block, and every check waits for the device. Use it for debugging only.

    Args:
        model: the model that runs inside the block.
        stop: raise at the first finding.

    Yields:
        the findings, which grow while the model runs.

    Raises:
        NonFiniteError: a NaN or Inf was found and ``stop`` is True.

    Example:
        >>> import torch
        >>> from halo_tensor import find_nonfinite
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 1))
        >>> with find_nonfinite(model) as found:
        ...     model(torch.full((4, 16), torch.inf)).sum().backward()
        >>> found.first.layer, found.first.product, found.first.operand, found.first.inf
        ('0', 'output', 'X', 64)
    """
    model = getattr(model, "_orig_mod", model)
    log = _Log(Findings(), stop)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or is_experts(module) or not any(module.children()):
                for handle in _Watch(log, name, module).register():
                    stack.callback(handle.remove)
        stack.callback(log.close)
        yield log.found


class _Log:
    """Checks tensors and keeps the findings."""

    def __init__(self, found: Findings, stop: bool):
        self.found, self.stop, self.open = found, stop, True

    def close(self) -> None:
        """Stop checking. Hooks on tensors of a graph may run after the block."""
        self.open = False

    def is_finite(
        self, tensor: Any, layer: str, module: nn.Module, phase: str, product: str, operand: str | None = None
    ) -> bool:
        """Whether a tensor is finite; record it in either case. Anything that is no floating tensor counts as finite."""
        if not self.open or not isinstance(tensor, torch.Tensor) or not (tensor.is_floating_point() or tensor.is_complex()):
            return True
        dense = dense_value(tensor.detach())
        if bool(dense.isfinite().all()):
            if not self.found.all:
                self.found.last_finite = f"{operand or product} of {layer or 'the model'}"
            return True
        nan, inf = int(dense.isnan().sum()), int(dense.isinf().sum())
        kind = type(module).__name__
        self.found.all.append(Finding(layer, kind, phase, product, operand, nan, inf, tuple(dense.shape), dense.dtype))
        if self.stop:
            raise NonFiniteError(self.found)
        return False


class _Watch:
    """The hooks on one module."""

    def __init__(self, log: _Log, name: str, module: nn.Module):
        self.log, self.name, self.module = log, name, module
        self.input, self.gradient = ("X", "E") if isinstance(module, nn.Linear) else ("input", "grad_output")
        self.finite = {"forward": True, "backward": True}  # whether all operands of the latest call are

    def register(self) -> list[Any]:
        """Register the hooks and return their handles."""
        handles: list[Any] = [
            self.module.register_forward_pre_hook(self._before, with_kwargs=True),
            self.module.register_forward_hook(self._after, with_kwargs=True),
        ]
        for key, parameter in self.module.named_parameters(recurse=False):
            if parameter.requires_grad:
                product = "grad_weight" if key == "weight" else f"grad_{key}"
                handles.append(parameter.register_hook(partial(self._check_result, "backward", product)))
        return handles

    def _check_operand(self, tensor: Any, phase: str, product: str, operand: str) -> None:
        self.finite[phase] &= self.log.is_finite(tensor, self.name, self.module, phase, product, operand)

    def _check_result(self, phase: str, product: str, tensor: Any) -> None:
        if self.finite["forward"] and self.finite[phase]:  # otherwise an operand explains the result
            self.log.is_finite(tensor, self.name, self.module, phase, product)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self.finite["forward"] = True
        args, kwargs = tuple(self._enter(x) for x in args), {key: self._enter(x) for key, x in kwargs.items()}
        for key, parameter in module.named_parameters(recurse=False):
            self._check_operand(parameter, "forward", "output", "W" if key == "weight" else key)
        return args, kwargs

    def _enter(self, x: Any) -> Any:
        """Check an input, and return it or a view of it whose gradient is this module's share of the input's gradient."""
        if not isinstance(x, torch.Tensor):
            return x
        self._check_operand(x, "forward", "output", self.input)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return x
        x = x.view_as(x)
        x.register_hook(partial(self._check_result, "backward", "grad_input"))
        return x

    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        for y in output if isinstance(output, (tuple, list)) else (output,):
            self._check_result("forward", "output", y)
            if isinstance(y, torch.Tensor) and y.requires_grad:
                y.register_hook(self._check_output_gradient)

    def _check_output_gradient(self, gradient: torch.Tensor) -> None:
        self.finite["backward"] = True
        self._check_operand(gradient, "backward", "grad_input", self.gradient)
