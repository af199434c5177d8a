"""Quantized layers of a type registered by another package: found, adapted, saved, loaded, never written to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.torch._quantized import QUANTIZED


class PackedLinear(torch.nn.Module):
    """A layer of 4-bit codes, two per byte, and a scale; no attribute is named weight or in_features."""

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        self.size = rows, cols
        self.register_buffer("codes", torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor(0.05))

    def numbers(self) -> Any:
        pairs = torch.stack([self.codes & 15, self.codes >> 4], -1)
        return (pairs.reshape(self.size).float() - 7.5) * self.scale

    def forward(self, x: Any) -> Any:
        return x @ self.numbers().T


class Packed(tt.QuantizedLayer):
    def matches(self, module: Any) -> bool:
        return isinstance(module, PackedLinear)

    def shape(self, module: Any) -> tuple[int, int]:
        return module.size  # type: ignore[no-any-return]

    def dequantize(self, module: Any) -> Any:
        return module.numbers()


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    QUANTIZED.forget()
    yield
    QUANTIZED.forget()


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(PackedLinear(12, 8), torch.nn.Tanh(), PackedLinear(4, 12))


def test_without_registration_it_is_no_layer() -> None:
    with pytest.raises(tna.TargetError, match="all-linear"):
        tt.attach(model(), tna.presets.lora(2), targets="all-linear")


@pytest.mark.parametrize(
    "config", [tna.presets.lora(2), tna.presets.superlora(2), tna.presets.lokr(2)], ids=["lora", "superlora", "lokr"]
)
def test_attach_train_save_load(config: tna.Config, tmp_path: Path) -> None:
    tt.register_quantized("packed", Packed)
    base, x = model(), torch.randn(5, 8)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = base(x)
    adapter = tt.attach(base, config, targets="all-linear")
    assert [target.shape for target in adapter.targets] == [(12, 8), (4, 12)]
    assert torch.equal(base(x), expected)
    optimizer = torch.optim.Adam(adapter.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (base(x) - 1.0).square().mean().backward()
        optimizer.step()
    # What the layers compute is x (W + ΔW)ᵀ of the numbers that their codes stand for.
    first, second = adapter.deltas()
    summed = torch.tanh(x @ (base[0].numbers() + first).T) @ (base[2].numbers() + second).T
    torch.testing.assert_close(base(x), summed, rtol=1e-4, atol=1e-5)
    adapter.save(tmp_path / "a.safetensors")
    again = model()
    tt.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again(x), base(x))
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items() if name in state)


def test_another_base_is_refused_by_its_numbers(tmp_path: Path) -> None:
    tt.register_quantized("packed", Packed)
    adapter = tt.attach(model(), tna.presets.lora(2), targets="all-linear")
    adapter.save(tmp_path / "a.safetensors")
    with pytest.raises(tna.FileError, match="base"):
        tt.load(model(seed=1), tmp_path / "a.safetensors")


def test_it_is_never_written_to() -> None:
    tt.register_quantized("packed", Packed)
    adapter = tt.attach(model(), tna.presets.lora(2), targets="all-linear")
    with pytest.raises(
        tna.TargetError,
        match=r"0\.weight is quantized: PackedLinear cannot be merged into, because Packed does not define requantize",
    ):
        adapter.merge()


def test_what_is_missing_is_named() -> None:
    class Silent(tt.QuantizedLayer):
        pass

    class Shapeless(tt.QuantizedLayer):
        def matches(self, module: Any) -> bool:
            return isinstance(module, PackedLinear)

    tt.register_quantized("silent", Silent)
    with pytest.raises(tna.TargetError, match=r"Silent does not define matches\(module\)"):
        tt.attach(model(), tna.presets.lora(2), targets="all-linear")
    QUANTIZED.forget()
    tt.register_quantized("shapeless", Shapeless)
    with pytest.raises(tna.TargetError, match=r"PackedLinear has no in_features.*define Shapeless\.shape\(module\)"):
        tt.attach(model(), tna.presets.lora(2), targets="all-linear")
    with pytest.raises(tna.ConfigError, match=r"inherits from tnadapt\.torch\.QuantizedLayer; got"):
        tt.register_quantized("dict", dict)


def test_an_embedding_of_another_package_is_looked_up() -> None:
    class PackedEmbedding(PackedLinear):
        def forward(self, ids: Any) -> Any:
            return self.numbers()[ids]

    class PackedTable(Packed):
        def matches(self, module: Any) -> bool:
            return isinstance(module, PackedEmbedding)

        def looks_up(self, module: Any) -> bool:
            return True

    tt.register_quantized("packed-table", PackedTable)  # asked first, because it is registered first
    tt.register_quantized("packed", Packed)
    made = torch.nn.Sequential(PackedEmbedding(12, 8), PackedLinear(4, 8))
    assert [target.module for target in tt.find_targets(made, "embeddings")] == ["0"]
    assert [target.module for target in tt.find_targets(made, "all-linear")] == ["1"]
    adapter = tt.attach(made[:1], tna.presets.lora(2), "embeddings")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += torch.randn(parameter.shape)
    ids = torch.tensor([[0, 11, 3]])
    torch.testing.assert_close(made[0](ids), (made[0].numbers() + adapter.deltas()[0])[ids])
    with pytest.raises(tna.TargetError, match="PackedTable does not define requantize"):
        adapter.merge()
