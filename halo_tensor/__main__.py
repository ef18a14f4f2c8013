"""``python -m halo_tensor``: the environment, for a bug report. ``--json`` prints it as JSON."""

import argparse
import json

from halo_tensor import environment

parser = argparse.ArgumentParser(prog="python -m halo_tensor", description="Versions and devices, for a bug report.")
parser.add_argument("--json", action="store_true", help="print JSON")
found = environment()
print(json.dumps(found, indent=1) if parser.parse_args().json else found)
