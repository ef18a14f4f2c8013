"""HaloWeight: the parameter of a converted linear layer.

A weight subclass alone never sees the grad_weight product, since F.linear decomposes into aten ops whose backward does not
touch the weight. So this wrapper catches ``F.linear`` itself and hands it to :mod:`halo_tensor.products.linear`; to everything
else, optimisers and checkpoints above all, it is the dense high-precision weight it stands for
(:mod:`halo_tensor.weight.write_through`).

It also holds what the weight brings to its products, as codes that every write to it brings up to date. So a compiled graph
reads codes, and a weight is quantised once per optimiser step however many micro-batches there are.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

from halo_tensor.fences.pytorch import hidden_from_modes, preserved_version, return_and_correct_aliasing, tree_map_only
from halo_tensor.operand.gains import Gains, moved
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.products import eager
from halo_tensor.products.linear import linear
from halo_tensor.products.operands import weight_operand
from halo_tensor.products.steps import reuses_operand
from halo_tensor.recipe import Format, Operand, Product, Recipe, Rotation
from halo_tensor.version import fingerprint
from halo_tensor.weight import derived, fsdp, sharding
from halo_tensor.weight import write_through as dispatch

aten = torch.ops.aten
_STAYS_A_WEIGHT = {
    aten.clone.default,
    aten.empty_like.default,  # Module.to_empty
    aten._to_copy.default,
    aten._pin_memory.default,
}

#: Attributes of a weight that are its own; others are tags that users hang on parameters.
_OWN = {"master", "operand", "recipe", "base", "fsdp", "rows", "sent", "_is_param"}
#: The functions by which ``Module._apply`` converts a parameter (see ``_keep_hooks``).
_CONVERSIONS = {"to", "type", "cpu", "cuda", "xpu", "float", "double", "half", "bfloat16", "empty_like", "share_memory"}
#: Types of a master whose writes can be followed: a fake or functional one has no values.
_HAVE_VALUES = (torch.Tensor, torch.nn.Parameter)
#: Names of the functions that read or set an attribute of a tensor, as FSDP does often. What they return is a view, which is a
#: HaloWeight, or not computed from the weight.
_ATTRIBUTES = ("__get__", "__set__")
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
# allow_in_graph: Dynamo puts the call into its graph as it stands, and AOTAutograd traces through it, backward included.
_linear_in_graph = torch.compiler.allow_in_graph(linear)


def _version(weight: "HaloWeight") -> tuple | None:
    """What changes when the master is written, or is another tensor."""
    master = weight.master
    if master is None:
        return None
    lent = fsdp.lent_version(weight) if weight.fsdp == "shard" else None
    return id(master), None if master.is_inference() else master._version, lent


def _of_operand(name: str) -> Any:
    """The operand's attribute as the weight's own; None without an operand."""
    return property(lambda weight: None if weight.operand is None else getattr(weight.operand, name))


def _codes(weight: "HaloWeight") -> torch.Tensor | None:
    """The operand's codes, in step with the master. A compiled forward reads them here in every call, before it runs its
    graph: so it sees writes to the master as an eager one does."""
    operand = weight.operand
    if operand is None:
        return None
    if weight.master is not None and not is_compiling():
        weight.follow()
    return operand.codes


class HaloWeight(fsdp.Shardable, torch.Tensor):
    """A weight [out_features, in_features] whose ``F.linear`` follows a recipe.

    Attributes:
        master: the high-precision weight, what optimisers update; its gradient is an ordinary dense tensor. None if the
            weight is frozen: then the codes are all there is; and None of a weight gathered by FSDP, whose master is sharded.
        operand: the codes that ``output`` multiplies with, in step with the master; None if the recipe has it plain, or if
            the weight holds none and is quantised in every forward.
        recipe: how the three products of its layer are computed.
        gain: float32 [in_features], powers of two that the operand's columns were multiplied with before they were rotated,
            and X's are divided by; or None. Neither the master nor its gradient knows of it. See ``balance_``.

    A view of it is a HaloWeight with the identity recipe and a ``base``, so that writes through the view reach the codes.
    """

    master: torch.Tensor | None
    operand: HadamardQuantTensor | None
    recipe: Recipe
    base: "HaloWeight | None" = None
    fsdp: str | None = None

    @staticmethod
    def __new__(
        cls,
        master: torch.Tensor | None,
        operand: HadamardQuantTensor | None = None,
        recipe: Recipe | None = None,
        *,
        requires_grad: bool | None = None,
    ):
        if recipe is None:
            return _moved_by_accelerate(master, bool(requires_grad))
        like = operand if master is None else master
        assert like is not None
        with _of_the_kind_of(like):
            return torch.Tensor._make_wrapper_subclass(
                cls,
                like.shape,
                strides=like.stride(),
                storage_offset=like.storage_offset(),
                dtype=like.dtype,
                device=like.device,
                requires_grad=like.requires_grad,
            )

    def __init__(
        self,
        master: torch.Tensor | None,
        operand: HadamardQuantTensor | None = None,
        recipe: Recipe | None = None,
        *,
        requires_grad: bool | None = None,
    ):
        if recipe is not None:
            self.master, self.operand, self.recipe = master, operand, recipe

    @classmethod
    def from_hp(
        cls,
        master: torch.Tensor,
        recipe: Recipe,
        frozen: bool = False,
        gains: Gains | None = None,
        keep_codes: bool = True,
    ) -> "HaloWeight":
        """A weight that follows ``recipe``. ``frozen`` keeps only the codes, if they serve both products with W; any other
        weight keeps the master, and its codes beside it if ``keep_codes``."""
        if not (frozen or keep_codes):
            return cls(master, None, recipe)
        operand = weight_operand(master, recipe, moved(gains, master.device))
        if frozen and operand is not None and reuses_operand(recipe):
            return cls(None, operand.packed(), recipe)
        weight = cls(master, operand, recipe)
        weight.in_step()
        return weight

    def dequantize(self) -> torch.Tensor:
        """The dense weight: the master, or what the codes of a frozen weight stand for."""
        if self.master is not None:
            return self.master
        assert self.operand is not None
        return self.operand.dequantize()

    def requantize(self, dense: torch.Tensor | None = None) -> None:
        """Bring the codes up to date with the master; to be called after writing to ``weight.master`` itself, where no forward
        follows, eager or compiled, which does it by itself: before the replay of a CUDA graph that was captured by hand.
        ``dense`` is the new value of a frozen weight."""
        if self.base is not None:
            self.base.requantize()
        elif self.operand is not None:
            self.operand.requantize_(self.dequantize() if dense is None else dense)
            self.in_step()

    def in_step(self) -> None:
        """The codes are those of the master as it is now."""
        if self.operand is not None:
            self.operand.version, self.operand.lent = _version(self), False

    def follow(self) -> None:
        """Bring the codes up to date if the master itself was written to, as code that averages the tensors of state dicts
        does. To be called before the codes are used or handed on."""
        operand = self.operand
        if operand is None or type(self.master) not in _HAVE_VALUES:
            return
        counted = operand.version != _version(self)
        if not (counted or operand.lent):
            return
        # Autograd counts no writes through .data of a plain weight, and so none of what follows from them.
        parts = () if counted else tuple(part for part in operand.parts if not part.is_inference())
        # Hidden from modes: it belongs to the write. Selective checkpointing,
        # which matches the ops of two runs, would find it in one of them, and make_fx would put it into its graph.
        with torch.no_grad(), hidden_from_modes(), preserved_version(parts):
            self.requantize()

    def lend(self) -> torch.Tensor:
        """The dense weight for a state dict. Writes that change no version (through ``.data`` or NumPy, in inference mode) may
        come before the next forward, so that one quantises the master in any case."""
        if self.operand is not None and self.master is not None and not fsdp.needs_common_scale(self):
            self.operand.lent = True
        return self.dequantize()

    def share_memory_(self) -> "HaloWeight":
        for tensor in [self.master] if self.operand is None else [self.master, *self.operand.parts]:
            if tensor is not None:
                tensor.share_memory_()
        _keep_hooks(torch.Tensor.share_memory_, self, self)
        return self

    def numpy(self, *, force: bool = False):
        """A copy, of which no write would be noticed."""
        return self.dequantize().detach().clone().requires_grad_(self.requires_grad).numpy(force=force)

    def tolist(self) -> list:
        return self.dequantize().tolist()

    def __dlpack__(self, **options):
        raise BufferError("a converted weight has no memory of its own for DLPack: export weight.dequantize()")

    def storage(self):  # and safetensors, which asks for it
        raise RuntimeError("a converted weight has no memory of its own: save model.state_dict(), or weight.dequantize()")

    def __repr__(self):
        of = "Parameter containing:\n" if isinstance(self, torch.nn.Parameter) else ""
        grad = f", grad_fn=<{type(self.grad_fn).__name__}>" if self.grad_fn else ", requires_grad=True" * self.requires_grad
        return f"{of}HaloWeight({self.operand if self.master is None else self.master}, recipe={self.recipe}{grad})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, cls):
                sharding.check_whole(weight)
                if weight.fsdp in (None, "gathered") and not is_compiling():
                    if weight.master is not None:
                        weight.follow()
                    if (y := eager.linear(x, weight, bias)) is not None:
                        return y
            if isinstance(weight, cls) and not weight.recipe.is_identity and weight.fsdp != "chunk":
                if torch.compiler.is_exporting():
                    raise RuntimeError("torch.export knows no converted weights: call dequantize_(model) first")
                if weight.master is not None and not is_compiling():
                    weight.follow()
                return _linear_in_graph(x, weight, bias, None, weight.undo_gain)
        elif func == _SET_DATA:
            return args[0]._set_data(args[1])
        elif func is torch.autograd.grad:
            return _grad(*args, **kwargs)
        elif func is torch.autograd.backward:
            return _backward(*args, **kwargs)
        # Python code that runs in here has this function disabled, so nothing that may call a layer belongs in here.
        with torch._C.DisableTorchFunctionSubclass():
            return _watched(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            # The very same master, not a view of it: its version then tells of every write, also through .data.
            return return_and_correct_aliasing(func, args, kwargs, args[0]._alias())
        if func is aten.copy_.default and dispatch.are_alike(*args[:2]):
            return dispatch.copy(*args[:2])
        if func in sharding.OPS:
            out = sharding.OPS[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func in _STAYS_A_WEIGHT and (kwargs.get("dtype") or args[0].dtype).is_floating_point:
            return return_and_correct_aliasing(func, args, kwargs, args[0]._copied(func, args[1:], kwargs))
        out = dispatch.run(func, args, kwargs)
        if func.is_view:
            return tree_map_only(torch.Tensor, args[0]._view, out)
        return out

    def _alias(self) -> "HaloWeight":
        with _of_the_kind_of(self):
            alias = HaloWeight(self.master, self.operand, self.recipe)
        alias.base, alias.fsdp = self.base, self.fsdp
        return alias._tagged(self)

    def _tagged(self, like: torch.Tensor) -> "HaloWeight":
        """This weight with the attributes that users have set on another, as for optimisers. A plain parameter keeps its own
        in ``module.to``; a converted one is replaced there."""
        if not like.__dict__.keys() <= _OWN:
            self.__dict__.update(tags(like))
        return self

    def _view(self, view: torch.Tensor) -> "HaloWeight":
        with _of_the_kind_of(self):
            weight = HaloWeight(view, None, Recipe())
        weight.base = self if self.base is None else self.base
        weight.fsdp = None if self.fsdp == "gathered" else self.fsdp
        return weight

    def _copied(self, func, args, kwargs) -> "HaloWeight":
        """What ``func``, which copies a tensor, makes of this weight."""
        if self.master is not None:
            return self.renewed(func(self.master, *args, **kwargs))
        weight = HaloWeight(None, func(self.operand, *args, **kwargs), self.recipe)  # codes are copied as they are
        weight.fsdp = self.fsdp
        return weight._tagged(self)

    def renewed(self, dense: torch.Tensor) -> "HaloWeight":
        """A weight like this one, of another dense value."""
        weight = HaloWeight.from_hp(
            dense, self.recipe, frozen=self.master is None, gains=self.gains, keep_codes=self.operand is not None
        )
        if self.operand is not None and self.operand.is_packed:
            weight.operand = cast(HadamardQuantTensor, weight.operand).packed()
        weight.fsdp = self.fsdp
        return weight._tagged(self)

    def _set_data(self, value: torch.Tensor) -> None:
        """``weight.data = value``."""
        if isinstance(value, HaloWeight) and value.operand is self.operand and value.master is self.master:
            return  # the end of ``weight.data += …``, which has written already
        value = dense_value(value)
        if (value.shape, value.dtype, value.device) != (self.shape, self.dtype, self.device):
            raise ValueError(
                f"a converted weight's data can only be replaced by a tensor like it, {list(self.shape)} {self.dtype} on "
                f"{self.device}; got {list(value.shape)} {value.dtype} on {value.device}. Use module.to(...) to convert it, "
                "and dequantize_(model) before changing its shape"
            )
        if self.master is not None:
            self.master = value.detach()
        self.requantize(value.detach())

    # The operand's tensors as this weight's own, not as those of a subclass inside: compiled code looks at each level, in
    # every call.
    def __tensor_flatten__(self):
        names, attributes = ([], None) if self.operand is None else self.operand.__tensor_flatten__()
        names = names if self.master is None else ["master", *names]
        return names, {"recipe": self.recipe, "fsdp": self.fsdp, "operand": attributes}

    @classmethod
    def __tensor_unflatten__(cls, tensors, attributes, size, stride):
        operand = attributes["operand"] and HadamardQuantTensor.__tensor_unflatten__(
            tensors, attributes["operand"], size, stride
        )
        weight = cls(tensors.get("master"), operand, attributes["recipe"])
        weight.fsdp = attributes["fsdp"]
        return weight

    codes = property(_codes)
    scale, gain, undo_gain, gains = map(_of_operand, ("scale", "gain", "undo_gain", "gains"))

    def _stable_hash_for_caching(self) -> str:
        """Lets a compiled graph be cached across processes. The graph holds what ``linear`` was traced to, which the compiler
        does not know to depend on this library's sources."""
        names, attributes = self.__tensor_flatten__()
        inner = [(name, t.dtype, tuple(t.shape), t.stride()) for name in names for t in (getattr(self, name),)]
        outer = tuple(self.shape), self.stride(), self.dtype, self.requires_grad
        return repr((fingerprint(), outer, inner, attributes))

    def __deepcopy__(self, memo):
        self.follow()
        copied = super().__deepcopy__(memo)
        copied.in_step()  # versions of another master say nothing of its own
        return copied

    def __getstate__(self):
        self.follow()
        return {name: value for name, value in self.__dict__.items() if name not in ("sent", "rows")}  # FSDP's, on this run


def _of_the_kind_of(tensor: torch.Tensor) -> AbstractContextManager:
    """In inference mode a view of a plain tensor is a plain one. What holds it must be, or PyTorch refuses the view. A weight
    may be plain although its master is not: of a layer made in inference mode."""
    plain = torch.is_inference_mode_enabled() and not tensor.is_inference()
    return torch.inference_mode(False) if plain else nullcontext()


def _grad(outputs, inputs, *args, **kwargs):
    return torch.autograd.grad(_edges(outputs), _edges(inputs), *args, **kwargs)


def _backward(tensors, grad_tensors=None, retain_graph=None, create_graph=False, inputs=None):
    inputs = None if inputs is None else _edges(inputs)
    return torch.autograd.backward(_edges(tensors), grad_tensors, retain_graph, create_graph, inputs=inputs)


def _edges(tensors) -> list:
    """Weights as edges of the graph. Run with __torch_function__ disabled, which they ask for as they are, a backward that
    recomputes (activation checkpointing) would recompute in high precision."""
    tensors = (tensors,) if isinstance(tensors, torch.Tensor) else tensors
    return [torch.autograd.graph.get_gradient_edge(t) if isinstance(t, HaloWeight) else t for t in tensors]


def _moved_by_accelerate(moved: Any, requires_grad: bool) -> torch.nn.Parameter:
    """What accelerate (tested with 1.15) calls the class of a parameter for: ``cls(moved, requires_grad=…)``."""
    if not isinstance(moved, HaloWeight) or moved.is_meta:
        raise TypeError(
            'accelerate\'s offloading (cpu_offload, disk_offload, a device_map with "cpu" or "disk") and its loading of '
            "checkpoints (load_checkpoint_and_dispatch) put plain tensors in place of converted weights: keep every converted "
            "layer on a GPU, and load a checkpoint before quantize_ or with model.load_state_dict"
        )
    return torch.nn.Parameter(moved, requires_grad=requires_grad)


def tags(tensor: torch.Tensor) -> dict[str, Any]:
    """The attributes that users have set on a parameter.

    Raises ValueError if one has the name of an attribute of converted weights.
    """
    if not isinstance(tensor, HaloWeight) and (taken := _OWN & tensor.__dict__.keys()):
        raise ValueError(
            f"a parameter to convert has an attribute {min(taken)!r}, a name that converted weights need: rename it"
        )
    return {name: value for name, value in tensor.__dict__.items() if name not in _OWN}


def _watched(func: Any, args: tuple, kwargs: dict) -> Any:
    """What an ordinary function makes of weights, run eagerly with ``__torch_function__`` disabled."""
    out = func(*args, **kwargs)
    if not isinstance(out, torch.Tensor) and type(out) not in (list, tuple):
        return out
    if isinstance(out, HaloWeight):
        _keep_hooks(func, args[0] if args else None, out)
    elif getattr(func, "__name__", "") in _ATTRIBUTES:
        return out
    return derived.watch(func, args, kwargs, out)


# Not by asking torch.compiler.is_compiling(): Dynamo would then compile calls of __torch_function__ that eager code makes
# between two graphs, and what it makes of weight.grad calls itself without end (torch 2.13).
@torch.compiler.substitute_in_graph(_watched)
def _not_watched(func: Any, args: tuple, kwargs: dict) -> Any:
    return func(*args, **kwargs)


def _keep_hooks(func: Any, weight: Any, out: HaloWeight) -> None:
    """Let hooks on a parameter outlive ``Module._apply``, which puts ``nn.Parameter(converted)`` in its place, that is,
    ``converted.detach().requires_grad_()``."""
    name = dispatch.name_of(func)
    if name in _CONVERSIONS and not torch.is_grad_enabled() and isinstance(weight, torch.nn.Parameter):
        with torch._C.DisableTorchFunctionSubclass():
            hooks = weight._backward_hooks, weight._post_accumulate_grad_hooks
        if any(hooks):
            out.__dict__["_hooks"] = hooks
    elif name == "requires_grad" and "_hooks" in out.__dict__:
        with torch._C.DisableTorchFunctionSubclass():
            out._backward_hooks, out._post_accumulate_grad_hooks = out.__dict__.pop("_hooks")


def dense_value(tensor: torch.Tensor) -> torch.Tensor:
    """What a converted weight stands for, in high precision; any other tensor is itself."""
    return tensor.dequantize() if isinstance(tensor, HaloWeight) else tensor


def _linear_arguments(input, weight, bias=None):
    return input, weight, bias


torch.serialization.add_safe_globals([HaloWeight, Recipe, Product, Operand, Rotation, Format])
