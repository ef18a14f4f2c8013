"""``python -m halo_tensor``: the environment, for a bug report. ``--json`` prints it as JSON."""

import argparse
import json

from halo_tensor import environment


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m halo_tensor", description="Versions and devices, for a bug report.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    found = environment()
    print(json.dumps(found, indent=1) if as_json else found)


if __name__ == "__main__":
    main()
