"""A plugin of pytest for the marker ``law``: checked as tests are collected, and recorded for the page of the laws."""

from __future__ import annotations

import pytest

from tnadapt.algebra.folding import FOLDS

from .book import laws

__all__ = ["about"]

BOOK = laws()

LIBRARIES = ("numpy", "array_api_strict", "torch", "jax", "cupy")
DTYPES = ("float64", "float32", "float16", "bfloat16")
# Of these parameters the values are names: of a method, a config, a model, a fault.
NAMES = (
    "bad", "case", "check", "config", "damage", "format", "kind", "label", "method", "model", "name", "preset",
    "projection", "target", "variant", "what",
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Refuse a marker that names no law of the book: the collection of its file fails."""
    if unknown := [law for law in _laws(metafunc.definition) if law not in BOOK]:
        pytest.fail(f"{metafunc.definition.name} is marked with the law {unknown[0]!r}, which the book lacks", False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add each test's laws to its ``user_properties``, and what the case is of: ``--junitxml`` writes them down."""
    for item in items:
        if own := _laws(item):
            item.user_properties += [*(("law", law) for law in own), *about(item)]


def _laws(node: pytest.Item) -> dict[str, None]:
    return dict.fromkeys(law for mark in node.iter_markers("law") for law in mark.args)


def about(item: pytest.Item) -> list[tuple[str, object]]:
    """Whether Hypothesis draws a case; its library, dtype, fold and variant, as its parameters have them."""
    found: list[tuple[str, object]] = []
    if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
        found.append(("drawn", True))
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    for key, value in parameters.items():
        # What a worker of pytest-xdist reports must be UTF-8, and a name of a fault need not be.
        text = str(value).removeprefix("torch.").encode(errors="backslashreplace").decode()
        if text in LIBRARIES:
            found.append(("library", text))
        elif text in DTYPES:
            found.append(("dtype", text))
        elif text in FOLDS:
            found.append(("fold", text))
        elif key in NAMES and isinstance(value, str | float):
            found.append(("variant", text[:60]))
    if "library" not in dict(found):
        # A test that names no library computes on the one that its module imports, or on NumPy.
        module = vars(getattr(item, "module", None) or object)
        found.append(("library", next((name for name in ("jax", "torch") if name in module), "numpy")))
    return found
