"""In a compiled graph, nothing of X is saved beside X itself.

Forward makes X's codes for its own product, and their transpose for grad_weight, which is saved instead of X. But some X is
saved in any case: attention's backward wants its result, which is what o_proj reads. There the transpose is made in backward,
from X again. That costs one more pass over X, and saves a byte an element.

This is written against AOTAutograd's partitioner and Inductor's joint passes as of torch 2.11–2.13.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.partitioners import get_default_op_list, must_recompute
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.pattern_matcher import stable_topological_sort
from torch.utils.checkpoint import CheckpointPolicy

from halo_tensor.ops.schemas import fingerprint

#: For comparison: without it, the transpose is always saved. It is part of the key of cached graphs, but not of AOTAutograd's
#: where a pass comes through torch.compile's ``options``, which take effect after that key is made.
REPEAT_FOR_BACKWARD = True
_QUANTIZE = torch.ops.halo.rotate_quantize.default
_CODES_T = 1  # of its outputs


def quantize_again_in_backward(graph: fx.Graph) -> None:
    """Split each quantisation in two, one for forward and one for backward, where backward has X and can repeat it exactly."""
    if not (_tangents(graph) and graph.find_nodes(op="call_function", target=_QUANTIZE)):
        return
    stable_topological_sort(graph)  # passes before this one put nodes where they can, and Inductor sorts after it
    graph.eliminate_dead_code()  # as the partitioner will: what it drops keeps nothing
    backward = _backward(graph)
    for node in graph.find_nodes(op="call_function", target=_QUANTIZE):
        arguments: Any = node.args
        x, left, *_, fold_rows, fold_columns, rows, columns, seed, _ = arguments
        # A left rotation may run on other tiles where no rows are wanted, and then a code may differ.
        repeatable = not left and fold_rows is None and fold_columns is None and seed is None
        tagged = "recompute" in node.meta  # by someone's checkpointing
        if rows and columns and repeatable and not tagged and node not in backward and _keeps(x, backward):
            transposed = [user for user in node.users if user.args[1] == _CODES_T]
            if transposed and all(reader in backward for codes_t in transposed for reader in _readers(codes_t, backward)):
                _split(node, transposed)


def _tangents(graph: fx.Graph) -> list[fx.Node]:
    """The gradients that enter, as AOTAutograd names them."""
    return [node for node in graph.find_nodes(op="placeholder") if "tangents" in str(node.target)]


def _backward(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that cannot be run before there is a gradient."""
    backward = set(_tangents(graph))
    for node in graph.nodes:
        if node.op != "output" and any(used in backward for used in node.all_input_nodes):
            backward.add(node)
    return backward


def _keeps(x: fx.Node, backward: set[fx.Node]) -> bool:
    """Whether the memory of x is saved in any case: something in backward reads it as it is, and it is the result of an op
    that the partitioner does not run twice."""
    base: Any = x
    while _is_view(base):
        base = base.args[0]
    made_by = base.args[0] if base.target is operator.getitem else base
    if made_by.op != "call_function" or _dtype(base) != _dtype(x):
        return False
    runs_twice = get_default_op_list().is_recomputable(made_by) or must_recompute(made_by) or must_recompute(base)
    return not runs_twice and any(reader in backward for reader in _readers(base, backward))


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or target is torch.ops.aten._unsafe_view.default)


def _readers(node: fx.Node, backward: set[fx.Node]) -> Iterator[fx.Node]:
    """What reads a node's memory, looked at through forward's views of it."""
    for user in node.users:
        if _is_view(user) and user not in backward:
            yield from _readers(user, backward)
        else:
            yield user


def _split(node: fx.Node, transposed: list[fx.Node]) -> None:
    arguments: Any = node.args
    *same, _, _, seed, gain = arguments
    codes, codes_t, scales = node.meta["val"]
    nothing = codes.new_empty(0)
    with node.graph.inserting_before(node):
        again = node.graph.node_copy(node)
    node.args, node.meta["val"] = (*same, True, False, seed, gain), (codes, nothing, scales)
    again.args, again.meta["val"] = (*same, False, True, seed, gain), (nothing, codes_t, scales)
    again.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE  # the partitioner neither saves it nor runs it in forward
    for codes_t in transposed:
        codes_t.replace_input_with(node, again)


class _Pass(CustomGraphPass):
    """And before it the passes that were there: not every version of Inductor takes a list."""

    def __init__(self, others: Sequence):
        self.others = others

    def __call__(self, graph: fx.Graph) -> None:
        for other in self.others:
            other(graph)
        if REPEAT_FOR_BACKWARD:
            quantize_again_in_backward(graph)

    def uuid(self) -> tuple | None:
        """None, and then graphs are not cached, if one of the others has none."""
        others = [other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.others]
        return ("halo_tensor", fingerprint(), REPEAT_FOR_BACKWARD, *others) if all(others) else None


def install() -> None:
    """Last of Inductor's joint passes: earlier ones find attention in products, and put a kernel in its place. To be called in
    the thread that compiles, for every graph: torch's configuration is each thread's own, and may have been set anew. Models
    compiled later in this thread, converted or not, have it in their keys, and are otherwise left alone."""
    current = config.joint_custom_post_pass
    others = () if current is None else current if isinstance(current, list | tuple) else (current,)
    if not any(isinstance(other, _Pass) for other in others):
        config.joint_custom_post_pass = _Pass(others)
