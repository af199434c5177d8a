"""The contract suites can fail: a class that returns None without declaring it does not pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt.algebra.formats import CP, FORMATS, Dense, Format
from tnadapt.backends import OPTIONAL, Backend, load_backend, register_backend
from tnadapt.testing import BackendContract, FormatContract, MapContract, SourceContract

NumpyBackend: Any = type(load_backend("numpy"))

TESTS = {
    "gradient": BackendContract.test_gradient,
    "fwht": BackendContract.test_the_kernel_of_fwht,
    "fastfood": BackendContract.test_the_kernels_of_fastfood,
    "shuffle": BackendContract.test_the_kernel_of_shuffle,
    "dft2": BackendContract.test_the_fft_of_dft2,
}


class Plain(NumpyBackend):
    """A NumPy backend without optional methods; each test determines which of them are declared."""

    name = "plain"

    def __init__(self, listed: frozenset[str]) -> None:
        super().__init__()
        self.listed = listed

    def lacks(self, x: Any) -> frozenset[str]:
        return self.listed


for method in OPTIONAL:
    setattr(Plain, method, getattr(Backend, method))


def contract_of(found: Backend) -> BackendContract:
    contract = BackendContract()
    contract.backend = found
    return contract


def test_every_optional_method_is_held_to_what_is_declared() -> None:
    assert set(TESTS) == set(OPTIONAL)


@pytest.mark.parametrize("method", OPTIONAL)
def test_none_without_saying_so_fails(method: str) -> None:
    TESTS[method](contract_of(Plain(frozenset(OPTIONAL))))
    expected = rf"Plain\.{method} returned None: implement it, or list '{method}' in lacks\(\)"
    with pytest.raises(AssertionError, match=expected):
        TESTS[method](contract_of(Plain(frozenset(OPTIONAL) - {method})))


class Refusing(Plain):
    """A backend that refuses one dtype with a given error."""

    name = "refusing"

    def __init__(self, refused: str, text: str) -> None:
        super().__init__(frozenset(OPTIONAL))
        self.refused, self.text = refused, text

    def dtype(self, name: str) -> Any:
        if name == self.refused:
            raise tna.BackendError(self.text)
        return super().dtype(name)


def test_a_dtype_may_be_refused_with_a_reason_only() -> None:
    contract_of(Refusing("float64", "float64 must be switched on first")).test_round_trip()
    with pytest.raises(AssertionError, match="float64 is refused by an error that does not name it: no"):
        contract_of(Refusing("float64", "no")).test_round_trip()
    with pytest.raises(tna.BackendError, match="float32 must be switched on"):
        contract_of(Refusing("float32", "float32 must be switched on first")).test_round_trip()


def test_jax_may_have_float64_switched_off() -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(False):
        contract_of(load_backend("jax")).test_round_trip()


class Answering(Plain):
    """A backend that implements one optional method, returning zeros."""

    name = "answering"

    def __init__(self, listed: frozenset[str], method: str) -> None:
        super().__init__(listed)
        for other in set(OPTIONAL) - {method}:
            setattr(self, other, getattr(super(), other))

    def fwht(self, x: Any, *others: Any) -> Any:
        return np.zeros_like(x)

    def gradient(self, function: Any, arrays: Any) -> Any:
        return {name: np.zeros_like(array) for name, array in arrays.items()}

    def fastfood(self, x: Any, draws: Any, n_in: int, adjoint: bool, fallback: Any) -> Any:
        return np.zeros_like(fallback[adjoint](x))

    def shuffle(self, x: Any, *others: Any, **named: Any) -> Any:
        return np.zeros_like(x)

    def dft2(self, x: Any, fallback: Any) -> Any:
        return np.zeros_like(x)


@pytest.mark.parametrize("method", OPTIONAL)
def test_an_answer_where_none_is_declared_fails(method: str) -> None:
    expected = rf"Answering\.{method} returned a result, but lacks\(\) lists it: remove it"
    with pytest.raises(AssertionError, match=expected):
        TESTS[method](contract_of(Answering(frozenset(OPTIONAL), method)))


@pytest.mark.parametrize("method", OPTIONAL)
def test_a_wrong_answer_fails(method: str) -> None:
    with pytest.raises(AssertionError, match=r"Not equal|Mismatched"):
        TESTS[method](contract_of(Answering(frozenset(OPTIONAL) - {method}, method)))


def test_a_name_that_is_no_method_fails() -> None:
    with pytest.raises(AssertionError, match=r"lacks\(\) lists \{'gradients'\}; expected names of \('gradient', "):
        BackendContract.test_gradient(contract_of(Plain(frozenset({*OPTIONAL, "gradients"}))))


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


def test_a_dtype_that_the_library_has_is_not_passed_over() -> None:
    class Narrow(NumpyBackend):
        def dtype(self, name: str) -> Any:
            if name == "float16":
                raise tna.BackendError("no floating dtype 'float16'")
            return super().dtype(name)

    with pytest.raises(tna.BackendError, match="no floating dtype 'float16'"):
        contract_of(Narrow()).test_round_trip()


@pytest.mark.parametrize(
    ("contract", "test", "example"),
    [
        (FormatContract, "test_counts", "kind = MyFormat"),
        (MapContract, "test_the_adjoint_is_that_of_the_derivative", "kind = MyMap"),
        (SourceContract, "test_a_dictionary_gives_the_source_back", r"sources = \(MySource\(\),\)"),
    ],
)
def test_a_contract_without_its_subject_says_what_is_missing(contract: type, test: str, example: str) -> None:
    empty = type("TestMine", (contract,), {})
    with pytest.raises(tna.ConfigError, match=f"^TestMine does not say what it tests: set {example} in the class$"):
        getattr(empty(), test)()


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
