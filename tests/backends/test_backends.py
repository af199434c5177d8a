"""The backend contract for every library; lookup of a backend; arrays that must not be mixed."""

from __future__ import annotations

import numpy as np
import pytest

import tnadapt as tna
from tests.conftest import installed
from tnadapt.backends import Backend, available_backends, get_backend, load_backend, register_backend
from tnadapt.testing import BackendContract


class Installed(BackendContract):
    """The contract for a library that may be absent."""

    name = ""

    @pytest.fixture(autouse=True)
    def _load(self) -> None:
        if not installed(self.name):
            pytest.skip(f"{self.name} is not installed")
        self.backend = load_backend(self.name)
        if not self.backend.usable():
            pytest.skip(f"{self.name} finds no device to compute on")


class TestNumpy(Installed):
    name = "numpy"


class TestStrict(Installed):
    name = "array_api_strict"


class TestTorch(Installed):
    name = "torch"


class TestJax(Installed):
    name = "jax"


class TestCupy(Installed):
    name = "cupy"


def test_the_backend_is_found_from_the_type(backend: Backend) -> None:
    x = backend.asarray(np.ones(2), "float32")
    assert get_backend(x, x) is backend is load_backend(backend.name)
    assert backend.name in available_backends()


def test_subclasses_are_their_librarys() -> None:
    class Named(np.ndarray):
        pass

    assert get_backend(np.zeros(2).view(Named)).name == "numpy"
    torch = pytest.importorskip("torch")
    assert get_backend(torch.nn.Parameter(torch.zeros(2))).name == "torch"


def test_mixed_libraries_or_devices_name_both() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(tna.BackendError, match="two libraries in one call: numpy and torch"):
        tna.kronecker([np.ones(2, np.float32), torch.ones(2)])
    with pytest.raises(tna.BackendError, match="two devices in one call: cpu and meta"):
        tna.kronecker([torch.ones(2), torch.ones(2, device="meta")])
    plan = tna.UpdatePlan(tna.presets.lora(1), [(2, 2)])
    params = plan.init()
    params["group0.split0.factor1"] = torch.tensor(params["group0.split0.factor1"])
    with pytest.raises(tna.BackendError, match="numpy and torch"):
        plan.deltas(params)


def test_devices_that_do_not_exist() -> None:
    plan = tna.UpdatePlan(tna.presets.lora(1), [(2, 2)])
    torch = pytest.importorskip("torch")
    with pytest.raises(tna.BackendError, match="no device 'toaster'"):
        plan.init("torch", device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(tna.BackendError, match="cannot use device 'cuda'"):
            plan.init("torch", device="cuda")
    pytest.importorskip("jax")
    with pytest.raises(tna.BackendError, match="no device"):
        plan.init("jax", device="toaster")
    with pytest.raises(tna.BackendError, match="no device"):
        plan.init("jax", device="cpu:99")
    assert str(plan.init("jax", device="cpu:0")["group0.split0.factor0"].device).lower().startswith(("cpu", "tfrt_cpu"))


def test_registering() -> None:
    with pytest.raises(tna.BackendError, match="cannot be replaced"):
        register_backend("numpy", lambda: load_backend("numpy"))
    with pytest.raises(tna.BackendError, match="a name and a callable"):
        register_backend("mine", None)  # type: ignore[arg-type]
    with pytest.raises(tna.BackendError, match="no backend named 'nonsense'"):
        load_backend("nonsense")

    def absent() -> Backend:
        raise ImportError("No module named 'absent_library'")

    register_backend("absent_library", absent)
    with pytest.raises(tna.BackendError, match="cannot be imported here: No module named 'absent_library'"):
        load_backend("absent_library")
    assert "absent_library" not in available_backends()


def test_a_library_that_records_derivatives_says_how() -> None:
    class Recording(Backend):
        def differentiates(self, x: object) -> bool:
            return True

    x = np.ones(2)
    with pytest.raises(NotImplementedError, match="Recording records derivatives but defines no with_pullback"):
        Recording(np).with_pullback(x, [x], lambda x, cotangents: x)
    assert load_backend("numpy").with_pullback(x, [x], lambda x, cotangents: x)[0] is x


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_no_arrays_and_lookalikes_of_arrays() -> None:
    with pytest.raises(tna.BackendError, match="at least one array"):
        get_backend()
    for thing in (1.0, [1.0], None, "x"):
        with pytest.raises(tna.BackendError, match="expected an array of one of numpy"):
            get_backend(thing)
    for thing in (np.matrix([[1.0, 2.0]]), np.ma.masked_array([1.0, 2.0])):
        with pytest.raises(tna.BackendError, match="must be an array of one of numpy"):
            tna.fwht(thing)
