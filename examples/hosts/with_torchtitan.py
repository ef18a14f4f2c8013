"""torchtitan: train one of its models in low precision. Every option of torchtitan works.

    torchrun --nproc-per-node 8 examples/hosts/with_torchtitan.py --module llama3 --config llama3_8b --compile.enable

This is ``python -m torchtitan.train`` with one more option. ``halo_experts`` does nothing to a model without experts.
"""

import sys

from torchtitan.train import main

OPTIONS = '{"level": 1, "dtype": "int8"}'
OVERRIDES = [f"halo_tensor.torchtitan.{name}={OPTIONS}" for name in ("halo_linear", "halo_experts")]

if __name__ == "__main__":
    sys.argv += ["--override.imports", *OVERRIDES]
    main()
