"""Experts of mixtures in high precision, and the results that converted ones are compared with."""

import torch

from halo_tensor.recipe import Gate
from halo_tensor.reference.experts import activate

GPT_OSS = Gate(1.702, 7.0, 1.0, interleaved=True)


def exact_experts(x, index, weights, gate_up, down, gate_up_bias=None, down_bias=None, gate=None):
    """Return the layer's result: a loop over experts, in the dtype of its arguments."""
    gate = gate or Gate()
    out = torch.zeros_like(x)
    for expert in range(gate_up.shape[0]):
        token, place = torch.where(index == expert)
        h = x[token] @ gate_up[expert].t()
        h = h if gate_up_bias is None else h + gate_up_bias[expert]
        a = activate64(h, gate)
        y = a @ down[expert].t()
        y = y if down_bias is None else y + down_bias[expert]
        out = out.index_add(0, token, y * weights[token, place, None])
    return out


def activate64(h, gate):
    """Return the gate of h in h's dtype; :func:`activate` computes in float32."""
    if h.dtype != torch.float64:
        return activate(h, gate)
    f = h.shape[1] // 2
    g, u = (h[:, ::2], h[:, 1::2]) if gate.interleaved else (h[:, :f], h[:, f:])
    if gate.limit is not None:
        g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    return (u + gate.shift) * (g * torch.sigmoid(gate.alpha * g))


def routed(tokens, experts, top_k, unused=0):
    """Return a random top_k_index [tokens, top_k] of different experts, the last ``unused`` of which get no token."""
    return torch.rand(tokens, experts - unused).argsort(1)[:, :top_k]


def offsets(sizes):
    """Return the ends of groups of these sizes."""
    return torch.tensor(sizes, dtype=torch.int32).cumsum(0).to(torch.int32)
