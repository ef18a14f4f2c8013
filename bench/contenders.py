"""Who is compared: names, and how each converts a model in place."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from halo_tensor import halo_config, quantize_, recipe_config
from halo_tensor.calibration.balance import set_gains
from halo_tensor.operand import gains
from halo_tensor.weight import fsdp
from halo_tensor.weight.tensor import HaloWeight


def _everything(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def _ours(config, model: nn.Module) -> None:
    quantize_(model, config, filter_fn=_everything)


def torchao_float8(recipe: str, model: nn.Module, filter_fn=_everything, all_gather: bool = False) -> None:
    """``recipe``: "tensorwise" or "rowwise". ``all_gather``: FSDP2 gathers weights in fp8, which is tensorwise only."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), enable_fsdp_float8_all_gather=all_gather)
    convert_to_float8_training(model, config=config, module_filter_fn=filter_fn)


#: Milliseconds for which the tuner of torchao's int8 product runs a configuration: before it is timed, and while it is.
TUNING = {"warmup": 10, "rep": 30}


def torchao_int8(model: nn.Module, filter_fn=_everything) -> None:
    """Its prototype of INT8 mixed-precision training, all three products in int8.

    torchao 0.18 registers the function for F.linear where only ATen ops are looked up, so that products stay in bf16
    without a word: it is registered anew. With module_swap=True they are in int8, but ``torch.compile`` does not take the
    config that the module passes on.

    On a GPU its product times 27 configurations for each size and keeps the fastest. All of them are tried here too, but each
    is timed for TUNING milliseconds instead of Triton's 125: two Llama-3-8B blocks have nine sizes.
    """
    import torchao
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig, int8_mixed_precision

    weight = int8_mixed_precision.Int8MixedPrecisionTrainingLinearWeight
    product = int8_mixed_precision._Int8MixedPrecisionTrainingLinearFunction

    @weight.implements_torch_function(nn.functional.linear)
    def linear(func, types, args, kwargs):
        return product.apply(*args, **(kwargs or {}))

    if torch.cuda.is_available():  # elsewhere the product is PyTorch's
        from torchao.prototype.quantized_training.int8_mm import _scaled_int8_mm_kernel
        from triton.testing import do_bench

        _scaled_int8_mm_kernel.do_bench = partial(do_bench, **TUNING)
    torchao.quantization.quantize_(model, Int8MixedPrecisionTrainingConfig(), filter_fn=filter_fn)


FP8_ALL_GATHER = "torchao-tensorwise-fp8-all-gather"  #: for FSDP2
BALANCED = "-balanced"  #: at the end of a contender's name: balance_ follows, on data that its caller has
DRAWN = "-drawn"  #: draw_gains follows
HALO = {f"halo{level}-{dtype}": halo_config(level, dtype) for dtype in ("fp8", "int8", "fp6") for level in (0, 1, 2)}
HALO |= {f"{name}-no-codes": replace(config, keep_codes=False) for name, config in HALO.items()}
CONTENDERS = {
    "bf16": lambda model: None,
    "torchao-tensorwise": partial(torchao_float8, "tensorwise"),
    FP8_ALL_GATHER: partial(torchao_float8, "tensorwise", all_gather=True),
    "torchao-rowwise": partial(torchao_float8, "rowwise"),
    "torchao-int8": torchao_int8,
    "ideal-fp8": partial(_ours, recipe_config("ideal_fp8")),
    **{name: partial(_ours, config) for name, config in HALO.items()},
}


def rotated(name: str) -> bool:
    name = name.removesuffix(BALANCED)
    return name in HALO and HALO[name].level > 0


def convert(model: nn.Module, name: str, seed: int = 0) -> None:
    """``seed``: of the random signs of a rotation, where there is one. To balance and to draw gains is the caller's."""
    name = name.removesuffix(BALANCED).removesuffix(DRAWN)
    if rotated(name):
        _ours(replace(HALO[name], seed=seed), model)
    else:
        CONTENDERS[name](model)


def precompute_scales(name: str, model: nn.Module) -> None:
    """What is to be called after each optimiser step under FSDP2: one reduction for the scales of all weights."""
    if name == FP8_ALL_GATHER:
        from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

        precompute_float8_dynamic_scale_for_fsdp(model)
    elif name in HALO:
        fsdp.precompute_scales(model)


def draw_gains(model: nn.Module, seed: int) -> None:
    """Let X and W of all converted layers, torchao's too, share random powers of two from ¼ to 4, one draw for each width.

    Floating codes keep their relative precision, but another element sets a row's scale, so that the whole row is rounded
    otherwise: what random signs are to a recipe with a rotation. (Not where scales are powers of two, as torchao's by rows.)
    """
    generator, pairs = torch.Generator().manual_seed(seed), {}
    for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
        ours, width = isinstance(module.weight, HaloWeight), module.in_features
        if not ours and type(module) is nn.Linear:
            continue
        if width not in pairs:
            exponents = torch.randint(-2, 3, (width,), generator=generator)
            pairs[width] = gains.of_exponents(exponents.to(module.weight.device))
        if ours:
            set_gains(module.weight, pairs[width])
        else:
            _give_float8(module, pairs[width])


def _give_float8(module: nn.Linear, pair: gains.Gains) -> None:
    from torchao.float8.float8_linear import matmul_with_hp_or_float8_args

    def forward(x: torch.Tensor) -> torch.Tensor:
        x, weight = x * module.gain[1], module.weight * module.gain[0]
        y = matmul_with_hp_or_float8_args.apply(x, weight.t(), module.linear_mm_config, module.config)
        return y if module.bias is None else y + module.bias

    if not hasattr(module, "gain"):
        module.register_buffer("gain", torch.empty(2, module.in_features).to(module.weight), persistent=False)
        module.forward = forward
    module.gain.copy_(torch.stack(pair))


@torch.no_grad()
def requantize(model: nn.Module) -> None:
    """What the optimiser's write to the weights causes, once a step: they are quantised anew. For steps timed without one."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, HaloWeight):
            weight.requantize()
