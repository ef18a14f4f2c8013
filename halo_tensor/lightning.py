"""Lightning: a precision plugin for ``Trainer`` and ``Fabric``.

Tested with lightning 2.6.6.
"""

from contextlib import AbstractContextManager
from typing import Any

import lightning.fabric.plugins.precision as fabric
import torch
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from halo_tensor.convert import Conversion
from halo_tensor.switch import Switch

#: Lightning's plugin of the precision of everything that is not converted.
OTHERS = {
    "32-true": fabric.Precision,
    "bf16-true": lambda: fabric.HalfPrecision("bf16-true"),
    "bf16-mixed": lambda: fabric.MixedPrecision("bf16-mixed", device="cuda" if torch.cuda.is_available() else "cpu"),
}


class HaloPrecision(Precision):
    """Converts the model that a Lightning ``Trainer`` or ``Fabric`` sets up, before optimisers exist.

    ``Trainer(plugins=HaloPrecision("int8", precision="bf16-mixed"))``. With ``Fabric(plugins=HaloPrecision("int8"))``, make
    the optimizer of the parameters of what ``fabric.setup_module(model)`` returns, since the conversion replaces parameters:
    an optimizer that is older is refused.

    Args:
        value: a dtype ("int8"), the name of a recipe, the path of a file that ``LayerConfigs.save`` wrote, a mapping of
            options, or a config.
        precision: of everything else: "32-true", "bf16-true" or "bf16-mixed", as Lightning's own plugins.
        **options: ``level``, ``dtype`` and other fields of :class:`~halo_tensor.HaloConfig`, or ``recipe``. Without ``level``,
            fp8 is not rotated (level 0), and int8 gets level 1.

    Attributes:
        conversion: which layers were converted, and why others were not; None before the model is set up.

    Raises:
        ValueError: an option is not valid. Later: no layer was converted, an optimizer is older than the conversion, or the
            model was converted by other code.

    Example:
        >>> from halo_tensor.lightning import HaloPrecision
        >>> from lightning.fabric import Fabric
        >>> fabric = Fabric(accelerator="cpu", devices=1, plugins=HaloPrecision("int8"))
        >>> model = fabric.setup_module(torch.nn.Sequential(torch.nn.Linear(128, 128)))
        >>> model[0].weight.codes.dtype
        torch.int8
    """

    def __init__(self, value: Any = None, *, precision: str = "32-true", **options: Any):
        self.switch = Switch.of(value, **options)
        if self.switch.balance or self.switch.report:
            raise ValueError(
                "HaloPrecision sees no batch: call balance_ and report yourself, in LightningModule.on_fit_start for example"
            )
        if precision not in OTHERS:
            raise ValueError(f"precision must be one of {', '.join(OTHERS)}; got {precision!r}")
        self.precision = precision  # type: ignore[assignment]
        self.other = OTHERS[precision]()
        self.conversion: Conversion | None = None

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert a model. Lightning calls this before it makes or sets up optimisers, and again for later loops."""
        module = self.other.convert_module(module)
        if not hasattr(module, "_halo_precision"):
            self.conversion = self.switch.convert(module)
            module._halo_precision = True  # type: ignore[assignment]
        return module

    def tensor_init_context(self) -> AbstractContextManager:
        """Return the context in which tensors are made."""
        return self.other.tensor_init_context()

    def module_init_context(self) -> AbstractContextManager:
        """Return the context in which modules are made."""
        return self.other.module_init_context()

    def forward_context(self) -> AbstractContextManager:
        """Return the context of a forward: autocast, with "bf16-mixed"."""
        return self.other.forward_context()

    def convert_input(self, data: Any) -> Any:
        """Return a batch in the dtype of the model."""
        return self.other.convert_input(data)

    def convert_output(self, data: Any) -> Any:
        """Return outputs in the default dtype."""
        return self.other.convert_output(data)

    def pre_backward(self, tensor: torch.Tensor, module: Any) -> Any:
        """Call the hooks of a LightningModule; Fabric has none."""
        return super().pre_backward(tensor, module) if _has_trainer(module) else None

    def backward(self, tensor: torch.Tensor, model: Any, *args: Any, **kwargs: Any) -> None:
        """Run the backward."""
        if _has_trainer(model):
            super().backward(tensor, model, *args, **kwargs)
        else:
            self.other.backward(tensor, model, *args, **kwargs)

    def post_backward(self, tensor: torch.Tensor, module: Any) -> Any:
        """Call the hooks of a LightningModule; Fabric has none."""
        return super().post_backward(tensor, module) if _has_trainer(module) else None

    def optimizer_step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Step the optimiser: ``Trainer`` passes the model and a closure, Fabric does not."""
        if args or "model" in kwargs:
            return super().optimizer_step(optimizer, *args, **kwargs)
        return self.other.optimizer_step(optimizer, **kwargs)


def _has_trainer(module: Any) -> bool:
    return getattr(module, "_trainer", None) is not None
