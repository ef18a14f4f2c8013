"""HaloWeight: the parameter of a converted linear layer.

A weight subclass alone never sees the grad_weight product, since F.linear decomposes into aten ops whose backward does not
touch the weight. So this wrapper catches ``F.linear`` itself and hands it to :mod:`halo_tensor.linear`; to everything else,
optimisers and checkpoints above all, it is the dense high-precision weight it holds.
"""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from halo_tensor.linear import linear
from halo_tensor.recipe import Format, Operand, Product, Recipe, Rotation

aten = torch.ops.aten
_STAYS_A_WEIGHT = {
    aten.clone.default,
    aten.empty_like.default,  # Module.to_empty
    aten._to_copy.default,
    aten._pin_memory.default,
}

_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]
# allow_in_graph: Dynamo puts the call into its graph as it stands, and AOTAutograd traces through it, backward included.
_linear_in_graph = torch._dynamo.allow_in_graph(linear)


class HaloWeight(torch.Tensor):
    """A weight [out_features, in_features] whose ``F.linear`` follows a recipe.

    Attributes:
        master: the high-precision weight, what optimisers update. Its gradient is an ordinary dense tensor.
        recipe: how the three products of its layer are computed.
    """

    master: torch.Tensor
    recipe: Recipe

    @staticmethod
    def __new__(cls, master: torch.Tensor, recipe: Recipe):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            master.shape,
            strides=master.stride(),
            storage_offset=master.storage_offset(),
            dtype=master.dtype,
            device=master.device,
            requires_grad=master.requires_grad,
        )

    def __init__(self, master: torch.Tensor, recipe: Recipe):
        self.master = master
        self.recipe = recipe

    def __repr__(self):
        return f"HaloWeight({self.master}, recipe={self.recipe})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, cls) and not weight.recipe.is_identity:
                return _linear_in_graph(x, weight, bias)
        elif func == _SET_DATA:
            return args[0]._set_data(args[1])
        elif func is torch.autograd.grad:
            return _grad(*args, **kwargs)
        # Python code that runs in here has this function disabled, so nothing that may call a layer belongs in here.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            # The very same master, not a view of it: its version then tells of every write, also through .data.
            return return_and_correct_aliasing(func, args, kwargs, cls(args[0].master, args[0].recipe))
        plain_args, plain_kwargs = tree_map_only(cls, lambda weight: weight.master, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if func in _STAYS_A_WEIGHT and out.is_floating_point():
            return return_and_correct_aliasing(func, args, kwargs, cls(out, args[0].recipe))
        if not func._schema.is_mutable:
            return out
        # Autograd, which counts versions, is above this function and has only seen the wrappers.
        written = [w for w in tree_leaves(_written_arguments(func, args, kwargs)) if isinstance(w, cls)]
        torch.autograd.graph.increment_version([w.master for w in written])
        wrapper = {id(w.master): w for w in written}  # an in-place op returns what it wrote to: the weight, not its master
        return tree_map_only(torch.Tensor, lambda t: wrapper.get(id(t), t), out)

    def _set_data(self, value: torch.Tensor) -> None:
        """``weight.data = value``."""
        value = value.master if isinstance(value, HaloWeight) else value
        if (value.shape, value.dtype, value.device) != (self.shape, self.dtype, self.device):
            raise ValueError(
                f"a converted weight's data can only be replaced by a tensor like it, {list(self.shape)} {self.dtype} on "
                f"{self.device}; got {list(value.shape)} {value.dtype} on {value.device}. Use module.to(...) to convert it"
            )
        self.master = value.detach()

    def __tensor_flatten__(self):
        return ["master"], {"recipe": self.recipe}

    @classmethod
    def __tensor_unflatten__(cls, tensors, attributes, size, stride):
        return cls(tensors["master"], attributes["recipe"])

    def _stable_hash_for_caching(self) -> str:
        """Lets a compiled graph be cached across processes."""
        return repr((tuple(self.shape), self.dtype, self.recipe))


def _grad(outputs, inputs, *args, **kwargs):
    """``torch.autograd.grad`` with weights among its inputs. Run with __torch_function__ disabled, a backward that recomputes
    (activation checkpointing) would recompute in high precision; so the weights go in as edges of the graph instead."""
    inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs
    edges = [torch.autograd.graph.get_gradient_edge(t) if isinstance(t, HaloWeight) else t for t in inputs]
    return torch.autograd.grad(outputs, edges, *args, **kwargs)


def convert_weight(module: torch.nn.Linear, recipe: Recipe) -> None:
    """Make ``module``'s linear products follow ``recipe``, in place; its state dict stays a plain one."""
    weight = module.weight
    master = weight.master if isinstance(weight, HaloWeight) else weight.detach()
    module.weight = torch.nn.Parameter(HaloWeight(master, recipe), requires_grad=weight.requires_grad)
    if _save_plain not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_save_plain)
        module.register_load_state_dict_pre_hook(_load_plain)


def restore_weight(module: torch.nn.Linear) -> None:
    """The inverse of :func:`convert_weight`."""
    weight = module.weight
    assert isinstance(weight, HaloWeight)
    module.weight = torch.nn.Parameter(weight.master, requires_grad=weight.requires_grad)
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            if getattr(hook, "hook", hook) in (_save_plain, _load_plain):
                del hooks[key]


def _save_plain(module, state_dict, prefix, local_metadata):
    weight = state_dict[prefix + "weight"]
    if isinstance(weight, HaloWeight) and not weight.requires_grad:  # it does under keep_vars=True
        state_dict[prefix + "weight"] = weight.master


def _load_plain(module, state_dict, prefix, local_metadata, *_):
    """``load_state_dict(assign=True)`` puts a tensor of the state dict in the weight's place: make it one."""
    weight = state_dict.get(prefix + "weight")
    if local_metadata.get("assign_to_params_buffers") and weight is not None and not isinstance(weight, HaloWeight):
        state_dict[prefix + "weight"] = HaloWeight(weight.detach(), module.weight.recipe)


def _written_arguments(func, args, kwargs) -> list:
    arguments = func._schema.arguments
    return [
        args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _linear_arguments(input, weight, bias=None):
    return input, weight, bias


torch.serialization.add_safe_globals([HaloWeight, Recipe, Product, Operand, Rotation, Format])
