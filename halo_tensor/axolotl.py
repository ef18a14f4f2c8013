"""Axolotl: a plugin that trains in low precision.

    plugins:
      - halo_tensor.axolotl.HaloPlugin
    halo: int8

``halo`` is a dtype ("int8"), the name of a recipe ("hot_llm"), the path of a .json file of ``LayerConfigs``, or options::

    halo: {level: 2, dtype: int8, balance: 4}

The plugin adds a :class:`~halo_tensor.transformers.HaloCallback` to the trainer, so it converts after adapters are loaded and
before the optimiser exists, for fine-tuning and for preference training.

Tested with axolotl 0.19.0.
"""

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator

from halo_tensor.switch import Switch
from halo_tensor.transformers.callback import HaloCallback

NAME = "halo_tensor.axolotl.HaloPlugin"


class HaloArgs(BaseModel):
    """The key that the plugin adds to Axolotl's config.

    Raises:
        ValueError: ``halo`` is missing, or it or a key of its mapping is not known; the base is quantised by others; or FSDP1
            is configured.
    """

    halo: str | dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def check_halo(cls, data: Any) -> Any:
        """Refuse what would not train in low precision, before a model is loaded."""
        if not isinstance(data, dict) or NAME not in (data.get("plugins") or []):
            return data
        if unknown := sorted(key for key in data if key.startswith("halo") and key != "halo"):
            raise ValueError(
                f"there is no key {unknown[0]!r}: options stand under halo, as in halo: {{dtype: int8, balance: 4}}"
            )
        if data.get("halo") is None:
            raise ValueError(f"{NAME} trains in what halo says: add halo: int8, for example, or remove the plugin")
        Switch.of(data["halo"])
        for key in ("load_in_4bit", "load_in_8bit", "gptq"):
            if data.get(key):
                raise ValueError(
                    f"{key} quantises the base weights in its own way, which halo cannot convert: remove one of them"
                )
        if data.get("fsdp_config") and data.get("fsdp_version", 1) == 1:
            raise ValueError("halo works with FSDP2, and not with FSDP1: set fsdp_version: 2")
        return data


class HaloPlugin(BasePlugin):
    """Adds HaloCallback to Axolotl's trainers."""

    def get_input_args(self) -> str:
        """Return the name of the model of the plugin's keys."""
        return "halo_tensor.axolotl.HaloArgs"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[HaloCallback]:
        """Return the callback that converts the model when the trainer has been made."""
        value = cfg.get("halo")
        return [HaloCallback(dict(value) if isinstance(value, dict) else value)]
