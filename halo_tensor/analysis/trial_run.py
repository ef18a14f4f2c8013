"""Runs of a model that leave it as it was, some of them with other parameters.

Each context manager here restores the model when its block is left.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from math import sqrt
from typing import Any

import torch
from torch import nn

from halo_tensor.layers import kinds
from halo_tensor.layers.linear import stand_in
from halo_tensor.layers.linear_subclasses import follow_linear
from halo_tensor.operand.gains import Gains
from halo_tensor.recipe import Recipe
from halo_tensor.weight.tensor import HaloWeight

LossFn = Callable[[nn.Module, Any], torch.Tensor]
GRADIENT_SAMPLE = 65536  # elements of each parameter's gradient that are kept


@contextmanager
def untouched(model: nn.Module, evaluating: bool = True) -> Iterator[None]:
    """Run eagerly and with gradients enabled; then restore modes, gradients, buffers and the random state.

    Args:
        model: what runs inside the block. Its gradients are None at first, since autograd would add to the old ones in place.
        evaluating: run in evaluation mode, in which no dropout is applied and no running statistics are updated.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))  # loss_of seeds every device
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_restoring_tensors(model))
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if evaluating:
            model.eval()
        yield


@contextmanager
def _restoring_tensors(model: nn.Module) -> Iterator[None]:
    """Restore gradients and buffers."""
    gradients = {p: p.grad for p in model.parameters()}
    buffers = [(m, name, b, b.detach().clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for module, name, buffer, value in buffers:
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.copy_(value)
            module._buffers[name] = buffer  # a forward may have put another tensor there


@contextmanager
def swapped(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Put ``parameters`` in the place of the model's parameters of those qualified names, and put the old objects back."""
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
    """Let ``modules`` call ``F.linear``, which follows the recipe of a converted weight.

    A subclass of nn.Linear may multiply in another way in its own forward. A converted Conv1D becomes a plain one.
    """
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
    """Convert Conv1D modules to their recipes inside the block."""
    try:
        for module, recipe in recipes.items():
            kinds.convert(module, recipe, frozen=False)
        yield
    finally:
        for module in recipes:
            if kinds.recipe_of(module) is not None:
                kinds.restore(module)


@contextmanager
def following_experts(recipes: Mapping[Any, Recipe]) -> Iterator[None]:
    """Convert modules of experts to their recipes inside the block."""
    holders = ("_parameters", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_forward_pre_hooks")
    before = [(m, type(m), m.__dict__.get("_halo_gate"), [dict(m.__dict__[name]) for name in holders]) for m in recipes]
    try:
        for module, recipe in recipes.items():
            kinds.convert(module, recipe, frozen=False)
        yield
    finally:
        for module, own, gate, held in before:
            kinds.restore(module)
            for name, was in zip(holders, held, strict=True):
                module.__dict__[name].clear()
                module.__dict__[name].update(was)
            module.__class__ = own
            if gate is not None:
                module._halo_gate = gate


def dense_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return new dense parameters for all of the model's, by qualified name. They share memory with the old ones.

    Hooks and ``.grad`` of the old parameters do not see what is done with the new ones. Tied parameters stay tied.
    """
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
    """Return a parameter of the same value that follows ``recipe``.

    Args:
        weight: dense, [out, in].
        recipe: if it quantises nothing, ``weight`` itself is returned.
        gains: a balance, or None.
        earlier: the same weight converted to another recipe. Its codes are used again if both recipes ask for the same codes.
    """
    if recipe.is_identity:
        return weight
    same = isinstance(earlier, HaloWeight) and earlier.recipe.output.right == recipe.output.right
    if isinstance(earlier, HaloWeight) and same and gains is None is earlier.gain:
        made = HaloWeight(weight.detach(), earlier.operand, recipe)
    else:
        made = HaloWeight.from_hp(weight.detach(), recipe, gains=gains)
    return nn.Parameter(made, weight.requires_grad)


def loss_of(model: nn.Module, batch: Any, loss_fn: LossFn | None) -> torch.Tensor:
    """Return the scalar loss of ``model`` on ``batch``. The random seed is the same in every call.

    :func:`~halo_tensor.report` documents ``batch`` and ``loss_fn``.

    Raises:
        ValueError: there is no loss, it is no scalar, or it depends on no parameter that requires a gradient.
    """
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
    """Return samples of the gradient of each parameter that gets one, as float32 vectors. No ``.grad`` is written.

    A sample has at most GRADIENT_SAMPLE elements, the same ones in every call. It is multiplied by √(elements / sample), so
    that its sum of squares estimates that of the whole gradient.
    """
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: _sampled(g) for name, g in zip(parameters, found, strict=True) if g is not None}


def _sampled(gradient: torch.Tensor) -> torch.Tensor:
    flat = gradient.detach().flatten()
    if len(flat) <= GRADIENT_SAMPLE:
        return flat.float()
    chosen = _sample_indices(len(flat), GRADIENT_SAMPLE).to(flat.device)
    return flat[chosen].float() * sqrt(len(flat) / GRADIENT_SAMPLE)


@lru_cache(maxsize=16)  # a model has weights of few sizes, and every run asks for the same ones
def _sample_indices(elements: int, count: int) -> torch.Tensor:
    """Return ``count`` random indices below ``elements``. They are sorted, because memory is read faster in order."""
    generator = torch.Generator().manual_seed(elements)
    return torch.randint(elements, (count,), generator=generator).sort().values
