"""There and back: tensors through their decompositions, and adapters through the files of other libraries.

``tnadapt.verify`` runs these cases and reports their errors as laws. What a decomposition or a file must hold is
computed here once more, with NumPy and TensorLy alone.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tnadapt.algebra import presets
from tnadapt.algebra.config import Config
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.backends import Backend
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.convert import convert
from tnadapt.decomposition import decompose
from tnadapt.targets.target import Target
from tnadapt.tensors import (
    cp,
    hadamard_decomposition,
    kronecker_decomposition,
    tensor_ring,
    tensor_train,
    tt_matrix,
    tucker,
)


class Case(NamedTuple):
    """A comparison: the law that it belongs to, its error and the error allowed, and what was compared."""

    law: str
    error: float
    allowed: float
    sizes: str


# -- Decompositions ----------------------------------------------------------------------------------------------------

# Errors of approximations are differences of squares: half of a float64's digits.
_HALF = 1e-7
_TIGHT = 1e-10
Decompose = Callable[..., Any]


def decomposition_cases(backend: Backend, rng: np.random.Generator) -> Iterator[Case]:
    """Yield the cases of decompositions of small random tensors on one library, in float64."""
    shape = 6, 5, 4
    tensor, matrix = rng.normal(size=shape), rng.normal(size=(6, 8))

    def orthonormal(size: int, rank: int) -> np.ndarray:
        return np.asarray(np.linalg.qr(rng.normal(size=(size, rank)))[0])

    factors = [orthonormal(size, 2) for size in shape]
    of_cp = np.einsum("r,ir,jr,kr", np.array([2.0, 1.0]), *factors)
    of_tucker = np.einsum("abc,ia,jb,kc", rng.normal(size=(2, 2, 2)), *factors)
    of_train = np.einsum("ia,ajb,bk", rng.normal(size=(6, 2)), rng.normal(size=(2, 5, 2)), rng.normal(size=(2, 4)))
    product = np.kron(rng.normal(size=(2, 2)), rng.normal(size=(3, 4)))
    calls: list[tuple[str, Decompose, np.ndarray, np.ndarray, Mapping[str, Any]]] = [
        ("cp, rank 2", cp, tensor, of_cp, {"rank": 2}),
        ("tucker, rank 2", tucker, tensor, of_tucker, {"rank": 2}),
        ("tensor_train, rank 2", tensor_train, tensor, of_train, {"rank": 2}),
        ("tensor_ring, rank 2", tensor_ring, tensor, of_train, {"rank": (1, 2, 2, 1)}),
        ("tt_matrix, rank 1", tt_matrix, matrix, product, {"rank": 1, "rows": (2, 3), "cols": (2, 4)}),
        ("kronecker_decomposition, 1 term", kronecker_decomposition, matrix, product,
         {"shapes": [(2, 2), (3, 4)], "terms": 1}),
        ("hadamard_decomposition, rank 1", hadamard_decomposition, matrix, np.outer(matrix[:, 0], matrix[0]),
         {"rank": 1, "max_iterations": 20}),
    ]  # fmt: skip
    for name, call, noise, planted, settings in calls:
        sizes = f"{name} of {'×'.join(map(str, noise.shape))}"
        result = call(backend.asarray(noise, "float64"), **settings)
        formed = _formed(backend, result)
        distance = _distance(formed, noise)
        yield Case("a decomposition's error = that of its tensor", abs(result.error - distance), _HALF, sizes)
        yield Case("a bound on the error ≤ the error", _excess(result.bound, result.error), _TIGHT, sizes)
        exact = call(backend.asarray(planted, "float64"), **settings)
        yield Case("a tensor of these ranks is recovered", _distance(_formed(backend, exact), planted), _HALF, sizes)
        if call in (tucker, tensor_train):
            bound = math.sqrt(sum(_tail(cut, 2) for cut in _unfoldings(noise, call is tensor_train)))
            yield Case("error ≤ that of truncated SVDs", _excess(distance, bound), _TIGHT, sizes)
        if call in (cp, tucker, tensor_train):
            error = _distance(_theirs(backend, call, result), formed)
            yield Case("a decomposition's tensor = TensorLy's", error, _TIGHT, sizes)
    noisy = of_tucker + 0.05 * np.linalg.norm(of_tucker) / math.sqrt(of_tucker.size) * tensor
    for most in (0.5, 0.1):
        for call in (tucker, tensor_train, tensor_ring):
            formed = _formed(backend, call(backend.asarray(noisy, "float64"), max_error=most))
            sizes = f"{call.__name__}, max_error {most} of 6×5×4"
            yield Case("error ≤ max_error", _excess(_distance(formed, noisy), most), _TIGHT, sizes)
    yield from _optima(backend, matrix, (2, 2), (3, 4))


def _optima(backend: Backend, matrix: np.ndarray, first: tuple[int, int], second: tuple[int, int]) -> Iterator[Case]:
    """Yield the cases of matrices, whose best approximations are truncated SVDs."""
    sent = backend.asarray(matrix, "float64")
    blocks = matrix.reshape(first[0], second[0], first[1], second[1]).transpose(0, 2, 1, 3)
    least, of_blocks = _tail(matrix, 2), _tail(blocks.reshape(math.prod(first), math.prod(second)), 2)
    params, report = decompose([sent], presets.lora(2))
    for sizes, formed, share in (
        ("cp, rank 2 of 6×8", _formed(backend, cp(sent, 2)), least),
        ("decompose, lora(2) of 6×8", backend.to_numpy(report.plan.deltas(params)[0]), least),
        ("kronecker_decomposition, 2 terms of 6×8",
         _formed(backend, kronecker_decomposition(sent, [first, second], 2)), of_blocks),
    ):  # fmt: skip
        error = abs(_distance(formed, matrix) - math.sqrt(share))
        yield Case("error of a matrix = that of the truncated SVD", error, _HALF, sizes)


def _formed(backend: Backend, result: Any) -> np.ndarray:
    return backend.to_numpy(result.to_matrix() if hasattr(result, "to_matrix") else result.to_tensor())


def _distance(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _excess(value: float, most: float) -> float:
    """Return by how much a value is too large; NaN if it is NaN."""
    return 0.0 if value <= most else value - most


def _unfoldings(tensor: np.ndarray, of_train: bool) -> list[np.ndarray]:
    if of_train:
        return [tensor.reshape(math.prod(tensor.shape[:cut]), -1) for cut in range(1, tensor.ndim)]
    return [np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], -1) for mode in range(tensor.ndim)]


def _tail(matrix: np.ndarray, rank: int) -> float:
    """Return the share of the squares of a matrix that its truncated SVD leaves out."""
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    return float(squares[rank:].sum() / squares.sum())


def _theirs(backend: Backend, call: Decompose, result: Any) -> np.ndarray:
    """Return the tensor of the arrays of a result as TensorLy forms it, in NumPy."""
    import tensorly

    def host(parts: Any) -> Any:
        return [host(part) if isinstance(part, (list, tuple)) else backend.to_numpy(part) for part in parts]

    form = {cp: tensorly.cp_to_tensor, tucker: tensorly.tucker_to_tensor, tensor_train: tensorly.tt_to_tensor}[call]
    # TensorLy's backend is a process-wide setting: set it for this thread only, and restore it.
    with tensorly.backend_context("numpy", local_threadsafe=True):
        return np.asarray(form(host(tuple(result))))


# -- Conversion --------------------------------------------------------------------------------------------------------

_CONVERTED: dict[str, Callable[..., Config]] = {"lora": presets.lora, "loha": presets.loha, "lokr": presets.lokr}


def conversion_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Yield the cases of adapters that are written for PEFT and LyCORIS, computed from these files, and read back."""
    targets = [Target(f"layers.{layer}.q_proj", (12, 8), "q") for layer in range(2)]
    base = {target.module: target.stored for target in targets}
    for method, preset in _CONVERTED.items():
        config = preset(2, alpha=6)
        plan = UpdatePlan(config, [target.shape for target in targets])
        arrays = {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}
        deltas = plan.deltas(arrays)
        for library in ("peft", "lycoris"):
            sizes = f"{library}-{method}, {method}(2, alpha=6), weights 12x8*2"
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / ("adapter" if library == "peft" else "adapter.safetensors")
                convert(AdapterFile(config, targets, arrays), path, to=f"{library}-{method}", base=base)
                in_file = _in_file(path, targets)
                back = convert(path, base=base).file
            assert back is not None  # an adapter of this library is one
            for law, read in (
                ("ΔW of a file = the other library's formula", in_file),
                ("ΔW of a file read back", back.deltas()),
            ):
                yield Case(law, max(map(_distance, read, deltas)), _TIGHT, sizes)


def _in_file(path: Path, targets: Sequence[Target]) -> list[np.ndarray]:
    """Return the updates in a file of PEFT's or LyCORIS's, by the formulas of these libraries."""
    from safetensors.numpy import load_file

    if path.is_dir():
        settings = json.loads((path / "adapter_config.json").read_text())
        scale = settings.get("lora_alpha", settings.get("alpha")) / settings["r"]
        tensors = load_file(path / "adapter_model.safetensors")
        prefixes = [f"base_model.model.{target.module}." for target in targets]
    else:
        scale, tensors = None, load_file(path)
        prefixes = [f"lycoris_{target.module.replace('.', '_')}." for target in targets]
    updates = []
    for prefix in prefixes:
        arrays = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        updates.append(_update(arrays, scale))
    return updates


def _update(arrays: Mapping[str, np.ndarray], scale: float | None) -> np.ndarray:
    """Return the update of one module; LyCORIS stores alpha next to the arrays, and PEFT in its settings."""

    def factor(name: str) -> np.ndarray:
        return arrays[name] if name in arrays else arrays[f"{name}_a"] @ arrays[f"{name}_b"]

    if "hada_w1_a" in arrays:
        update, rank = factor("hada_w1") * factor("hada_w2"), len(arrays["hada_w1_b"])
    elif any(name.startswith("lokr_w1") for name in arrays):
        update = np.kron(factor("lokr_w1"), factor("lokr_w2"))
        rank = next((len(arrays[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in arrays), 0)
    else:
        up, down = ("lora_B", "lora_A") if "lora_A.weight" in arrays else ("lora_up", "lora_down")
        update, rank = arrays[f"{up}.weight"] @ arrays[f"{down}.weight"], len(arrays[f"{down}.weight"])
    if scale is None:
        scale = float(arrays["alpha"]) / rank if rank else 1.0
    return np.asarray(update * scale)
