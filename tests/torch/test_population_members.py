"""Views of the members of a population, their starts, and what is refused."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import numpy as np
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tests.support.depth import in_depth

from .internals import MemberState
from .loops import bits, same
from .small import WIDTH, batch, compiles_whole, small, stir

CONFIGS: dict[str, Any] = {
    "lora": P.lora(2, alpha=3),
    "superlora": tna.presets.superlora(2),
    "theta": tna.presets.unilora(9, 2),
    "dora": tna.presets.dora(2),
    "pissa": tna.presets.lora(2, start="pissa"),
    "lora_xs": tna.presets.lora_xs(2),
    "behind F": tna.presets.superlora(2, projection="nonlinear", ratio=0.5),
    "several": {"q": tna.presets.lora(2), "v": tna.presets.superlora(2)},
}
configs = pytest.mark.parametrize("config", CONFIGS)
PROGRAMS = in_depth(
    itertools.product(CONFIGS, ["auto", "weight"]),
    [("dora", "auto"), ("theta", "weight"), ("several", "weight")],
)
NAMES = ["ann", "bob", "cleo", "dan"]


def population(config: str = "lora", count: int = 4, **options: Any) -> tuple[nn.Module, tt.Population]:
    model = small()
    adapter = tt.attach(model, CONFIGS[config], population=count, **options)
    assert isinstance(adapter, tt.Population)
    return model, stirred(adapter)


def stirred(adapter: Any) -> Any:
    stir(adapter, 0.3)
    return adapter


def single(config: str = "lora", member: tt.Member | None = None, **options: Any) -> tuple[nn.Module, tt.Adapter]:
    """Return an adapter that is attached alone, with the arrays of a member."""
    model = small()
    adapter = tt.attach(model, CONFIGS[config], **options)
    if member is not None:
        adapter.load_arrays({name: array.detach().clone() for name, array in member.arrays().items()})
    return model, adapter


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(batch(size=4))


def numbers(adapter: tt.Adapter) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}


def equal(one: Any, other: Any) -> bool:
    return bool(one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one))


# -- Views ---------------------------------------------------------------------------------------


@pytest.mark.law("members-alone")
@configs
def test_the_active_member_acts_on_all_rows(config: str) -> None:
    model, adapters = population(config)
    for number in (3, 0, 3):
        adapters[number].activate()
        assert torch.equal(run(model), run(single(config, adapters[number])[0]))
    with adapters.disabled():
        assert torch.equal(run(model), run(small()))
    adapters.set_weight(0.0)
    assert torch.equal(run(model), run(small()))


@configs
@pytest.mark.parametrize("storage", ["another", "another part"])
def test_the_active_member_follows_parameters_to_other_memory(config: str, storage: str) -> None:
    """Sharding and offloading exchange the memory of parameters, also for other parts of one buffer."""
    model, adapters = population(config)
    adapters[2].activate()
    for parameter in adapters.parameters():
        parameter.data = torch.stack([parameter.data, 0.5 * parameter.data])[0]
    before = model(batch(size=4)).detach()
    for parameter in adapters.parameters():
        if storage == "another":
            parameter.data = 0.5 * parameter.data
        else:
            parameter.data = parameter.data.as_strided(parameter.shape, parameter.stride(), parameter.numel())
    output = model(batch(size=4))
    torch.testing.assert_close(output.detach(), run(model))
    assert not torch.allclose(output.detach(), before)
    output.square().sum().backward()
    assert all(parameter.grad[2].any() and not parameter.grad[:2].any() for parameter in adapters.parameters())


@compiles_whole
@pytest.mark.parametrize(("config", "strategy"), PROGRAMS)
def test_a_program_of_the_active_member(config: str, strategy: str) -> None:
    """It is compiled before any pass, without a break."""
    model, adapters = population(config, strategy=strategy)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for number in (2, 1):
        adapters[number].activate()
        with torch.no_grad():
            output = compiled(batch(size=4))
        torch.testing.assert_close(output, run(model))
    torch._dynamo.reset()


@configs
def test_transforms_of_the_active_member_s_model(config: str) -> None:
    model, adapters = population(config)
    adapters[1].activate()
    x = batch(size=4)
    gradient = torch.func.grad(lambda x: model(x).square().sum())(x)
    x.requires_grad_()
    model(x).square().sum().backward()
    torch.testing.assert_close(gradient, x.grad)
    assert all(parameter.grad[1].any() for parameter in adapters.parameters())


def test_no_member_is_activated_while_another_is_merged() -> None:
    model, adapters = population()
    adapters[2].activate()
    adapters[2].merge()
    merged = run(model)
    with pytest.raises(tna.TargetError, match="member 2 of population 'default' is merged, and not member 1: unmerge"):
        adapters[1].activate()
    adapters[2].activate()
    adapters[2].unmerge()
    torch.testing.assert_close(run(model), merged)


def test_the_weight_of_a_member_is_that_of_the_population() -> None:
    model, adapters = population()
    adapters[1].activate()
    adapters.set_weight(0.5)
    assert adapters.weight == adapters[1].weight == 0.5
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch(size=4)), run(model))


def test_members_that_were_used_are_freed() -> None:
    model, adapters = population()
    for number in range(3):
        adapters[number].activate()
        model(batch(size=4)).sum().backward()
    gc.collect()
    states = [value for value in gc.get_objects() if type(value) is MemberState]
    assert [state.number for state in states if state.whole is adapters._state] == [2]


def test_only_the_active_member_keeps_updates() -> None:
    model, adapters = population("superlora", strategy="weight")
    members, held = list(adapters), []
    for member in members:
        member.activate()
        run(model)
        held.append(sum(cache.held() for cache in adapters._state.caches()))
    assert held[0] > 0
    assert held == held[:1] * 4
    adapters[3].clear_cache()
    with torch.no_grad(), adapters.members([0, 1, 2, 2]):
        model(batch(size=4))
    assert sum(cache.held() for cache in adapters._state.caches()) == 0
    adapters[0].activate()
    run(model)
    adapters.clear_cache()
    assert sum(cache.held() for cache in adapters._state.caches()) == 0


@pytest.mark.law("member-views")
@configs
def test_a_member_s_file_is_that_of_the_adapter_alone(config: str, tmp_path: Path) -> None:
    model, adapters = population(config)
    _, alone = single(config, adapters[2])
    adapters[2].save(tmp_path / "member")
    alone.save(tmp_path / "alone")
    assert (tmp_path / "member").read_bytes() == (tmp_path / "alone").read_bytes()
    adapters.save(tmp_path / "all")
    tna.append(tmp_path / "all", adapters[2], name="new")
    tna.replace(tmp_path / "all", 0, adapters[2])
    first, third, new = tna.load(tmp_path / "all", members=[0, 2, "new"])
    assert all((array == third.arrays[name]).all() for file in (first, new) for name, array in file.arrays.items())
    with pytest.raises(tna.FileError, match="a whole population, in place of one member"):
        tna.replace(tmp_path / "all", 0, adapters)
    adapters[2].save_pretrained(tmp_path / "folder")
    assert (tmp_path / "folder" / "adapter.safetensors").read_bytes() == (tmp_path / "alone").read_bytes()
    loaded = small()
    tt.load(loaded, tmp_path / "member")
    adapters[2].activate()
    assert torch.equal(run(loaded), run(model))
    before = numbers(adapters)
    adapters[1].swap(tmp_path / "member")
    after = numbers(adapters)
    for name, old in before.items():
        new = after[name]
        assert torch.equal(new[1], old[2])
        assert torch.equal(new[[0, 2, 3]], old[[0, 2, 3]])


@pytest.mark.law("member-views")
@configs
def test_arrays_updates_and_their_gradients(config: str) -> None:
    _, adapters = population(config)
    for number in (0, 3):
        _, alone = single(config, adapters[number])
        assert equal(adapters[number].arrays(), alone.arrays())
        updates, expected = adapters[number].deltas(), alone.deltas()
        assert all(map(torch.equal, updates, expected))
        gradients, of_alone = (
            torch.autograd.grad(
                sum(update.square().sum() for update in several),
                [parameter for _, parameter in handle.named_parameters()],
                materialize_grads=True,
            )
            for several, handle in ((updates, adapters), (expected, alone))
        )
        for gradient, other in zip(gradients, of_alone, strict=True):
            torch.testing.assert_close(gradient[number], other)
            assert not gradient[[other for other in range(4) if other != number]].any()


@pytest.mark.law("member-views")
@configs
def test_a_change_of_one_member_leaves_the_others(config: str) -> None:
    model, adapters = population(config)
    fresh = numbers(single(config)[1])
    before = numbers(adapters)
    adapters[1].load_arrays({name: 0.5 * array for name, array in adapters[3].arrays().items()})
    adapters[2].reset()
    for name, parameter in adapters.named_parameters():
        assert torch.equal(parameter[[0, 3]], before[name][[0, 3]])
        torch.testing.assert_close(parameter[1], 0.5 * before[name][3])
        assert torch.equal(parameter[2], fresh[name])
    with pytest.raises(tna.ShapeError, match="needs arrays named and shaped as its plan says; differing"):
        adapters[1].load_arrays(adapters.arrays())
    adapters[2].activate()
    assert torch.equal(run(model), run(small()))


@pytest.mark.law("member-views")
@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_member(config: str, dtype: Any) -> None:
    model, adapters = population(config)
    model.to(dtype)
    base = bits(model)
    other, alone = single(config, adapters[2])
    other.to(dtype)
    adapters[2].merge()
    alone.merge()
    assert all(torch.equal(one, two) for one, two in zip(bits(model).values(), bits(other).values(), strict=True))
    assert [member.merged for member in adapters] == [False, False, True, False]
    assert adapters.merged
    text = r"^member 2 of population 'default' is merged, and not member 1: unmerge\(\) that one$"
    for refused in (adapters[1].merge, adapters[1].unmerge, adapters[1].bake):
        with pytest.raises(tna.TargetError, match=text):
            refused()
    for other_call in (adapters[1].reset, adapters.reset, adapters.detach):
        with pytest.raises(tna.TargetError, match=r"is merged, and .* needs it unmerged: call unmerge\(\) first"):
            other_call()
    with pytest.raises(tna.TargetError, match="is merged already"):
        adapters[2].merge()
    with (
        pytest.raises(tna.TargetError, match=r"merged into the base, .* unmerge\(\) it before members\(\)$"),
        adapters.members([0]),
    ):
        pass
    adapters[2].unmerge()
    assert same(bits(model), base)
    adapters[1].merge()
    adapters.unmerge()
    assert same(bits(model), base)
    assert not adapters.merged
    with pytest.raises(tna.TargetError, match="is not merged"):
        adapters[1].unmerge()


@pytest.mark.law("member-views")
def test_members_are_saved_while_one_is_merged(tmp_path: Path) -> None:
    _, adapters = population()
    for number in (1, 2):
        adapters[number].save(tmp_path / f"{number}")
    adapters[1].merge()
    for number in (1, 2):
        adapters[number].save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / f"{number}").read_bytes()


@pytest.mark.law("member-views")
def test_baking_a_member_leaves_nothing_of_the_population() -> None:
    for merged in (False, True):
        model, adapters = population()
        other, alone = single(member=adapters[2])
        if merged:
            adapters[2].merge()
        assert adapters[2].bake() is model
        alone.bake()
        assert same(model.state_dict(), other.state_dict())
        assert tt.adapters(model) == {}
        assert torch.equal(run(model), run(other))


@pytest.mark.law("member-views")
@pytest.mark.parametrize("config", ["lora", "vera"])
def test_a_member_is_converted_as_it_is_saved(config: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    handles = []
    for count in (None, 3):
        handles.append(tt.attach(copy.deepcopy(model), config, "all-linear", rank=2, population=count))
    alone, adapters = handles
    stir(adapters, 0.3)
    alone.load_arrays(adapters[1].arrays())
    for name, handle in (("alone", alone), ("member", adapters[1])):
        handle.save(tmp_path / name)
        tna.convert(tmp_path / name, tmp_path / f"{name}-peft", to="peft-lora")
        tna.convert(handle, tmp_path / f"{name}-attached", to="peft-lora")
    assert tna.convert(adapters, tmp_path / "all", to="peft-lora").exact
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        folders = ("alone-peft", "alone-attached", "member-peft", "member-attached", "all/1")
        assert len({(tmp_path / folder / file).read_bytes() for folder in folders}) == 1


def test_a_view_is_one_object_with_a_name() -> None:
    model, adapters = population(names=NAMES)
    member = adapters["cleo"]
    assert member is adapters[2]
    assert member is list(adapters)[2]
    assert (member.number, member.name, len(adapters), adapters.population) == (2, "default['cleo']", 4, 4)
    adapters.names = None
    assert member.name == "default[2]"
    assert repr(member) == "<tnadapt member 2 of population 'default': 624 parameters for 10 weights of Small>"
    adapters.names = NAMES[::-1]
    assert member.name == "default['bob']"
    assert adapters["bob"] is member
    assert adapters.num_parameters == member.num_parameters == single()[1].num_parameters
    assert sum(parameter.numel() for parameter in adapters.parameters()) == 4 * member.num_parameters
    assert repr(member) == "<tnadapt member 2 ('bob') of population 'default': 624 parameters for 10 weights of Small>"
    assert repr(adapters) == (
        "<tnadapt population 'default': 4 members of 624 parameters (LoRA r = 2) for 10 weights of Small, "
        "attached, weight 1>"
    )
    for duplicate in (copy.deepcopy(member), pickle.loads(pickle.dumps(member))):
        duplicate.activate()
        member.activate()
        assert duplicate.model is not model
        assert torch.equal(run(duplicate.model), run(model))
        duplicate.reset()
        assert not torch.equal(run(duplicate.model), run(model))


def test_counts_are_those_of_all_members(capsys: pytest.CaptureFixture[str]) -> None:
    model, adapters = population(keep_trainable="head")
    adapters.set_trainable(arrays="factor0")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    every = sum(parameter.numel() for parameter in model.parameters())
    adapters.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trained:,} || all params: {every:,} ||")


# -- Where members start -------------------------------------------------------------------------


@pytest.mark.law("member-starts")
@configs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_members_start_as_the_adapter_alone(config: str, dtype: Any) -> None:
    model = small().to(dtype)
    adapters = tt.attach(model, CONFIGS[config], population=3, dtype=dtype)
    alone = numbers(tt.attach(small().to(dtype), CONFIGS[config], dtype=dtype))
    for name, parameter in adapters.named_parameters():
        assert torch.equal(parameter, alone[name].expand(parameter.shape))
    x = batch(size=4).to(dtype)
    with torch.no_grad(), adapters.members([0, None, 2, 1]):
        # Where the rows of each member are computed alone, torch rounds sums differently.
        torch.testing.assert_close(model(x), small().to(dtype)(x), rtol=0, atol=10 * torch.finfo(dtype).eps)


@pytest.mark.law("member-starts")
@pytest.mark.parametrize("config", ["lora", "superlora", "theta", "dora"])
@pytest.mark.parametrize("meta", [False, True])
def test_each_member_starts_from_a_seed_of_its_own(config: str, meta: bool) -> None:
    """Also where the arrays get their values later, and after ``reset``."""
    with torch.device("meta" if meta else "cpu"):
        model = small()
    adapters = tt.attach(model, CONFIGS[config], population=3, seeds="each")
    if meta:
        model.to_empty(device="cpu")
        model.load_state_dict(small().state_dict(), strict=False)
        adapters.reset()

    def check() -> None:
        for number in range(3):
            alone = tt.attach(small(), CONFIGS[config].replace(seed=number))
            expected = numbers(alone)
            assert equal(numbers(adapters[number]), expected)

    check()
    stirred(adapters)
    adapters.reset()
    check()
    stirred(adapters[1])
    adapters[1].reset()
    check()


@pytest.mark.law("member-starts")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_seeds_of_members_in_other_precisions(dtype: torch.dtype) -> None:
    adapters = tt.attach(small(), CONFIGS["lora"], population=3, seeds="each", dtype=dtype)
    for number in range(3):
        assert equal(
            numbers(adapters[number]), numbers(tt.attach(small(), P.lora(2, alpha=3, seed=number), dtype=dtype))
        )


def test_a_start_that_is_subtracted_is_one_for_all() -> None:
    with pytest.raises(tna.ConfigError, match=r"so all members share them: use seeds='one'"):
        tt.attach(small(), CONFIGS["behind F"], population=3, seeds="each")


@pytest.mark.law("member-starts")
@pytest.mark.parametrize("seeds", ["one", "each"])
@pytest.mark.parametrize("arrays", ["factor0", "factor1"])
def test_the_arrays_that_are_trained(seeds: str, arrays: str) -> None:
    """Chosen at the start, and after training; of all members."""
    model = small()
    adapters = tt.attach(model, CONFIGS["lora"], population=2, seeds=seeds)
    adapters.set_trainable(arrays=arrays)
    for number in range(2):
        alone = tt.attach(small(), CONFIGS["lora"].replace(seed=number if seeds == "each" else 0))
        alone.set_trainable(arrays=arrays)
        assert equal(numbers(adapters[number]), numbers(alone))
        assert adapters.trained == adapters[number].trained == alone.trained
    with adapters.members([0, 1, None]):
        model(batch()).square().sum().backward()
    assert all(parameter.grad.flatten(1).any(1).all() for parameter in adapters.parameters())
    stirred(adapters)
    before = numbers(adapters)
    adapters.set_trainable()
    assert equal(numbers(adapters), before)
    text = "^all members of population 'default' train the same arrays: call set_trainable"
    with pytest.raises(tna.ConfigError, match=text):
        adapters[0].set_trainable(arrays=arrays)


@pytest.mark.law("member-starts")
def test_seeds_of_several_configs_and_beyond_the_largest() -> None:
    parts = {"q": P.lora(2, seed=3), "v": P.lora(2, seed=2**64 - 1)}
    adapters = tt.attach(small(), parts, population=3, seeds="each")
    for number in range(3):
        alone = {key: part.replace(seed=(part.seed + number) % 2**64) for key, part in parts.items()}
        assert equal(numbers(adapters[number]), numbers(tt.attach(small(), alone)))


@pytest.mark.law("member-starts")
def test_a_given_start_is_one_for_all() -> None:
    model = small()
    adapters = tt.attach(model, P.lora(2, start="given"), population=3)
    alone = tt.attach(small(), P.lora(2, start="given"))
    given = {"group0.split0.factor0": torch.ones(WIDTH, 2)}
    with pytest.raises(tna.ConfigError, match=r"start from the same given arrays: call start_from\(\) of the pop"):
        adapters[1].start_from(given)
    for strategy in ("weight", "factored"):
        other = tt.attach(small(), P.lora(2, start="given"), ["head"], population=3, strategy=strategy)
        single_one = tt.attach(small(), P.lora(2, start="given"), ["head"], strategy=strategy)
        other[1].activate()
        assert torch.equal(run(other.model), run(small()))
        for handle in (other, single_one):
            handle.start_from({"group0.split0.factor0": torch.ones(3, 2)})
        assert other[1].plan is other.plan
        stirred(other)
        single_one.load_arrays(other[1].arrays())
        assert torch.equal(run(other.model), run(single_one.model))
    for handle in (adapters, alone):
        handle.start_from(given)
    for number in range(3):
        assert equal(numbers(adapters[number]), numbers(alone))
    stirred(adapters)
    adapters[1].activate()
    changed = run(model)
    alone.load_arrays(adapters[1].arrays())
    assert torch.equal(changed, run(alone.model))
    with pytest.raises(tna.ConfigError, match="has been trained or loaded, and another start would change its ΔW"):
        adapters.start_from(given)
    adapters.reset()
    assert torch.equal(run(model), run(small()))


@pytest.mark.parametrize("strategy", ["weight", "auto"])
def test_views_from_before_another_start_have_it(strategy: str) -> None:
    adapters = tt.attach(small(), P.lora(2, start="given"), population=3, strategy=strategy)
    alone = tt.attach(small(), P.lora(2, start="given"), strategy=strategy)
    member = adapters[1]
    member.activate()
    run(adapters.model)
    for handle in (adapters, alone):
        handle.start_from({"group0.split0.factor0": torch.ones(WIDTH, 2)})
    stirred(adapters)
    alone.load_arrays(member.arrays())
    assert torch.equal(run(adapters.model), run(alone.model))
    assert member.plan is adapters.plan


@configs
def test_arrays_of_all_members_are_copied_and_loaded(config: str) -> None:
    _, adapters = population(config)
    _, others = population(config)
    adapters.reset()
    adapters.load_arrays({name: array.detach().clone() for name, array in others.arrays().items()})
    assert equal(numbers(adapters), numbers(others))
    text = "needs arrays named and shaped as its plan says, with an axis of its 4 members in front; differing"
    with pytest.raises(tna.ShapeError, match=text):
        adapters.load_arrays(adapters[0].arrays())
    assert equal(numbers(adapters), numbers(others))


# -- What is refused -----------------------------------------------------------------------------


LIST = r"members\(\) needs a list with a member's number or name, or None, for each row of the batch; got "
ENTRY = r"a member of population 'default' is a number from 0 to 3, or a name; got "
ARRAY = r"members\(\) needs one integer for each row; got "
BAD: list[tuple[Any, type[Exception], str]] = [
    ([4, 0], tna.TargetError, "^population 'default' has members 0 to 3; got 4$"),
    ([0, -1], tna.TargetError, "has members 0 to 3; got -1; negative numbers do not count from the end$"),
    ([2**70], tna.TargetError, "has members 0 to 3; got 1180591620717411303424$"),
    ([0, 1.0], tna.ConfigError, ENTRY + "1.0$"),
    ([True, 0], tna.ConfigError, ENTRY + "True$"),
    ([[0, 1], [2, 3]], tna.ConfigError, ENTRY + r"\[0, 1\]$"),
    ([torch.tensor(1.0)], tna.ConfigError, ENTRY + r"tensor\(1\.\)$"),
    ([torch.tensor(True)], tna.ConfigError, ENTRY + r"tensor\(True\)$"),
    (["eve"], tna.TargetError, "population 'default' has no member 'eve'; its members have the names 'ann'"),
    ("ann", tna.ConfigError, LIST + "'ann'$"),
    ([], tna.ConfigError, LIST + r"\[\]$"),
    (2, tna.ConfigError, LIST + "2$"),
    (None, tna.ConfigError, LIST + "None$"),
    ({0, 1}, tna.ConfigError, LIST + r"\{0, 1\}$"),
    ({0: 1}, tna.ConfigError, LIST + r"\{0: 1\}$"),
    (iter([0]), tna.ConfigError, LIST + "<list_iterator"),
    (torch.tensor(2), tna.ConfigError, ARRAY + r"Tensor of shape \(\) and dtype int64$"),
    (torch.tensor([[0, 1]]), tna.ConfigError, ARRAY + r"Tensor of shape \(1, 2\) and dtype int64$"),
    (torch.tensor([0.0]), tna.ConfigError, ARRAY + r"Tensor of shape \(1,\) and dtype float32$"),
    (torch.tensor([True]), tna.ConfigError, ARRAY + r"Tensor of shape \(1,\) and dtype bool$"),
    (torch.tensor([4]), tna.TargetError, "has members 0 to 3; got 4$"),
    (torch.tensor([], dtype=torch.int64), tna.ConfigError, LIST + r"\[\]$"),
    (np.array([[0]]), tna.ConfigError, ARRAY + r"ndarray of shape \(1, 1\) and dtype int64$"),
    (np.array([0.5]), tna.ConfigError, ARRAY + r"ndarray of shape \(1,\) and dtype float64$"),
    (np.array(["ann"]), tna.ConfigError, ARRAY + r"ndarray of shape \(1,\) and dtype <U3$"),
]


@pytest.mark.law("members-refused")
@pytest.mark.parametrize(("index", "error", "text"), BAD, ids=range(len(BAD)))
def test_what_names_no_members(index: Any, error: type[Exception], text: str) -> None:
    model, adapters = population(names=NAMES)
    with pytest.raises(error, match=text), adapters.members(index):
        pass
    # Nothing of it is left.
    with torch.no_grad(), adapters.members([0, 1, 2, 3]):
        model(batch(size=4))


@pytest.mark.parametrize(
    "index",
    [
        [2, 0, 3, 2], (2, 0, 3, 2), ["cleo", "ann", 3, "cleo"], np.array([2, 0, 3, 2], dtype=np.uint8),
        torch.tensor([2, 0, 3, 2], dtype=torch.int32), [np.int64(2), torch.tensor(0), 3, 2],
    ],
    ids=repr,
)  # fmt: skip
def test_ways_to_name_members(index: Any) -> None:
    model, adapters = population(names=NAMES)
    outputs = []
    for names in (index, [2, 0, 3, 2]):
        with torch.no_grad(), adapters.members(names):
            outputs.append(model(batch(size=4)))
    with torch.no_grad(), tt.rows(model, ["cleo", "ann", "dan", "cleo"]):
        outputs.append(model(batch(size=4)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.law("members-refused")
@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((5, 3, WIDTH), r"members\(\) has 4 members, and 0 got an input of shape \(5, 3, 16\): its first dimension"),
        ((8, 4, WIDTH), r"first or second dimension could be the batch: .* give a member for each of its 8 rows"),
        ((WIDTH,), r"members\(\) needs layers whose input has rows, and 0 got an input of shape \(16,\)"),
    ],
)
def test_rows_that_do_not_fit(shape: tuple[int, ...], text: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 4))
    adapters = tt.attach(model, "lora", "all-linear", rank=2, population=3)
    for index in ([0, None, 1, 1], [2] * 4):
        with pytest.raises(tna.TargetError, match=text), adapters.members(index):
            model(torch.randn(shape))
    with adapters.members([2]):  # one member is for all rows, whatever their number
        assert model(torch.randn(8, 4, WIDTH)).shape == (8, 4, 4)


@pytest.mark.law("members-refused")
@pytest.mark.parametrize(
    ("member", "error", "text"),
    [
        (4, tna.TargetError, "^population 'default' has members 0 to 3; got 4$"),
        (-1, tna.TargetError, "got -1; negative numbers do not count from the end$"),
        (1.0, tna.ConfigError, ENTRY + "1.0$"),
        (True, tna.ConfigError, ENTRY + "True$"),
        (None, tna.ConfigError, ENTRY + "None$"),
        (slice(0, 2), tna.ConfigError, ENTRY + "slice"),
        ("ann", tna.TargetError, "has no member 'ann'; its members have no names$"),
    ],
)
def test_what_is_no_member(member: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        population()[1][member]


@pytest.mark.law("members-refused")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"population": 0}, r"^population must be at least 1; got 0$"),
        ({"population": -1}, r"^population must be at least 1; got -1$"),
        ({"population": 2.5}, "^population must be an integer; got 2.5$"),
        ({"population": True}, "^population must be an integer; got True$"),
        ({"names": ["a"]}, "^names, seeds and sparse are those of a population's members: give population=, too$"),
        ({"seeds": "each"}, "^names, seeds and sparse are those of a population's members: give population=, too$"),
        ({"population": 2, "names": ["a"]}, "^names must have a name, or None, for each of the 2 members; got 1$"),
        ({"population": 2, "names": "ab"}, "^names must have a name, or None, for each of the 2 members; got 'ab'$"),
        ({"population": 2, "names": ["a", "a"]}, "^names has 'a' twice; members must have different names$"),
        ({"population": 2, "names": ["a", ""]}, r"^names\[1\] must be printable text of 1 to 256 bytes .*; got ''$"),
        ({"population": 2, "names": ["a", 3]}, r"^names\[1\] must be printable text of 1 to 256 bytes .*; got 3$"),
        ({"population": 2, "names": ["a", "\n"]}, r"^names\[1\] must be printable text of 1 to 256 bytes"),
        ({"population": 2, "seeds": "all"}, "^seeds must be one of one, each; got 'all'$"),
        ({"population": 2, "seeds": None}, "^seeds must be one of one, each; got None$"),
        ({"population": 2, "seeds": 3}, "^seeds must be one of one, each; got 3$"),
    ],
)
def test_populations_that_cannot_be(options: dict[str, Any], text: str) -> None:
    model = small()
    with pytest.raises(tna.ConfigError, match=text):
        tt.attach(model, "lora", rank=2, **options)
    assert same(model.state_dict(), small().state_dict())
    if "names" in options and "population" in options:
        adapters = tt.attach(model, "lora", rank=2, population=2, names=["x", "y"])
        with pytest.raises(tna.ConfigError, match=text):
            adapters.names = options["names"]
        assert adapters.names == ["x", "y"]


@pytest.mark.law("members-refused")
@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("merge()", lambda adapters: adapters.merge()),
        ("merge()", lambda adapters: adapters.merge(max_error=0.1)),
        ("unmerge()", lambda adapters: adapters.unmerge()),
        ("bake()", lambda adapters: adapters.bake()),
        ("deltas()", lambda adapters: adapters.deltas()),
        ("swap(path)", lambda adapters: adapters.swap("adapter.safetensors")),
    ],
)
def test_what_needs_a_member(what: str, call: Callable[[Any], None]) -> None:
    _, adapters = population()
    text = f"adapter 'default' is a population of 4 members, and {what} is of a single adapter: name a member, as in "
    with pytest.raises(tna.ConfigError) as refused:
        call(adapters)
    assert str(refused.value) == f"{text}adapter[0].{what}"


@pytest.mark.law("members-refused")
@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda member: member.set_weight(0.5), r"have one mixing weight: call set_weight\(\) of the population$"),
        (lambda member: member.start_from({}), r"start from the same given arrays: call start_from\(\) of the popula"),
        (lambda member: member.set_trainable(0), r"train the same arrays: call set_trainable\(\) of the population$"),
        (
            lambda member: member.parameters(),
            r"optimizer can train: use .*MemberAdamW\(population, population.parameters",
        ),
        (lambda member: member.parameter_groups(1e-3), r"MemberAdamW\(population, population.parameter_groups\(…\)\)"),
        (
            lambda member: member.adam_groups(1e-3),
            r"population.adam_groups\(…\)\), which steps the members",
        ),
    ],
)
def test_what_needs_the_population(call: Callable[[Any], None], text: str) -> None:
    _, adapters = population()
    before = numbers(adapters)
    with pytest.raises(tna.ConfigError, match=f"population 'default',? .*{text}"):
        call(adapters[1])
    assert adapters.weight == 1.0
    assert equal(numbers(adapters), before)


@pytest.mark.law("members-refused")
def test_a_pass_without_members() -> None:
    model, adapters = population()
    text = (
        r"^adapter 'default' is a population of 4 members, and nothing says which of them acts here: run the model "
        r"inside `with adapter\.members\(\[…\]\)`, with a member for each row, or call adapter\[0\]\.activate\("
    )
    for refused in (lambda: None, adapters.activate):
        refused()
        with pytest.raises(tna.TargetError, match=text):
            model(batch())
    with adapters.disabled():
        assert torch.equal(run(model), run(small()))
    with pytest.raises(tna.ConfigError, match=r"member 1 is a part of population 'default': detach\(\) the population"):
        adapters[1].detach()
    adapters.detach()
    assert same(model.state_dict(), small().state_dict())
    for refused in (lambda: adapters[0], lambda: adapters.members([0]).__enter__()):
        with pytest.raises(tna.TargetError, match="'default' is no longer attached to its model"):
            refused()


@pytest.mark.law("members-refused")
def test_members_and_adapters_in_one_batch() -> None:
    model, adapters = population(names=NAMES)
    tt.attach(model, "lora", name="other", rank=2)
    second = tt.attach(model, "lora", name="second", rank=2, population=2)
    inside = r"cannot be used inside rows\(\), or inside members\(\) of another population of this model: a row has one"
    for outer in (lambda: tt.rows(model, ["other", None]), lambda: second.members([0, 1])):
        with outer(), pytest.raises(tna.TargetError, match=rf"^members\(\) of population 'default' {inside}"):
            adapters.members([0, 1]).__enter__()
    with pytest.raises(tna.TargetError, match="adapter 'default' is a population, and an entry of rows"):
        tt.rows(model, ["default", None]).__enter__()
    with pytest.raises(tna.TargetError, match=r"rows\(\) names members of population 'default' and 'other', which is"):
        tt.rows(model, ["ann", "other"]).__enter__()
    with pytest.raises(tna.TargetError, match=r"no adapter 'default\[1\]' on this model"):
        tt.mix(model, {"default[1]": 1.0})
    with pytest.raises(tna.TargetError, match=r"'second'; population 'default' has a member 'ann', which its activate"):
        tt.mix(model, {"ann": 1.0})
    for names, meanings in (
        (["bob", "ann"], "'ann', which is a member of population 'default' and a member of population 'second'"),
        (["other"], "'other', which is a member of population 'second' and an adapter"),
        ([None, "__base__"], "'__base__', which is a member of population 'second' and the base, as in PEFT"),
    ):
        second.names = [name if name != "bob" else None for name in (names[-1], None)]
        with pytest.raises(tna.TargetError, match=rf"rows\(\) names {meanings}: rename one of them, or use `with ada"):
            tt.rows(model, names).__enter__()
    second.names = ["ann", "zoe"]
    with pytest.raises(tna.TargetError, match="names members of population 'default' and 'zoe', which is none of them"):
        tt.rows(model, ["bob", "zoe"]).__enter__()
    second.names = None
    with adapters.disabled():
        with pytest.raises(tna.TargetError, match=r"adapter 'default' is disabled, and members\(\) names it"):
            adapters.members([0]).__enter__()
        with pytest.raises(tna.TargetError, match=r"adapter 'default' is disabled, and rows\(\) names it"):
            tt.rows(model, ["ann"]).__enter__()
    with (
        tt.rows(model, ["ann", "bob"]),
        pytest.raises(tna.TargetError, match=r"^rows\(\) has 2 names, and .* got an in"),
    ):
        model(batch(size=3))
    # Rows of a single adapter have none of the population.
    second.detach()
    with torch.no_grad(), adapters.members([0, 1]), tt.rows(model, ["other", None]):
        y = model(batch(size=2))
    adapters.detach()
    with torch.no_grad(), tt.rows(model, ["other", None]):
        assert torch.equal(y, model(batch(size=2)))


@pytest.mark.law("members-refused")
def test_names_of_members_in_rows_leave_other_adapters_out() -> None:
    """As names of adapters do, whereas members() leaves them as they are."""
    model, adapters = population(names=NAMES)
    other, second = (
        stirred(tt.attach(model, "lora", name="other", rank=2)),
        tt.attach(model, "lora", population=2, rank=2, name="second"),
    )
    names, x = ["bob", None, "__base__", "bob"], batch(size=4)
    with torch.no_grad():
        with tt.rows(model, names):
            y = model(x)
        second[0].activate()
        other.activate()
        adapters[0].activate()
        other.set_weight(1.0)
        with tt.rows(model, names):
            assert torch.equal(model(x), y)
        with adapters.members([*names[:2], None, "bob"]):
            assert not torch.allclose(model(x), y)
        torch.testing.assert_close(y[1:3], run(small())[1:3])
    other.merge()
    with pytest.raises(tna.TargetError, match=r"adapter 'other' is merged into the base, and so into every row"):
        tt.rows(model, names).__enter__()


@pytest.mark.parametrize(
    ("make", "targets", "text"),
    [
        (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), "qv", "has batch_first=False"),
        (
            lambda: nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])}),
            "all-linear",
            r"experts\.0\.weight belongs to experts, which see selected tokens",
        ),
    ],
)
def test_models_whose_rows_cannot_be_told_apart(make: Callable[[], Any], targets: str, text: str) -> None:
    adapters = tt.attach(make(), "lora", targets, rank=2, population=2)
    with pytest.raises(tna.TargetError, match=text), adapters.members([0, 1]):
        pass
