"""The contract suites can fail: a class that returns None without declaring it does not pass."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.backends.internals import numpy_backend
from tnadapt.algebra.formats import CP, FORMATS, Dense, Format
from tnadapt.backends import OPTIONAL, Backend, load_backend, register_backend
from tnadapt.testing import BackendContract, FormatContract

TESTS = {
    "gradient": BackendContract.test_gradient,
    "fwht": BackendContract.test_the_kernel_of_fwht,
    "fastfood": BackendContract.test_the_kernels_of_fastfood,
    "shuffle": BackendContract.test_the_kernel_of_shuffle,
    "dft2": BackendContract.test_the_fft_of_dft2,
}


class Plain(numpy_backend.NumpyBackend):
    """A NumPy backend that declares what it is told to, and answers optional methods with zeros, or not at all."""

    name = "plain"

    def __init__(self, *listed: str, answered: str = "") -> None:
        super().__init__()
        self.listed = frozenset(listed)
        for method in set(OPTIONAL) - {answered}:
            setattr(self, method, types.MethodType(getattr(Backend, method), self))

    def lacks(self, x: Any) -> frozenset[str]:
        return self.listed

    def fwht(self, x: Any, *others: Any) -> Any:
        return np.zeros_like(x)

    def gradient(self, function: Any, arrays: Any) -> Any:
        return {name: np.zeros_like(array) for name, array in arrays.items()}

    def fastfood(self, x: Any, f: Any, adjoint: bool) -> Any:
        return np.zeros_like(f.plain(self)[adjoint](x))

    def shuffle(self, x: Any, *others: Any, **named: Any) -> Any:
        return np.zeros_like(x)

    def dft2(self, x: Any, fallback: Any) -> Any:
        return np.zeros_like(x)


def contract_of(backend: Backend) -> BackendContract:
    contract = BackendContract()
    contract.backend = backend
    return contract


@pytest.mark.parametrize("method", OPTIONAL)
def test_every_optional_method_is_held_to_what_is_declared(method: str) -> None:
    assert set(TESTS) == set(OPTIONAL)
    others = set(OPTIONAL) - {method}
    TESTS[method](contract_of(Plain(*OPTIONAL)))
    with pytest.raises(
        AssertionError, match=rf"Plain\.{method} returned None: implement it, or list '{method}' in lacks\(\)"
    ):
        TESTS[method](contract_of(Plain(*others)))
    with pytest.raises(AssertionError, match=rf"Plain\.{method} returned a result, but lacks\(\) lists it: remove it"):
        TESTS[method](contract_of(Plain(*OPTIONAL, answered=method)))
    with pytest.raises(AssertionError, match=r"Not equal|Mismatched"):
        TESTS[method](contract_of(Plain(*others, answered=method)))


@pytest.mark.parametrize(
    ("dtype", "message", "error", "shown"),
    [
        ("float64", "float64 must be switched on first", None, ""),
        ("float64", "no", AssertionError, "float64 is refused by an error that does not name it: no"),
        ("float32", "float32 must be switched on first", tna.BackendError, "float32 must be switched on"),
        # That the library has it is not passed over.
        ("float16", "no floating dtype 'float16'", tna.BackendError, "no floating dtype 'float16'"),
    ],
)
def test_a_dtype_may_be_refused_with_a_reason_only(
    dtype: str, message: str, error: type[Exception] | None, shown: str
) -> None:
    class Refusing(Plain):
        def dtype(self, name: str) -> Any:
            if name == dtype:
                raise tna.BackendError(message)
            return super().dtype(name)

    with pytest.raises(error, match=shown) if error else contextlib.nullcontext():
        contract_of(Refusing(*OPTIONAL)).test_round_trip()


def test_jax_may_have_float64_switched_off() -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(False):
        contract_of(load_backend("jax")).test_round_trip()


def test_a_name_that_is_no_method_fails() -> None:
    with pytest.raises(AssertionError, match=r"lacks\(\) lists \{'gradients'\}; expected names of \('gradient', "):
        BackendContract.test_gradient(contract_of(Plain(*OPTIONAL, "gradients")))


def test_verify_does_not_leave_out_a_law_that_was_not_declared_missing() -> None:
    strict = pytest.importorskip("array_api_strict")

    class Silent(Backend):
        name = "array_api_strict"

        def __init__(self) -> None:
            super().__init__(strict)

    before = type(load_backend("array_api_strict"))
    register_backend("array_api_strict", Silent)
    try:
        expected = r"the backend 'array_api_strict' returned None for a gradient, and its lacks\(\) does not list"
        with pytest.raises(tna.BackendError, match=expected):
            tna.verify(tna.presets.lora(1), [(3, 2)], backends=["array_api_strict"])
    finally:
        register_backend("array_api_strict", before)


def test_a_format_without_halves_has_to_say_so() -> None:
    class Forgotten(CP):
        def inner(self, modes: int) -> int | None:
            return Format.inner(self, modes)

    class Said(Forgotten):
        unfolds = False

    class Wrong(CP):
        unfolds = False

    class Lacking(Dense):
        unfolds = True

    def unfolding(kind: type[Format]) -> None:
        contract = FormatContract()
        contract.kind = kind
        contract.test_an_unfolding_is_the_product_of_its_halves()

    unfolding(Said)
    for kind in (Forgotten, Lacking):
        with pytest.raises(AssertionError, match=rf"{kind.__name__}\.inner returned None: implement it, or set"):
            unfolding(kind)
    with pytest.raises(AssertionError, match=r"Wrong\.inner returned 1, but unfolds is False: remove that line"):
        unfolding(Wrong)


def test_a_format_without_a_name_has_one_during_the_test_alone() -> None:
    class Unnamed(CP):
        def __init__(self, *arguments: Any) -> None:
            raise RuntimeError("found by its name")

    contract, before = FormatContract(), dict(FORMATS)
    contract.kind = Unnamed
    with pytest.raises(RuntimeError, match="found by its name"):
        contract.test_other_libraries_files_hold_the_update_or_say_how_far_they_are_off()
    assert dict(FORMATS) == before


def test_a_formula_that_is_a_method_is_told() -> None:
    class Method(Format):
        def array_shapes(self, rank: Any) -> dict[str, tuple[int, ...]]:
            return {"a": (self.sizes[0], rank), "b": (rank, self.sizes[1])}

        def formula(self) -> str:  # type: ignore[override]
            return "ar,rb->ab"

    with pytest.raises(
        tna.ConfigError,
        match=r"must be a string; got <bound method .*Method\.formula .*write @property above its definition$",
    ):
        Method((3, 4), 2).num_terms  # noqa: B018
