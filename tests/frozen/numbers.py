"""The numbers of every case, and what moved of them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tnadapt as tna

from .settings import Setting, maps, preset_calls, settings

try:
    import torch
except ImportError:
    torch = None

__all__ = ["FILE", "Record", "cases", "differences", "moved", "recorded", "write"]

FILE = Path(__file__).with_name("numbers.txt")
#: Libraries that must agree with NumPy, on a setting of so many.
TORCH, EVERY = tuple({"backend": "torch", "dtype": dtype} for dtype in ("float64", "float32")), 10
STRATEGIES = ("weight", "factored", "additive")
#: Of the norm: in float64, in float32, and where LAPACK computes arrays that are rounded to float32.
EXACT, SINGLE, FROM_LAPACK = 1e-12, 1e-5, 1e-6


class Record(NamedTuple):
    """What is equal to the bit, as digests, and products with fixed vectors, each with its scale and tolerance."""

    digests: dict[str, str]
    products: dict[str, tuple[float, float]]
    tolerance: float = EXACT


def noise(key: str, *shape: int) -> np.ndarray:
    """Return numbers of (-1, 1) in float64, the same on every machine."""
    words = np.frombuffer(hashlib.shake_128(key.encode()).digest(4 * math.prod(shape)), "<u4")
    return ((words + 0.5) * 2.0**-31 - 1.0).reshape(shape)


def digest(*parts: Any) -> str:
    total = hashlib.sha256()
    for part in parts:
        raw = part.tobytes() if isinstance(part, np.ndarray) else part
        total.update(raw if isinstance(raw, bytes) else str(raw).encode())
    return total.hexdigest()[:8]


def product(arrays: Iterable[Any]) -> tuple[float, float]:
    """Return the product of arrays with a fixed vector, and their norm."""
    vector = np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays])
    return float(vector @ noise("probe", vector.size)), float(np.linalg.norm(vector))


# -- Plans ----------------------------------------------------------------------------------------


def of_setting(setting: Setting, backend: str = "numpy", dtype: str = "float64") -> Record:
    """Record a plan: its shapes and start, the update of fixed arrays, and the file with these."""
    plan = completed(setting)
    params = {name: noise(name, *shape) for name, shape in plan.param_shapes.items()}
    start = plan.init(backend)
    digests = {
        "plan": digest(plan.num_parameters, dict(plan.param_shapes), dict(plan.frozen_shapes), dict(plan.units)),
        "start": digest(*itertools.chain(*((name, np.asarray(array)) for name, array in start.items()))),
    }
    if not plan.base_shapes.keys() <= plan.frozen_shapes.keys():
        digests["start"] = "-"  # computed by LAPACK; the update has its difference to it
    if backend == "numpy":
        digests["file"] = file_digest(setting, plan, params)

    def native(array: np.ndarray) -> Any:
        return array.astype(dtype) if backend == "numpy" else torch.tensor(array, dtype=getattr(torch, dtype))

    params = {name: native(array) for name, array in params.items()}
    ends = (1, plan.size // 2 + 1), (plan.size // 3, plan.size)
    slices = [plan.vector(params, *each) for each in ends] + [plan.delta(params, len(plan.shapes) - 1)]
    products = {"update": product(plan.deltas(params)), "slices": product(slices)}
    if setting.config.apply != "add":
        products["merged"] = product(plan.merged(params, [native(weight) for weight in base_weights(setting)]))
    lapack = bool(plan.base_shapes) or "orthonormal" in repr(setting.config)
    return Record(digests, products, SINGLE if dtype == "float32" else FROM_LAPACK if lapack else EXACT)


def base_weights(setting: Setting) -> list[np.ndarray]:
    return [noise(f"base {index}", *shape) for index, shape in enumerate(setting.shapes)]


def completed(setting: Setting) -> tna.UpdatePlan:
    """Return the plan with all arrays that the caller brings, and those that are computed from the base weights."""
    plan = setting.plan()
    given = {name: noise(name, *shape) for name, shape in plan.given_shapes.items()}
    for name in given:
        if name.endswith("theta.index"):
            given[name] = np.floor((given[name] + 1.0) / 2.0 * setting.config.parameters)
    plan = setting.plan(given) if given else plan
    if setting.config.start == "given":
        plan = plan.with_start({name: noise(f"start {name}", *shape) for name, shape in plan.array_shapes.items()})
    return plan.with_base(base_weights(setting)) if plan.needs_base else plan


def file_digest(setting: Setting, plan: tna.UpdatePlan, params: Mapping[str, np.ndarray]) -> str:
    targets = [
        tna.Target(f"layers.{layer}.{role}_proj", shape, role, layer=str(layer))
        for shape, layer, role in zip(setting.shapes, setting.layers, setting.roles, strict=False)
    ]
    arrays = {name: array.astype(np.float32) for name, array in params.items()}
    given = {name: array for name, array in plan.given.items() if name not in plan.base_shapes}
    adapter_file = tna.AdapterFile(setting.config, targets, arrays, given=given)
    return digest(bytes_of(lambda path: tna.save(path, adapter_file)))


def bytes_of(save: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save(path)
        return path.read_bytes()


# -- Maps, and adapters on a model ----------------------------------------------------------------


def of_map(f: tna.Projection) -> Record:
    """Record the draws of a map, and its products with fixed vectors."""
    x, y = noise("x", f.n_in), noise("y", f.n_out)
    return Record({"draws": f.digest[:10]}, {"forward": product([f(x)]), "adjoint": product([f.adjoint(y, x)])})


def of_adapter(preset: Callable[..., tna.Config], options: Mapping[str, Any], strategy: str) -> Record:
    """Record the outputs of two layers with an adapter in float64, and the file that the adapter saves."""
    from tnadapt.torch import attach

    layers = {f"{role}_proj": torch.nn.Linear(8, 12, bias=False, dtype=torch.float64) for role in "qv"}
    for name, layer in layers.items():
        layer.weight.data = torch.tensor(noise(name, 12, 8))
    model = torch.nn.ModuleDict(layers)
    adapter = attach(model, preset(**options), "qv", strategy=strategy, dtype="float64")
    adapter.load_arrays({name: noise(name, *array.shape) for name, array in adapter.arrays().items()})
    outputs = [layer(torch.tensor(noise("x", 5, 8))).detach() for layer in layers.values()]
    lapack = bool(adapter.plan.base_shapes)
    return Record(
        {"file": digest(bytes_of(adapter.save))}, {"output": product(outputs)}, FROM_LAPACK if lapack else EXACT
    )


# -- All of them ----------------------------------------------------------------------------------


def cases() -> dict[str, Callable[..., Record]]:
    """Return what records each case, by its name; it raises TnadaptError where the library refuses the setting."""
    found: dict[str, Callable[..., Record]] = {}
    for name, make in settings().items():
        found[name] = functools.partial(_of, of_setting, make)
    for name, make in maps().items():
        found[name] = functools.partial(_of, of_map, make)
    for (name, call), strategy in itertools.product(preset_calls().items() if torch else (), STRATEGIES):
        found[f"attach/{name}/{strategy}"] = functools.partial(of_adapter, *call, strategy)
    return found


def _of(record: Callable[..., Record], make: Callable[[], Any], **library: str) -> Record:
    return record(make(), **library)


def write() -> None:
    """Write a line for each case: its name, digests and products. Lines of what has not moved stay as they are."""
    known = recorded() if FILE.is_file() else {}
    lines = []
    for name, case in cases().items():
        with contextlib.suppress(tna.TnadaptError):
            record = case()
            digests, products = record.digests.values(), [f"{value:.14g}" for value, _ in record.products.values()]
            if name in known and not compared(record, *known[name]):
                digests, products = known[name]
            lines.append(f"{name}\t{' '.join(digests)}\t{' '.join(products)}\n")
    FILE.write_text("".join(lines), encoding="utf-8", newline="\n")


def recorded() -> dict[str, tuple[list[str], list[str]]]:
    """Return the digests and products of each case of the file."""
    lines = (line.split("\t") for line in FILE.read_text(encoding="utf-8").splitlines())
    return {name: (digests.split(), products.split()) for name, digests, products in lines}


def moved(count: int | None = None, seed: int = 0) -> list[str]:
    """Return a line for each case that differs from the file; of so many cases, evenly spread, or of all."""
    known, functions = recorded(), cases()
    names = list(known) if count else [*known, *(functions.keys() - known.keys())]
    if count:
        rng, ends = random.Random(seed), [len(names) * number // count for number in range(count + 1)]
        names = [names[rng.randrange(*piece)] for piece in itertools.pairwise(ends) if piece[0] < piece[1]]
    if torch is None:
        names = [name for name in names if not name.startswith("attach/")]
    found, with_torch = [], settings() if torch else {}
    for number, name in enumerate(names):
        for library in ({}, *(TORCH if name in with_torch and number % EVERY == 0 else ())):
            differing = differences(functions.get(name), known.get(name), library)
            if differing:
                found.append(f"{name}{''.join(f' {word}' for word in library.values())}: {', '.join(differing)}")
    return found


def differences(function: Callable[..., Record] | None, known: Any, library: Mapping[str, str]) -> list[str]:
    """Return what of a case differs from what is known of it: digests and products, or None if it is not recorded."""
    if function is None:
        return ["no longer listed"]
    try:
        record = function(**library)
    except tna.TnadaptError as error:
        return [f"refused: {error}"] if known else []
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    return compared(record, *known) if known else ["not recorded"]


def compared(record: Record, digests: Iterable[str], products: Iterable[str]) -> list[str]:
    found = [name for (name, value), old in zip(record.digests.items(), digests, strict=False) if value != old]
    for (name, (value, scale)), old in zip(record.products.items(), products, strict=True):
        if not abs(value - float(old)) <= record.tolerance * scale:
            found.append(f"{name} by {abs(value - float(old)) / scale:.1e}")
    return found
