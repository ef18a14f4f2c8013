"""Predict the peak of memory of a training step, on tensors without values.

The model is run on the meta device, forward and backward. In eager code, the bytes of all live tensors are counted after each
op. A compiled graph is partitioned as Inductor does it, and what it saves is counted; of what its kernels hold besides, the
largest gradient is counted. The allocator's rounding, the workspaces of libraries and fragmentation are not counted.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from halo_tensor.activations.hooks import block_of
from halo_tensor.analysis.saved_memory import measure_saved, storages
from halo_tensor.fences.pytorch import observed, partition_only
from halo_tensor.layers import kinds as layers
from halo_tensor.weight.tensor import HaloWeight

GIB = 2**30
#: What a kernel of attention saves: q, k, v, the result, and a number for each row.
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _adamw8bit(p: torch.Tensor) -> int:
    """torchao quantises the state of parameters of at least 4096 elements in blocks of 256, with a float32 scale each."""
    n = p.numel()
    return 2 * (n + n // 256 * 4) if n >= 4096 and n % 256 == 0 else 2 * n * p.element_size()


#: optimizer -> bytes of state of a parameter on the GPU.
OPTIMIZERS: dict[str, Callable[[torch.Tensor], int]] = {
    "adamw": lambda p: 2 * p.numel() * p.element_size(),
    "adamw8bit": _adamw8bit,
    "momentum": lambda p: p.numel() * p.element_size(),
    "sgd": lambda p: 0,
    "offloaded": lambda p: 0,
}


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of a training step.

    Attributes:
        weights: parameters and buffers in high precision, or codes of frozen weights.
        codes: codes and scales that are held beside trained weights.
        optimizer: the optimiser's state.
        gradients: of all trained parameters.
        saved: what forward saves for backward, without parameters.
        step: the most that forward and backward need besides weights, codes and state, gradients included.

    Example:
        >>> from halo_tensor import PeakMemory
        >>> peak = PeakMemory(weights=2**30, codes=2**29, optimizer=2**31, gradients=2**30, saved=2**30, step=2**31)
        >>> print(str(peak).splitlines()[-1])
        peak                      5.50 GiB
    """

    weights: int
    codes: int
    optimizer: int
    gradients: int
    saved: int
    step: int

    @property
    def total(self) -> int:
        """The peak: what is held all the time, and ``step``."""
        return self.weights + self.codes + self.optimizer + self.step

    def __str__(self) -> str:
        rows = {
            "weights": self.weights, "codes beside them": self.codes, "optimiser's state": self.optimizer,
            "forward and backward": self.step, "  of which saved": self.saved, "  of which gradients": self.gradients,
            "peak": self.total,
        }  # fmt: skip
        return "\n".join(f"{name:22}{size / GIB:8.2f} GiB" for name, size in rows.items())


def predict_peak(
    model: nn.Module, *args: Any, optimizer: str = "adamw", compiled: str | None = None, **kwargs: Any
) -> PeakMemory:
    """Predict the peak of memory of a step: forward, backward, and an optimiser that updates in place (``fused=True``).

    Args:
        model: on any device; one that was made on the meta device needs no memory. It is not changed.
        *args: arguments of its forward. Tensors may be on any device; only their shapes and dtypes matter.
        optimizer: "adamw", "adamw8bit" (torchao's), "momentum", "sgd", or "offloaded" (torchao's CPUOffloadOptimizer).
        compiled: None for eager code; "model" for a model that is compiled as one graph; "blocks" if its blocks are compiled,
            the modules in its ModuleLists.
        **kwargs: more arguments of its forward.

    Returns:
        The bytes of each part, and the peak.

    Raises:
        ValueError: another ``optimizer`` or another ``compiled``.

    Example:
        >>> import torch
        >>> from halo_tensor import halo_config, quantize_
        >>> from halo_tensor.analysis import predict_peak
        >>> with torch.device("meta"):
        ...     model = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.GELU(), torch.nn.Linear(4096, 1024))
        >>> report = quantize_(model, halo_config(memory="low"))
        >>> peak = predict_peak(model, torch.empty(8192, 1024, device="meta"))
        >>> peak.codes, peak.optimizer == 2 * peak.weights
        (0, True)
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {optimizer!r}")
    if compiled not in (None, "model", "blocks"):
        raise ValueError(f'compiled must be None, "model" or "blocks"; got {compiled!r}')
    model, args, kwargs = on_meta(model), on_meta(args), on_meta(kwargs)
    held = {s._cdata: s for p in (*model.parameters(), *model.buffers()) for s in storages(p)}
    codes = {s._cdata: s for p in model.parameters() for part in _codes_beside(p) for s in storages(part)}
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    beside = sum(s.nbytes() for s in codes.values())
    with _without_values():
        saved, step = _measure(model, args, kwargs, compiled, gradients)
    return PeakMemory(
        weights=sum(s.nbytes() for s in held.values()) - beside,
        codes=beside,
        optimizer=sum(map(OPTIMIZERS[optimizer], trained)),
        gradients=gradients,
        saved=saved,
        step=step,
    )


def _measure(model: nn.Module, args: Any, kwargs: Any, compiled: str | None, gradients: int) -> tuple[int, int]:
    """Return the bytes that forward saves, and the most that forward and backward need."""
    if compiled is None:
        with LiveBytes(model) as live:
            with measure_saved(model) as saved:
                loss = _loss(model(*args, **kwargs))
            loss.backward()
        return saved.total, live.peak
    backend = partition_only()  # one for all, since equal modules share code that has the same backend
    for module in _compiled(model, compiled):
        module.compile(backend=backend)
    with measure_saved(model) as saved:
        _loss(model(*args, **kwargs))
    return saved.total, max(saved.total + saved.largest, gradients)


def _compiled(model: nn.Module, compiled: str) -> list[nn.Module]:
    """Return the modules that are compiled, each by itself."""
    if compiled == "model":
        return [model]
    named = [name for name, module in model.named_modules() if layers.features(module)]
    blocks = dict.fromkeys(block_of(model, name) for name in named)
    return [model.get_submodule(name) for name in blocks if name] or [model]


def _codes_beside(parameter: torch.Tensor) -> list[torch.Tensor]:
    """Return the codes and scales that a weight holds besides its master."""
    if not isinstance(parameter, HaloWeight) or parameter.master is None:
        return []
    return [part for operand in parameter.operands for part in operand.parts]


def on_meta(value: Any) -> Any:
    """Return a copy of a model, or of arguments, whose tensors have no values. Tensors are not copied on their own device."""
    if isinstance(value, nn.Module):
        tensors = [*value.parameters(), *value.buffers()]
        memo = {id(t): _meta_twin(t) for t in tensors}
        return copy.deepcopy(value, memo)
    if isinstance(value, torch.Tensor):
        return value.detach().to("meta").requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: on_meta(v) for key, v in value.items()}
    return type(value)(map(on_meta, value)) if isinstance(value, list | tuple) else value


def _meta_twin(tensor: torch.Tensor) -> torch.Tensor:
    twin = tensor.detach().to("meta")
    return nn.Parameter(twin, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else twin


def _loss(output: Any) -> torch.Tensor:
    """Return the loss of a model's output, or the sum of its first tensor."""
    loss = getattr(output, "loss", None)
    if loss is None:
        loss = next(t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point())
    return loss if loss.ndim == 0 else loss.sum()


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Compute attention by one op, as kernels on GPUs do. On meta tensors, PyTorch would take products and a softmax."""
    return _ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def _cross_entropy(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None = None, size_average: Any = None,
    ignore_index: int = -100, reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Compute the loss by ops that have gradients on the meta device. PyTorch's op loses them once Inductor is imported."""
    if input.ndim != 2 or target.is_floating_point():
        return _FUNCTIONS["cross_entropy"](
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    kind = ("none", "mean", "sum").index(reduction)
    return torch.ops.aten.nll_loss_forward(input.log_softmax(1), target, weight, kind, ignore_index)[0]


_FUNCTIONS = {name: getattr(nn.functional, name) for name in ("scaled_dot_product_attention", "cross_entropy")}
_bool = torch.Tensor.__bool__


@contextmanager
def _without_values() -> Iterator[None]:
    """Let models run on meta tensors: attention is one op, and a condition on values ("is nothing padded?") is true."""
    nn.functional.scaled_dot_product_attention, nn.functional.cross_entropy = _attention, _cross_entropy
    torch.Tensor.__bool__ = lambda self: True if self.is_meta else _bool(self)  # type: ignore
    try:
        yield
    finally:
        for name, function in _FUNCTIONS.items():
            setattr(nn.functional, name, function)
        del torch.Tensor.__bool__


class LiveBytes(TorchDispatchMode):
    """Record the peak of the bytes of the tensors that are made in the block and alive.

    Args:
        model: whose parameters and buffers do not count, nor do views of them.

    Attributes:
        peak: in bytes.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        tensors = () if model is None else (*model.parameters(), *model.buffers())
        self._held = {s._cdata: s for t in tensors for s in storages(t)}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._made = self.peak = 0

    def __enter__(self) -> "LiveBytes":
        self._observed = observed()
        self._observed.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._observed.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(t, HaloWeight) for t in types):
            return NotImplemented  # it calls ops on its inner tensors
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and type(t) in (torch.Tensor, nn.Parameter):
                self._add(t.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._held or (storage._cdata in self._alive and not self._alive[storage._cdata][0].expired()):
            return
        self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._made += storage.nbytes()
        if self._made > self.peak:  # at most; without those that died it may be less
            self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
            self._made = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._made)
