"""Conversions of any adapter and layer: exact or rejected, never wrong; the best approximation if not exact."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

import tnadapt as tna
from tests.conftest import peak_of
from tests.support import checkpoint_files as cp
from tests.support.array_presets import P
from tnadapt import AdapterFile, Config, Rows, Target, UpdatePlan, presets
from tnadapt.algebra.formats import CP
from tnadapt.checkpoints.container import DTYPES
from tnadapt.checkpoints.fingerprint import fingerprint
from tnadapt.checkpoints.lora_export import lora_export
from tnadapt.convert import FORMS, ModuleUpdate, Pair
from tnadapt.sources import Seeded
from tnadapt.testing.strategies import plans

from .conversions import (
    TOLERANCE,
    adapter_on,
    assert_same_updates,
    converted,
    error,
    loaded_by_peft,
    made,
    model,
    peft_updates,
    trained_by_peft,
    updates,
)
from .internals import norms_of

# The forms that hold more than the adapters of one structure. GGUF needs a model of a known architecture.
FOREIGN = [
    form
    for form in FORMS
    if form.rpartition("-")[2] in ("lora", "lokr", "loha", "full") and not form.startswith("gguf")
]


def named(plan: UpdatePlan, seed: int = 0) -> AdapterFile:
    targets = [Target(f"blocks.{n}.q", shape) for n, shape in enumerate(plan.shapes)]
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal(shape).astype("f4") for name, shape in plan.param_shapes.items()}
    # The arrays at which it started are stored, as in a file that needs no base.
    return AdapterFile(plan.config, targets, arrays, given=plan.given)


def part_of(form: str) -> str | None:
    """What a form needs to be told where the names of the modules do not show the part of a pipeline."""
    return "unet" if form.startswith(("kohya", "diffusers")) else None


def holds(plan: UpdatePlan, form: str) -> bool:
    """Whether a form has what apply= makes of the update: all hold a ΔW, and one DoRA by rows, and HiRA."""
    return plan.applying.additive or (form == "peft-lora" and plan.config.magnitude_axis == "rows")


@pytest.mark.law("foreign-files")
@given(plan=plans(), form=st.sampled_from(FOREIGN), rank=st.none() | st.integers(1, 4))
def test_any_adapter_is_converted_exactly_or_refused(plan: UpdatePlan, form: str, rank: int | None) -> None:
    """Or, if an error is allowed, with that of what a reader finds in the bytes."""
    assume(plan.config.groups != "layer")
    file, is_full, part = named(plan), form.endswith("-full"), part_of(form)
    rank = None if is_full else rank
    if not holds(plan, form):
        for allowed in (None, 1.0):
            message = f"does more than add ΔW to the weight, and {form} can only add: merge it into the base with tna"
            with pytest.raises(tna.ConfigError, match=message):
                tna.convert(file, to=form, rank=rank, part=part, max_error=allowed)
        return
    try:
        found = tna.convert(file, to=form, rank=rank, part=part)
    except tna.ConfigError:
        with pytest.raises(tna.ConfigError, match="lycoris-full"):  # which takes every update
            tna.convert(file, to=form, rank=rank, part=part)
        assert not is_full
    else:
        assert found.exact
        assert found.error <= TOLERANCE
        assert len(found.errors) == len(plan.shapes)
        if rank is not None and form != "vllm-lora":  # which is padded
            ends = ("lora_A.weight", "w1_b", "w2_b", "down.weight")
            assert max((a.shape[0] for n, a in found.tensors.items() if n.endswith(ends)), default=1) <= rank
    found = tna.convert(file, to=form, rank=None if is_full else rank or 1, max_error=1.0, part=part)
    assert (found.error <= TOLERANCE) or not found.exact
    if form.startswith(("lycoris", "kohya")):
        with tempfile.TemporaryDirectory() as folder:
            found.save(f"{folder}/theirs")
            names = [target.module for target in file.targets]
            theirs = updates(converted(f"{folder}/theirs", base=names))
        ours = {t.module: np.asarray(d, np.float64) for t, d in zip(file.targets, file.deltas(), strict=True)}
        off = sum(float(np.sum((theirs[path] - delta) ** 2)) for path, delta in ours.items())
        whole = sum(float(np.sum(delta**2)) for delta in ours.values())
        assert math.sqrt(off / whole) == pytest.approx(found.error, abs=1e-5)


@given(
    sides=st.tuples(*[st.integers(1, 4)] * 4), have=st.integers(1, 6), want=st.integers(1, 6), seed=st.integers(0, 99)
)
@example(sides=(2, 2, 2, 2), have=6, want=2, seed=0)  # a rank above the matrix's own
def test_lora_of_a_lower_rank_is_the_truncated_svd(sides: tuple[int, ...], have: int, want: int, seed: int) -> None:
    p, q, k, n = sides
    kronecker = Config(splits=2, split_size=(p, q), format="dense", alpha=3, rank=2)
    for config, form in ((tna.presets.lora(have, alpha=3), "peft-lora"), (kronecker, "lycoris-lora")):
        file = made(config, {"a.q": (p * k, q * n)}, seed)
        found = tna.convert(file, to=form, rank=want, max_error=1.0)
        values = np.linalg.svd(updates(file)["a.q"], compute_uv=False)
        best = math.sqrt(float(np.sum(values[want:] ** 2)) / float(np.sum(values**2)))
        assert found.error == pytest.approx(best, abs=TOLERANCE)
        assert found.exact == (best < 1e-12)


@pytest.mark.parametrize("config", [
    Config(order=1, format="dense"), Config(order=2, format="dense"), Config(order=2, format="dense", fold=(7, 8)),
    Config(rank=(None, None), format="tucker"),
], ids=["a vector", "a matrix", "a longer matrix", "a core"])  # fmt: skip
def test_one_array_is_written_with_its_own_numbers(config: Config) -> None:
    file = made(config, {"a.0.q": (6, 8)})
    found = tna.convert(file, to="lycoris-full")
    assert (found.exact, found.error) == (True, 0.0)
    (array,), (tensor,) = file.arrays.values(), found.tensors.values()
    assert np.array_equal(tensor.reshape(-1), array.reshape(-1)[: tensor.size])


@pytest.mark.parametrize(("size", "cols"), [("balanced", 20), (2, 20), ((2, 1), 7)])
def test_a_kronecker_product_keeps_its_split_size(size: str | int | tuple[int, int], cols: int, tmp_path: Path) -> None:
    file = made(Config(splits=2, split_size=size, format="dense"), {"a.0.q": (12, cols)})
    tna.convert(file, tmp_path / "theirs", to="peft-lokr")
    again = converted(tmp_path / "theirs")
    assert (again.config.split_size, again.config.rank) == (size, 1)  # full matrices have no other rank
    # A product of several is one of two.
    for splits in (2, 3, 4):
        side = 2 ** (splits - 1)
        several = made(Config(splits=splits, split_size=2, format="dense", alpha=3), {"a.0.q": (side * 5, side * 3)})
        found = tna.convert(several, to="peft-lokr")
        assert found.exact
        assert [tensor.shape for tensor in found.tensors.values()] == [(side, side), (5, 3)]


@pytest.mark.parametrize("shape", [(2000, 6), (6, 2000)])
@pytest.mark.parametrize("name", ["dense", "loha", "kronecker"])
def test_no_more_singular_vectors_are_computed_than_there_are_values(name: str, shape: tuple[int, int]) -> None:
    sides = (1000, 2) if shape[0] > shape[1] else (2, 1000)
    config = {
        "dense": tna.presets.dense(),
        "loha": tna.presets.loha(3),
        "kronecker": Config(splits=2, split_size=sides, format="dense"),
    }[name]
    file = made(config, {"a.0.q": shape})
    peak = peak_of(lambda: tna.convert(file, to="peft-lora", rank=2, max_error=1.0))
    assert peak < 2 << 20  # all vectors of the long side take 32 MiB, of the long side of a factor 8 MiB


def test_the_smallest_rank_within_an_error() -> None:
    file = made(tna.presets.krona(), {"a.q": (16, 16), "b.q": (16, 16)})
    found = tna.convert(file, to="peft-lora", max_error=0.3)
    assert found.config is not None
    assert found.error <= 0.3
    assert tna.convert(file, to="peft-lora", rank=found.config["r"] - 1, max_error=1.0).error > 0.3
    message = "matrix rank 16, and LoRA of that rank is larger than the update itself"
    with pytest.raises(tna.ConfigError, match=message):
        tna.convert(file, to="peft-lora")


@pytest.mark.parametrize("form", ["peft-lokr", "lycoris-lokr", "peft-loha"])
def test_lossy_lokr_and_loha_are_no_worse_than_a_plain_fit(form: str) -> None:
    file = made(tna.presets.lora(6), {"a.q": (12, 20)})
    with pytest.raises(tna.ConfigError, match=r"max_error=.* \(--max-error .*\) to accept it"):
        tna.convert(file, to=form, rank=2)
    found = tna.convert(file, to=form, rank=2, max_error=1.0)
    assert not found.exact
    assert 0.0 < found.error < 1.0
    if form == "peft-loha":
        values = np.linalg.svd(updates(file)["a.q"], compute_uv=False)
        assert found.error <= math.sqrt(float(np.sum(values[2:] ** 2)) / float(np.sum(values**2))) + TOLERANCE
    with pytest.raises(tna.ConfigError, match="give a larger rank"):
        tna.convert(file, to=form, rank=2, max_error=found.error / 2)
    if form != "peft-loha":
        across = made(presets.superlora(3), {"a.q": (24, 36), "b.q": (24, 36)})
        lora, lokr = (tna.convert(across, to=to, rank=2, max_error=1).error for to in ("peft-lora", form))
        assert lokr <= lora + 1e-6


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    """Checks by the peers' own loaders. (Imported here, as Hypothesis refuses tests that are defined within a test.)"""
    pytest.importorskip("peft")
    pytest.importorskip("lycoris")
    from .test_lycoris_format import check_loaded as by_lycoris
    from .test_peft_format import check_loaded as by_peft

    return {"peft-lokr": by_peft, "lycoris-lokr": by_lycoris}


@pytest.mark.law("foreign-files")
@given(
    sides=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6)),
    low=st.tuples(st.booleans(), st.booleans()),
    rank=st.integers(1, 3),
    form=st.sampled_from(["peft-lokr", "lycoris-lokr"]),
    kind=st.sampled_from(["cp", "tt"]),
)
@example(sides=(8, 8, 2, 5), low=(True, True), rank=3, form="peft-lokr", kind="tt")  # ranks of 3 and 2
def test_lokr_of_any_sizes_is_loaded_or_refused(
    sides: tuple[int, ...], low: tuple[bool, bool], rank: int, form: str, kind: str, loaded: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    """The peers' own loaders: what is called exact is exact there."""
    p, q, k, n = sides
    config = Config(
        rank=rank, splits=2, split_size=(p, q), alpha=3, leading="same" if low[0] and low[1] else "dense",
        format=kind if low[1] else "dense",
    )  # fmt: skip
    shapes = {"blocks.0.q": (p * k, q * n), "blocks.1.q": (p * k, q * n)}
    file = made(config, shapes)
    out = tmp_path_factory.mktemp("lokr") / "out.safetensors"
    try:
        found = tna.convert(file, out, to=form)
    except tna.ConfigError:
        with pytest.raises(tna.ConfigError, match=r"'blocks\.0\.q' has matrix rank"):
            tna.convert(file, out, to=form)
        # No decompose_factor makes PEFT arrive at these sizes. (What LyCORIS guesses follows no such rule.)
        factorization = pytest.importorskip("peft.tuners.lokr.layer").factorization
        assert form != "peft-lokr" or not any(
            factorization(p * k, factor) == (p, k) and factorization(q * n, factor) == (q, n)
            for factor in (-1, *range(1, 40))
        )
        return
    assert found.exact
    loaded[form](out, updates(file), shapes)
    assert_same_updates(converted(out), file)


#: Rows and columns of the parts of an update of 24 × 30, and whether each is of low rank.
UPDATES = {
    "lora": [(24, 30, True)], "loha": [(24, 30, True)] * 2, "lokr": [(3, 2, False), (8, 15, False)],
    "lokr, low": [(4, 3, True), (6, 10, True)], "lokr, low first": [(4, 3, True), (6, 10, False)],
    "lokr, one": [(1, 1, False), (24, 30, True)], "dense": [(24, 30, False)],
}  # fmt: skip


def drawn_update(kind: str, rng: np.random.Generator, rank: int) -> ModuleUpdate:
    """A random update of 24 × 30."""
    parts = list[Pair | np.ndarray]()
    for rows, cols, is_low in UPDATES[kind]:
        shapes = [(rows, rank), (cols, rank)] if is_low else [(rows, cols)]
        halves = [rng.standard_normal(shape) for shape in shapes]
        parts.append(Pair(*halves) if is_low else halves[0])
    return ModuleUpdate(kind.partition(",")[0], (24, 30), tuple(parts), 0.5)


@given(
    kind=st.sampled_from([*UPDATES]), other=st.none() | st.sampled_from([*UPDATES]), rank=st.integers(1, 9),
    near=st.sampled_from([1e-12, 1e-7, 1e-3, 1.0]), size=st.sampled_from([1.0, 1e-150, 1e140]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_error_by_factors_is_the_dense_one(
    kind: str, other: str | None, near: float, rank: int, size: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    old = drawn_update(kind, rng, rank)
    new = drawn_update(other or kind, rng, rank)
    if other is None:
        parts = zip(old.parts, new.parts, strict=True)
        new = old._replace(parts=tuple(
            Pair(part.b + near * change.b, part.a + near * change.a) if isinstance(part, Pair) else part + near * change
            for part, change in parts
        ))  # fmt: skip
    old, new = old._replace(scale=size), new._replace(scale=size)
    off, whole = norms_of(old, new)
    one, two = (update._replace(scale=1.0).delta() for update in (old, new))
    assert off / size == pytest.approx(np.linalg.norm(one - two), rel=1e-6, abs=1e-14 * np.linalg.norm(one))
    assert whole / size == pytest.approx(np.linalg.norm(one), rel=1e-12)
    assert norms_of(old, old._replace(parts=tuple(old.parts)))[0] == 0.0
    np.testing.assert_allclose(old.rows(5, 19), old.delta()[5:19], rtol=1e-12, atol=1e-12 * size)


@pytest.mark.parametrize("to", ["lycoris-lokr", "lycoris-loha"])
def test_an_update_is_its_own_other_form_to_the_bit(to: str) -> None:
    """LoRA as LoKr with a W1 of one, or as LoHa times ones, is off by nothing."""
    assert tna.convert(made(presets.lora(3), dtype="f8"), to=to).error == 0.0


def test_a_form_that_is_not_the_plan_s_update_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    file = made(tna.presets.lora(2), {"a.q": (6, 8), "b.q": (300, 80)})
    right = CP.factors

    def wrong(self: Any, backend: Any, arrays: Any) -> Any:
        left, upper = right(self, backend, arrays)  # type: ignore[misc]
        return left * 1.001, upper

    monkeypatch.setattr(CP, "factors", wrong)
    found = tna.convert(file, to="peft-lora")
    assert found.exact
    assert all(0 < off < TOLERANCE for off in found.errors.values())


@pytest.mark.parametrize("form", ["peft-lokr", "lycoris-lokr", "peft-loha", "lycoris-loha"])
def test_products_are_converted_without_being_formed(form: str) -> None:
    """Two factors of 60 × 60 are 100 KiB, their Kronecker product is 100 MiB in float64."""
    settings: dict[str, Any] = (
        {"splits": 2, "format": "dense"}
        if form.endswith("lokr")
        else {"splits": 2, "combine": "hadamard", "leading": "same"}
    )
    file = made(Config(rank=2, **settings), {"a.q": (3600, 3600)})
    whole = 8 * 3600**2
    foreign = tna.convert(file, to=form)

    def through(**options: Any) -> Any:
        return tna.convert(dataclasses.replace(file), **options)

    with tempfile.TemporaryDirectory() as folder:
        foreign.save(f"{folder}/out")
        for call in (
            lambda: tna.convert(f"{folder}/out"), lambda: tna.convert(f"{folder}/out", to=form),
            lambda: through(to=form), lambda: through(dtype="float16"),
        ):  # fmt: skip
            found = list[Any]()
            assert peak_of(lambda: found.append(call())) < whole / 4  # noqa: B023
            assert found[0].exact
            assert found[0].error < 1e-3
    assert through().error == foreign.error == 0.0


def test_modes_in_another_order_are_not_taken_for_the_weight_s() -> None:
    """A square weight whose format makes its transpose."""
    file = made(Config(rank=2, fold=(24, 24), axes=(1, 0)), {"a.q": (24, 24)})
    found = tna.convert(file, to="peft-lora")
    b, a = (found.tensors[f"base_model.model.a.q.lora_{which}.weight"].astype("f8") for which in "BA")
    assert error(b @ a, file.deltas()[0]) <= TOLERANCE


def test_a_base_is_a_file_a_folder_a_list_or_a_mapping(tmp_path: Path) -> None:
    save_file({"a.q.weight": np.ones((6, 8), "f4"), "a.q.bias": np.ones(6, "f4")}, tmp_path / "model.safetensors")
    files = {cols: made(presets.lora(1), {"a.q": (6, cols)}) for cols in (8, 9)}
    for base in (tmp_path, str(tmp_path / "model.safetensors"), {"a.q.weight": [6, 8]}, {"a.q": (6, 8)}):
        assert tna.convert(files[8], base=base).exact
        with pytest.raises(tna.TargetError, match=r"\(6, 9\), and the weight in base has \(6, 8\)"):
            tna.convert(files[9], base=base)
    for file in files.values():
        assert tna.convert(file, base=iter(["a.q", "b"])).exact
    (tmp_path / "other").mkdir()
    save_file({"x": np.ones(2, "f4")}, tmp_path / "other" / "model.safetensors")
    with pytest.raises(tna.FileError, match=r"base: .* has no tensor whose name ends in \.weight"):
        tna.convert(tmp_path / "model.safetensors", base=tmp_path / "other")


def test_what_a_conversion_says_of_itself() -> None:
    found = tna.convert(made(tna.presets.lora(4)), to="peft-lora", rank=1, max_error=1.0)
    text = str(found)
    assert text.startswith("tnadapt -> peft-lora, 3 weights\nparameters 368 -> 92\nNOT exact: relative error 0.")
    assert "blocks.0.attn.q_proj.weight" in text
    assert repr(found).startswith("Conversion('tnadapt' -> 'peft-lora', NOT exact")
    # Two are two, whatever is in them.
    assert len({found, found, dataclasses.replace(found)}) == 2
    assert found.to_dict()["parameters"] == {"before": 368, "after": 92}


# -- Methods whose weights stay low-rank are exported as LoRA exactly, from their own factors, and load in PEFT --------


# Grouped-query attention of three layers: four query heads and two key and value heads of 6 rows.
ATTENTION: dict[str, tuple[int, ...]] = {
    f"layers.{layer}.{name}_proj": (rows, 20) for layer in range(3) for name, rows in (("q", 24), ("v", 12))
}

METHODS: dict[str, Config] = {
    "lora": presets.lora(2, alpha=3),
    "lora, terms": presets.lora(1, terms=3),
    "lotr": presets.lotr(2, groups="role", alpha=3),
    "lotr, train": presets.lotr(2, train=True, groups="role"),
    "lotr, terms": presets.lotr(1, terms=2, groups="role", alpha=0.3),
    "fact_tt": presets.fact_tt(3, groups="role"),
    "fact_tk": presets.fact_tk(2, groups="role"),
    "fact_tk, unequal": presets.fact_tk((2, 2, 3), groups="role"),
    "cara": presets.cara(2, head_size=6, groups="role"),
    "cara, terms": presets.cara(1, head_size=6, terms=3, groups="role"),
    "lorta_cp": presets.lorta_cp(3, head_size=6, groups="role"),
    "metatt": presets.metatt(2, groups="role", alpha=3),
    "metatt, heads": presets.metatt(2, head_size=6, groups="role"),
    "metatt, terms": presets.metatt(1, terms=2, groups="role"),
    "miss": presets.miss(5, alpha=3),
    "miss that is cut": presets.miss(3),
    "miss of rows": presets.miss(8, 4),
    "low rank, cosines": Config(2, projection="dct2", on="weight"),
    "Hadamard across weights": presets.lotr(1, splits=2, combine="hadamard", leading="same", groups="role"),
}
FROZEN = {
    "lora": {"factor1": Seeded("normal")},
    "lotr": {"factor1": Seeded("normal"), "factor2": Seeded("orthonormal")},
    "lotr, train": {"core1": Seeded("normal")},
    "fact_tk": {"factor2": Seeded("signs")},
    "cara": {"factor0": Seeded("uniform")},
    "lorta_cp": {"factor4": Seeded("normal", shared=False)},
    "metatt": {"core0": Seeded("normal"), "core3": Seeded("normal")},
}
CASES = {**METHODS, **{f"{name}, frozen": METHODS[name].replace(sources=own) for name, own in FROZEN.items()}}


def on_projections(config: Config, shapes: dict[str, tuple[int, ...]], dtype: str = "f4") -> AdapterFile:
    return adapter_on([Target(path, shape, path[-6]) for path, shape in shapes.items()], config, dtype=dtype)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("no singular value decomposition is needed")


@pytest.mark.law("foreign-files", "largest-rank")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_the_factors_are_the_networks_own(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, double = on_projections(CASES[name], ATTENTION, dtype), dtype == "float64"
    if name != "fact_tk, unequal":  # narrowed to the smaller of two ranks
        monkeypatch.setattr(np.linalg, "svd", refuse)
    found = tna.convert(file, tmp_path / "theirs", to="peft-lora")
    monkeypatch.undo()
    assert found.exact
    assert found.error <= (0.0 if double else TOLERANCE)
    for number, (path, shape) in enumerate(ATTENTION.items()):
        b = found.tensors[f"base_model.model.{path}.lora_B.weight"]
        assert b.shape == (shape[0], file.plan.largest_rank(number))
    assert found.config is not None
    assert found.config["r"] == file.plan.lora_rank
    assert not found.config["rank_pattern"]
    again = converted(tmp_path / "theirs")
    assert again.config.format == "cp"
    assert_same_updates(again, file, 1e-12 if double else TOLERANCE)
    # Nothing is rounded.
    assert set(tna.convert(file, to="peft-lora", dtype="float64").errors.values()) == {0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_updates(loaded_by_peft(tmp_path / "theirs", ATTENTION), file)


@pytest.mark.parametrize(
    "config", [presets.lora(12), presets.lora(30), presets.unilora(50, rank=14), presets.vera(20)], ids=str
)
def test_factors_of_its_own_are_exported_at_any_size_as_is_said(config: Config) -> None:
    file = on_projections(config, ATTENTION)
    rank = config.rank
    assert isinstance(rank, int)
    assert any(rank * (rows + cols) >= rows * cols for rows, cols in ATTENTION.values())
    said = lora_export(file.plan, file.targets)
    assert (said.rank, file.plan.lora_rank) == (rank, rank)
    for form, expected in (("peft-lora", rank), ("vllm", said.served)):
        found = tna.convert(file, to=form)
        assert found.exact
        assert found.config is not None
        assert found.config["r"] == expected


def test_a_slice_of_high_rank_is_left_to_the_other_ways() -> None:
    file = on_projections(presets.lotr(12, groups="role"), ATTENTION)
    assert file.plan.lora_rank is None
    message = r"give max_error= \(--max-error\) for the nearest of lower rank, with rank= \(--rank\) if that is fixed"
    with pytest.raises(tna.ConfigError, match=message):
        tna.convert(file, to="peft-lora")
    assert tna.convert(file, to="lycoris-full").exact


# -- Adapters with frozen, tied and shared arrays are LoRA exactly; those of the base weights need the base ------------


SQUARES: dict[str, tuple[int, ...]] = {f"layers.{layer}.{name}_proj": (24, 20) for layer in range(2) for name in "qv"}
LOW_RANK = {
    "lora_fa": (presets.lora_fa(3, alpha=2), 3),
    "share_lora": (presets.share_lora(3), 3),
    "tied_lora": (presets.tied_lora(3, alpha=5), 3),
    "vera": (presets.vera(5), 5),
    "unilora": (presets.unilora(50, 3), 3),
    "nola": (presets.nola(20, 2), 2),
    "lora_xs": (presets.lora_xs(4, alpha=2), 4),
    "svft": (presets.svft(6), 6),
    "tinylora": (presets.tinylora(7, 2), 2),
}
OF_BASE = ("lora_xs", "svft", "tinylora")


def weights(seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"{path}.weight": rng.normal(size=shape).astype("f4") for path, shape in SQUARES.items()}


@pytest.mark.law("foreign-files", "largest-rank")
@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_methods_are_lora_exactly(name: str, tmp_path: Path) -> None:
    config, rank = LOW_RANK[name]
    file, base = on_projections(config, SQUARES), weights()
    save_file(base, tmp_path / "model.safetensors")
    tna.save(tmp_path / "adapter.safetensors", file)
    whole = file.with_base(list(base.values())) if name in OF_BASE else file
    for source, where in (
        (whole, None), (file, tmp_path / "model.safetensors"), (tmp_path / "adapter.safetensors", tmp_path),
    ):  # fmt: skip
        found = tna.convert(source, to="peft-lora", base=where, dtype="float64")
        assert (found.exact, found.error) == (True, 0.0)
        assert found.config is not None
        assert found.config["r"] == rank
        assert not found.config["rank_pattern"]
        assert found.parameters == (file.num_parameters, 4 * rank * (24 + 20))
    # In this library's own form, the arrays are stored from now on.
    assert converted(file, base=tmp_path / "model.safetensors").complete
    tna.convert(whole, tmp_path / "lora", to="peft-lora")
    assert_same_updates(converted(tmp_path / "lora"), whole)
    assert_same_updates(loaded_by_peft(tmp_path / "lora", SQUARES), whole)
    for shapes in (None, SQUARES) if name in OF_BASE else ():
        with pytest.raises(tna.ConfigError) as caught:
            tna.convert(file, to="peft-lora", base=shapes)
        told = str(caught.value)
        assert "does not store the arrays that are computed from the base weights, 'group0.split0.factor0'" in told
        assert "give base= (--base), a safetensors file, an index or a folder of the base model" in told
        assert "or, in Python, convert file.with_base(weights)" in told


@pytest.mark.law("foreign-files")
@pytest.mark.parametrize("changes", [{}, {"offset": False, "seed": 3}, {"before": "linear"}])
def test_tinylora_is_written_for_peft(changes: dict[str, Any], tmp_path: Path) -> None:
    file, base = on_projections(presets.tinylora(13, 2, alpha=3, **changes), SQUARES), weights()
    save_file(base, tmp_path / "model.safetensors")
    found = tna.convert(file, tmp_path / "theirs", to="peft-tinylora", base=tmp_path / "model.safetensors")
    assert found.exact
    wrapped = pytest.importorskip("peft").PeftModel.from_pretrained(model(SQUARES), tmp_path / "theirs")
    assert sum(p.numel() for n, p in wrapped.named_parameters() if "tinylora_v" in n) == 13
    assert_same_updates(peft_updates(wrapped), file.with_base(list(base.values())))
    for config, message in (
        (presets.lora_xs(4), "it needs one θ for all weights, and both factors frozen"),
        (presets.tinylora(3, 2, scope="group"), "it needs one θ for all weights"),
        (presets.unilora(50, 3), "it needs one θ for all weights, and both factors frozen"),
        (presets.tinylora(7, 2).replace(rank=(2, 3)), "PEFT's matrices between the factors are square"),
    ):
        with pytest.raises(tna.ConfigError, match=message):
            tna.convert(on_projections(config, SQUARES).with_base(list(base.values())), to="peft-tinylora")


def test_another_base_is_refused(tmp_path: Path) -> None:
    file, base, path = on_projections(LOW_RANK["lora_xs"][0], SQUARES), weights(), tmp_path / "model.safetensors"
    known = dataclasses.replace(file, base=fingerprint(list(base.values()), "float32"))
    save_file(base, path)
    assert tna.convert(known, to="peft-lora", base=path).exact
    for other, message in (
        (weights(2), "base is another model than the one that the adapter was trained on"),
        (
            {name: array.astype("i4") for name, array in base.items()},
            r"'layers.0.q_proj.weight' of the shape \(24, 20\), .* it is I32",
        ),
        (dict(list(base.items())[1:]), "base has no module 'layers.0.q_proj'"),
    ):
        save_file(other, path)
        with pytest.raises(tna.TargetError, match=message):
            tna.convert(known, to="peft-lora", base=path)
    save_file({name: array.astype("f2") for name, array in base.items()}, path)
    assert tna.convert(file, to="peft-lora", base=path).exact


@pytest.mark.parametrize("name", ["lora_xs", "lora_fa"])
@pytest.mark.parametrize("renamed", ["headless", "earlier"])
def test_the_base_may_name_its_weights_otherwise(name: str, renamed: str, tmp_path: Path) -> None:
    # A checkpoint without the prefix of the model with a head, or with names of an earlier release.
    own = {f"encoder.{path}": shape for path, shape in SQUARES.items()}
    other = {path: path.removeprefix("encoder.") for path in own}
    if renamed == "earlier":
        kinds = {"q": "query", "v": "value"}
        other = {path: f"block.{path.split('.')[2]}.attention.{kinds[path[-6]]}" for path in own}
    base = dict(zip(own, weights().values(), strict=True))
    save_file({f"{other[path]}.weight": array for path, array in base.items()}, tmp_path / "model.safetensors")
    plain = on_projections(LOW_RANK[name][0], own)
    file = dataclasses.replace(plain, base=fingerprint(list(base.values()), "float32"))
    found = tna.convert(file, tmp_path / "theirs", to="peft-lora", base=tmp_path / "model.safetensors")
    assert found.exact
    assert all(path.startswith("base_model.model.encoder.layers.") for path in found.tensors)
    want = file if file.complete else file.with_base(list(base.values()))
    assert_same_updates(converted(tmp_path / "theirs"), want)
    with pytest.raises(tna.TargetError, match=r"base has no module 'encoder.layers.0.q_proj'"):
        tna.convert(file, to="peft-lora", base=list(other.values()))


@pytest.mark.parametrize(
    ("config", "kind"),
    [(presets.lora(2), "lora"), (presets.lokr(2), "lokr"), (presets.loha(2), "loha"), (presets.vera(3), "lora")],
)
def test_a_format_alone_takes_the_adapters_own_method_or_lora(config: Config, kind: str) -> None:
    for name, part in (("peft", None), ("lycoris", None), ("kohya", "transformer")):
        found = tna.convert(made(config), to=name, part=part)
        assert (found.kind, found.exact) == (f"{name}-{kind}", True)
    assert tna.convert(made(config), to="diffusers", part="unet", rank=3, max_error=1).kind == "diffusers-lora"


def test_square_weights_stay_as_they_are_stored_beside_others(tmp_path: Path) -> None:
    square, plain = tna.Target("h.c_proj", (8, 8), transposed=True), tna.Target("h.fc", (6, 8))
    for targets in ([square, plain], [square, tna.Target("h.c_wide", (8, 24), transposed=True), plain]):
        file = adapter_on(targets, presets.lora(2))
        theirs = tna.convert(file, tmp_path / "peft", to="peft-lora", overwrite=True)
        assert theirs.config is not None
        # PEFT's one word for all layers; what it sets for each of the others itself is recorded.
        assert theirs.config["fan_in_fan_out"] is False
        for base in (None, {target.module: target.stored for target in targets}):
            back = converted(tmp_path / "peft", base=base).targets
            assert {(target.module, target.transposed) for target in back} == {
                (target.module, target.transposed) for target in targets
            }


@pytest.mark.parametrize("worst", ["a.q", "b.q", "c.q"])
def test_of_errors_that_are_too_large_the_worst_is_named(worst: str) -> None:
    file = made(tna.presets.lora(2), dict.fromkeys(("a.q", "b.q", "c.q"), (6, 8)))
    # The others are of rank 1, but for a little.
    arrays = {name: array.copy() for name, array in file.arrays.items()}
    for index, target in enumerate(file.targets):
        if target.module != worst:
            arrays[f"group{index}.split0.factor0"][:, 1] *= np.float32(1e-3)
    with pytest.raises(tna.ConfigError, match=rf"{worst}\.weight") as caught:
        tna.convert(dataclasses.replace(file, arrays=arrays), to="peft-lora", rank=1)
    assert not any(f"{other}.weight" in str(caught.value) for other in {"a.q", "b.q", "c.q"} - {worst})


def test_exact_is_so_of_every_weight() -> None:
    file = made(presets.krona(), {"a.q": (24, 36), "b.q": (24, 36)})
    small = {n: a * np.float32(2e-4) if n.startswith("group1.") else a for n, a in file.arrays.items()}
    file = dataclasses.replace(file, arrays=small)
    with pytest.raises(tna.ConfigError, match=r"that of b\.q\.weight by 0\.9"):
        tna.convert(file, to="lycoris-full", dtype="float16")
    found = tna.convert(file, to="lycoris-full", dtype="float16", max_error=0.01)
    assert not found.exact
    assert "b.q.weight" in str(found)


FUSED = {"blocks.0.attn.qkv": (24, 8), "blocks.1.attn.qkv": (24, 8)}
IN_PROJ = Target("attn", (12, 4), "q", "in_proj_weight", Rows(0, 4, 12))


def fused(config: Config, interleaved: bool = False) -> AdapterFile:
    """Queries and values of fused weights."""
    places = (Rows(0, 2, 6, 4), Rows(4, 2, 6, 4)) if interleaved else (Rows(0, 8, 24), Rows(16, 8, 24))
    pairs = list(zip("qv", places, strict=True))
    return adapter_on([Target(path, FUSED[path], role, rows=rows) for path in FUSED for role, rows in pairs], config)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("to", ["peft-lora", "peft-lokr", "peft-loha", "lycoris-lora", "lycoris-full"])
def test_fused_rows_become_a_whole_module(to: str, interleaved: bool, tmp_path: Path) -> None:
    file = fused(P.lora(2, alpha=3), interleaved)
    found = tna.convert(file, tmp_path / "out", to=to)
    assert found.exact
    assert found.error <= TOLERANCE
    again = updates(converted(tmp_path / "out"))
    assert_same_updates(again, file)
    for delta in again.values():
        assert not (delta.reshape(4, 6, 8)[:, 2:4] if interleaved else delta[8:16]).any()
    if to == "peft-lora":
        assert found.config is not None
        assert found.config["r"] == 4  # the sum of both
        assert_same_updates(loaded_by_peft(tmp_path / "out", FUSED), file)


def test_transposed_weights_are_peft_s_fan_in_fan_out(tmp_path: Path) -> None:
    conv = pytest.importorskip("transformers").pytorch_utils.Conv1D
    peft, nn = pytest.importorskip("peft"), pytest.importorskip("torch").nn
    base = nn.ModuleDict({"h": nn.ModuleDict({"c_attn": conv(24, 8), "c_square": conv(8, 8)})})
    config = peft.LoraConfig(r=3, fan_in_fan_out=True, target_modules=["c_attn", "c_square"])
    theirs = trained_by_peft(tmp_path / "theirs", base, config)
    file = converted(tmp_path / "theirs")
    assert_same_updates(file, peft_updates(theirs))  # as it is stored, (in, out)
    # The base says how a weight that is not square is stored.
    shapes = {"h.c_attn": (8, 24), "h.c_square": (8, 8)}
    known = converted(tmp_path / "theirs", base=shapes)
    assert [target.transposed for target in known.targets] == [True, True]
    fresh = nn.ModuleDict({"h": nn.ModuleDict({"c_attn": conv(24, 8), "c_square": conv(8, 8)})})
    assert converted(tmp_path / "theirs", base=fresh).targets == known.targets
    packed = fresh.requires_grad_(False)
    packed["h"]["c_attn"].weight.data = packed["h"]["c_attn"].weight.data.byte()
    assert [target.stored for target in converted(tmp_path / "theirs", base=packed).targets] == [(8, 24), (8, 8)]
    with pytest.raises(tna.FileError, match=r"unknown how the square 'h\.c_square' is stored"):
        tna.convert(tmp_path / "theirs", base={**shapes, "h.c_attn": (24, 8)})
    for to in ("peft-lokr", "peft-loha", "lycoris-lora", "lycoris-full"):
        with pytest.raises(tna.ConfigError, match=r"stored as \(in, out\).*convert to 'peft-lora'"):
            tna.convert(file, to=to)


def test_multihead_attention_and_other_parameters_are_refused() -> None:
    message = "cannot be converted: .* adapts the weight of a layer in the model, and this is another parameter; merge"
    for target, to in (
        (IN_PROJ, "peft-lora"),
        (IN_PROJ, "lycoris-full"),
        (Target("attn", (4, 4), parameter="table"), "peft-lora"),
        (Target("", (4, 4)), "peft-lora"),
    ):
        with pytest.raises(tna.ConfigError, match=message):
            tna.convert(adapter_on([target], P.lora(1)), to=to)


def test_what_was_trained_beside_it_needs_a_place() -> None:
    head = {"head.weight": np.ones((3, 8), "f4"), "head.bias": np.ones(3, "f4")}
    file, beside = (
        dataclasses.replace(made(P.lora(2)), kept=kept)
        for kept in (head, {"blocks.0.attn.q_proj.scale": np.zeros(12, "f4")})
    )
    assert tna.convert(file, to="peft-lora").exact
    with pytest.raises(tna.ConfigError, match=r"LyCORIS has no place for.*head.bias.*without_kept=True"):
        tna.convert(file, to="lycoris-lora")
    assert tna.convert(file, to="lycoris-lora", without_kept=True).exact
    alone: dict[str, tuple[str, ...]] = {file.targets[0].name: ()}
    tied = dataclasses.replace(file, ties={"head.weight": ("embed.weight",), **alone})
    assert converted(tied, without_kept=True).ties == alone
    with pytest.raises(tna.ConfigError, match=r"saves whole modules, and cannot keep 'blocks\.0\.attn\.q_proj\.scale'"):
        tna.convert(beside, to="peft-lora")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("to", ["peft-lora", "lycoris-lora"])
def test_dtypes_come_and_go_unchanged(to: str, dtype: str, tmp_path: Path) -> None:
    file = converted(made(P.lora(4, alpha=8), dtype="f8"), dtype=dtype)
    assert file.dtype == dtype
    found = tna.convert(file, tmp_path / "out", to=to)
    assert found.error == 0.0
    again = converted(tmp_path / "out")
    assert (again.dtype, again.config) == (dtype, file.config)
    for name, array in file.arrays.items():
        assert np.array_equal(again.arrays[name], array)
    # A peer's own library reads the same dtype.
    load = pytest.importorskip("safetensors.torch").load
    tensors = load(next(iter(found.files.values())))
    assert {str(tensor.dtype) for name, tensor in tensors.items() if "alpha" not in name} == {f"torch.{dtype}"}


@pytest.mark.parametrize("names", ["F16 BF16", "F16 F32", "BF16 F32", "F64 F16", "BF16 F64", "F32 F64", "F16 BF16 F32"])
@pytest.mark.parametrize("library", ["peft", "lycoris"])
def test_different_dtypes_become_one_that_holds_all_numbers(library: str, names: str, tmp_path: Path) -> None:
    if library == "peft":
        name, (down, up) = "base_model.model.{}.q.{}.weight", ("lora_A", "lora_B")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    else:
        name, (down, up) = "lycoris_{}_q.{}.weight", ("lora_down", "lora_up")
    tensors, expected = {}, {}
    rng = np.random.default_rng(0)
    for layer, tag in zip("abc", names.split(), strict=False):
        dtype = DTYPES[tag]
        for part, shape in ((down, (2, 6)), (up, (4, 2))):
            stored = cp.stored(rng.standard_normal(shape), dtype)
            tensors[name.format(layer, part)] = (tag, stored)
            expected[f"{layer}.q", part] = cp.numbers(stored, dtype)
    cp.write_file(tmp_path / "adapter_model.safetensors", tensors)
    where = tmp_path if library == "peft" else tmp_path / "adapter_model.safetensors"
    file = converted(where, base=["a.q", "b.q", "c.q"])
    assert file.dtype == ("float64" if "F64" in names else "float32")
    found = updates(file)
    assert len(found) == len(names.split())
    for path in found:
        assert error(found[path], expected[path, up] @ expected[path, down]) < 1e-15


def test_what_has_to_be_rounded_becomes_float32(tmp_path: Path) -> None:
    file = converted(made(P.lora(4, alpha=8), dtype="f8"), dtype="bfloat16")
    assert dict(file.dtypes)
    found = tna.convert(file, to="peft-lora", rank=2, max_error=0.9)
    assert not found.dtypes
    assert {array.dtype.name for array in found.tensors.values()} == {"float32"}
    rounded = tna.convert(file, to="peft-lora", rank=2, max_error=0.9, dtype="bfloat16")
    assert set(rounded.dtypes.values()) == {"bfloat16"}
    assert rounded.error > found.error
    small = made(P.lora(1))
    large = dataclasses.replace(small, arrays={n: array * np.float32(1e6) for n, array in small.arrays.items()})
    for to in ("tnadapt", "peft-lora"):
        with pytest.raises(tna.ConfigError, match="too large for float16; use float32"):
            tna.convert(large, to=to, dtype="float16")


def test_factors_that_cancel_lose_more_than_their_last_digit() -> None:
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((8, 1)), rng.standard_normal((12, 1))
    near = {"group0.split0.factor0": np.hstack([b, b + 1e-6]), "group0.split0.factor1": np.hstack([a, -a])}
    file = AdapterFile(P.lora(2), [Target("a.q", (8, 12))], near)
    assert tna.convert(file, to="peft-lora").error == 0.0  # in float64, as it was
    with pytest.raises(tna.ConfigError, match=r"nothing but rounding is allowed: give a larger rank or a wider dtype"):
        tna.convert(file, to="peft-lora", dtype="float32")
    assert not tna.convert(file, to="peft-lora", dtype="float32", max_error=0.5).exact


def test_ranks_and_scales_that_differ_keep_the_update(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors, deltas = {}, {}
    for path, rank, alpha in (("a.q", 2, 4.0), ("b.q", 3, 1), ("c.q", 1, 0.0)):  # some scripts store integers
        name = f"lora_unet_{path.replace('.', '_')}"
        up, down = rng.standard_normal((6, rank)), rng.standard_normal((rank, 8))
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        tensors |= {f"{name}.alpha": np.asarray(alpha)}
        deltas[path] = up @ down * (alpha / rank or 1.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    file = converted(tmp_path / "kohya.safetensors", base=list(deltas))
    parts = [(config.rank, config.alpha, len(targets)) for config, targets in file.config.split(file.targets)]
    assert parts == [(2, 4.0, 1), (3, 1.0, 1), (1, None, 1)]
    assert_same_updates(file, deltas, 1e-14)


def test_a_fresh_adapter_is_zero_everywhere(tmp_path: Path) -> None:
    config = P.superlora(2, groups=1)
    file = AdapterFile(config, [Target("a.q", (6, 8))], UpdatePlan(config, [(6, 8)]).init())
    for to in ("peft-lora", "peft-lokr", "peft-loha", "lycoris-full"):
        found = tna.convert(file, to=to)
        assert (found.exact, found.error) == (True, 0.0)
