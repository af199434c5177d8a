"""Presets against the computation of PEFT and of LyCORIS themselves.

Their adapter tensors, filled with random numbers, become our parameters; the ΔW, the outputs and the gradients
must be theirs to 1e-12 in float64, or to 1e-6 where theirs are in float32. Comments say where a peer errs or has a
convention of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.support.array_presets import P
from tnadapt import Config, UpdatePlan, presets

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

import tnadapt.torch as tt

TOLERANCE = 1e-12

SIZES = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
RANKS = st.integers(1, 6)
SEEDS = st.integers(0, 2**32 - 1)
# None is our "alpha = rank"; floats at random are never the rank.
ALPHAS = st.none() | st.floats(0.125, 32.0)
# Products of two, so that a balanced split has a W1 that is more than one row.
PRODUCTS = st.tuples(st.integers(1, 7), st.integers(1, 7)).map(lambda pair: pair[0] * pair[1])


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These matrices are tiny, and threads that wait for each other on busy cores take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lycoris() -> dict[str, Any]:
    """LyCORIS's module of each method."""
    pytest.importorskip("lycoris")
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    return {"lora": LoConModule, "loha": LohaModule, "lokr": LokrModule}


# -- Comparing ---------------------------------------------------------------------------------


def error(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest of their elements."""
    ours, theirs = (np.asarray(a.detach() if hasattr(a, "detach") else a) for a in (ours, theirs))
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype == np.float64
    largest = np.abs(theirs).max()
    assert largest > 0.0  # or there is nothing to be equal to
    return float(np.abs(ours - theirs).max() / largest)


def check_equal(configs: Sequence[Config], arrays: Sequence[Mapping[str, Any]], theirs: Sequence[Any]) -> list[Any]:
    """Our ΔW of these arrays, one dict a weight, is theirs, through NumPy and through torch.

    Weights of one config are the groups of one adapter. Returns the torch ones.
    """
    ours: dict[int, Any] = {}
    for config in dict.fromkeys(configs):
        members = [i for i, own in enumerate(configs) if own == config]
        adapter = UpdatePlan(config, [tuple(theirs[i].shape) for i in members])
        params = {f"group{g}.{name}": array for g, i in enumerate(members) for name, array in arrays[i].items()}
        host = adapter.deltas({name: array.detach().numpy() for name, array in params.items()})
        for i, numpy_delta, torch_delta in zip(members, host, adapter.deltas(params), strict=True):
            assert isinstance(numpy_delta, np.ndarray)
            assert error(numpy_delta, theirs[i]) <= TOLERANCE
            assert error(torch_delta, theirs[i]) <= TOLERANCE
            ours[i] = torch_delta
    return [ours[i] for i in range(len(theirs))]


def check_gradients(ours: Sequence[Any], theirs: Sequence[Any], modules: Sequence[Any], draw: Callable) -> None:
    """The gradient that the peer's own parameters get through our ΔW is the one they get through its own."""
    for own, other, module in zip(ours, theirs, modules, strict=True):
        leaves = [param for param in module.parameters() if param.requires_grad]
        assert leaves
        weights = draw(*other.shape)
        through_ours, through_theirs = (torch.autograd.grad((delta * weights).sum(), leaves) for delta in (own, other))
        for mine, its in zip(through_ours, through_theirs, strict=True):
            assert error(mine, its) <= TOLERANCE


def drawer(seed: int) -> Callable:
    """Normal float64 tensors, one after another, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def fill(module: Any, draw: Callable) -> None:
    """Random numbers in every parameter: adapters start at ΔW = 0, and 0 = 0 proves nothing."""
    for param in module.parameters():
        param.data.copy_(draw(*param.shape))


def our_arrays(method: str, get: Callable[[str], Any]) -> dict[str, Any]:
    """Their tensors under our names; ``get`` finds one by its name in PEFT, or None. Views, so gradients flow."""
    if method == "lora":
        return {"split0.factor0": get("lora_B"), "split0.factor1": get("lora_A").T}
    if method == "gralora":
        # PEFT has A of each block of inputs, with r / k columns for each block of outputs, and B the other way around.
        a, b = get("gralora_A"), get("gralora_B")
        k, rank = len(a), a.shape[2] // len(a)
        blocks, part = list(itertools.product(range(k), repeat=2)), [slice(n * rank, (n + 1) * rank) for n in range(k)]
        return {
            "split0.factor1": torch.stack([b[out, part[into]].T for out, into in blocks]),
            "split0.factor2": torch.stack([a[into][:, part[out]] for out, into in blocks]),
        }
    stem = {"lokr": "lokr_w", "loha": "hada_w"}[method]
    arrays = {}
    for k in (0, 1):
        whole = get(f"{stem}{k + 1}")
        if whole is not None:
            arrays[f"split{k}.dense"] = whole
        else:
            arrays[f"split{k}.factor0"] = get(f"{stem}{k + 1}_a")
            arrays[f"split{k}.factor1"] = get(f"{stem}{k + 1}_b").T
    return arrays


def lokr_config(
    shape: tuple[int, int], rank: int, alpha: float | None, both: bool = False, split_size: int | str = "balanced"
) -> Config:
    """Our config for the LoKr that PEFT and LyCORIS make of a weight: both have the rule of ``full`` below.

    The rule is held to their code by what this config is used for: arrays of another kind or shape than
    they have made are refused with a ShapeError.
    """
    whole = UpdatePlan(presets.krona(split_size=split_size), [shape]).param_shapes
    w1, w2 = whole["group0.split0.dense"], whole["group0.split1.dense"]
    full = (not (both and rank < max(w1) / 2), rank >= max(w2) / 2)
    # A W1 of two factors beside a whole W2 needs a W1 that is larger than W2; no setting of ours makes it.
    assume(full != (False, True))
    if all(full):
        return presets.krona(rank=rank, alpha=alpha, split_size=split_size)
    leading = "dense" if full[0] else "same"
    return presets.lokr(rank=rank, alpha=alpha, leading=leading, split_size=split_size)


# -- PEFT --------------------------------------------------------------------------------------


def peft_model(config: Any, sizes: Sequence[int], draw: Callable) -> tuple[Any, list[Any]]:
    """Linear layers from size to size, adapted, all of it random; and the adapted layers."""
    layers = [torch.nn.Linear(cols, rows) for cols, rows in itertools.pairwise(sizes)]
    config.target_modules = [str(i) for i in range(len(layers))]
    model = peft.get_peft_model(torch.nn.Sequential(*layers), config).double().eval()
    fill(model, draw)
    return model, list(model.base_model.model)


def peft_arrays(method: str, layer: Any) -> dict[str, Any]:
    def get(name: str) -> Any:
        held = getattr(layer, name, {})
        if "default" not in held:
            return None
        return held["default"].weight if method == "lora" else held["default"]

    return our_arrays(method, get)


def check_peft(method: str, peft_config: Any, configs: Sequence[Config], sizes: Sequence[int], seed: int) -> None:
    """ΔW, its gradients, the output of the model and the merged weights."""
    draw = drawer(seed)
    model, layers = peft_model(peft_config, sizes, draw)
    arrays = [peft_arrays(method, layer) for layer in layers]
    theirs = [layer.get_delta_weight("default") for layer in layers]
    ours = check_equal(configs, arrays, theirs)
    check_gradients(ours, theirs, layers, draw)
    with torch.no_grad():
        weights = [layer.base_layer.weight + delta for layer, delta in zip(layers, ours, strict=True)]
        x = draw(5, sizes[0])
        expected = x
        for layer, weight in zip(layers, weights, strict=True):
            expected = expected @ weight.T + layer.base_layer.bias
        assert error(expected, model(x)) <= TOLERANCE
        for layer, weight in zip(model.merge_and_unload(), weights, strict=True):
            assert error(weight, layer.weight) <= TOLERANCE


@pytest.mark.law("peft-agrees")
@pytest.mark.parametrize("method", ["lora", "loha"])
@given(sizes=SIZES, rank=RANKS, alpha=ALPHAS, seed=SEEDS)
@example(sizes=(12, 8, 18), rank=3, alpha=16.0, seed=0)
def test_lora_and_loha_are_peft_s(
    method: str, sizes: tuple[int, ...], rank: int, alpha: float | None, seed: int
) -> None:
    whole = float(rank) if alpha is None else alpha
    if method == "lora":
        theirs = peft.LoraConfig(r=rank, lora_alpha=whole)
    else:
        # PEFT rounds LoHa's alpha / r to float32: here are scales that float32 has.
        alpha = whole = rank * float(np.float32(whole / rank))
        theirs = peft.LoHaConfig(r=rank, alpha=whole)
    check_peft(method, theirs, [getattr(presets, method)(rank=rank, alpha=alpha)] * 2, sizes, seed)


@pytest.mark.law("peft-agrees")
@given(
    sizes=st.tuples(PRODUCTS, PRODUCTS, PRODUCTS), rank=st.integers(1, 4), alpha=ALPHAS, both=st.booleans(), seed=SEEDS
)
@example(sizes=(12, 8, 18), rank=1, alpha=16.0, both=False, seed=0)
# Both sides of each bound: W2 is 4 × 4, 5 × 4; W1 is 5 × 6 and W2 6 × 6; 2 × 3 and 11 × 13; then primes.
@example(sizes=(12, 8), rank=2, alpha=5.0, both=False, seed=0)
@example(sizes=(8, 20), rank=2, alpha=5.0, both=False, seed=0)
@example(sizes=(8, 20), rank=3, alpha=5.0, both=False, seed=0)
@example(sizes=(36, 30), rank=2, alpha=5.0, both=True, seed=0)
@example(sizes=(36, 30), rank=3, alpha=5.0, both=True, seed=0)
@example(sizes=(39, 22), rank=1, alpha=5.0, both=True, seed=0)
@example(sizes=(39, 22), rank=2, alpha=5.0, both=True, seed=0)
@example(sizes=(13, 7), rank=1, alpha=5.0, both=False, seed=0)
def test_lokr_and_krona_of_balanced_sizes_are_peft_s(
    sizes: tuple[int, ...], rank: int, alpha: float | None, both: bool, seed: int
) -> None:
    configs = [lokr_config((rows, cols), rank, alpha, both) for cols, rows in itertools.pairwise(sizes)]
    theirs = peft.LoKrConfig(r=rank, alpha=rank if alpha is None else alpha, decompose_both=both)
    check_peft("lokr", theirs, configs, sizes, seed)


@pytest.mark.law("peft-agrees")
@given(
    rows=st.integers(1, 4), cols=st.integers(1, 4), k=st.integers(1, 3), rank=st.integers(1, 3), alpha=ALPHAS,
    seed=SEEDS,
)  # fmt: skip
@example(rows=3, cols=2, k=2, rank=2, alpha=16.0, seed=0)
def test_gralora_is_peft_s(rows: int, cols: int, k: int, rank: int, alpha: float | None, seed: int) -> None:
    r = rank * k
    whole = r if alpha is None else alpha
    theirs = peft.GraloraConfig(r=r, alpha=whole, gralora_k=k, init_weights=False)
    check_peft("gralora", theirs, [presets.gralora(r, k, alpha=alpha)], (cols * k, rows * k), seed)


# PEFT's decompose_factor f is our split_size=f wherever f divides, even where W1 is then the larger of the two.
@pytest.mark.law("peft-agrees")
@given(
    factor=st.integers(1, 7), of_cols=st.integers(1, 9), of_rows=st.integers(1, 9), rank=st.integers(1, 4),
    alpha=ALPHAS, both=st.booleans(), seed=SEEDS,
)  # fmt: skip
@example(factor=7, of_cols=9, of_rows=2, rank=3, alpha=16.0, both=True, seed=0)
@example(factor=7, of_cols=2, of_rows=3, rank=1, alpha=16.0, both=False, seed=0)
def test_lokr_of_a_given_size_is_peft_s(
    factor: int, of_cols: int, of_rows: int, rank: int, alpha: float | None, both: bool, seed: int
) -> None:
    cols, rows = factor * of_cols, factor * of_rows
    config = lokr_config((rows, cols), rank, alpha, both, split_size=factor)
    theirs = peft.LoKrConfig(
        r=rank, alpha=rank if alpha is None else alpha, decompose_both=both, decompose_factor=factor
    )
    check_peft("lokr", theirs, [config], (cols, rows), seed)


# -- LyCORIS -----------------------------------------------------------------------------------


def check_lycoris(
    lycoris: Any, method: str, config: Config, shape: tuple[int, int], seed: int, **settings: Any
) -> None:
    """ΔW as the forward pass makes it, its gradients, and both forms of the forward pass."""
    draw, (rows, cols) = drawer(seed), shape
    linear = torch.nn.Linear(cols, rows).double()
    fill(linear, draw)
    linear.requires_grad_(False)
    module = lycoris[method]("adapter", linear, 1.0, config.rank, config.alpha, **settings).double().eval()
    fill(module, draw)

    def get(name: str) -> Any:
        if method == "lora":
            return {"lora_B": module.lora_up, "lora_A": module.lora_down}[name].weight
        return getattr(module, name, None)

    # For LoHa and LoKr, get_diff_weight and a merge scale once more.
    theirs = module.get_diff_weight()[0] if method == "lora" else module.get_weight(shape)
    assert theirs.shape == shape
    ours = check_equal([config], [our_arrays(method, get)], [theirs])
    check_gradients(ours, [theirs], [module], draw)
    x = draw(5, cols)
    with torch.no_grad():
        assert error(x @ (linear.weight + ours[0]).T + linear.bias, module(x)) <= TOLERANCE
        assert error(x @ ours[0].T, module.bypass_forward_diff(x)) <= TOLERANCE


SHAPES = st.tuples(st.integers(1, 30), st.integers(1, 30))


@pytest.mark.law("lycoris-agrees")
@pytest.mark.parametrize("method", ["lora", "loha"])
@given(shape=SHAPES, rank=RANKS, alpha=ALPHAS, seed=SEEDS)
@example(shape=(8, 12), rank=3, alpha=16.0, seed=0)
def test_lora_and_loha_are_lycoris_s(
    lycoris: Any, method: str, shape: tuple[int, int], rank: int, alpha: float | None, seed: int
) -> None:
    check_lycoris(lycoris, method, getattr(presets, method)(rank=rank, alpha=alpha), shape, seed)


@pytest.mark.law("lycoris-agrees")
@given(shape=st.tuples(PRODUCTS, PRODUCTS), rank=st.integers(1, 4), alpha=ALPHAS, both=st.booleans(), seed=SEEDS)
@example(shape=(8, 12), rank=1, alpha=16.0, both=False, seed=0)
@example(shape=(8, 12), rank=2, alpha=None, both=False, seed=0)
@example(shape=(30, 36), rank=2, alpha=16.0, both=True, seed=0)
def test_lokr_and_krona_are_lycoris_s(
    lycoris: Any, shape: tuple[int, int], rank: int, alpha: float | None, both: bool, seed: int
) -> None:
    config = lokr_config(shape, rank, alpha, both)
    if config.format == "dense":
        config = config.replace(alpha=None)  # LyCORIS ignores any other
    check_lycoris(lycoris, "lokr", config, shape, seed, decompose_both=both)


# LyCORIS has f in W1 as we do up to the square root of the size.
@pytest.mark.law("lycoris-agrees")
@given(factor=st.integers(1, 6), times=st.tuples(st.integers(0, 6), st.integers(0, 6)), alpha=ALPHAS, seed=SEEDS)
@example(factor=3, times=(0, 4), alpha=16.0, seed=0)
def test_lokr_of_a_given_size_is_lycoris_s(
    lycoris: Any, factor: int, times: tuple[int, int], alpha: float | None, seed: int
) -> None:
    rows, cols = (factor * (factor + extra) for extra in times)
    config = lokr_config((rows, cols), 1, alpha, split_size=factor)
    assume(config.format == "cp")
    check_lycoris(lycoris, "lokr", config, (rows, cols), seed, factor=factor)


# -- FourierFT, WaveFT, C3A, SHiRA, MiSS, DoRA and HiRA, which the peers compute in float32 (PEFT has no LoCA) ----

SINGLE = 1e-6
SIDES = st.integers(2, 24)
SHORT_SEEDS = st.integers(0, 2**31 - 1)
ROUND_ALPHAS = st.sampled_from([1.0, 3.0, 16.0])

few = settings(max_examples=15, deadline=None)


def peft_layer(method: str, rows: int, cols: int, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """PEFT's model of one weight with random parameters, and its layer."""
    torch.manual_seed(seed % 1000)
    config = getattr(peft, f"{method}Config")(target_modules=["0"], **options)
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(cols, rows)), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # A magnitude stays near the norm, where it starts.
                parameter.add_(torch.randn(parameter.shape) * (0.1 if "magnitude" in name else 1.0))
    return model, model.base_model.model[0]


def numbers(array: Any) -> np.ndarray:
    return np.asarray(array.detach(), np.float64)


def check_close(ours: np.ndarray, theirs: Any, least: float = 0.0) -> None:
    """The largest difference is small relative to the largest of their elements, or to ``least`` if that is larger."""
    theirs = numbers(theirs)
    assert ours.shape == theirs.shape
    assert np.max(np.abs(ours - theirs)) < SINGLE * max(least, np.max(np.abs(theirs)))


# -- Updates that PEFT computes from one array ----------------------------------------------------


def delta(config: tna.Config, values: Any, shape: tuple[int, int]) -> np.ndarray:
    """Our ΔW of one array."""
    plan = tna.UpdatePlan(config, [shape])
    flat = numbers(values).reshape(-1)
    assert plan.param_shapes == {"group0.split0.dense": flat.shape}
    return np.asarray(plan.deltas({"group0.split0.dense": flat})[0])


def check_output(ours: np.ndarray, layer: Any, atol: float) -> None:
    x = torch.randn(5, ours.shape[1])
    theirs = (layer(x) - layer.base_layer(x)).detach().numpy()
    np.testing.assert_allclose(x.numpy() @ ours.T, theirs, atol=atol)


def places(indices: Any, cols: int) -> tuple[int, ...]:
    return tuple((indices[0].long() * cols + indices[1].long()).tolist())


@pytest.mark.law("presets")
@few
@given(SIDES, SIDES, SHORT_SEEDS, st.data())
def test_fourierft(rows: int, cols: int, seed: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, rows * cols))
    scale = data.draw(st.sampled_from([150.0, 3.0]))
    _, theirs = peft_layer("FourierFT", rows, cols, seed, n_frequency=n, scaling=scale, random_loc_seed=seed)
    config = presets.fourierft(n, places(theirs.indices["default"], cols), alpha=scale)
    check_close(delta(config, theirs.fourierft_spectrum["default"], (rows, cols)), theirs.get_delta_weight("default"))


@pytest.mark.law("presets")
@few
@given(SIDES, SIDES, SHORT_SEEDS, st.sampled_from(["db1", "db2", "db3", "db4", "db8", "db10"]), st.data())
def test_waveft(rows: int, cols: int, seed: int, family: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, min(50, rows * cols)))
    _, theirs = peft_layer("WaveFT", rows, cols, seed, n_frequency=n, wavelet_family=family, random_loc_seed=seed)
    wavelet = tna.maps.Wavelet(family)
    shape = wavelet.coefficients(rows), wavelet.coefficients(cols)
    # PEFT leaves coefficients at the edges out, and has two quarters the other way round: its upper right one is
    # high-pass along rows.
    place = [
        index.long() + (longer - size) // 2
        for index, longer, size in zip(theirs.waveft_indices["default"], shape, (rows, cols), strict=True)
    ]
    halves = [longer // 2 for longer in shape]
    high = [index >= half for index, half in zip(place, halves, strict=True)]
    swapped = [
        index - own.long() * half + other.long() * half
        for index, half, own, other in zip(place, halves, high, high[::-1], strict=True)
    ]
    config = presets.waveft(n, places(swapped, shape[1]), family)
    assert config.alpha == 25.0  # as PEFT's scaling
    check_close(delta(config, theirs.waveft_spectrum["default"], (rows, cols)), theirs.get_delta_weight("default"))


@pytest.mark.law("presets")
@few
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), SHORT_SEEDS)
def test_c3a(block: int, down: int, across: int, seed: int) -> None:
    shape = down * block, across * block
    _, theirs = peft_layer("C3A", *shape, seed, block_size=block)
    ours = delta(presets.c3a(block), theirs.c3a_kernel["default"], shape)
    check_close(ours, theirs.get_delta_weight("default"))
    check_output(ours, theirs, atol=1e-5)


@pytest.mark.law("presets")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@few
@given(st.integers(4, 24), st.integers(4, 24), SHORT_SEEDS)
def test_shira(rows: int, cols: int, seed: int) -> None:
    r = rows * cols // (2 * (rows + cols))
    if r == 0:
        return
    _, theirs = peft_layer("Shira", rows, cols, seed, r=r, random_seed=seed % 1000)
    config = presets.shira(r * (rows + cols), places(theirs.shira_indices["default"], cols))
    ours = delta(config, theirs.shira_weight["default"], (rows, cols))
    check_close(ours, theirs.get_delta_weight("default").to_dense())


def check_miss(layer: Any, ours: np.ndarray) -> None:
    base = layer.base_layer.weight.detach().clone()
    change = layer.get_delta_weight_miss("default", base.clone()) - base  # it returns the whole weight
    np.testing.assert_allclose(ours, change.detach().numpy(), atol=1e-5)


@pytest.mark.law("presets")
@few
@given(SIDES, SIDES, SHORT_SEEDS, st.data())
def test_miss(rows: int, cols: int, seed: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, cols))
    _, theirs = peft_layer("Miss", rows, cols, seed, r=r)
    ours = delta(presets.miss(r), theirs.miss_block["default"].T, (rows, cols))
    check_miss(theirs, ours)
    check_output(ours, theirs, atol=1e-4)


@pytest.mark.law("presets")
@pytest.mark.parametrize(("rows", "cols", "r", "mini"), [(12, 8, 4, 3), (12, 9, 4, 6), (6, 5, 5, 1)])
def test_miss_mini(rows: int, cols: int, r: int, mini: int) -> None:
    _, theirs = peft_layer("Miss", rows, cols, r=r, mini_r=mini, init_weights="mini")
    check_miss(theirs, delta(presets.miss(r, mini), theirs.miss_block["default"].T, (rows, cols)))


# -- DoRA and HiRA ----------------------------------------------------------------------------------


def of_dora(layer: Any) -> dict[str, np.ndarray]:
    return {
        "group0.split0.factor0": numbers(layer.lora_B["default"].weight),
        "group0.split0.factor1": numbers(layer.lora_A["default"].weight.T),
        "weight0.magnitude": numbers(layer.lora_magnitude_vector["default"].weight),
    }


def of_hira(layer: Any) -> dict[str, np.ndarray]:
    return {
        "group0.split0.factor0": numbers(layer.hira_B["default"]),
        "group0.split0.factor1": numbers(layer.hira_A["default"].T),
    }


@pytest.mark.law("presets", "peft-agrees")
@pytest.mark.parametrize("method", ["dora", "hira"])
@few
@given(SIDES, SIDES, st.integers(1, 6), ROUND_ALPHAS, SHORT_SEEDS)
def test_a_weight_changed_by_its_norm_or_elements_is_peft_s(
    method: str, rows: int, cols: int, rank: int, alpha: float, seed: int
) -> None:
    if method == "dora":
        model, layer = peft_layer("Lora", rows, cols, seed, r=rank, lora_alpha=alpha, use_dora=True)
        config, params = presets.dora(rank, alpha=alpha), of_dora(layer)
    else:
        model, layer = peft_layer("Hira", rows, cols, seed, r=rank)
        config, params = presets.hira(rank), of_hira(layer)
    weight, bias = numbers(layer.base_layer.weight), numbers(layer.base_layer.bias)
    (ours,) = tna.UpdatePlan(config, [(rows, cols)]).merged(params, [weight])
    x = torch.randn(3, cols)
    check_close(numbers(x) @ ours.T + bias, model(x), least=1.0)
    model.merge_adapter()
    check_close(ours, layer.base_layer.weight, least=1.0)


@pytest.mark.parametrize("strategy", ["weight", "factored", "additive"])
def test_gradients_are_peft_s_with_a_detached_norm(strategy: str) -> None:
    model, layer = peft_layer("Lora", 12, 8, r=3, lora_alpha=6, use_dora=True)
    own = torch.nn.Sequential(torch.nn.Linear(8, 12))
    own[0].load_state_dict(layer.base_layer.state_dict())
    adapter = tt.attach(own, P.dora(3, alpha=6), "all-linear", strategy=strategy, detach_norm=True)
    adapter.load_arrays(of_dora(layer))
    x = torch.randn(5, 8)
    torch.testing.assert_close(own(x), model(x), rtol=1e-5, atol=1e-5)
    own(x).square().sum().backward()
    model(x).square().sum().backward()
    theirs = {
        "group0.split0.factor0": layer.lora_B["default"].weight.grad,
        "group0.split0.factor1": layer.lora_A["default"].weight.grad.T,
        "weight0.magnitude": layer.lora_magnitude_vector["default"].weight.grad,
    }
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-4)


@pytest.mark.law("lycoris-agrees")
@settings(max_examples=10, deadline=None)
@given(SIDES, SIDES, st.integers(1, 4), st.booleans(), SHORT_SEEDS)
def test_dora_is_lycoris_s_by_rows_and_by_columns(rows: int, cols: int, rank: int, on_out: bool, seed: int) -> None:
    lycoris = pytest.importorskip("lycoris.modules.locon")
    torch.manual_seed(seed % 1000)
    base = torch.nn.Linear(cols, rows, bias=False)
    layer = lycoris.LoConModule("x", base, lora_dim=rank, alpha=3.0, weight_decompose=True, wd_on_out=on_out)
    with torch.no_grad():
        layer.lora_up.weight.normal_()
        layer.dora_scale.add_(0.1 * torch.randn(layer.dora_scale.shape))
    config = presets.dora(rank, alpha=3.0, magnitude_axis="rows" if on_out else "cols")
    params = {
        "group0.split0.factor0": numbers(layer.lora_up.weight),
        "group0.split0.factor1": numbers(layer.lora_down.weight.T),
        "weight0.magnitude": numbers(layer.dora_scale).reshape(-1),
    }
    plan = tna.UpdatePlan(config, [(rows, cols)]).with_base([numbers(base.weight)])
    (ours,) = plan.merged(params, [numbers(base.weight)])
    check_close(ours, layer.get_merged_weight()[0], least=1.0)
