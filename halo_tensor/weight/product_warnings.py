"""Warnings of products with converted weights that are not quantised.

:mod:`halo_tensor.weight.write_through` warns of products with a weight itself, :mod:`halo_tensor.weight.derived` of products
with values computed from a weight.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch

#: Names of functions and of aten ops, without underscores at their ends, that contract a weight with an input.
PRODUCTS = {
    *("mm", "addmm", "bmm", "addbmm", "baddbmm", "mv", "addmv", "matmul", "rmatmul", "linear", "bilinear", "trilinear"),
    *("einsum", "tensordot", "inner", "multi_dot", "chain_matmul", "conv1d", "conv2d", "conv3d", "convolution"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "grouped_mm", "scaled_mm", "scaled_grouped_mm"),
    *("addmm_activation", "multi_head_attention_forward", "rnn_tanh_cell", "rnn_relu_cell", "gru_cell", "lstm_cell"),
}
#: Called while a graph is traced in which a weight is used. ``halo_tensor.weight`` adds the search of Dynamo's graph.
WHEN_TRACED: list[Callable[[], None]] = []


def name_of(func: Any) -> str:
    """The name of a function of torch or of an aten op, without underscores at its ends."""
    return getattr(func, "__name__", "").removeprefix("linalg_").strip("_")


def warn_of_product(name: str, what: str, stacklevel: int = 2) -> None:
    """Warn that a product is not quantised.

    Args:
        name: of the function or op.
        what: its operand: a converted weight, a part of one, or a value computed from one.
        stacklevel: as of ``warnings.warn``.
    """
    if torch._C._current_graph_task_id() != -1:  # in backward; forward has warned
        return
    warnings.warn(message_of_product(name, what), stacklevel=stacklevel + 1)


def message_of_product(name: str, what: str) -> str:
    """The message of :func:`warn_of_product`."""
    return (
        f"{name} with {what} runs in high precision, since it is not called as F.linear(x, weight): leave its layer out with "
        "skip or filter_fn, or dequantize() the weight"
    )


def watch_graph() -> None:
    """Have the graph that is being traced searched for products with values computed from weights."""
    for watch in WHEN_TRACED:
        watch()
