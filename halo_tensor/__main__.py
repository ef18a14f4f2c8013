"""Print the environment, for a bug report: ``python -m halo_tensor [--json]``.

``python -m halo_tensor bench`` measures how fast linear layers are on this GPU.
"""

import argparse
import json
import sys

from halo_tensor import environment
from halo_tensor.diagnostics import bench


def main() -> None:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(prog="python -m halo_tensor", description="Versions and devices, for a bug report.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    commands = parser.add_subparsers(dest="command", metavar="bench")
    bench.add_arguments(commands.add_parser("bench", help="bf16 against low precision on this GPU", description=bench.__doc__))
    args = parser.parse_args()
    if args.command == "bench":
        sys.exit(bench.run(args))
    found = environment()
    print(json.dumps(found, indent=1) if args.json else found)


if __name__ == "__main__":
    main()
