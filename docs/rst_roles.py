"""mkdocstrings: docstrings as Markdown. Roles, :func:`~halo_tensor.report` for example, become code, and so do examples."""

import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?([^`]+)`")


def plain(text: str) -> str:
    """``text`` with every role as the last part of its name, in backticks; ``halo_tensor.x`` keeps the last part only."""
    return ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", text)


def example(text: str) -> str:
    """``text`` with a section ``Example:`` named as mkdocstrings knows it, which then shows doctests as code."""
    return re.sub(r"^Example:$", "Examples:", text, flags=re.M)


class Roles(griffe.Extension):
    """Rewrites every docstring that mkdocstrings loads."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = example(plain(obj.docstring.value))
