"""Kernels as operators of torch, without Triton or a device: programs, what is recorded, plans of launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

import tnadapt as tna

from .internals import launch_plans, torch_kernels

passes = launch_plans.passes

# -- The operators of the Triton kernels in programs of torch.compile, without Triton and without a device -------------

# What they compute is tested in kernels/test_triton.py.


LARGE = 2**64 - 59


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take any device for one with kernels."""
    monkeypatch.setattr(torch_kernels, "is_supported", lambda x: True)
    monkeypatch.setattr(torch_kernels, "_has_launcher", lambda: True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


with_kernels = pytest.mark.usefixtures("pretended")


class Traced:
    """A compiler that runs nothing: it records the operators of the forward and the backward program."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return aot_module_simplified(graph, inputs, fw_compiler=self._record, bw_compiler=self._record)

    def _record(self, graph: Any, inputs: Any) -> Any:
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        self.called += [str(node.target) for node in nodes]
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        metas = [None if node is None else node.meta["val"] for node in outputs]
        return make_boxed_func(lambda *args: [_zeros(meta) for meta in metas])

    def tnadapt(self) -> list[str]:
        return [name for name in self.called if name.startswith("tnadapt.")]


def _zeros(meta: Any) -> Any:
    if not isinstance(meta, torch.Tensor):
        return meta if meta is None else _length(meta)
    return torch.zeros([_length(size) for size in meta.shape], dtype=meta.dtype)


def _length(size: Any) -> int:
    """Return a length, or the one that a variable length had in the trace."""
    return size if isinstance(size, int) else int(size.node.hint)


FUNCTIONS: dict[str, tuple[Callable[[Any], Any], tuple[int, ...], list[str]]] = {
    "fwht": (lambda x: tna.fwht(x, axis=0), (8, 3), ["tnadapt.fwht.default"] * 2),
    "F": (tna.Projection("linear", 5, 12, seed=LARGE), (2, 3, 5), ["tnadapt.fastfood.default"] * 2),
    "its adjoint": (tna.Projection("linear_v2", 5, 12, seed=1).adjoint, (12,), ["tnadapt.fastfood.default"] * 2),
    "nonlinear": (tna.Projection("nonlinear", 5, 12, seed=LARGE), (5,), ["tnadapt.fastfood.default"] * 2),
    "shuffle": (tna.Projection("shuffle", 6, 6, seed=LARGE), (2, 6), ["tnadapt.shuffle.default"] * 2),
}


@with_kernels
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_compiled_program_calls_them_forward_and_backward(name: str) -> None:
    function, shape, expected = FUNCTIONS[name]
    traced = Traced()
    x = torch.ones(shape, requires_grad=True)
    y = torch.compile(function, backend=traced, fullgraph=True)(x)
    y.sum().backward()
    assert traced.tnadapt() == expected
    assert x.grad is not None
    assert not any("mm" in called for called in traced.called)


@with_kernels
def test_kept_normal_numbers_are_an_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_kernels, "_draws_fast", lambda device: False)
    traced, f = Traced(), tna.Projection("linear", 5, 12)
    torch.compile(f, backend=traced, fullgraph=True)(torch.ones(5, requires_grad=True)).sum().backward()
    assert traced.tnadapt() == ["tnadapt.fastfood.default"] * 2
    assert [name for name in f.map.__dict__ if name.startswith("placed on")] == ["placed on cpu: gain"]


@with_kernels
@pytest.mark.parametrize(("capability", "fast"), [((9, 0), True), ((8, 0), True), ((8, 9), False), ((12, 0), False)])
def test_cards_with_slow_double_precision_keep_normal_numbers(
    capability: tuple[int, int], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert torch_kernels._draws_fast(torch.device("cuda", 0)) is fast


@with_kernels
def test_seeds_stay_constants() -> None:
    """A second seed makes the compiler take an integer for a variable, which has 63 bits."""
    traced = Traced()

    @torch.compile(backend=traced, fullgraph=True)
    def both(f: tna.Projection, g: tna.Projection, x: Any) -> Any:
        return f(x), g(x)

    for seed in (LARGE, LARGE + 1, LARGE + 2):
        f, g = tna.Projection("linear", 5, 5, seed=seed), tna.Projection("shuffle", 5, 5, seed=seed)
        both(f, g, torch.ones(5))
    assert traced.tnadapt() == ["tnadapt.fastfood.default", "tnadapt.shuffle.default"] * 3


@with_kernels
def test_any_number_of_rows() -> None:
    traced = Traced()
    f = torch.compile(tna.Projection("linear", 5, 12), backend=traced, fullgraph=True, dynamic=True)
    assert [tuple(f(torch.ones(rows, 5)).shape) for rows in (2, 3, 7)] == [(2, 12)] * 3  # of the first trace
    assert traced.tnadapt() == ["tnadapt.fastfood.default"]


@with_kernels
def test_exported_programs_contain_none() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return tna.fwht(x)

    for strict in (True, False):
        program = torch.export.export(Module(), (torch.ones(8),), strict=strict)
        assert not any(str(node.target).startswith("tnadapt.") for node in program.graph.nodes)


@with_kernels
def test_shapes_without_numbers() -> None:
    with FakeTensorMode():
        x = torch.empty(3, 8)
        assert torch_kernels.fwht_operator(x, 0.5).shape == (3, 8)
        assert torch_kernels.fastfood_operator(x, None, "16 8 1 0 1", 8, 13, False).shape == (3, 13)
        assert torch_kernels.fastfood_operator(torch.empty(3, 13), None, "16 8 1 0 1", 8, 13, True).shape == (3, 8)
        assert torch_kernels.shuffle_operator(x, "1 0", True).shape == (3, 8)


@with_kernels
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_kernels, "kernels", lambda name: None)
    with pytest.raises(
        RuntimeError, match=r"compiled with Triton kernels for a tensor on cpu, and Triton 3\.5 or newer"
    ):
        torch_kernels.fwht_operator(torch.ones(2, 8), 1.0)


# -- A kernel is called directly where nothing records the call, and as an autograd function where something does ------


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_tracer_is_given_no_constant() -> None:
    try:
        traced = torch.jit.trace(tna.fwht, torch.randn(8))
    except RuntimeError:
        return  # refused, as a function in Python may be
    x = torch.randn(8)
    torch.testing.assert_close(traced(x), tna.fwht(x))


# -- Launch plans for GPUs: passes transform every digit once in tiles that fit, and read the draws of a map -----------


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("tile_bytes", [1 << 15, 1 << 16])
def test_every_digit_is_done_once(itemsize: int, tile_bytes: int) -> None:
    for bits in range(35):
        found = passes(bits, itemsize, tile_bytes)
        assert math.prod(1 << step.bits for step in found) == 1 << bits
        assert [step.stride for step in found] == [1 << sum(s.bits for s in found[:k]) for k in range(len(found))]
        for step in found:
            assert step.rows * step.columns * itemsize <= tile_bytes
            assert step.columns <= 128
            if step.stride > 1:
                assert step.rows == 1 << step.bits
                assert step.stride % step.columns == 0
                assert step.columns * itemsize >= 64


def test_number_of_passes() -> None:
    assert [len(passes(bits, 4, 1 << 16)) for bits in (14, 24, 30)] == [1, 2, 3]
    assert [len(passes(bits, 4, 1 << 15)) for bits in (13, 22, 30)] == [1, 2, 3]
    assert [len(passes(bits, 8, 1 << 15)) for bits in (12, 21, 30)] == [1, 2, 3]
