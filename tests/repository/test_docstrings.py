"""The docstrings of public names: each name has a text of its own, and an example that runs."""

import doctest
import inspect
import re
import textwrap

import pytest

import halo_tensor
from halo_tensor import fsdp

PUBLIC = {name: getattr(halo_tensor, name) for name in halo_tensor.__all__} | {"precompute_scales": fsdp.precompute_scales}
try:
    from halo_tensor import transformers

    of_transformers = ("HaloArguments", "HaloCallback", "HaloQuantConfig", "Recoding")
    of_transformers += ("export_compressed_tensors", "fuse_head_", "unfuse_head_")
    PUBLIC |= {name: getattr(transformers, name) for name in of_transformers}
except ImportError:
    pass
#: Public names that have no example yet.
MISSING = {"HadamardQuantTensor", "HaloWeight", "keep_products", "precompute_scales"}
#: Public names whose ``help`` shows another text, or that have members without one.
WITHOUT_TEXT = {"keep_products"}
WITHOUT_TEXT_OF_MEMBERS = {"HadamardQuantTensor", "HaloWeight"}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def example_of(docstring: str) -> str | None:
    """The code under ``Example:`` or ``Examples:``, without its indentation."""
    found = re.search(r"^Examples?::?\n((?:[ \t].*\n|\n)+)", inspect.cleandoc(docstring) + "\n", re.M)
    return found and textwrap.dedent(found[1]).strip()


def run(code: str, name: str) -> None:
    """Run an example: a doctest, or else plain code, perhaps in a fence."""
    if ">>>" not in code:
        exec(compile(re.sub(r"^```.*$", "", code, flags=re.M), name, "exec"), {})
        return
    test = doctest.DocTestParser().get_doctest(code + "\n", {}, name, name, 0)
    assert test.examples
    output: list[str] = []
    result = doctest.DocTestRunner(verbose=False, optionflags=FLAGS).run(test, out=output.append)
    assert not result.failed, "".join(output)


def has_own_text(value: object) -> bool:
    """Whether ``help`` shows a text that was written for this object, not an inherited or a generated one."""
    text = value.__doc__
    if not text or text.startswith(f"{getattr(value, '__name__', '')}("):  # as dataclasses write
        return False
    if inspect.isclass(value):
        return not any(base.__doc__ == text for base in value.__mro__[1:])
    return text != type(value).__doc__


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - WITHOUT_TEXT))
def test_help_shows_its_own_text(name):
    assert has_own_text(PUBLIC[name])
    texts = [value.__doc__ for value in {id(v): v for v in PUBLIC.values()}.values()]
    assert texts.count(PUBLIC[name].__doc__) == 1


@pytest.mark.parametrize(
    "name", [name for name, value in PUBLIC.items() if inspect.isclass(value) and name not in WITHOUT_TEXT_OF_MEMBERS]
)
def test_members_have_texts(name):
    members = {n: m for n, m in vars(PUBLIC[name]).items() if not n.startswith("_")}
    ours = {n: m for n, m in members.items() if isinstance(m, property | staticmethod | classmethod) or inspect.isfunction(m)}
    assert not [n for n, member in ours.items() if not member.__doc__]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name):
    code = example_of(PUBLIC[name].__doc__)
    if code is None:
        assert name in MISSING
        pytest.skip("it has no example yet")
    run(code, name)


def test_the_example_of_the_package_runs():
    run(example_of(halo_tensor.__doc__), "halo_tensor")
    named = set(re.findall(r"`{1,2}(\w+)", halo_tensor.__doc__))
    assert set(halo_tensor.__all__) <= named, "help(halo_tensor) names every public name"


def test_examples_that_are_wrong_fail():
    """And texts that are none are found."""
    with pytest.raises(AssertionError, match=r"Got:\s+2"):
        run(">>> 1 + 1\n3", "wrong")
    with pytest.raises(ZeroDivisionError):
        run("1 / 0", "wrong")
    assert (
        example_of("Add.\n\n    Args:\n        x: one.\n\n    Example:\n        >>> 1\n        1\n\n    Raises:\n        E: x")
        == ">>> 1\n1"
    )
    assert example_of("Add. An Example: none") is None

    class Child(halo_tensor.Conversion):
        __doc__ = halo_tensor.Conversion.__doc__

    assert not has_own_text(Child) and not has_own_text(type("Other", (), {"__doc__": "Other(x: int)"}))
