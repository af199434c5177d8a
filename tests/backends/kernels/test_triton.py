"""The Triton kernels against their reference implementations: on a CUDA device, or under Triton's interpreter.

The interpreter must be selected before Triton is imported, so without a device one test runs this file again in a
separate process, where CPU tensors are treated as tensors on a device. The rules and the rounding of the compiler,
which the interpreter does not have, are tested in test_triton_compile.py.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import relative_error
from tnadapt.algebra import rng
from tnadapt.algebra.maps.fastfood import fwht_plain
from tnadapt.backends import get_backend

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton", minversion="3.5")

import triton.language as tl

from ..internals import launch_plans as passes
from ..internals import torch_kernels, vector
from .internals import triton_kernels as kernel_draws
from .internals import triton_launcher as launcher

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device; done by test_under_the_interpreter"
)
# The interpreter takes seconds for what a device does in microseconds.
few = settings(max_examples=15 if INTERPRETED else 100)

SEEDS = [(0, 0), (2**40 + 7, 3), (2**63 - 1, 2**31), (2**64 - 1, 2**32 - 1)]
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="this is the interpreter, or there is a device")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def tensor(array: np.ndarray, dtype: str = "float64") -> Any:
    return torch.tensor(array, dtype=getattr(torch, dtype), device=DEVICE)


def numpy(x: Any) -> np.ndarray:
    return np.asarray(x.cpu())


@triton.jit
def _draw(
    words, normals, normals_in_rows, signs, images, inverses,
    start: tl.int64, group: tl.int64, seed: tl.uint64, N: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, N)
    tl.store(words + i, kernel_draws.word(start + i, 2, group, seed))
    tl.store(normals + i, kernel_draws.normal(start + i, 2, group, seed))
    rows = tl.arange(0, N // 128) * 128
    place = rows[:, None] + tl.arange(0, 128)[None, :]
    tl.store(normals_in_rows + place, kernel_draws.normal_row(start + rows, 128, 4, group, seed))
    tl.store(signs + place, kernel_draws.sign_row(start + rows, 128, group, seed).to(tl.int8))
    keys = kernel_draws.feistel_keys(group, seed)
    tl.store(images + i, kernel_draws.feistel(start + i, keys, BITS, False))
    tl.store(inverses + i, kernel_draws.feistel(start + i, keys, BITS, True))


@pytest.mark.law("equal-seeds")
@kernels
@pytest.mark.parametrize(("seed", "group"), SEEDS)
@pytest.mark.parametrize("start", [0, 1 << 15, (1 << 35) + 128])
def test_draws_have_the_bits_of_the_format(seed: int, group: int, start: int) -> None:
    n = 1 << 14
    bits = max(15, start.bit_length())
    kinds = [torch.int32, torch.float32, torch.float32, torch.int8, torch.int64, torch.int64]
    found = [torch.zeros(n, dtype=kind, device=DEVICE) for kind in kinds]
    _draw[(1,)](*found, start, group, seed, N=n, BITS=bits, enable_fp_fusion=False)
    words, normals, normals_in_rows, signs, images, inverses = map(numpy, found)
    stop = start + n
    assert np.array_equal(words.view(np.uint32), rng.words(seed, group, 2, start, stop))
    assert np.array_equal(normals, rng.normals(seed, group, 2, start, stop))
    assert np.array_equal(normals_in_rows, rng.normals(seed, group, 4, start, stop))
    assert np.array_equal(1 - 2 * signs, rng.signs(seed, group, start, stop))
    assert np.array_equal(images, rng.permutation(1 << bits, seed, group, start, stop))
    assert np.array_equal(inverses, rng.permutation(1 << bits, seed, group, start, stop, inverse=True))


@triton.jit
def _normal_of(words, out, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, kernel_draws.normal_of(tl.load(words + i).to(tl.uint32, bitcast=True)))


@kernels
def test_normals_of_words_everywhere() -> None:
    edges = [0, 1, 2, (1 << 31) - 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1]
    # |q| = 0.425 divides centre and tails.
    for edge in (0.075, 0.925):
        edges += [int(edge * 2**32) + d for d in range(-3, 4)]
    # And the series of the logarithm changes its half-octave.
    edges += [int(2.0 ** (-k / 2) * 2**32) + d for k in range(7, 64) for d in (-1, 0, 1) if 2.0 ** (32 - k / 2) > 2]
    drawn_words = np.random.default_rng(0).integers(0, 1 << 32, (1 << 18) - len(edges))
    words = np.concatenate([edges, drawn_words]).astype(np.uint32)
    found = torch.zeros(words.size, device=DEVICE)
    _normal_of[(64,)](torch.tensor(words.view(np.int32), device=DEVICE), found, N=1 << 12, enable_fp_fusion=False)
    assert np.array_equal(numpy(found), rng._normal_of(words))


@pytest.mark.law("kernels-agree")
@kernels
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bits", range(17))
def test_fwht(bits: int, dtype: str, rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 1 << bits))
    found = launcher.fwht(tensor(x, dtype), 1 << bits, 0.1, 1 << bits)
    assert found.dtype == getattr(torch, dtype)
    exact = tna.fwht(numpy(tensor(x, dtype)).astype(np.float64), normalize=False) * 0.1
    assert relative_error(numpy(found), exact) < TOLERANCE[dtype]


@kernels
@few
@given(st.integers(0, 11), st.integers(0, 5), st.data())
def test_fwht_padded_and_cut(bits: int, vectors: int, data: st.DataObject) -> None:
    length = 1 << bits
    n_in, n_out = (data.draw(st.integers(1, length)) for _ in range(2))
    x = np.random.default_rng(0).normal(size=(vectors, n_in))
    found = launcher.fwht(tensor(x), length, 1.0, n_out)
    expected = tna.fwht(np.pad(x, [(0, 0), (0, length - n_in)]), normalize=False)[:, :n_out]
    assert relative_error(numpy(found), expected) < TOLERANCE["float64"]


@kernels
def test_three_passes(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(launcher, "TILE_BYTES", 1 << 11)
    monkeypatch.setattr(passes, "_SHORT_TILE", 1 << 8)
    monkeypatch.setattr(passes, "_LEAST_STRIDED_BITS", 1)
    monkeypatch.setattr(passes, "_LEAST_WIDTH", 1 << 8)
    assert len(passes.passes(12, 8, 1 << 11)) == 3
    x = rng.normal(size=(2, 1 << 12))
    found = numpy(launcher.fwht(tensor(x), 1 << 12, 1.0, 1 << 12))
    assert relative_error(found, tna.fwht(x, normalize=False)) < TOLERANCE["float64"]
    f = tna.Projection("linear_v2", 300, 4000, seed=5)
    found = numpy(launcher.fastfood(tensor(x[:, :300]), drawn(f)))
    assert relative_error(found, f(x[:, :300])) < TOLERANCE["float64"]
    found = numpy(launcher.fastfood_adjoint(tensor(x[:, :4000]), drawn(f)))
    assert relative_error(found, f.adjoint(x[:, :4000])) < TOLERANCE["float64"]


@pytest.mark.law("walsh-not-finite")
@kernels
def test_non_finite_values_spread_only_within_their_vector(rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 64))
    x[0, 3], x[1, 5] = np.nan, np.inf
    found = numpy(launcher.fwht(tensor(x), 64, 1.0, 64))
    assert np.isnan(found[0]).all()
    assert np.isinf(found[1]).all()
    assert relative_error(found[2], tna.fwht(x[2], normalize=False)) < TOLERANCE["float64"]


def drawn(f: tna.Projection) -> launcher.Drawn:
    period = 1 << (f.n_in - 1).bit_length()
    return launcher.Drawn(f.n_in, f.n_out, f.padded, period, f.seed, f.group, not f.kind.endswith("_v2"))


def tolerance_of_adjoint(f: tna.Projection, dtype: str = "float64") -> float:
    # A sum of r numbers of both signs is about the root of r less than their sizes: so much more of it is rounding.
    return TOLERANCE[dtype] * max(1.0, math.sqrt(f.padded / (1 << (f.n_in - 1).bit_length())) / 8)


@pytest.mark.law("kernels-agree")
@kernels
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@few
@example("linear", 1, 1, 2**64 - 59, 3, 2)
@example("linear_v2", 9, 1, 2**64 - 59, 3, 2)
@example("linear", 1, 2000, 2**64 - 59, 3, 2)
@example("linear_v2", 64, 64, 2**64 - 59, 3, 2)
@example("linear_v2", 1500, 4096, 2**64 - 59, 3, 2)
@example("linear", 3, 9000, 2**64 - 59, 3, 2)
@given(
    st.sampled_from(["linear", "linear_v2"]), st.integers(1, 600), st.integers(1, 600), st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1), st.integers(0, 3),
)  # fmt: skip
def test_fastfood_of_any_size(
    dtype: str, kind: str, n_in: int, n_out: int, seed: int, group: int, vectors: int
) -> None:
    f = tna.Projection(kind, n_in, n_out, seed, group)
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(vectors, n_in)), generator.normal(size=(vectors, n_out))
    found = numpy(launcher.fastfood(tensor(x, dtype), drawn(f)))
    assert relative_error(found, f(x)) < TOLERANCE[dtype]
    found = numpy(launcher.fastfood_adjoint(tensor(y, dtype), drawn(f)))
    assert relative_error(found, f.adjoint(y)) < tolerance_of_adjoint(f, dtype)


@kernels
def test_the_adjoint_gives_the_same_bits_at_every_run(rng: np.random.Generator) -> None:
    f = tna.Projection("linear", 5, 4000, seed=0)
    y = tensor(rng.normal(size=(1, 4000)), "float32")
    first, second = (launcher.fastfood_adjoint(y, drawn(f)) for _ in range(2))
    assert torch.equal(first, second)


@kernels
@few
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 3), st.booleans())
def test_shuffle(size: int, seed: int, vectors: int, inverse: bool) -> None:
    x = np.arange(float(vectors * size)).reshape(vectors, size)
    found = numpy(launcher.shuffle(tensor(x), seed, 7, inverse))
    assert np.array_equal(found, x[:, rng.permutation(size, seed, 7, inverse=inverse)])


# -- Called through torch: derivatives of every order, vmap, strides, and a step of a plan ---------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Record every run of a kernel, so that no test passes without one."""
    made: list[Any] = []
    by_rows = torch_kernels._by_rows

    def counted(kernel: Any, x: Any) -> Any:
        made.append(kernel)
        return by_rows(kernel, x)

    monkeypatch.setattr(torch_kernels, "_by_rows", counted)
    if INTERPRETED:
        monkeypatch.setattr(torch_kernels, "is_supported", lambda x: True)
    yield made
    assert made


def through_torch(test: Any) -> Any:
    # torch's own forward derivatives compile some of theirs with what torch calls deprecated.
    ignored = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
    return kernels(ignored(pytest.mark.usefixtures("calls")(test)))


@through_torch
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_fwht_along_any_axis(axis: int) -> None:
    x = torch.randn(4, 8, 2, dtype=torch.float64, device=DEVICE)[:, ::2].requires_grad_()
    found = tna.fwht(x, axis=axis)
    expected = fwht_plain(get_backend(x), x.movedim(axis, -1), normalize=True).movedim(-1, axis)
    assert torch.allclose(found, expected, atol=1e-14)
    assert torch.autograd.gradcheck(lambda t: tna.fwht(t, axis=axis), (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda t: tna.fwht(t, axis=axis), (x,), fast_mode=True)


@through_torch
@pytest.mark.parametrize("kind", ["linear", "nonlinear_v2", "shuffle"])
def test_derivatives_of_f(kind: str) -> None:
    f = tna.Projection(kind, 7 if kind == "shuffle" else 3, 7, seed=1)
    x = torch.randn(2, f.n_in, dtype=torch.float64, device=DEVICE, requires_grad=True)
    # Along one random direction: each call takes the interpreter a tenth of a second.
    assert torch.autograd.gradcheck(f, (x,), check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x,), fast_mode=True)
    assert torch.autograd.gradcheck(f.linear_part.adjoint, (torch.randn_like(f(x)).requires_grad_(),), fast_mode=True)


@through_torch
@pytest.mark.parametrize("kind", ["shuffle", "linear", "linear_v2"])
def test_f_keeps_nothing(kind: str, rng: np.random.Generator) -> None:
    f = tna.Projection(kind, 9, 9, seed=2**63 + 5, group=1)
    x = rng.normal(size=(2, 9))
    found = f(torch.tensor(x, device=DEVICE)), f.adjoint(torch.tensor(x, device=DEVICE))
    assert not f.map.kept
    assert not f.map.placed
    for ours, plain in zip(found, (f(x), f.adjoint(x)), strict=True):
        assert np.allclose(ours.cpu().numpy(), plain, rtol=1e-13, atol=1e-13)


@through_torch
@pytest.mark.parametrize(("n_in", "n_out"), [(9, 9), (3, 600), (300, 500)])
def test_kept_normal_numbers_change_no_bit(n_in: int, n_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    f = tna.Projection("linear", n_in, n_out, seed=2**63 + 5, group=1)
    x, y = torch.randn(2, n_in, device=DEVICE), torch.randn(2, n_out, device=DEVICE)
    monkeypatch.setattr(torch_kernels, "_draws_fast", lambda device: True)
    drawn = f(x), f.adjoint(y)
    assert not f.map.placed
    monkeypatch.setattr(torch_kernels, "_draws_fast", lambda device: False)
    assert all(map(torch.equal, (f(x), f.adjoint(y)), drawn))
    assert [key for _, _, key in f.map.placed] == ["gain"]


@through_torch
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_batch_of_gradients_at_once() -> None:
    f = tna.Projection("linear", 5, 12, seed=2**64 - 1)
    x = torch.randn(2, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = torch.randn(3, 2, 12, dtype=torch.float64, device=DEVICE)
    (found,) = torch.autograd.grad(f(x), x, y, is_grads_batched=True)
    assert torch.allclose(found, f.adjoint(y))
    shuffle = tna.Projection("shuffle", 5, 5, seed=2**64 - 1)
    (found,) = torch.autograd.grad(shuffle(x), x, y[..., :5], is_grads_batched=True)
    assert torch.equal(found, shuffle.adjoint(y[..., :5]))
    (found,) = torch.autograd.grad(tna.fwht(x, axis=0), x, y[..., :5], is_grads_batched=True)
    assert torch.allclose(found, tna.fwht(y[..., :5], axis=1))


@through_torch
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_single(kind: str) -> None:
    f = tna.Projection("linear", 50, 200, seed=1)
    x = torch.randn(50, dtype=getattr(torch, kind), device=DEVICE)
    found = f(x)
    assert found.dtype == x.dtype
    assert torch.equal(found, f(x.float()).to(x.dtype))
    assert torch.equal(tna.fwht(found[:128]), tna.fwht(found[:128].float()).to(x.dtype))


@through_torch
def test_numbers_that_are_not_in_memory_yet() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, device=DEVICE)
    assert torch.equal(tna.fwht(torch._neg_view(x)), tna.fwht(-x))
    assert not tna.fwht(torch._efficientzerotensor(3, 8, dtype=torch.float64, device=DEVICE)).any()
    assert torch.equal(tna.fwht(x[:1].expand(3, 8)), tna.fwht(x[:1].repeat(3, 1)))


def arrays_of(plan: tna.UpdatePlan) -> dict[str, Any]:
    host = plan.init(dtype="float64")
    return {name: torch.tensor(array + 0.1, device=DEVICE, requires_grad=True) for name, array in host.items()}


def step(plan: tna.UpdatePlan, arrays: dict[str, Any]) -> list[Any]:
    update = vector(plan, arrays)
    return [update, *torch.autograd.grad(update.square().sum(), list(arrays.values()))]


@through_torch
@pytest.mark.parametrize("projection", ["linear", "nonlinear_v2"])
def test_a_step_of_a_plan(projection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tna.UpdatePlan(tna.presets.superlora(2, projection=projection, ratio=0.3), [(12, 10), (10, 10)])
    arrays = arrays_of(plan)
    found = step(plan, arrays)
    monkeypatch.setattr(torch_kernels, "there_are_kernels", lambda x: False)
    for ours, plain in zip(found, step(plan, arrays), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-12)


@through_torch
def test_groups_that_share_f_are_launched_together(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tna.presets.superlora(2, projection="linear", ratio=0.3, groups="weight")
    plan = tna.UpdatePlan(config, [(12, 10)] * 6)
    arrays = arrays_of(plan)
    found = step(plan, arrays)
    assert len(calls) == 2  # forward and backward
    calls.clear()
    monkeypatch.setattr(get_backend(arrays["group0.split0.factor0"]), "at_once", lambda x: 0)
    assert all(map(torch.equal, found, step(plan, arrays)))
    assert len(calls) == 12


RECIPE = f"16 8 {2**64 - 59} 3 1"
CALLS: dict[str, tuple[Any, int, tuple[Any, ...]]] = {
    "fwht": (torch_kernels.fwht_operator, 8, (0.5,)),
    "fastfood": (torch_kernels.fastfood_operator, 7, (None, RECIPE, 7, 13, False)),
    "its adjoint": (torch_kernels.fastfood_operator, 13, (None, RECIPE, 7, 13, True)),
    "shuffle": (torch_kernels.shuffle_operator, 7, (f"{2**64 - 59} 3", False)),
    "back": (torch_kernels.shuffle_operator, 7, (f"{2**64 - 59} 3", True)),
}

CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL_CHECKS = (*CHECKS, "test_aot_dispatch_dynamic")


@through_torch
@pytest.mark.parametrize("name", CALLS)
def test_operators_keep_the_rules_of_torch(name: str) -> None:
    operator, n, settings = CALLS[name]
    x = torch.randn(3, n, dtype=torch.float64, device=DEVICE, requires_grad=True)
    torch.library.opcheck(operator, (x, *settings), test_utils=CHECKS if name != "fastfood" else ALL_CHECKS)
    torch.library.opcheck(operator, (x.detach().T.contiguous().T, *settings), test_utils=CHECKS)
    assert torch.autograd.gradcheck(lambda x: operator(x, *settings), (x,), fast_mode=True)
    many = torch.randn(3, 2, n, dtype=torch.float64, device=DEVICE)
    found = torch.func.vmap(lambda x: operator(x, *settings), in_dims=1)(many)
    assert torch.equal(found, torch.stack([operator(one, *settings) for one in many.unbind(1)]))


@through_torch
@pytest.mark.parametrize("kind", ["shuffle", "linear", "nonlinear_v2"])
def test_compiled_programs_compute_the_same(kind: str, rng: np.random.Generator) -> None:
    f = tna.Projection(kind, 9, 9, seed=2**63 + 5, group=1)
    x = torch.tensor(rng.normal(size=(2, 9)), device=DEVICE, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    found, expected = compiled(x), f(x)
    assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13)
    pulled = [torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)]
    assert torch.allclose(*pulled, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()
