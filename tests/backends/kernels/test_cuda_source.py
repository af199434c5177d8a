"""The CUDA C kernels against their reference implementations, compiled for the host.

Threads of a block are threads of the host. This checks the arithmetic and the order of operations; another test checks
that NVRTC compiles the source. CuPy itself needs a device, and is covered by the tests with the backend "cupy" in other
files.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.conftest import relative_error
from tnadapt.algebra import _rng_numpy as rng_numpy
from tnadapt.algebra import rng
from tnadapt.backends._kernels.gpu import passes
from tnadapt.backends._kernels.gpu.cuda_launcher import OPTIONS, CudaLauncher, source
from tnadapt.backends._kernels.gpu.launch_plans import Drawn

HERE = Path(__file__).parent
TOLERANCE = {"float32": 2e-6, "float64": 1e-14}
SEEDS = [(0, 0), (2**40 + 7, 3), (2**63 - 1, 2**31), (2**64 - 1, 2**32 - 1)]

# Entry points for tests of inner functions.
PROBES = """
extern "C" void draw(i64 start, i64 n, u32 purpose, u32 group, u64 seed, int bits, u32 *words, float *normals,
                     i64 *images, i64 *inverses) {
  const Network network = network_of(bits, group, seed);
  for (i64 i = 0; i < n; ++i) {
    words[i] = word_at(start + i, purpose, group, seed);
    normals[i] = normal_of(words[i]);
    images[i] = image<false>(network, start + i);
    inverses[i] = image<true>(network, start + i);
  }
}
extern "C" void normals_of(const u32 *words, i64 n, float *normals) {
  for (i64 i = 0; i < n; ++i) normals[i] = normal_of(words[i]);
}
"""

C_TYPES = {
    np.int32: ctypes.c_int32, np.int64: ctypes.c_int64, np.uint32: ctypes.c_uint32, np.uint64: ctypes.c_uint64,
    np.float64: ctypes.c_double,
}  # fmt: skip


def passed(argument: Any) -> Any:
    if isinstance(argument, np.ndarray):
        assert argument.flags.c_contiguous
        return ctypes.c_void_p(argument.ctypes.data)
    return C_TYPES[type(argument)](argument)


class Host:
    """The program compiled for the host, in both precisions."""

    def __init__(self, folder: Path, compiler: str) -> None:
        self.programs = {}
        for itemsize in (4, 8):
            text = f'#include "{HERE / "cuda_on_host.h"}"\n{source(itemsize)}\n{PROBES}'
            path = folder / f"program{itemsize}.cpp"
            path.write_text(text)
            library = path.with_suffix(".so")
            command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-pthread", "-shared", "-fPIC"]
            done = subprocess.run([*command, "-o", str(library), str(path)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            self.programs[itemsize] = ctypes.CDLL(str(library))

    def launcher(self, threads: int = 1) -> CudaLauncher:
        def run(x: np.ndarray, name: str, blocks: int, wanted: int, arguments: tuple[Any, ...]) -> None:
            assert 32 <= wanted <= 512
            program = self.programs[x.itemsize]
            kernel, given_ = getattr(program, name), [passed(argument) for argument in arguments]
            for block in range(blocks):
                program.begin_block(block, blocks, threads)
                if threads == 1:
                    program.begin_thread(0)
                    kernel(*given_)
                else:
                    self.together(program, kernel, given_, threads)

        return CudaLauncher(run, lambda x, shape: np.full(shape, np.nan, x.dtype))

    @staticmethod
    def together(program: ctypes.CDLL, kernel: Callable[..., Any], arguments: list[Any], threads: int) -> None:
        def one(index: int) -> None:
            program.begin_thread(index)
            kernel(*arguments)

        workers = [threading.Thread(target=one, args=(index,)) for index in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    return Host(tmp_path_factory.mktemp("cuda"), compiler)


@pytest.mark.slow
@pytest.mark.law("equal-seeds")
@pytest.mark.parametrize(("seed", "group"), SEEDS)
@pytest.mark.parametrize("start", [0, 1 << 15, (1 << 35) + 128])
def test_draws_have_the_bits_of_the_format(host: Host, seed: int, group: int, start: int) -> None:
    n, bits = 1 << 14, max(15, start.bit_length())
    kinds: list[Any] = [np.uint32, np.float32, np.int64, np.int64]
    words, normals, images, inverses = found = [np.empty(n, kind) for kind in kinds]
    arguments = [np.int64(start), np.int64(n), np.uint32(2), np.uint32(group), np.uint64(seed), np.int32(bits)]
    host.programs[4].draw(*map(passed, arguments), *map(passed, found))
    stop = start + n
    assert np.array_equal(words, rng.words(seed, group, 2, start, stop))
    assert np.array_equal(normals, rng.normals(seed, group, 2, start, stop))
    assert np.array_equal(images, rng.permutation(1 << bits, seed, group, start, stop))
    assert np.array_equal(inverses, rng.permutation(1 << bits, seed, group, start, stop, inverse=True))


def test_normals_of_words_everywhere(host: Host, rng: np.random.Generator) -> None:
    edges = [0, 1, 2, (1 << 31) - 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1]
    for edge in (0.075, 0.925):
        edges += [int(edge * 2**32) + d for d in range(-3, 4)]
    edges += [int(2.0 ** (-k / 2) * 2**32) + d for k in range(7, 64) for d in (-1, 0, 1) if 2.0 ** (32 - k / 2) > 2]
    words = np.concatenate([edges, rng.integers(0, 1 << 32, 1 << 18)]).astype(np.uint32)
    found = np.empty(words.size, np.float32)
    host.programs[4].normals_of(passed(words), passed(np.int64(words.size)), passed(found))
    assert np.array_equal(found, rng_numpy._normal_of(words))


@pytest.mark.law("kernels-agree")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bits", [*range(17), 19])
def test_fwht(host: Host, bits: int, dtype: str, rng: np.random.Generator) -> None:
    x = rng.normal(size=(3, 1 << bits)).astype(dtype)
    found = host.launcher().fwht(x, 1 << bits, 0.1, 1 << bits)
    assert found.dtype == x.dtype
    exact = tna.fwht(x.astype(np.float64), normalize=False) * 0.1
    assert relative_error(found, exact) < TOLERANCE[dtype]


@given(st.integers(0, 12), st.integers(0, 5), st.sampled_from([1, 3]), st.data())
def test_fwht_padded_and_cut(host: Host, bits: int, vectors: int, threads: int, data: st.DataObject) -> None:
    length = 1 << bits
    n_in, n_out = (data.draw(st.integers(1, length)) for _ in range(2))
    x = np.random.default_rng(0).normal(size=(vectors, n_in))
    found = host.launcher(threads).fwht(x, length, 1.0, n_out)
    expected = tna.fwht(np.pad(x, [(0, 0), (0, length - n_in)]), normalize=False)[:, :n_out]
    assert relative_error(found, expected) < TOLERANCE["float64"]


def drawn(f: tna.Projection) -> Drawn:
    period = 1 << (f.n_in - 1).bit_length()
    return Drawn(f.n_in, f.n_out, f.padded, period, f.seed, f.group, not f.kind.endswith("_v2"))


def tolerance_of_adjoint(f: tna.Projection, dtype: str = "float64") -> float:
    # A sum of r numbers of both signs is about the root of r less than their sizes: so much more of it is rounding.
    return TOLERANCE[dtype] * max(1.0, math.sqrt(f.padded / (1 << (f.n_in - 1).bit_length())) / 8)


LENGTHS = [(1, 1), (1, 2), (2, 3), (9, 1), (37, 509), (1, 2000), (64, 64), (40, 7), (1500, 4096), (3, 70000)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["linear", "linear_v2"])
@pytest.mark.parametrize(("n_in", "n_out"), [*LENGTHS, (20000, 30000)])
def test_fastfood(host: Host, kind: str, n_in: int, n_out: int, dtype: str, rng: np.random.Generator) -> None:
    f = tna.Projection(kind, n_in, n_out, seed=2**64 - 59, group=3)
    x, y = rng.normal(size=(2, n_in)).astype(dtype), rng.normal(size=(2, n_out)).astype(dtype)
    assert relative_error(host.launcher().fastfood(x, drawn(f)), f(x.astype(np.float64))) < TOLERANCE[dtype]
    found = host.launcher().fastfood_adjoint(y, drawn(f))
    assert relative_error(found, f.adjoint(y.astype(np.float64))) < tolerance_of_adjoint(f, dtype)


@pytest.mark.law("kernels-agree")
@given(
    st.sampled_from(["linear", "linear_v2"]), st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from([1, 3]),
)  # fmt: skip
def test_fastfood_of_any_size(
    host: Host, kind: str, n_in: int, n_out: int, seed: int, group: int, vectors: int, threads: int
) -> None:
    f = tna.Projection(kind, n_in, n_out, seed, group)
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(vectors, n_in)), generator.normal(size=(vectors, n_out))
    launcher = host.launcher(threads)
    assert relative_error(launcher.fastfood(x, drawn(f)), f(x)) < TOLERANCE["float64"]
    assert relative_error(launcher.fastfood_adjoint(y, drawn(f)), f.adjoint(y)) < tolerance_of_adjoint(f)


def test_three_passes(host: Host, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    monkeypatch.setattr(CudaLauncher, "tile_bytes", 1 << 11)
    monkeypatch.setattr(passes, "_SHORT_TILE", 1 << 8)
    monkeypatch.setattr(passes, "_LEAST_STRIDED_BITS", 1)
    monkeypatch.setattr(passes, "_LEAST_WIDTH", 1 << 8)
    x = rng.normal(size=(2, 1 << 12))
    for kind in ("linear", "linear_v2"):
        f = tna.Projection(kind, 300, 4000, seed=5)
        assert relative_error(host.launcher().fastfood(x[:, :300].copy(), drawn(f)), f(x[:, :300])) < 1e-14
        found = host.launcher(2).fastfood_adjoint(x[:, :4000].copy(), drawn(f))
        assert relative_error(found, f.adjoint(x[:, :4000])) < 1e-14


@pytest.mark.law("kernels-agree")
def test_any_number_of_threads_gives_the_same_bits(host: Host, rng: np.random.Generator) -> None:
    f = tna.Projection("linear", 5, 4000, seed=0)
    y = rng.normal(size=(1, 4000)).astype(np.float32)
    first = host.launcher(1).fastfood_adjoint(y, drawn(f))
    assert np.array_equal(first, host.launcher(5).fastfood_adjoint(y, drawn(f)))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 3), st.booleans())
def test_shuffle(host: Host, size: int, seed: int, vectors: int, inverse: bool) -> None:
    x = np.arange(float(vectors * size)).reshape(vectors, size)
    found = host.launcher().shuffle(x, seed, 7, inverse)
    assert np.array_equal(found, x[:, rng.permutation(size, seed, 7, inverse=inverse)])


def nvrtc() -> ctypes.CDLL:
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [path for place in places for path in Path(place).glob("**/libnvrtc.so.*")]
    if not found:
        pytest.skip("no NVRTC (the package nvidia-cuda-nvrtc-cu12)")
    return ctypes.CDLL(str(found[0]))


@pytest.mark.parametrize("itemsize", [4, 8])
def test_nvrtc_compiles_it_to_machine_code(itemsize: int) -> None:
    """Only compilation: tests with the backend "cupy" check on a device what the machine code computes."""
    library = nvrtc()
    program = ctypes.c_void_p()
    text = source(itemsize).encode()
    assert library.nvrtcCreateProgram(ctypes.byref(program), text, b"tnadapt.cu", 0, None, None) == 0
    options = [option.encode() for option in (*OPTIONS, "--gpu-architecture=sm_80")]
    status = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    assert size.value
