"""mkdocstrings: the roles of docstrings, :func:`~halo_tensor.report` for example, as code."""

import re

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):`~?([^`]+)`")


def plain(text: str) -> str:
    """``text`` with every role as the last part of its name, in backticks; ``halo_tensor.x`` keeps the last part only."""
    return ROLE.sub(lambda match: f"`{match[1].rpartition('.')[2]}`", text)


class Roles(griffe.Extension):
    """Replaces roles in every docstring that mkdocstrings loads."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
