"""The contenders of the benchmarks: their names, and how each converts a model in place."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from halo_tensor import fsdp, halo_config, hot_config, quantize_, recipe_config
from halo_tensor.calibration.balance import set_gains
from halo_tensor.layers.kinds import is_experts
from halo_tensor.operand import gains
from halo_tensor.weight.tensor import HaloWeight


def _linears(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def _everything(module: nn.Module, name: str) -> bool:
    return _linears(module, name) or is_experts(module)


def _ours(config, model: nn.Module) -> None:
    quantize_(model, config, filter_fn=_everything, min_gain=0)  # layers that lose are measured too


def torchao_float8(recipe: str, model: nn.Module, filter_fn=_linears, all_gather: bool = False) -> None:
    """Convert to torchao's float8 training.

    Args:
        recipe: "tensorwise" or "rowwise".
        model: converted in place.
        filter_fn: which modules to convert.
        all_gather: let FSDP2 gather weights in fp8, which torchao offers for "tensorwise" only.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = replace(Float8LinearConfig.from_recipe_name(recipe), enable_fsdp_float8_all_gather=all_gather)
    convert_to_float8_training(model, config=config, module_filter_fn=filter_fn)


#: Milliseconds for which the tuner of torchao's int8 product runs each configuration: as a warm-up, and while it is timed.
TUNING = {"warmup": 10, "rep": 30}


def torchao_int8(model: nn.Module, filter_fn=_linears) -> None:
    """Convert to torchao's prototype of INT8 mixed-precision training, which computes all three products in int8.

    torchao 0.18 registers the function for F.linear in a table of ATen ops, where it is never found, and products silently
    stay in bf16. This function registers it again. With module_swap=True products are in int8, but ``torch.compile`` does not
    accept the config that the module passes on.

    On a GPU, its product times 27 configurations for each size and keeps the fastest. Here all of them are tried too, but each
    is timed for TUNING milliseconds instead of Triton's 125, because two Llama-3-8B blocks have nine sizes.
    """
    import torchao
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig, int8_mixed_precision

    weight = int8_mixed_precision.Int8MixedPrecisionTrainingLinearWeight
    product = int8_mixed_precision._Int8MixedPrecisionTrainingLinearFunction

    @weight.implements_torch_function(nn.functional.linear)
    def linear(func, types, args, kwargs):
        return product.apply(*args, **(kwargs or {}))

    if torch.cuda.is_available():  # on a CPU the product is PyTorch's
        from torchao.prototype.quantized_training.int8_mm import _scaled_int8_mm_kernel
        from triton.testing import do_bench

        _scaled_int8_mm_kernel.do_bench = partial(do_bench, **TUNING)
    torchao.quantization.quantize_(model, Int8MixedPrecisionTrainingConfig(), filter_fn=filter_fn)


FP8_ALL_GATHER = "torchao-tensorwise-fp8-all-gather"  #: for FSDP2
BALANCED = "-balanced"  #: suffix of a contender's name: the caller calls balance_ after converting
DRAWN = "-drawn"  #: suffix of a contender's name: the caller calls draw_gains after converting
FROZEN = "-frozen"  #: suffix of a contender's name: weights need no gradient
#: Suffixes of a contender's name -> what computes the head and its loss, instead of PyTorch: linear_cross_entropy, or
#: Liger-Kernel's fused loss. The caller fuses the head.
HEADS = {"-head": "halo_tensor", "-liger": "liger"}
HALO = {f"halo{level}-{dtype}": halo_config(level, dtype) for dtype in ("fp8", "int8", "fp6") for level in (0, 1, 2)}
#: Suffixes of names -> fields that trade speed for memory (docs/memory.md).
MEMORY = {
    "no-codes": {"memory": "balanced"},
    "low": {"memory": "low"},
    "low-int6": {"memory": "low", "activations": "int6"},
    "8-bit-activations": {"activations": "int8"},
}
HALO |= {f"{name}-{suffix}": replace(config, **options) for name, config in HALO.items() for suffix, options in MEMORY.items()}
RECIPES = {"hot": hot_config(), "hot_llm": recipe_config("hot_llm")}
CONTENDERS = {
    "bf16": lambda model: None,
    "torchao-tensorwise": partial(torchao_float8, "tensorwise"),
    FP8_ALL_GATHER: partial(torchao_float8, "tensorwise", all_gather=True),
    "torchao-rowwise": partial(torchao_float8, "rowwise"),
    "torchao-int8": torchao_int8,
    "ideal-fp8": partial(_ours, recipe_config("ideal_fp8")),
    **{name: partial(_ours, config) for name, config in (HALO | RECIPES).items()},
}


def split_head(name: str) -> tuple[str, str | None]:
    """Split a contender's name into that of its layers and a value of HEADS, or None."""
    suffix = next((suffix for suffix in HEADS if name.endswith(suffix)), "")
    return name.removesuffix(suffix), HEADS.get(suffix)


def rotated(name: str) -> bool:
    name = split_head(name)[0].removesuffix(BALANCED)
    return name in HALO and HALO[name].level > 0


def convert(model: nn.Module, name: str, seed: int = 0) -> None:
    """Convert ``model`` to a contender. ``seed`` draws random signs. The caller balances the model or draws gains."""
    if name.endswith(FROZEN):
        model.requires_grad_(False)
    name = name.removesuffix(BALANCED).removesuffix(DRAWN).removesuffix(FROZEN)
    if rotated(name):
        _ours(replace(HALO[name], seed=seed), model)
    else:
        CONTENDERS[name](model)


def precompute_scales(name: str, model: nn.Module) -> None:
    """Compute the scales of all weights in one reduction, after an optimiser step under FSDP2."""
    if name == FP8_ALL_GATHER:
        from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

        precompute_float8_dynamic_scale_for_fsdp(model)
    elif name in HALO:
        fsdp.precompute_scales(model)


def draw_gains(model: nn.Module, seed: int) -> None:
    """Let X and W of all converted layers share random powers of two from ¼ to 4, one draw for each width.

    It also applies to torchao's layers. Floating-point codes keep their relative precision, but another element determines the
    scale of a row, so the whole row is rounded differently. Another draw of random signs has this effect on a recipe with a
    rotation. There is no effect where scales are powers of two, as torchao's row-wise scales are.
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
    """Quantise all weights again, as they are after an optimiser's write, for steps that have no optimiser."""
    for weight in model.parameters():
        if isinstance(weight, HaloWeight) and weight.requires_grad:
            weight.requantize()
