"""Compress what a compiled graph saves for backward.

The partitioner decides what is saved. After it, each large activation among that is compressed at the end of forward, and
decompressed in backward before it is read, by ``torch.ops.halo.compress`` and ``decompress``. Layers ask for it while they are
traced (:func:`request`), as their recipe says.

Private API: ``torch._inductor.config.custom_partitioner_fn`` and ``custom_graph_pass.CustomPartitionerFn``;
``torch._functorch.partitioners.min_cut_rematerialization_partition`` with its convention that saved values are forward's last
outputs and backward's inputs, by the same names; an attribute of ``torch._guards.TracingContext``. Tested with torch 2.11 to
2.15 (:data:`halo_tensor.fences.fast_paths.SAVED`).
"""

import warnings
from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from halo_tensor.activations.layout import inverse, memory_order
from halo_tensor.compiler.saved_values import bits_of, is_dynamic, is_rectified, root_of
from halo_tensor.fences.fast_paths import SAVED, disabled
from halo_tensor.fences.pytorch import tracing_context
from halo_tensor.recipe import Activations
from halo_tensor.version import fingerprint

_NAME = "halo_activations"
_DYNAMIC = (
    "halo_tensor: a graph with dynamic shapes was compiled, and activations whose sizes it does not know are saved as they "
    "are, in spite of activations= or memory= in the config. Pad to few lengths and use torch.compile(dynamic=False)"
)
_aten, _halo = torch.ops.aten, torch.ops.halo


def request(activations: Activations) -> None:
    """Ask that what is saved by the graph that is being traced be compressed."""
    context = tracing_context()
    if context is not None:
        setattr(context, _NAME, activations)
        current = config.custom_partitioner_fn
        if not isinstance(current, _Partitioner):
            config.custom_partitioner_fn = _Partitioner(current)


class _Partitioner(CustomPartitionerFn):
    """The partitioner ``inner``, or Inductor's, after which saved activations are compressed where layers asked for it."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        partition = self.inner or min_cut_rematerialization_partition
        activations = getattr(tracing_context(), _NAME, None)
        forward, backward = partition(gm, joint_inputs, **kwargs)
        if activations is not None:
            static = set(kwargs.get("static_lifetime_input_indices") or ())
            chosen = SAVED.attempt(choose, forward.graph, backward.graph, kwargs["num_fwd_outputs"], static, activations)
            if chosen:
                _compress_in_forward(forward.graph, kwargs["num_fwd_outputs"], chosen)
                _decompress_in_backward(backward.graph, chosen)
                for module in (forward, backward):
                    module.graph.lint()
                    module.recompile()
        return forward, backward

    def uuid(self) -> tuple | None:
        """Return the part of the key of cached graphs; None if the partitioner inside has none."""
        inner = "" if self.inner is None else self.inner.uuid()
        return None if inner is None else ("halo_tensor", fingerprint(), *disabled(), inner)


class Chosen:
    """A value that is saved compressed.

    Attributes:
        node: in forward.
        bits: of an element.
        order: see :func:`~halo_tensor.activations.layout.memory_order`.
        first: the one whose codes it shares, since both are views of the same memory; itself if it has its own.
        is_mask, rectified: whether only a mask is saved; whether one is saved beside codes, since a ReLU made the value.
        parts: the own codes and scales, and the own mask: forward's nodes and then backward's placeholders.
        flat, made: the fake values of the contiguous tensor, and of the parts.
    """

    parts: list[fx.Node]

    def __init__(self, node: fx.Node, bits: int, first: "Chosen | None"):
        value = node.meta["val"]
        self.node, self.bits, self.first = node, bits, first or self
        self.order = memory_order(value.shape, value.stride())
        self.flat = value.contiguous() if self.order is None else value.permute(self.order)
        self.is_mask = bits == 1
        self.rectified = not self.is_mask and is_rectified(node)
        self.made: tuple[torch.Tensor, ...] = () if self.is_mask else _halo.compress.default(self.flat, bits)
        if self.is_mask or self.rectified:
            self.made = (*self.made, _halo.pack_mask.default(self.flat))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parts."""
        return ("mask",) if self.is_mask else ("codes", "scales") + ("mask",) * self.rectified


def choose(forward: fx.Graph, backward: fx.Graph, results: int, static: set[int], activations: Activations) -> list[Chosen]:
    """Return the saved values to compress.

    Args:
        forward, backward: graphs as they were partitioned.
        results: how many of forward's outputs are not saved values.
        static: the indices of inputs that are alive in any case, such as parameters.
        activations: the bits of each kind.
    """
    outputs: Any = forward.output_node().args[0]
    placeholders = forward.find_nodes(op="placeholder")
    alive = {placeholders[i] for i in static if i < len(placeholders)} | set(outputs[:results])
    readers = {node.name: node for node in backward.find_nodes(op="placeholder")}
    chosen: list[Chosen] = []
    dynamic = False
    firsts: dict[tuple[fx.Node, int], Chosen] = {}
    for node in outputs[results:]:
        if not isinstance(node, fx.Node) or node.name not in readers:
            continue
        root = root_of(node)
        if node in alive or root in alive:
            continue
        bits = bits_of(node, readers[node.name], activations)
        if bits is None:
            dynamic |= is_dynamic(node)
            continue
        value = node.meta["val"]
        whole = memory_order(value.shape, value.stride()) is not None and value.numel() == root.meta["val"].numel()
        one = Chosen(node, bits, firsts.get((root, bits)) if whole else None)
        if whole:
            firsts.setdefault((root, bits), one)
        chosen.append(one)
    if dynamic:
        warnings.warn(_DYNAMIC, stacklevel=2)
    return chosen


def _call(graph: fx.Graph, target: Any, args: tuple, value: Any) -> fx.Node:
    """Add a call. Inductor gives the op inputs with the strides of these values, since codes follow the order in memory."""
    node = graph.call_function(target, args)
    inputs = tuple(a.meta["val"] if isinstance(a, fx.Node) else a for a in args)
    node.meta |= {"val": value, "eager_input_vals": (inputs, {})}
    return node


def _compress_in_forward(graph: fx.Graph, results: int, chosen: list[Chosen]) -> None:
    """Put the codes and scales of ``chosen`` into the place of their values among forward's outputs."""
    output = graph.output_node()
    replaced: dict[fx.Node, tuple[fx.Node, ...]] = {}
    placeholders = graph.find_nodes(op="placeholder")
    for one in chosen:
        if one.first is not one:
            replaced[one.node] = ()
            continue
        with graph.inserting_after(placeholders[-1] if one.node.op == "placeholder" else one.node):
            flat = _contiguous(graph, one)
        one.parts = _made(graph, one, flat)
        checked = {key: one.node.meta[key] for key in ("saved_tensor_with_no_vc_check",) if key in one.node.meta}
        for node, value in zip(one.parts, one.made, strict=True):
            node.meta |= {"val": value} | checked
        replaced[one.node] = tuple(one.parts)
    outputs: Any = output.args[0]
    saved = [new for old in outputs[results:] for new in replaced.get(old, (old,))]
    output.args = ([*outputs[:results], *saved],)
    _describe(output, results, len(saved))


def _made(graph: fx.Graph, one: Chosen, flat: fx.Node) -> list[fx.Node]:
    """Add the ops that compress a contiguous tensor, and return the nodes of their results."""
    at, parts = flat, []
    if not one.is_mask:
        with graph.inserting_after(at):
            at = made = _call(graph, _halo.compress.default, (flat, one.bits), one.made[:2])
        for i in range(2):
            with graph.inserting_after(at):
                at = graph.call_function(getitem, (made, i))
            parts.append(at)
    if one.is_mask or one.rectified:
        with graph.inserting_after(at):
            parts.append(_call(graph, _halo.pack_mask.default, (flat,), one.made[-1]))
    return parts


def _contiguous(graph: fx.Graph, one: Chosen) -> fx.Node:
    """Return the node of a contiguous tensor with the elements of a value."""
    if one.order is None:
        node = graph.call_function(_aten.clone.default, (one.node,), {"memory_format": torch.contiguous_format})
    elif one.order == sorted(one.order):
        return one.node
    else:
        node = graph.call_function(_aten.permute.default, (one.node, one.order))
    node.meta["val"] = one.flat
    return node


def _describe(output: fx.Node, results: int, saved: int) -> None:
    """Extend the descriptions of outputs, which newer versions of torch keep, to the new number of saved values."""
    described = output.meta.get("desc")
    if described is not None:
        kind = type(described[results])
        output.meta["desc"] = [*described[:results], *(kind(i) for i in range(saved))]


def _decompress_in_backward(graph: fx.Graph, chosen: list[Chosen]) -> None:
    """Read codes and scales in place of the values of ``chosen``."""
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    for one in chosen:
        if one.first is one:
            with graph.inserting_before(inputs[one.node.name]):
                one.parts = [graph.placeholder(f"{one.node.name}_{name}") for name in one.names]
            for node, value in zip(one.parts, one.made, strict=True):
                node.meta["val"] = value
    order = {node: i for i, node in enumerate(graph.nodes)}
    for one in chosen:
        old, value = inputs[one.node.name], one.node.meta["val"]
        with graph.inserting_before(min(old.users, key=order.__getitem__)):
            new = _undone(graph, one)
            if one.order is not None and one.order != sorted(one.order):
                new = _call(graph, _aten.permute.default, (new, inverse(one.order)), value)
        old.replace_all_uses_with(new)
        graph.erase_node(old)


def _undone(graph: fx.Graph, one: Chosen) -> fx.Node:
    """Return the node of the contiguous tensor that was compressed. What a ReLU made has its zeros, and no others."""
    parts, shape, dtype = one.first.parts, [*one.flat.shape], one.flat.dtype
    if one.is_mask:
        return _call(graph, _halo.unpack_mask.default, (parts[0], shape, dtype), one.flat)
    new = _call(graph, _halo.decompress.default, (*parts[:2], shape, dtype), one.flat)
    if not one.rectified:
        return new
    mask = _call(graph, _halo.unpack_mask.default, (parts[2], shape, torch.bool), one.flat > 0)
    positive = _call(graph, _aten.clamp_min.default, (new, torch.finfo(dtype).tiny), one.flat)
    zero = _call(graph, _aten.full.default, ([], 0), one.flat.new_zeros(()))
    zero.kwargs = {"dtype": dtype, "device": one.flat.device}
    return _call(graph, _aten.where.self, (mask, positive, zero), one.flat)
