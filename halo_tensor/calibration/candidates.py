"""The configs that ``report``, ``calibrate`` and ``python -m halo_tensor bench`` choose from by default."""

import torch

from halo_tensor.analysis import roofline
from halo_tensor.analysis.ceilings import Ceilings
from halo_tensor.config import HaloConfig, halo_config
from halo_tensor.kernels.device import runs

#: Name -> config. ``report`` compares all of them.
CANDIDATES: dict[str, HaloConfig] = {
    **{f"int8 HALO-{level}": halo_config(level, "int8") for level in (0, 1, 2)},
    **{f"fp8 HALO-{level}": halo_config(level, "fp8") for level in (0, 1)},
}
#: The names that ``calibrate`` and the benchmark choose from.
SHORT_LIST = ("int8 HALO-1", "fp8 HALO-0", "int8 HALO-2")


def fastest_first(device: torch.device, ceilings: Ceilings) -> list[HaloConfig]:
    """Return the configs of the short list that ``device`` runs and ``ceilings`` predict to be faster than bf16.

    The config with the shortest predicted time comes first.
    """
    able = [CANDIDATES[name] for name in SHORT_LIST if runs(CANDIDATES[name].recipe.formats, device)]
    return roofline.fastest_first(able, ceilings)
