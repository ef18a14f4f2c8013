"""The version of the library, and a fingerprint of its sources."""

from functools import cache
from hashlib import sha256
from pathlib import Path

__version__ = "0.1.0"


@cache
def fingerprint() -> str:
    """Of the library's sources: what was compiled with others must not be taken from a cache."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
