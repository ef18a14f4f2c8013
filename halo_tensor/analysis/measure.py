"""What a report is made of: the operands of every layer in one forward and backward, and how far from each other two results
are. Nothing here changes the model for longer than a ``with`` block."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import log10, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from halo_tensor.layers import kinds
from halo_tensor.layers.kinds import input_of
from halo_tensor.layers.linear import stand_in
from halo_tensor.layers.subclasses import follow_linear
from halo_tensor.operand.gains import Gains
from halo_tensor.recipe import Recipe, Rotation
from halo_tensor.reference import ops as reference
from halo_tensor.reference.hadamard import fit
from halo_tensor.weight.tensor import HaloWeight

LossFn = Callable[[nn.Module, Any], torch.Tensor]
LOSSLESS = 150.0  # dB: below float32's own rounding
GRADIENT_SAMPLE = 65536  # elements of each weight's gradient that are compared


@dataclass(frozen=True)
class Fidelity:
    """How close a matrix is to the exact one: the ``cosine`` of both as vectors, and ``sqnr``, in dB and within ±150:
    10 log₁₀(|exact|² / |difference|²)."""

    cosine: float
    sqnr: float

    @classmethod
    def of(cls, actual: torch.Tensor, exact: torch.Tensor) -> "Fidelity":
        a, e = actual.flatten().float(), exact.flatten().float()
        signal, power, dot = (float(u @ v) for u, v in ((e, e), (a, a), (e, a)))
        difference = a - e
        noise = float(difference @ difference)
        if noise == 0:
            return cls(1.0, LOSSLESS)
        if not 0 < signal * power < float("inf") or not noise < float("inf"):
            return cls(0.0, -LOSSLESS)
        return cls(dot / sqrt(signal * power), max(min(10 * log10(signal / noise), LOSSLESS), -LOSSLESS))


@dataclass(frozen=True)
class Outliers:
    """How heavy the tails of a matrix are: ``kurtosis``, E[x⁴]/E[x²]² (3 for a Gaussian), and ``peak``, max|x|/rms(x)."""

    kurtosis: float
    peak: float

    @classmethod
    def of(cls, x: torch.Tensor) -> "Outliers":
        flat = x.float().flatten()
        rms = (flat @ flat / len(flat)).sqrt().clamp_min(reference.SMALLEST_SCALE)
        squares = (flat / rms).square_()
        return cls(float(squares @ squares) / len(flat), squares.amax().sqrt().item())

    @classmethod
    def rotated(cls, x: torch.Tensor, dim: int, rotation: Rotation) -> "Outliers":
        """Of a matrix whose columns (``dim`` 1) are rotated in the blocks that fit, or whose rows (0) are, as tokens: of as
        many of them as whole blocks have."""
        if dim == 1:
            return cls.of(reference.rotate(x, None, fit(rotation, x.shape[1])))
        edge = min(rotation.edge, 1 << (len(x).bit_length() - 1))
        return cls.of(reference.rotate(x[: len(x) // edge * edge], replace(rotation, block=edge) if edge > 1 else None, None))


@dataclass
class Operands:
    """What reached one layer: ``tokens`` rows in all, of which ``x`` [t, in] and ``e`` [t, out] (None: no gradient arrived)
    hold the same evenly spaced ones. ``needs_grad_input``: whether X requires a gradient. ``x_group``: layers that were called
    with the very same X have the same."""

    tokens: int = 0
    x: torch.Tensor | None = None
    e: torch.Tensor | None = None
    needs_grad_input: bool = False
    x_group: int = -1
    _calls: list[list] = field(default_factory=list)

    def gather(self, limit: int) -> None:
        """Put what several calls of the layer have left together, in at most ``limit`` rows."""
        calls = [c for c in self._calls if c[1] is not None] or self._calls  # recomputed calls (checkpointing) have no E
        self._calls = []
        self.tokens = sum(n for _, _, n in calls)
        rows = torch.cat([x for x, _, _ in calls])
        kept = _evenly(len(rows), limit, rows.device)
        self.x = rows[kept]
        self.e = None if calls[0][1] is None else torch.cat([e for _, e, _ in calls])[kept]


def _evenly(n: int, limit: int, device: torch.device) -> torch.Tensor:
    """The indices of ``limit`` evenly spaced rows out of ``n``, or of all."""
    return torch.arange(min(n, limit), device=device) * n // max(min(n, limit), 1)


@contextmanager
def captured(layers: Mapping[str, nn.Linear], limit: int) -> Iterator[dict[str, Operands]]:
    """Yields what reaches ``layers`` in the forwards and backwards inside the block; complete when the block is left."""
    seen: dict[str, Operands] = {}
    latest: list = [None, -1]  # the latest X and its number; it is held, so that no other tensor gets its id

    def hook(name: str) -> Callable:
        def forward(module, args, kwargs, y):
            x = input_of(args, kwargs)
            if x.numel() == 0:
                return
            if x is not latest[0]:
                latest[:] = x, latest[1] + 1
            operands = seen.setdefault(name, Operands(x_group=latest[1]))
            rows = x.detach().reshape(-1, x.shape[-1])
            kept = _evenly(len(rows), limit, rows.device)
            call = [rows[kept], None, len(rows)]
            operands.needs_grad_input |= x.requires_grad
            operands._calls.append(call)

            def backward(e):
                call[1] = e.detach().reshape(-1, e.shape[-1])[kept]

            if y.requires_grad:
                y.register_hook(backward)

        return forward

    handles = [m.register_forward_hook(hook(name), with_kwargs=True) for name, m in layers.items()]
    try:
        yield seen
    finally:
        latest[0] = None
        for handle in handles:
            handle.remove()
    for operands in seen.values():
        operands.gather(limit)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout, no statistics updated), gradients enabled, eager, the same random numbers every time; and
    every module's mode and the random state as they were afterwards."""
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for module, mode in modes.items():
            stack.callback(setattr, module, "training", mode)
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))  # loss_of seeds all
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        yield


@contextmanager
def swapped(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """``parameters``, by their qualified names, in the place of the model's; the very same ones are put back."""
    places = []
    for name, new in parameters.items():
        path, _, leaf = name.rpartition(".")
        holder = model.get_submodule(path)._parameters
        places.append((holder, leaf, holder[leaf], new))
    try:
        for holder, leaf, _, new in places:
            holder[leaf] = new
        yield
    finally:
        for holder, leaf, old, _ in places:
            holder[leaf] = old


@contextmanager
def calling_linear(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block a subclass of nn.Linear whose forward multiplies in another way calls F.linear, where a parameter that
    follows a recipe is met; and a converted Conv1D is a plain one."""
    before = [(m, type(m), kinds.recipe_of(m)) for m in modules]
    try:
        for module, _, recipe in before:
            if isinstance(module, nn.Linear):
                follow_linear(module)
            elif recipe is not None:
                kinds.restore(module)
        yield
    finally:
        for module, own, recipe in before:
            module.__class__ = own
            if recipe is not None and not isinstance(module, nn.Linear):
                module.recipe = recipe  # type: ignore[assignment]


@contextmanager
def following(recipes: Mapping[nn.Module, Recipe]) -> Iterator[None]:
    """Inside the block each of these Conv1D follows its recipe."""
    try:
        for module, recipe in recipes.items():
            kinds.convert(module, recipe, frozen=False)
        yield
    finally:
        for module in recipes:
            if kinds.recipe_of(module) is not None:
                kinds.restore(module)


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """New parameters in the place of all of the model's, by qualified name: dense, sharing memory with the old ones. Neither
    these, nor hooks on them, nor their ``.grad`` then see what happens. Tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    parameters = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if type(p) is nn.Parameter or isinstance(p, HaloWeight):
            if id(p) not in made:
                made[id(p)] = stand_in(p)
            parameters[name] = made[id(p)]
    return parameters


def converted(
    weight: nn.Parameter, recipe: Recipe, gains: Gains | None = None, earlier: nn.Parameter | None = None
) -> nn.Parameter:
    """A parameter of the same value that follows ``recipe``, balanced if there are ``gains``; with the codes of ``earlier``,
    the same weight converted to another recipe, if they are the same."""
    if recipe.is_identity:
        return weight
    same = isinstance(earlier, HaloWeight) and earlier.recipe.output.right == recipe.output.right
    if isinstance(earlier, HaloWeight) and same and gains is None is earlier.gain:
        made = HaloWeight(weight.detach(), earlier.operand, recipe)
    else:
        made = HaloWeight.from_hp(weight.detach(), recipe, gains=gains)
    return nn.Parameter(made, weight.requires_grad)


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> torch.Tensor:
    """The scalar loss of ``model`` on ``batch``, checked; :func:`~halo_tensor.report` says how it is found."""
    torch.manual_seed(0)
    loss: Any
    if loss_fn is not None:
        loss, origin = loss_fn(model, batch), "loss_fn"
    else:
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
        origin = f"the {type(output).__name__} that {type(model).__name__} returned"
    if not isinstance(loss, torch.Tensor):
        raise ValueError(f"no loss in {origin}: add labels to the batch, or pass loss_fn=lambda model, batch: ...")
    if loss.numel() != 1:
        raise ValueError(
            f"{origin} gives a tensor of shape {list(loss.shape)} where a scalar loss is needed: pass "
            "loss_fn=lambda model, batch: ... that reduces it, e.g. with .mean()"
        )
    if not loss.requires_grad:
        raise ValueError(f"the loss of {origin} depends on no parameter that requires a gradient")
    return loss.reshape(())


def gradients(loss: torch.Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The gradient of each parameter that gets one, in float32: at most 65536 elements of each, the same random ones in every
    call, times √(elements/65536), so that sums of squares are those of the whole gradient's. No ``.grad`` is written."""
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    samples = {}
    for name, gradient in zip(parameters, found, strict=True):
        if gradient is None:
            continue
        flat = gradient.detach().flatten()
        if len(flat) > GRADIENT_SAMPLE:
            samples[name] = flat[_sample(len(flat), GRADIENT_SAMPLE).to(flat.device)].float() * sqrt(
                len(flat) / GRADIENT_SAMPLE
            )
        else:
            samples[name] = flat.float()
    return samples


@lru_cache(maxsize=16)  # weights have few sizes, and every run asks for the same
def _sample(elements: int, count: int) -> torch.Tensor:
    """The indices of ``count`` random elements, in order, which reads memory faster."""
    generator = torch.Generator().manual_seed(elements)
    return torch.randint(elements, (count,), generator=generator).sort().values


def products(
    x: torch.Tensor, weight: nn.Parameter, e: torch.Tensor | None, wanted: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    """``wanted`` of a layer's three products of x [t, in], weight [out, in] and e [t, out], by F.linear and its backward, in
    the dtype of the weight."""
    inputs = {"grad_input": x.to(weight.dtype).detach().requires_grad_("grad_input" in wanted), "grad_weight": weight}
    backward = [name for name in wanted if name != "output"]
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(inputs["grad_input"], weight)
        results = {"output": y.detach()}
        if backward:
            assert e is not None
            found = torch.autograd.grad(y, [inputs[name] for name in backward], e.to(y.dtype))
            results |= dict(zip(backward, found, strict=True))
    return results


def grad_weight(x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Eᵀ X, in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return e.float().t() @ x.float()


def outliers(operands: Operands, weight: torch.Tensor, rotation: Rotation) -> dict[str, tuple[Outliers, Outliers]]:
    """Of X, W and E, as they are and rotated as HALO does: X and W along in_features, E along tokens."""
    rotation = replace(rotation, block=rotation.block or 128)
    matrices = {"X": (operands.x, 1), "W": (weight.detach(), 1), "E": (operands.e, 0)}
    with torch.autocast(weight.device.type, enabled=False):
        return {
            name: (Outliers.of(matrix), Outliers.rotated(matrix, dim, rotation))
            for name, (matrix, dim) in matrices.items()
            if matrix is not None
        }
