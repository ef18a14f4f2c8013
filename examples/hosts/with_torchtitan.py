"""torchtitan: train one of its models in low precision. Every option of torchtitan works.

    torchrun --nproc-per-node 8 examples/hosts/with_torchtitan.py --module llama3 --config llama3_8b --compile.enable

This is ``python -m torchtitan.train`` with one more option.
"""

import sys

from torchtitan.train import main

OVERRIDE = 'halo_tensor.torchtitan.halo_linear={"level": 1, "dtype": "int8"}'

if __name__ == "__main__":
    sys.argv += ["--override.imports", OVERRIDE]
    main()
