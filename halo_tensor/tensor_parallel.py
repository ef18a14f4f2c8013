"""Tensor and sequence parallelism: styles for ``torch.distributed.tensor.parallel.parallelize_module``.

::

            tokens split    HaloPrepareInput        HaloColwiseParallel            HaloRowwiseParallel    tokens split
    X ─────────────────▶ all-gather of codes ─▶ rows of W on each rank ─▶ columns of W on each rank ─▶ reduce-scatter ─▶ Y

Each rank quantises the parts of X, W and E that it multiplies, as the recipe says. Sums over ranks are in the layer's dtype.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.compiler import is_compiling
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from halo_tensor.fences.collectives import Ranks
from halo_tensor.layers.hooks import SPLIT
from halo_tensor.layers.linear_subclasses import subclass_of
from halo_tensor.products.collectives import copied, summed
from halo_tensor.products.shared_input import PreparedInput, SharedInput, prepare_in_graph, shared_input
from halo_tensor.reference.blocks import BLOCK
from halo_tensor.weight.sharded_parameters import is_sharded
from halo_tensor.weight.tensor import HaloWeight
from halo_tensor.weight.tensor_parallel import local, obstacle, split, split_plain


class _Split(NamedTuple):
    """How a layer is split among ranks.

    Attributes:
        style: its name, for errors.
        dim: of the weight [out, in] along which it is split.
        mesh: of the ranks.
        ranks: the same as ops take them.
        input: the placement of an input that is a plain tensor.
        output: the placement of the output.
        gathered_grad: as what the gradient of the output is gathered, "dense" or "int8".
        use_local_output: whether the output is a plain tensor.
    """

    style: str
    dim: int
    mesh: DeviceMesh
    ranks: Ranks
    input: Placement
    output: Placement
    gathered_grad: str
    use_local_output: bool


class HaloPrepareInput(ParallelStyle):
    """Make the input of a module one that its colwise layers share, such as q, k and v of attention.

    The layers share one all-gather of codes, if tokens are split, and the sum of their gradients shares one reduction. The
    module sees the shape of the whole input. A layer that was not converted, or any other function, gets the dense input,
    which is gathered in high precision.

    Args:
        input_layouts: ``Shard(1)`` if ranks have parts of dimension 1, the tokens; ``Replicate()`` if all have the whole. It
            is not used if the input is a DTensor.
        argument: the name of the argument in the module's call. None for the first.

    Example:
        >>> from torch.distributed.tensor import Shard
        >>> from halo_tensor.tensor_parallel import HaloColwiseParallel, HaloPrepareInput
        >>> plan = {"self_attn": HaloPrepareInput(input_layouts=Shard(1)), "self_attn.q_proj": HaloColwiseParallel()}
    """

    def __init__(self, *, input_layouts: Placement | None = None, argument: str | None = None) -> None:
        super().__init__()
        self.input_layouts, self.argument = input_layouts or Replicate(), argument

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = Ranks.of(device_mesh.get_group())

        def prepare(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            name = self.argument or (None if args else next(iter(kwargs)))
            x = args[0] if name is None else kwargs[name]
            x, dim = _tokens(x, self.input_layouts, "HaloPrepareInput")
            if is_compiling():
                x = prepare_in_graph(x, -1 if dim is None else dim, *ranks)
            else:
                x = PreparedInput.of(SharedInput.of(x, dim, ranks))
            return ((x, *args[1:]), kwargs) if name is None else (args, kwargs | {name: x})

        module.register_forward_pre_hook(prepare, with_kwargs=True)
        return module


class _HaloStyle(ParallelStyle):
    """A style of one converted linear layer."""

    dim: int  # of the weight [out, in] along which it is split
    gathered_grad = "dense"

    def __init__(self, input_layouts: Placement, output_layouts: Placement, use_local_output: bool) -> None:
        super().__init__()
        self.input_layouts, self.output_layouts, self.use_local_output = input_layouts, output_layouts, use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """Split a layer, in place. ``parallelize_module`` calls it.

        Raises:
            ValueError: the layer is not converted, or split already; or its weight cannot be cut for so many ranks.
        """
        name = type(self).__name__
        weight = _converted_weight(module, name)
        reason = obstacle(weight, self.dim, device_mesh.size())
        if self.gathered_grad == "int8" and weight.shape[0] % BLOCK:
            reason = f"gathered_grad='int8' needs out_features that are a multiple of {BLOCK}"
        if reason:
            raise ValueError(f"{name}: a weight of {list(weight.shape)} [out, in] cannot be split: {reason}")
        src = getattr(self, "src_data_rank", 0)
        module.register_parameter("weight", split(weight, self.dim, device_mesh, src))
        bias = module._parameters.get("bias")
        if bias is not None:
            placement = Shard(0) if self.dim == 0 else Replicate()
            module.register_parameter("bias", split_plain(bias, placement, device_mesh, src))
        ranks = Ranks.of(device_mesh.get_group())
        layouts = self.input_layouts, self.output_layouts, self.gathered_grad
        how = _Split(name, self.dim, device_mesh, ranks, *layouts, self.use_local_output)
        if how not in _splits:
            _splits.append(how)
        module.__dict__[SPLIT] = _splits.index(how)
        kind: Any = type(module)
        module.__class__ = _splitting(kind)
        return module


class HaloColwiseParallel(_HaloStyle):
    """Split out_features of a converted linear layer among ranks: each has some rows of W [out, in], with their codes.

    The output of a rank has its part of the out_features. Gradients of X are summed over ranks, and if tokens are split,
    scattered.

    Args:
        input_layouts: ``Replicate()``, the default, if all ranks have the whole X; ``Shard(1)`` if each has a part of the
            tokens, dimension 1, of which codes and scales are then gathered. Where several layers read one X, use
            :class:`HaloPrepareInput` on the module that holds them, with this. It is not used if X is a DTensor or prepared.
        use_local_output: whether the output is a plain tensor. If not it is a DTensor, ``Shard(-1)``.

    Raises:
        ValueError: another ``input_layouts``. ``parallelize_module`` raises it if the layer is not converted, or if the ranks
            do not divide its out_features.

    Example:
        >>> from halo_tensor.tensor_parallel import HaloColwiseParallel, HaloRowwiseParallel
        >>> plan = {"mlp.up": HaloColwiseParallel(), "mlp.down": HaloRowwiseParallel()}
        >>> # quantize_(model, halo_config(1, "int8")), and then parallelize_module(model, mesh, plan)
    """

    dim = 0

    def __init__(self, *, input_layouts: Placement | None = None, use_local_output: bool = True) -> None:
        _check_layout("HaloColwiseParallel", "input_layouts", input_layouts)
        super().__init__(input_layouts or Replicate(), Shard(-1), use_local_output)


class HaloRowwiseParallel(_HaloStyle):
    """Split in_features of a converted linear layer among ranks: each has some columns of W [out, in], whole blocks of its
    rotation.

    X of a rank has its part of the in_features, as the output of :class:`HaloColwiseParallel` does. Outputs are summed over
    ranks in the layer's dtype. X and W have scales of their own on each rank.

    Args:
        output_layouts: ``Replicate()``, the default, if all ranks get the whole sum; ``Shard(1)`` if each gets a part of the
            tokens, dimension 1, and the gradient of the output is gathered.
        gathered_grad: "dense" gathers that gradient in its dtype; "int8" as codes in rotated blocks of 128 elements, half the
            bytes of bf16. The recipe then quantises the gathered gradient, which is so rounded twice.
        use_local_output: whether the output is a plain tensor. If not it is a DTensor of ``output_layouts``.

    Raises:
        ValueError: another ``output_layouts`` or ``gathered_grad``. ``parallelize_module`` raises it if the layer is not
            converted, or if parts of its in_features are not whole blocks.

    Example:
        >>> from torch.distributed.tensor import Shard
        >>> from halo_tensor.tensor_parallel import HaloRowwiseParallel
        >>> plan = {"self_attn.o_proj": HaloRowwiseParallel(output_layouts=Shard(1))}
    """

    dim = 1

    def __init__(
        self, *, output_layouts: Placement | None = None, gathered_grad: str = "dense", use_local_output: bool = True
    ) -> None:
        _check_layout("HaloRowwiseParallel", "output_layouts", output_layouts)
        if gathered_grad not in ("dense", "int8"):
            raise ValueError(f"HaloRowwiseParallel: gathered_grad is 'dense' or 'int8'; got {gathered_grad!r}")
        if gathered_grad == "int8" and not isinstance(output_layouts, Shard):
            raise ValueError(
                "HaloRowwiseParallel: gathered_grad='int8' needs output_layouts=Shard(1); otherwise none is gathered"
            )
        self.gathered_grad = gathered_grad
        super().__init__(Shard(-1), output_layouts or Replicate(), use_local_output)


def _check_layout(style: str, name: str, layout: Placement | None) -> None:
    if layout is not None and not (layout.is_replicate() or type(layout) is Shard):
        raise ValueError(f"{style}: {name} is Replicate(), or Shard(d) for the dimension d of the tokens; got {layout!r}")


def _converted_weight(module: nn.Module, style: str) -> HaloWeight:
    """Return the weight of a layer that can be split.

    Raises:
        ValueError: there is none.
    """
    kind = type(module).__name__
    weight = module._parameters.get("weight")
    if is_sharded(weight):
        raise ValueError(
            f"{style}: the weight of this {kind} is sharded already: call parallelize_module once, before fully_shard"
        )
    if not isinstance(weight, HaloWeight) or not isinstance(module, nn.Linear):
        raise ValueError(
            f"{style} splits an nn.Linear that quantize_ has converted; this {kind} is not one. Call quantize_ before "
            f"parallelize_module, and use torch's {style.removeprefix('Halo')} for a layer that stays in high precision"
        )
    if type(module).forward is not nn.Linear.forward:
        raise ValueError(f"{style}: a {kind} has a forward of its own, which would not be split; leave it out of the plan")
    return weight


def _tokens(x: torch.Tensor, layout: Placement, style: str) -> tuple[torch.Tensor, int | None]:
    """Return this rank's tensor of an input, and the dimension along which its tokens are split, or None.

    Args:
        x: [..., tokens, ..., in].
        layout: of an ``x`` that is no DTensor.
        style: for the error.
    """
    if isinstance(x, DTensor):
        layout, x = x.placements[0], x.to_local()
    if layout.is_replicate():
        return x, None
    dim = layout.dim % x.ndim if isinstance(layout, Shard) else -1
    if dim in (-1, x.ndim - 1):
        raise ValueError(
            f"{style}: an input of {list(x.shape)} is {layout!r}; it takes one that is whole, or split along tokens"
        )
    return x, dim


def _rows(how: _Split, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute this rank's out_features."""
    shared = shared_input(x)
    if shared is None:
        shared = SharedInput.of(*_tokens(x, how.input, how.style), how.ranks)
    weight = local(weight)
    bias = None if bias is None else local(bias)
    if isinstance(weight, HaloWeight):
        gains = None if weight.gains is None else weight.gains[::-1]
        trains = torch.is_grad_enabled() and weight.requires_grad
        if (operand := shared.codes(weight.recipe, gains, trains)) is not None:
            return weight.linear(shared.plain, bias, operand)
    return F.linear(shared.dense, weight, bias)


def _columns(how: _Split, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute the product with this rank's in_features, and sum it over ranks."""
    if isinstance(x, DTensor):
        if not x.placements[0].is_shard(x.ndim - 1):
            raise ValueError(
                f"{how.style}: an input {list(x.shape)} is {x.placements[0]!r}; it takes one whose in_features are split"
            )
        x = x.to_local()
    dim = how.output.dim % x.ndim if isinstance(how.output, Shard) else None
    y = summed(F.linear(x, local(weight)), dim, how.ranks, how.gathered_grad == "int8")
    if bias is None:
        return y
    bias = local(bias)
    return y + (bias if dim is None else copied(bias, how.ranks)).to(y.dtype)


def _forward(module: Any, input: torch.Tensor) -> torch.Tensor:
    """The forward of a layer that is split."""
    how = _splits[module._split]
    run = _in_graph if is_compiling() else _run
    y = run(module._split, input, module.weight, module.bias)
    return y if how.use_local_output else DTensor.from_local(y, how.mesh, [how.output], run_check=False)


def _run(index: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    how = _splits[index]
    return (_rows if how.dim == 0 else _columns)(how, x, weight, bias)


#: How layers are split. A graph knows an index, since it holds no meshes; layers that are split alike share it and a graph.
_splits: list[_Split] = []
# Dynamo puts the call into its graph as it stands, and AOTAutograd traces through it, backward included.
_in_graph = torch.compiler.allow_in_graph(_run)


@cache
def _splitting(own: Any) -> Any:
    """Make a subclass of a layer's class with the forward of a layer that is split."""
    return subclass_of(own, {"forward": _forward}, _rebuild)


def _rebuild(own: type) -> nn.Module:
    return nn.Module.__new__(_splitting(own))


__all__ = ["HaloColwiseParallel", "HaloPrepareInput", "HaloRowwiseParallel"]
