"""``HaloQuantConfig`` for checkpoints that have a ``quantization_config`` of another library.

transformers refuses a config of another class than the checkpoint's, and has no hook before that (5.23.0), so
``AutoHfQuantizer.merge_quantization_configs`` is wrapped when this module is imported. All other configs go through it as
before.
"""

from copy import deepcopy
from functools import wraps
from typing import Any

from transformers.quantizers import AutoHfQuantizer
from transformers.utils.versions import require_version

from halo_tensor.transformers.config import METHOD, HaloQuantConfig


def read_other_checkpoints() -> None:
    """Let a HaloQuantConfig take the place of another library's config. The quantizer finds that in its ``source``."""
    merge: Any = AutoHfQuantizer.merge_quantization_configs
    if getattr(merge, "reads_others", False):
        return

    @wraps(merge)
    def merged(cls: type, quantization_config: Any, quantization_config_from_args: Any) -> Any:
        given = quantization_config_from_args
        if not isinstance(given, HaloQuantConfig):
            return merge(quantization_config, given)
        own = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        if own.get("quant_method") == METHOD:
            if not given.frozen:
                raise ValueError(
                    "frozen=False is for plain checkpoints and those of other libraries. This one has codes of this library: "
                    "load it without, call model.dequantize(), and then quantize_"
                )
            return merge(quantization_config, given)
        require_version("transformers>=5.21", "Earlier ones round scales of 8-bit checkpoints while loading: upgrade them.")
        given = deepcopy(given)
        vars(given)["source"] = own
        return given

    merged.reads_others = True  # type: ignore[attr-defined]
    AutoHfQuantizer.merge_quantization_configs = classmethod(merged)  # type: ignore[method-assign, assignment]
