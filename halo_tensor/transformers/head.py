"""``fuse_head_``: models of transformers compute their loss with :func:`~halo_tensor.linear_cross_entropy`.

Between the hooks of the model around a forward with labels, its head returns :class:`LazyLogits`, and the model's
``loss_function`` takes hidden states and weight out of them. Nothing else of the model changes.
"""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from halo_tensor.layers.linear_subclasses import subclass_of
from halo_tensor.products.loss import linear_cross_entropy
from halo_tensor.transformers.lazy_logits import LazyLogits

#: What fuse_head_ passes on to linear_cross_entropy.
OPTIONS = ("forward", "backward", "label_smoothing", "z_loss", "chunk", "scratch")


def fuse_head_(model: nn.Module, **options: Any) -> None:
    """Make a causal language model of transformers compute its loss without making its logits, in place.

    ``model(input_ids, labels=labels)`` then computes the loss with :func:`~halo_tensor.linear_cross_entropy`: the product of
    the head in int8, its backward in fp8, and the gradients together with the loss. Forwards without labels or under
    ``torch.no_grad()``, as in ``generate`` and in evaluations, are unchanged. ``outputs.logits`` of the others are computed
    when something reads them. The model trains as before with ``Trainer``, ``torch.compile``, FSDP2 and gradient
    checkpointing, with a tied, frozen or trained head, and with LoRA on it. Softcaps and factors of logits, as of Gemma 2,
    Cohere and Granite, are followed.

    Call it before ``torch.compile`` and FSDP, and after PEFT and :func:`~halo_tensor.quantize_`. A second call replaces the
    options of the first; :func:`unfuse_head_` undoes it.

    Args:
        model: a model of transformers, or one that contains it, such as PEFT's.
        **options: of :func:`~halo_tensor.linear_cross_entropy`: ``forward``, ``backward``, ``label_smoothing``, ``z_loss``,
            ``chunk`` and ``scratch``.

    Raises:
        ValueError: an option is not known; ``model`` contains no causal language model; its loss or its head is of a kind that
            cannot be fused, such as LoRA with dropout. The message says which.

    Warns:
        UserWarning: in a forward, if the model reads the logits itself before the loss, which then gains nothing.

    Example:
        >>> import torch, transformers
        >>> from halo_tensor.transformers import fuse_head_
        >>> tiny = transformers.LlamaConfig(
        ...     vocab_size=1000, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = transformers.LlamaForCausalLM(tiny)
        >>> fuse_head_(model)
        >>> ids = torch.randint(1000, (2, 16))
        >>> outputs = model(ids, labels=ids)
        >>> outputs.loss.backward()
        >>> outputs.logits
        LazyLogits([2, 16, 1000], not computed)
    """
    if unknown := options.keys() - set(OPTIONS):
        raise ValueError(f"fuse_head_ has no option {min(unknown)!r}; its options are {', '.join(OPTIONS)}")
    found = _language_model(model)
    unfuse_head_(found)
    if found.loss_function is not ForCausalLMLoss:
        name = getattr(found.loss_function, "__name__", repr(found.loss_function))
        raise ValueError(f"the loss of this {type(found).__name__} is {name}: only transformers' ForCausalLMLoss can be fused")
    parameters = [*inspect.signature(type(found).forward).parameters]
    if "labels" not in parameters:
        raise ValueError(f"the forward of this {type(found).__name__} takes no labels, so it computes no loss to fuse")
    heads = _layers_of(found.get_output_embeddings())
    for head in heads:
        _check_head(head)
    state = HeadState(options, parameters.index("labels") - 1)
    for head in heads:
        own: Any = type(head)
        head.__class__ = _fused_class(own)
        head.fused_state = state
    found.__dict__["_fused_head"] = state
    found.__dict__["_fused_hooks"] = (
        found.register_forward_pre_hook(_before, with_kwargs=True),
        found.register_forward_hook(_after, always_call=True),
    )
    found.loss_function = partial(_loss, original=found.loss_function)


def unfuse_head_(model: nn.Module) -> None:
    """Undo :func:`fuse_head_`, in place.

    Args:
        model: a fused model, or any other, which stays as it is.

    Raises:
        ValueError: ``model`` contains no causal language model.

    Example:
        >>> import transformers
        >>> from halo_tensor.transformers import fuse_head_, unfuse_head_
        >>> tiny = transformers.LlamaConfig(
        ...     vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = transformers.LlamaForCausalLM(tiny)
        >>> fuse_head_(model)
        >>> unfuse_head_(model)
        >>> type(model.lm_head).__name__
        'Linear'
    """
    found = _language_model(model)
    if found.__dict__.pop("_fused_head", None) is None:
        return
    for hook in found.__dict__.pop("_fused_hooks"):
        hook.remove()
    del found._loss_function
    for module in found.modules():
        if isinstance(module, FusedHead):
            module.__class__ = type(module)._own_class
            del module.fused_state


class HeadState:
    """What a fused head knows.

    Attributes:
        options: of linear_cross_entropy.
        place: of labels among the positional arguments of the model.
        armed: whether the head is to return LazyLogits.
        is_read: whether logits were read while it was armed.
    """

    def __init__(self, options: dict[str, Any], place: int):
        self.options, self.place, self.armed, self.is_read = options, place, False, False

    def note_read(self) -> None:
        """Note that logits were computed."""
        self.is_read = self.is_read or self.armed


class FusedHead:
    """A mixin of head layers, which return LazyLogits while they are armed."""

    fused_state: HeadState
    _own_class: Any

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the logits of hidden states [..., D], or what stands for them."""
        if not self.fused_state.armed:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        head: Any = self
        product = _Product(head, x)
        return LazyLogits(x, head.out_features, product, self.fused_state, product.dtype)


@cache
def _fused_class(own: Any) -> Any:
    """Make a subclass of a layer's class that is a FusedHead and has the same name."""
    return subclass_of(own, {"_own_class": own}, _rebuild, FusedHead)


def _rebuild(own: Any) -> nn.Module:
    return nn.Module.__new__(_fused_class(own))


class _Product:
    """Computes logits later, as the head would have in the forward."""

    def __init__(self, head: Any, x: torch.Tensor):
        self.head, device = head, x.device.type
        self.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        self.dtype = self.autocast[1] if self.autocast[2] else x.dtype

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        device, dtype, enabled = self.autocast
        if isinstance(_base(self.head).weight, DTensor):
            raise RuntimeError(
                "the logits of a forward with labels are computed when they are read, and FSDP has sharded the head again: "
                "call the model without labels or under torch.no_grad(), where logits are made at once"
            )
        with torch.autocast(device, dtype, enabled):
            return type(self.head)._own_class.forward(self.head, hidden)


def _before(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Arm the head before a forward with labels."""
    labels = kwargs.get("labels")
    if labels is None and len(args) > (place := model.__dict__["_fused_head"].place):
        labels = args[place]
    if labels is None:
        return
    layer = _layers_of(model.get_output_embeddings())[0]
    if not isinstance(layer, FusedHead):
        warnings.warn(
            "the head was replaced after fuse_head_, and the loss is computed from logits: call fuse_head_ again", stacklevel=2
        )
        return
    # Evaluations pass logits on: trainers and accelerate gather tensors only.
    layer.fused_state.armed = torch.is_grad_enabled()
    layer.fused_state.is_read = False


def _after(model: Any, args: tuple, output: Any) -> None:
    state = model.__dict__["_fused_head"]
    state.armed = False
    if state.is_read:
        state.is_read = False
        _warn_of_reading(type(model).__name__)


@cache
def _warn_of_reading(name: str) -> None:
    warnings.warn(
        f"the forward of this {name} reads its logits, so that fuse_head_ saves neither time nor memory: it does more with "
        "them than a product with a number and a tanh, or computes the loss without loss_function",
        stacklevel=4,
    )


def _loss(
    logits: Any,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    *,
    original: Any = ForCausalLMLoss,
    **kwargs: Any,
) -> torch.Tensor:
    """Do transformers' ForCausalLMLoss (5.6 to 5.23) for logits that were not computed; ``original`` does it for others."""
    if not isinstance(logits, LazyLogits):
        return original(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    head, hidden, form = logits._product.head, logits._hidden, logits._form  # type: ignore[attr-defined]
    with _gathered(head):
        weight, bias = _weight_and_bias(head)
        return linear_cross_entropy(
            hidden, weight, shift_labels.to(hidden.device).view(hidden.shape[:-1]), bias=bias, ignore_index=ignore_index,
            num_items_in_batch=num_items_in_batch, softcap=form.softcap or None, logit_scale=form.scale,
            **head.fused_state.options,
        )  # fmt: skip


def _gathered(head: Any) -> AbstractContextManager:
    """Return a context in which a head that is sharded for itself has its whole weight, as it had in its forward."""
    is_resharded = isinstance(head, FSDPModule) and isinstance(_base(head).weight, DTensor)
    return _unsharded(head) if is_resharded else nullcontext()


@contextmanager
def _unsharded(head: FSDPModule) -> Iterator[None]:
    head.unshard()
    try:
        yield
    finally:
        head.reshard()


def _base(head: Any) -> Any:
    """Return the layer that PEFT's LoRA wraps, or ``head`` itself."""
    return getattr(head, "base_layer", head)


def _weight_and_bias(head: Any) -> tuple[Any, torch.Tensor | None]:
    """Return the weight [V, D] with what LoRA adds to it, and the bias."""
    base = _base(head)
    weight = base.weight
    if base is not head and not head.disable_adapters and not head.merged:
        _check_head(head)
        dense = getattr(weight, "dequantize", lambda: weight)()
        for adapter in head.active_adapters:
            if adapter in head.lora_A:
                dense = dense + head.get_delta_weight(adapter).to(dense.dtype)
        weight = dense
    return weight, base.bias


def _layers_of(head: Any) -> list[Any]:
    """Return the layers of which the model calls one as its head: the first is the one that it calls now.

    PEFT (0.21) wraps a head that is in modules_to_save together with copies for its adapters.
    """
    copies = getattr(head, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return [head]
    active = [copies[name] for name in head.active_adapters if name in copies and not head.disable_adapters]
    return [*active, head.original_module, *(m for m in copies.values() if m not in active)]


def _check_head(head: Any) -> None:
    """Raise ValueError if what a head computes is not a product with one matrix."""
    base = _base(head)
    if not isinstance(base, nn.Linear):
        raise ValueError(f"the head is a {type(base).__name__}: only an nn.Linear can be fused")
    if base is head:
        return
    dropouts = [*getattr(head, "lora_dropout", {}).values()]
    variants = getattr(head, "lora_variant", {})
    if not hasattr(head, "lora_A") or not hasattr(head, "get_delta_weight"):
        reason = f"a {type(head).__name__}"
    elif any(not isinstance(dropout, nn.Identity) for dropout in dropouts):
        reason = "LoRA with dropout: set lora_dropout=0, or leave the head out of target_modules"
    elif variants or any(getattr(head, "lora_bias", {}).values()):
        reason = "a variant of LoRA, such as DoRA or one with a bias"
    else:
        return
    raise ValueError(f"the head carries {reason}. Only nn.Linear and plain LoRA can be fused")


def _language_model(model: nn.Module) -> Any:
    """Return the outermost model of transformers in ``model`` that has a head."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return module
    raise ValueError(f"this {type(model).__name__} contains no causal language model of transformers, which has a head")
