"""transformers: a callback for trainers, and quantised checkpoints.

:class:`HaloCallback` converts the model of a ``Trainer``, TRL's included, before it trains; :class:`HaloArguments` does so by
``--halo int8`` on a command line.

The rest of this page is about quantising a model as it is loaded, saving it quantised and loading it again.

Importing this module teaches transformers to read such checkpoints::

    from halo_tensor.transformers import HaloQuantConfig

    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=HaloQuantConfig(level=1, dtype="int8"))
    model.save_pretrained("quantised")
    model = AutoModelForCausalLM.from_pretrained("quantised")  # the config is in the checkpoint

A checkpoint that another library released in 8 bits (fp8 with blocks, compressed-tensors W8A8) is read in the same way, and
``print(model.halo_recoding)`` shows how close the codes are.

Each weight of an ``nn.Linear`` that :func:`~halo_tensor.quantize_` would convert is quantised when it arrives on its device,
and is held as codes only. So at most one weight at a time is in high precision. Such a model trains with adapters (PEFT).
``model.save_pretrained`` writes codes and scales, and ``from_pretrained`` reads them back, bit for bit;
``model.dequantize()`` makes it a plain model again.
"""

from transformers.utils.versions import require_version

require_version("transformers>=5.6", "Earlier ones cannot read quantised checkpoints: upgrade transformers.")

from halo_tensor.layers import experts  # noqa: E402  after the check of the version
from halo_tensor.transformers.arguments import HaloArguments  # noqa: E402
from halo_tensor.transformers.callback import HaloCallback  # noqa: E402
from halo_tensor.transformers.config import HaloQuantConfig  # noqa: E402
from halo_tensor.transformers.export.api import Exported, export_compressed_tensors  # noqa: E402
from halo_tensor.transformers.head import fuse_head_, unfuse_head_  # noqa: E402
from halo_tensor.transformers.quantizer import HaloQuantizer  # noqa: E402
from halo_tensor.transformers.recoding import Recoding  # noqa: E402

experts.register()

__all__ = [
    "Exported",
    "HaloArguments",
    "HaloCallback",
    "HaloQuantConfig",
    "HaloQuantizer",
    "Recoding",
    "export_compressed_tensors",
    "fuse_head_",
    "unfuse_head_",
]
