"""The ops of compiled graphs."""

import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd


def graphs(model: nn.Module, x: torch.Tensor) -> str:
    """Return the names of the ops in the forward and backward graphs of a compiled model."""
    seen = []

    def compiler(name):
        def compile_(gm, inputs):
            ops = [n for n in gm.graph.nodes if n.op == "call_function" and "getitem" not in str(n.target)]
            seen.append("\n  ".join([f"{name}:", *map(describe, ops)]))
            return make_boxed_func(gm)

        return compile_

    def describe(node):
        name = str(node.target).removesuffix(".default").removeprefix("aten.")
        if "rotate_quantize" in name:
            left, right, format_, scale = node.args[1:5]
            return f"{name}(left={left}, right={right}, {format_}, {scale})"
        return name

    backend = aot_autograd(
        fw_compiler=compiler("forward"),
        bw_compiler=compiler("backward"),
        partition_fn=min_cut_rematerialization_partition,  # Inductor's
    )
    torch.compile(model, fullgraph=True, backend=backend)(x).sum().backward()
    return "\n".join(seen)
