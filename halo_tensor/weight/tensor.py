"""HaloWeight: the parameter of a converted linear layer.

A weight subclass that acts on aten ops alone never sees the grad_weight product: F.linear decomposes into ops whose backward
does not touch the weight. So :class:`HaloWeight` catches ``F.linear`` itself and calls :mod:`halo_tensor.products.linear`. To
every other op, optimisers and checkpoints above all, it is the dense high-precision weight that it stands for.

It also holds the codes with which its products multiply. Every write to the weight brings them up to date, so a weight is
quantised once per optimiser step, however many micro-batches there are, and a compiled graph only reads codes.

Modules that import the class define what ops do with a weight, in the table of :mod:`halo_tensor.weight.handlers`.
"""

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling

from halo_tensor.fences.pytorch import GROUPED_MM, hidden_from_modes, is_symbolic, preserved_version
from halo_tensor.operand.gains import Gains, moved
from halo_tensor.operand.tensor import HadamardQuantTensor
from halo_tensor.products import eager
from halo_tensor.products.linear import linear
from halo_tensor.products.operands import grad_input_operand, weight_operand
from halo_tensor.products.stacks import stack_operand
from halo_tensor.products.steps import reuses_operand
from halo_tensor.recipe import TENSOR, Recipe
from halo_tensor.version import fingerprint
from halo_tensor.weight import gradients, grouped, refusals
from halo_tensor.weight.handlers import run_function, run_op
from halo_tensor.weight.roles import ShardRole
from halo_tensor.weight.state import CodesState

#: Types of a master whose writes can be followed: a fake or functional tensor has no values.
_HAVE_VALUES = (torch.Tensor, torch.nn.Parameter)
#: The tensors of ``grad_input_operand`` -> the attributes of a weight that they are.
_IN_GRAD_INPUT = {"codes_t": "grad_input_codes", "scale": "grad_input_scale"}
# allow_in_graph: Dynamo puts the call into its graph as it stands, and AOTAutograd traces through it, backward included.
# Looked up once: optimisers read attributes of every weight in each step, and each is a call of __torch_function__.
_LINEAR, _GRAD, _BACKWARD = F.linear, torch.autograd.grad, torch.autograd.backward
_WHOLE, _GATHERED = ShardRole.WHOLE, ShardRole.GATHERED
_linear_in_graph = torch.compiler.allow_in_graph(linear)


class HaloWeight(torch.Tensor):
    """A weight [out_features, in_features] whose ``F.linear`` follows a recipe; to any other op it is the dense weight.

    ``quantize_`` makes them from parameters. ``shard_role`` is its role under FSDP2::

        nn.Parameter
          │  ▲
          │  │ dequantize_
          ▼  │        torch.chunk              copied into          without padding
         WHOLE ──────────────────────▶ CHUNK ──────────────▶ PADDED ─────────────────▶ SHARD
                                                                                        │ ▲
                                                            all-gather of codes, scales │ │ reshard
                                                                                        ▼ │
                                                                                      GATHERED

    A frozen weight that is gathered is WHOLE again. An optimiser updates WHOLE and SHARD; ``F.linear`` takes WHOLE and
    GATHERED. So do the products of experts (:mod:`halo_tensor.products.experts`), whose weights are [experts, out, in] and are
    cut into experts, or into rows of each.

    Attributes:
        master: the dense high-precision weight [out, in], which optimisers update; its gradient is an ordinary dense tensor.
            None if the weight is frozen, so that only its codes are held, or gathered.
        operand: the codes and scales with which ``output`` multiplies. None if the recipe keeps the weight in high precision
            there, or if the weight holds no codes and is quantised in every forward.
        grad_input_operand: the transposed codes and scales with which ``grad_input`` multiplies, of a whole weight that
            ``output`` takes as it is, as in HOT. None if each backward quantises the weight, or ``grad_input`` reads the same
            codes as ``output``, or none.
        recipe: how the three products of the layer are computed.
        shard_role: see above.
        base: of a view or a chunk, the weight that it belongs to. A view has the identity recipe, and writes through it reach
            the codes of its base.
        codes_state: whether the codes are up to date; see :class:`~halo_tensor.weight.state.CodesState`.
        unpadded: of a padded weight, its rows without padding.

    Example:
        >>> import torch
        >>> from halo_tensor import HaloWeight, halo_config, quantize_
        >>> layer = torch.nn.Linear(128, 128)
        >>> report = quantize_(layer, halo_config(level=1, dtype="int8"))
        >>> isinstance(layer.weight, HaloWeight), layer.weight.codes.dtype
        (True, torch.int8)
    """

    master: torch.Tensor | None
    operand: HadamardQuantTensor | None
    grad_input_operand: HadamardQuantTensor | None = None
    recipe: Recipe
    codes_state: CodesState
    shard_role: ShardRole = ShardRole.WHOLE
    base: "HaloWeight | None" = None
    unpadded: "HaloWeight | None" = None

    @staticmethod
    def __new__(
        cls: type["HaloWeight"],
        master: torch.Tensor | None,
        operand: HadamardQuantTensor | None = None,
        recipe: Recipe | None = None,
        *,
        requires_grad: bool | None = None,
    ) -> Any:
        """Make a weight of the master's shape and dtype, or of the operand's without a master."""
        if recipe is None:  # accelerate (tested with 1.15) calls cls(moved, requires_grad=…)
            if not isinstance(master, HaloWeight) or master.is_meta:
                refusals.refuse_accelerate()
            return torch.nn.Parameter(master, requires_grad=bool(requires_grad))
        like = operand if master is None else master
        assert like is not None
        with inference_mode_of(like):
            weight = torch.Tensor._make_wrapper_subclass(
                cls,
                like.shape,
                strides=like.stride(),
                storage_offset=like.storage_offset(),
                dtype=like.dtype,
                device=like.device,
                requires_grad=like.requires_grad,
            )
        weight.master, weight.operand, weight.recipe, weight.codes_state = master, operand, recipe, CodesState()
        return weight

    @classmethod
    def from_hp(
        cls,
        master: torch.Tensor,
        recipe: Recipe,
        frozen: bool = False,
        gains: Gains | None = None,
        keep_codes: bool = True,
        in_features_first: bool = False,
        multiplied: bool = True,
    ) -> "HaloWeight":
        """Convert a dense weight.

        Args:
            master: [out, in], or of experts [experts, out, in], of a floating dtype.
            recipe: what the weight follows.
            frozen: hold only codes, if the recipe uses the same codes in both products with W. Any other weight keeps the
                master.
            gains: the balance of the columns, float32 [in] and its inverse, or None.
            keep_codes: hold codes beside the master. Without them the weight is quantised in every forward, or in every
                backward if only that needs codes.
            in_features_first: whether the master of experts is [experts, in, out]. It needs codes.
            multiplied: whether products read the codes. Those of a shard are gathered first; the codes of its experts are not
                held in the order of grad_input, which is not sent.

        Returns:
            A whole weight, whose codes are up to date.
        """
        if not (frozen or keep_codes or in_features_first):
            return cls(master, None, recipe)
        gains = moved(gains, master.device)
        operand: HadamardQuantTensor | None
        if master.ndim == 3:
            turned = multiplied and not frozen
            operand = stack_operand(
                master, recipe, gains, in_features_first=in_features_first, turned=turned, multiplied=multiplied
            )
        else:
            operand = weight_operand(master, recipe, gains)
        if frozen and operand is not None and reuses_operand(recipe):
            return cls(None, operand.packed(), recipe)
        weight = cls(master, operand, recipe)
        if keep_codes and multiplied and master.ndim == 2:
            weight.grad_input_operand = grad_input_operand(master, recipe)
        weight.mark_in_step()
        return weight

    @property
    def whole(self) -> "HaloWeight":
        """The weight that this one is a view or a chunk of, or itself."""
        return self if self.base is None else self.base

    @property
    def is_gathered(self) -> bool:
        """Whether FSDP2 has gathered it from shards, which have the master."""
        return self.shard_role is ShardRole.GATHERED

    @property
    def needs_common_scale(self) -> bool:
        """Whether its scale depends on the shards of other ranks, so that no rank may quantise it without a write."""
        return self.shard_role is ShardRole.SHARD and self.operand is not None and self.operand.granularity == TENSOR

    @property
    def operands(self) -> list[HadamardQuantTensor]:
        """The operands that it holds: that of output, that of grad_input alone."""
        return [operand for operand in (self.operand, self.grad_input_operand) if operand is not None]

    @property
    def holds_codes(self) -> bool:
        """Whether it holds codes, which follow its writes."""
        return self.operand is not None or self.grad_input_operand is not None

    @property
    def codes(self) -> torch.Tensor | None:
        """The operand's codes, in step with the master; None without an operand. A compiled forward reads them here in every
        call, before it runs its graph: so it sees writes to the master as an eager one does.
        """
        if self.operand is None:
            return None
        if self.master is not None and not is_compiling():
            self.follow()
        return self.operand.codes

    @property
    def scale(self) -> torch.Tensor | None:
        """The float32 scales of the codes, or None."""
        return None if self.operand is None else self.operand.scale

    @property
    def grad_input_codes(self) -> torch.Tensor | None:
        """The transposed codes [in, out'] that only grad_input reads, in step with the master as ``codes`` are; or None."""
        if self.grad_input_operand is None:
            return None
        if self.master is not None and not is_compiling():
            self.follow()
        return self.grad_input_operand.codes_t

    @property
    def grad_input_scale(self) -> torch.Tensor | None:
        """The float32 scales of these codes, or None."""
        return None if self.grad_input_operand is None else self.grad_input_operand.scale

    @property
    def turned_stack(self) -> torch.Tensor | None:
        """The codes of experts in the order of grad_input, [experts, in, out], if they are held."""
        return getattr(self.operand, "turned_stack", None)

    @property
    def in_features_first(self) -> bool:
        """Whether it is the weight of experts [experts, in, out], and not [experts, out, in]."""
        return getattr(self.operand, "in_features_first", False)

    @property
    def gain(self) -> torch.Tensor | None:
        """Powers of two, float32 [in], by which ``balance_`` has multiplied columns before they were quantised; or None."""
        return None if self.operand is None else self.operand.gain

    @property
    def undo_gain(self) -> torch.Tensor | None:
        """The inverse of ``gain``, with which columns of X are multiplied."""
        return None if self.operand is None else self.operand.undo_gain

    @property
    def gains(self) -> Gains | None:
        """The pair (gain, undo_gain), or None."""
        return None if self.operand is None else self.operand.gains

    def dequantize(self) -> torch.Tensor:
        """Return the dense weight, of this shape: the master itself, or the values of a frozen weight's codes."""
        if self.master is not None:
            return self.master
        assert self.operand is not None
        return self.operand.dequantize()

    def requantize(self, dense: torch.Tensor | None = None) -> None:
        """Bring the codes up to date with the master.

        A forward does so by itself, eager or compiled. Call this after a write to ``weight.master`` itself if no forward
        follows, for example before the replay of a CUDA graph that was captured by hand.

        Args:
            dense: the new value of a frozen weight, [out, in].
        """
        if self.base is not None:
            self.base.requantize()
        elif self.holds_codes:
            dense = self.dequantize() if dense is None else dense
            for operand in self.operands:
                operand.requantize_(dense)
            self.mark_in_step()

    def mark_in_step(self) -> None:
        """Note that the codes are those of the master as it is now."""
        state = self.codes_state
        state.version, state.lent, state.sends_scales = state.master_version(self.master), False, False

    @property
    def is_behind(self) -> bool:
        """Whether the master may have been written to after the codes were made from it."""
        state, master = self.codes_state, self.master
        if not self.holds_codes or master is None or type(master) not in _HAVE_VALUES:
            return False
        return state.lent or not state.is_of(master)

    def follow(self) -> None:
        """Bring the codes up to date if the master itself was written to, as by averages of state dicts, before their use."""
        state, master = self.codes_state, self.master
        if not state.lent and master is not None and state.is_of(master):
            return  # what nearly every call finds
        if not self.is_behind:
            return
        counted = master is not None and not state.is_of(master)
        # Autograd counts no writes through .data of a plain weight, and so must not count the writes to codes that follow.
        parts = () if counted else tuple(p for operand in self.operands for p in operand.parts if not p.is_inference())
        # Hidden from modes, since these ops belong to the write. Selective checkpointing matches the ops of two runs and would
        # find them in one of them; make_fx would put them into its graph.
        with torch.no_grad(), hidden_from_modes(), preserved_version(parts):
            self.requantize()

    def lend(self) -> torch.Tensor:
        """Return the dense weight for a state dict. Writes to it may change no version (through ``.data`` or NumPy, or in
        inference mode), so the next forward quantises the master in any case.
        """
        if self.holds_codes and self.master is not None and not self.needs_common_scale:
            self.codes_state.lent = True
        return self.dequantize()

    def check_whole(self) -> None:
        """Raise ValueError if this is a part of a weight, since no recipe describes a product with a part.

        torch's styles of tensor parallelism multiply with a part through DTensor, which cuts the detached weight. A chunk of
        the parameter itself was cut by other code and is a view like any other; so is a chunk that a graph cuts while it is
        traced, since shards were cut before and enter a graph without their base.
        """
        base = self.base
        if base is not None and self.shard_role is ShardRole.CHUNK and (isinstance(base, torch.nn.Parameter) or is_symbolic()):
            return
        if self.shard_role.is_part:
            refusals.refuse_part(self.shape)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None, operand_x: HadamardQuantTensor | None = None) -> torch.Tensor:
        """Compute ``F.linear(x, self, bias)`` in eager code. ``operand_x``: the codes of ``x``, if there are any."""
        if self.master is not None:
            self.follow()
        y = eager.linear(x, self, bias, operand_x)
        return linear(x, self, bias, None, self.undo_gain, operand_x) if y is None else y

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Collection[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _LINEAR:
            x, weight, bias = args if len(args) == 3 else _linear_arguments(*args, **kwargs)
            if isinstance(weight, cls):
                role = weight.shard_role
                if role is not _WHOLE and role is not _GATHERED:
                    weight.check_whole()
                if not weight.recipe.is_identity and role is not ShardRole.CHUNK:
                    if is_compiling():
                        if torch.compiler.is_exporting():
                            refusals.refuse_export()
                    else:
                        if weight.master is not None:
                            weight.follow()
                        if (y := eager.linear(x, weight, bias)) is not None:
                            return y
                    return _linear_in_graph(x, weight, bias, None, weight.undo_gain)
        elif func is GROUPED_MM:
            return grouped.grouped_in_graph(*args, **kwargs)
        elif func is _GRAD:
            return gradients.grad(cls, *args, **kwargs)
        elif func is _BACKWARD:
            return gradients.backward(cls, *args, **kwargs)
        # Python code that runs in here has this function disabled, so nothing that may call a layer belongs in here.
        with torch._C.DisableTorchFunctionSubclass():
            return run_function(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Collection[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run_op(func, args, kwargs or {})

    def __repr__(self, **options: Any) -> str:
        of = "Parameter containing:\n" if isinstance(self, torch.nn.Parameter) else ""
        grad = f", grad_fn=<{type(self.grad_fn).__name__}>" if self.grad_fn else ", requires_grad=True" * self.requires_grad
        return f"{of}HaloWeight({self.operand if self.master is None else self.master}, recipe={self.recipe}{grad})"

    # The operand's tensors are flattened as this weight's own, not as those of a subclass inside: compiled code looks at each
    # level in every call.
    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        names, attributes = ([], None) if self.operand is None else self.operand.__tensor_flatten__()
        names = names if self.master is None else ["master", *names]
        flattened = {"recipe": self.recipe, "shard_role": self.shard_role, "operand": attributes}
        if self.grad_input_operand is not None:
            inner, flattened["grad_input_operand"] = self.grad_input_operand.__tensor_flatten__()
            names += [_IN_GRAD_INPUT[name] for name in inner]
        return names, flattened

    @classmethod
    def __tensor_unflatten__(
        cls, tensors: dict[str, torch.Tensor], attributes: dict[str, Any], size: torch.Size, stride: tuple[int, ...]
    ) -> "HaloWeight":
        operand = attributes["operand"] and HadamardQuantTensor.__tensor_unflatten__(
            tensors, attributes["operand"], size, stride
        )
        weight = cls(tensors.get("master"), operand, attributes["recipe"])
        weight.shard_role = attributes["shard_role"]
        if (held := attributes.get("grad_input_operand")) is not None:
            inner = {name: tensors[outer] for name, outer in _IN_GRAD_INPUT.items() if outer in tensors}
            weight.grad_input_operand = HadamardQuantTensor.__tensor_unflatten__(inner, held, size, stride)
        return weight

    def _stable_hash_for_caching(self) -> str:
        """Return the key of graphs compiled for it in caches across processes; they depend on this library's sources."""
        names, attributes = self.__tensor_flatten__()
        inner = [(name, t.dtype, tuple(t.shape), t.stride()) for name in names for t in (getattr(self, name),)]
        outer = tuple(self.shape), self.stride(), self.dtype, self.requires_grad
        return repr((fingerprint(), outer, inner, attributes))

    def __deepcopy__(self, memo: dict[int, Any]) -> "HaloWeight":
        self.follow()
        copied = super().__deepcopy__(memo)
        copied.mark_in_step()  # its master is another tensor
        return copied

    def __getstate__(self) -> dict[str, Any]:
        self.follow()
        state = {name: value for name, value in self.__dict__.items() if name not in ("codes_state", "unpadded")}
        return state | {"shard_role": self.shard_role.value}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Read a state of this version, or of 0.1.0, where ``shard_role`` was "fsdp" and None was a whole weight."""
        state = {"shard_role": "whole"} | state
        role = state.pop("fsdp", None) or state["shard_role"]
        self.__dict__.update(state, shard_role=ShardRole(role), codes_state=CodesState())


def dense_value(tensor: torch.Tensor) -> torch.Tensor:
    """Return the dense weight of a converted one; any other tensor is returned as it is."""
    return tensor.dequantize() if isinstance(tensor, HaloWeight) else tensor


def inference_mode_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Return a context in which a wrapper of ``tensor`` is an inference tensor only if ``tensor`` is one.

    In inference mode a view of a plain tensor is a plain one, and PyTorch refuses it if its wrapper is an inference tensor.
    """
    plain = torch.is_inference_mode_enabled() and not tensor.is_inference()
    return torch.inference_mode(False) if plain else nullcontext()


def _linear_arguments(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return input, weight, bias
