"""What holds for every adapter on every model, fresh to detached; and the plain formula of its layers."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt

from .small import stir

# torch asks every input of a compiled program for its .grad, and hides the warning from its users.
asks_for_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def bits(model: nn.Module) -> dict[str, bytes]:
    """Return the bytes of the base's parameters and buffers by name."""
    return {name: _bytes(tensor) for name, tensor in model.state_dict().items() if "tnadapt_" not in name}


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def check_life(make: Callable[[], nn.Module], attach: Callable[..., tt.Adapter], x: Tensor, folder: Path) -> None:
    """Check an adapter that is attached, trained, saved, loaded, copied, merged, unmerged, reset and detached."""
    untouched, model = make(), make()
    base, before, free = run(untouched, x), bits(untouched), [untouched(x), untouched.requires_grad_(False)(x)]
    adapter = attach(model)
    assert torch.equal(run(model, x), base)
    for target in adapter.targets:  # where the sum is what requires a gradient, so must the base's weight
        untouched.get_parameter(target.name).requires_grad_()
    free.append(untouched(x))
    assert any(torch.equal(model(x), output) for output in free)
    assert [tuple(delta.shape) for delta in adapter.deltas()] == [target.shape for target in adapter.targets]
    assert {name: tuple(p.shape) for name, p in adapter.named_parameters()} == adapter.plan.param_shapes
    assert adapter.num_parameters == adapter.plan.num_parameters == sum(p.numel() for p in adapter.parameters())

    _train(model, adapter, x)
    assert bits(model) == before
    moved = run(model, x)
    assert not torch.allclose(moved, base, rtol=1e-4, atol=1e-5)

    path = folder / "adapter.safetensors"
    adapter.save(path)
    file = tna.load(path)
    assert file.config == adapter.config
    assert file.arrays.keys() == adapter.plan.param_shapes.keys()
    assert file.given.keys() >= adapter.plan.given_shapes.keys()
    other = make()
    loaded = tt.load(other, path)
    same_strategy = loaded.strategy == adapter.strategy
    torch.testing.assert_close(run(other, x), moved, **({"rtol": 0.0, "atol": 0.0} if same_strategy else CLOSE))
    assert loaded.num_parameters == adapter.num_parameters
    loaded.save(folder / "again.safetensors")
    assert (folder / "again.safetensors").read_bytes() == path.read_bytes()
    loaded.reset()
    assert torch.equal(run(other, x), base)

    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), _through_a_file(model)):
        assert torch.equal(run(duplicate, x), moved)
        (twin,) = tt.adapters(duplicate).values()
        assert twin is not adapter
        assert twin.model is duplicate
        stir(twin, size=0.3, seed=9)
        assert not torch.equal(run(duplicate, x), moved)
        twin.merge()
        twin.unmerge()
        twin.detach()
        assert torch.equal(run(duplicate, x), base)
    assert torch.equal(run(model, x), moved)

    check_merged(make, model, adapter, folder)
    torch.testing.assert_close(run(model, x), moved, **CLOSE)
    with adapter.disabled():
        assert torch.equal(run(model, x), base)
    assert adapter.merged
    adapter.unmerge()
    assert bits(model) == before
    with contextlib.suppress(ZeroDivisionError), adapter.disabled():
        assert torch.equal(run(model, x), base)
        raise ZeroDivisionError
    assert torch.equal(run(model, x), moved)
    adapter.reset()
    assert torch.equal(run(model, x), base)
    adapter.detach()
    assert bits(model) == before
    assert torch.equal(run(model, x), base)
    assert list(model.state_dict()) == list(untouched.state_dict())


def _train(model: nn.Module, adapter: tt.Adapter, x: Tensor) -> None:
    """Take three steps: what begins at zero moves at the first, all arrays in the end."""
    started = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = (model(x).float() - 1.0).square().mean()
        loss.backward()
        if step == 0:
            moving = {name for name, p in adapter.named_parameters() if p.grad is not None and p.grad.any()}
            assert moving
            # Parameters θ count from their start, so that all are zero, and some wait.
            waiting = {name for name in started if name.endswith("theta")}
            assert moving | waiting >= {name for name, start in started.items() if not start.any()}
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(torch.equal(p, started[name]) for name, p in adapter.named_parameters())


def _through_a_file(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def check_merged(make: Callable[[], nn.Module], model: nn.Module, adapter: tt.Adapter, folder: Path) -> None:
    """Merge the adapter into its model, and its file into a checkpoint of the base: the same bytes."""
    save_file({name: tensor.clone() for name, tensor in make().state_dict().items()}, folder / "model.safetensors")
    adapter.save(folder / "merged_adapter.safetensors")
    tna.merge(folder / "model.safetensors", folder / "merged_adapter.safetensors", folder / "out.safetensors")
    adapter.merge()
    merged = load_file(folder / "out.safetensors")
    assert bits(model) == {name: _bytes(tensor) for name, tensor in merged.items()}
    assert bits(model) != bits(make())


def check_from_meta(
    make: Callable[[], nn.Module], attach: Callable[[nn.Module], tt.Adapter], x: Tensor, folder: Path
) -> None:
    """Attach on the meta device, where nothing is allocated or computed, and reset once the model has its weights."""
    with torch.device("meta"):
        model = make()
    adapter = attach(model)
    assert adapter.plan.given == {}
    assert {p.device.type for p in adapter.parameters()} == {"meta"}
    assert adapter.num_parameters == sum(p.numel() for p in adapter.parameters())
    with pytest.raises(tna.TargetError, match="meta device"):
        adapter.merge()
    model.to_empty(device="cpu")
    untouched = make()
    model.load_state_dict(untouched.state_dict(), strict=False)
    if adapter.plan.given_shapes:
        with pytest.raises(tna.ConfigError, match=r"call adapter.reset\(\) once it has its weights"):
            model(x)
        with pytest.raises(tna.TargetError, match=r"call reset\(\) once the model has its weights"):
            adapter.save(folder / "adapter.safetensors")
    adapter.reset()
    assert torch.equal(run(model, x), run(untouched, x))
    expected = attach(untouched)
    for name, array in adapter.arrays().items():
        assert torch.equal(array, expected.arrays()[name])
    for name, array in adapter.plan.given.items():
        np.testing.assert_array_equal(array, expected.plan.given[name])


def passes(model: Callable[[Tensor], Tensor], adapter: tt.Adapter, *batches: Tensor) -> dict[str, Tensor]:
    """Return the outputs of passes forward and backward, and the sum of their gradients for every array."""
    for parameter in adapter.parameters():
        parameter.grad = None
    outputs = []
    for x in batches:
        outputs.append(model(x))
        _loss(outputs[-1]).backward()
    gradients = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    return {"output": torch.cat(outputs).detach(), **gradients}


def _loss(output: Tensor) -> Tensor:
    return output.to(torch.promote_types(output.dtype, torch.float32)).square().sum()


def by_formula(adapter: tt.Adapter, base: nn.Module, x: Tensor, detach_norm: bool = False) -> dict[str, Tensor]:
    """Return what ``passes`` does, of the base with W' in the place of each W, without the adapter's layers.

    In double precision if that is the base's.
    """
    weights = {name: p.detach() for name, p in base.named_parameters()}
    dtype = torch.float64 if all(weight.dtype == torch.float64 for weight in weights.values()) else None
    arrays = {name: p.detach().clone().to(dtype).requires_grad_() for name, p in adapter.named_parameters()}
    blocks = [target.select(weights[target.name]) for target in adapter.targets]
    changed = adapter.plan.training_plan.merged(arrays, blocks, detach_norm=detach_norm)
    for target, block, new in zip(adapter.targets, blocks, changed, strict=True):
        mixed = new if adapter.weight == 1.0 else block + adapter.weight * (new - block)
        weights[target.name] = replaced(weights[target.name], target, mixed)
    output = torch.func.functional_call(base, weights, (x,))
    output = output if isinstance(output, Tensor) else output.logits
    _loss(output).backward()
    return {"output": output.detach(), **{name: array.grad for name, array in arrays.items()}}


def replaced(stored: Tensor, target: tna.Target, numbers: Tensor) -> Tensor:
    """Return a parameter with other numbers in a target's rows, differentiable by them."""
    places = target.select(torch.arange(stored.numel()).view(stored.shape)).reshape(-1)
    return stored.reshape(-1).index_copy(0, places, numbers.reshape(-1)).view(stored.shape)


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    """Compare the outputs and gradients of ``passes``, each by its largest number."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= relative * tensor.abs().max(), name


def check_compiled(model: nn.Module, adapter: tt.Adapter, x: Tensor) -> None:
    """Compile the model whole, and compare outputs and gradients."""
    expected = passes(model, adapter, x)
    torch._dynamo.reset()
    program = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(passes(program, adapter, x), expected, 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(program(x), expected["output"], rtol=1e-4, atol=1e-5)
        adapter.set_weight(0.0)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
        adapter.set_weight(1.0)
