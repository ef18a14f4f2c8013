"""``find_nonfinite``: where the first NaN or Inf of a training step comes from."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from halo_tensor.weight.tensor import dense_value


@dataclass(frozen=True)
class Finding:
    """A NaN or Inf that was seen.

    Attributes:
        layer: the qualified name of the module, "" for the model itself.
        module: its class.
        phase: "forward" or "backward".
        product: "output", "grad_input" or "grad_weight" of a linear layer; for another module "output" or "grad_input".
        operand: the operand of the product that had it: "X", "W", "E" or "bias", or "input" and "grad_output" of another
            module; None if all were finite, and the product itself made it.
        nan, inf: how many elements.
        shape, dtype: of the tensor that has them.
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
    """What :func:`find_nonfinite` saw so far, in the order of events. What a module returns is not listed if its operands
    explain it.

    Attributes:
        first: the first of ``all``, or None.
        last_finite: what was last seen finite before it, e.g. "output of layers.3.mlp".
    """

    all: list[Finding] = field(default_factory=list)
    last_finite: str | None = None

    @property
    def first(self) -> Finding | None:
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
    """Raised by ``find_nonfinite(model, stop=True)``; ``finding`` says where."""

    def __init__(self, findings: Findings):
        super().__init__(str(findings))
        self.finding = findings.first


@contextmanager
def find_nonfinite(model: nn.Module, *, stop: bool = False) -> Iterator[Findings]:
    """Watch the forwards and backwards inside the block for NaN and Inf.

        with halo_tensor.find_nonfinite(model) as found:
            model(**batch).loss.backward()
        print(found)  # forward, layers.3.mlp.down_proj (Linear): 2 Inf in output …, made by the product output out of …

    Of a linear layer, plain or converted, it looks at the operands X, W, E and the bias, and at the products output,
    grad_input and grad_weight; of any other module without children, at inputs, parameters, outputs and gradients. So the
    first finding is either a product that made it out of finite operands, or an operand that had it on arrival;
    ``last_finite`` then says between which two modules it was made. Every look waits for the device: for debugging only.
    Modules run eagerly inside.

    Args:
        stop: raise :class:`NonFiniteError` at the first finding.
    """
    model = getattr(model, "_orig_mod", model)
    watch = _Watch(Findings(), stop)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or not any(module.children()):
                watch.layer(stack, name, module)
        stack.callback(watch.close)
        yield watch.found


class _Watch:
    def __init__(self, found: Findings, stop: bool):
        self.found, self.stop, self.open = found, stop, True

    def close(self) -> None:
        self.open = False  # hooks on tensors of a graph that outlives the block

    def is_finite(
        self, tensor: Any, layer: str, module: nn.Module, phase: str, product: str, operand: str | None = None
    ) -> bool:
        """Whether a tensor is finite, which is noted either way. True of what is no floating tensor, and once closed."""
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

    def layer(self, stack: ExitStack, name: str, module: nn.Module) -> None:
        operand, gradient = ("X", "E") if isinstance(module, nn.Linear) else ("input", "grad_output")
        finite = {"forward": True, "backward": True}  # the operands of the latest call

        def arrives(tensor: Any, phase: str, product: str, operand: str) -> None:
            finite[phase] &= self.is_finite(tensor, name, module, phase, product, operand)

        def results(tensor: Any, phase: str, product: str) -> None:
            if finite["forward"] and finite[phase]:  # else it only follows from what was found
                self.is_finite(tensor, name, module, phase, product)

        def enter(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            arrives(x, "forward", "output", operand)
            if not (x.requires_grad and torch.is_grad_enabled()):
                return x
            x = x.view_as(x)  # of its own, so that its gradient is this module's share
            x.register_hook(lambda g: results(g, "backward", "grad_input"))
            return x

        def before(module, args, kwargs):
            finite["forward"] = True
            args, kwargs = tuple(enter(x) for x in args), {key: enter(x) for key, x in kwargs.items()}
            for key, parameter in module.named_parameters(recurse=False):
                arrives(parameter, "forward", "output", "W" if key == "weight" else key)
            return args, kwargs

        def leave(g):
            finite["backward"] = True
            arrives(g, "backward", "grad_input", gradient)

        def after(module, args, kwargs, output):
            for y in output if isinstance(output, (tuple, list)) else (output,):
                results(y, "forward", "output")
                if isinstance(y, torch.Tensor) and y.requires_grad:
                    y.register_hook(leave)

        def on_gradient(product: str) -> Callable:
            return lambda g: results(g, "backward", product)

        handles: list[Any] = [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        ]
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                handles.append(parameter.register_hook(on_gradient("grad_weight" if key == "weight" else f"grad_{key}")))
        for handle in handles:
            stack.callback(handle.remove)
