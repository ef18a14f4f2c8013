"""The version of the library, and a fingerprint of its sources."""

from functools import cache
from hashlib import sha256
from pathlib import Path

__version__ = "0.1.0"


@cache
def fingerprint() -> str:
    """Return a hash of the library's sources. It is part of the keys of compiled code: other sources must not reuse that."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
