"""The version of the library, in a source tree as in a wheel: pyproject.toml reads it here."""

__version__ = "0.1.0"
