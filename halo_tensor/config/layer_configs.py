"""A config for each layer, and the file that holds them."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from torchao.core.config import AOBaseConfig

from halo_tensor.config import files
from halo_tensor.config.base import LinearConfig


@dataclass(frozen=True)
class LayerConfigs(AOBaseConfig):
    """A config for each layer: what :func:`~halo_tensor.calibrate` chooses and :func:`~halo_tensor.quantize_` takes.

    Layers that it does not name are left alone.

    Args:
        layers: qualified name of a layer -> its config.
        measured: qualified name of a layer -> the figures that the choice rests on.

    Example:
        >>> import tempfile, torch
        >>> from halo_tensor import LayerConfigs, halo_config, quantize_
        >>> chosen = LayerConfigs({"0": halo_config(1, "int8"), "1": halo_config(0, "fp8")})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     chosen.save(f"{folder}/layers.json")
        ...     loaded = LayerConfigs.load(f"{folder}/layers.json")
        >>> loaded == chosen
        True
        >>> quantize_(torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 128)), loaded).converted
        ['0', '1']
    """

    layers: dict[str, LinearConfig]
    measured: dict[str, dict[str, float]] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write it to a JSON file.

        Args:
            path: of the file, which is replaced if it exists.
        """
        files.write(Path(path), self.layers, self.measured)

    @classmethod
    def load(cls, path: str | Path) -> "LayerConfigs":
        """Read a file that :meth:`save` wrote, in this version or an earlier one.

        Args:
            path: of the file.

        Returns:
            the configs and figures that were saved.

        Raises:
            ValueError: the file is no such JSON, is of an unknown version, or a field is unknown, missing or wrong. The
                message names the file, the layer and the field.
        """
        return cls(*files.read(Path(path)))

    def __str__(self) -> str:
        counts = Counter(self.layers.values()).most_common()
        return "\n".join([f"configs of {len(self.layers)} layers", *(f"  {n} × {config}" for config, n in counts)])
