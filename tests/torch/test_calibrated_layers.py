"""Layers of GPTQ and AWQ, by the formats' definitions: read, adapted, saved, and never merged into."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .quantized_models import numbers

#: Of some widths, the integers of a column fill their words, and of others they do not.
ROWS, COLS, GROUP = 56, 96, 32


def words(codes: Any, bits: int) -> Any:
    """Pack integers along the first axis as one string of bits, cut into words of 32, in Python's integers."""
    packed = []
    for column in codes.T.tolist():
        total = sum(code << (bits * place) for place, code in enumerate(column))
        count = -(-len(column) * bits // 32)
        found = [(total >> (32 * place)) & 0xFFFFFFFF for place in range(count)]
        packed.append([word - (1 << 32) if word >> 31 else word for word in found])
    return torch.tensor(packed, dtype=torch.int32).T.contiguous()


def planes(codes: Any, bits: int) -> Any:
    """Pack integers along the first axis in blocks of 32, each as the bits of 1, 2, 4 or 8 places at a time."""
    widths = [width for width in (8, 4, 2, 1) if bits & width]
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % 32))
    found = []
    for block in codes.split(32):
        low = 0
        for width in widths:
            found.append(words(block >> low & (1 << width) - 1, width))
            low += width
    return torch.cat(found)


class Layer(torch.nn.Module):
    """The interface, and a forward by the numbers that the test knows."""

    def __init__(self, weight: Any, tensors: dict[str, Any], **attributes: Any) -> None:
        super().__init__()
        self.known = weight
        self.in_features, self.out_features = COLS, ROWS
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Any) -> Any:
        return x @ self.known.T


def drawn(bits: int, ordered: bool = True) -> tuple[Any, Any, Any, Any, Any]:
    """Return codes (cols, rows), zeros and scales (groups, rows), the group of each column, and the weight."""
    torch.manual_seed(bits)
    groups = COLS // GROUP
    codes, zeros = torch.randint(0, 1 << bits, (COLS, ROWS)), torch.randint(1, 1 << bits, (groups, ROWS))
    scales, group = torch.rand(groups, ROWS) * 0.02 + 0.001, torch.arange(COLS) // GROUP
    if not ordered:  # act-order: which group a feature is in is arbitrary
        group = group[torch.randperm(COLS)]
    return codes, zeros, scales, group, ((codes - zeros[group]) * scales[group]).T


def gptq(bits: int, ordered: bool = True, second: bool = False, pack: Any = words, **attributes: Any) -> Any:
    codes, zeros, scales, group, weight = drawn(bits, ordered)
    tensors = {
        "qweight": pack(codes, bits),
        "qzeros": pack((zeros if second else zeros - 1).T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": group.to(torch.int32),
    }
    return Layer(weight, tensors, bits=bits, **attributes)


def awq(bits: int = 4) -> Any:
    codes, zeros, scales, _, weight = drawn(bits)

    def packed(integers: Any) -> Any:
        # The word's places hold these of its eight output features, where there are eight.
        order = [8 * word + feature for word in range(ROWS // 8) for feature in (0, 2, 4, 6, 1, 3, 5, 7)]
        return words((integers[:, order] if bits == 4 else integers).T, bits).T.contiguous()

    return Layer(
        weight, {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}, w_bit=bits, group_size=GROUP
    )


LAYERS = {
    **{f"gptq {bits} bits": functools.partial(gptq, bits) for bits in (2, 3, 4, 8)},
    **{
        f"gptq {bits} bits in planes": functools.partial(gptq, bits, bits != 6, pack=planes, planar=True)
        for bits in (2, 3, 4, 5, 6, 7)
    },
    **{f"awq {bits} bits": functools.partial(awq, bits) for bits in (3, 4, 5, 8)},
    "gptq in order of activations": lambda: gptq(4, ordered=False),
    "gptq, second format": lambda: gptq(4, second=True, qzero_format=lambda: 2),
    # A model that was stored in the second format: the kernel needs it, and nothing was converted.
    "gptq, second format in the file": lambda: gptq(4, second=True, qzero_format=lambda: 1, REQUIRES_FORMAT_V2=True),
}
layers = pytest.mark.parametrize("layer", LAYERS)


@layers
def test_attach_train_save_load_and_no_merge(layer: str, tmp_path: Path) -> None:
    quantized = LAYERS[layer]()
    torch.testing.assert_close(numbers(quantized), quantized.known, rtol=1e-6, atol=0.0)
    base = torch.nn.Sequential(quantized)
    before = {name: tensor.clone() for name, tensor in base.named_buffers()}
    adapter = tt.attach(base, P.lora(2), "all-linear")
    assert adapter.targets[0].shape == (ROWS, COLS)
    x = torch.randn(5, COLS)
    optimizer = torch.optim.Adam(adapter.parameters(), 0.02)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = (base(x) - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapter.save(tmp_path / "a.safetensors")
    again = torch.nn.Sequential(LAYERS[layer]())
    tt.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again(x), base(x))
    other = torch.nn.Sequential(LAYERS[layer]())
    other[0].scales *= 2.0
    with pytest.raises(tna.FileError, match="another base"):
        tt.load(other, tmp_path / "a.safetensors")
    how = layer[:4].strip(" ,").upper()
    with pytest.raises(tna.TargetError, match=rf"0\.weight is quantized: Layer is quantized by {how}, which chose its"):
        adapter.merge()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.named_buffers() if name in before)


def test_other_layouts_are_adapted_and_not_read() -> None:
    def of_class(name: str, layer: Any) -> Any:
        layer.__class__ = type(name, (Layer,), {})
        return layer

    gemv = awq()
    gemv.qweight = gemv.qweight.T.contiguous()
    marlin = of_class("MarlinLinear", gptq(4))  # a kernel's own order, in tensors of the same names
    # Paro rotates the input before the product.
    for layer in (of_class("ParoLinear", awq()), gptq(4, online_full_had=True), marlin, gemv):
        assert numbers(layer) is None
    adapter = tt.attach(torch.nn.Sequential(marlin, torch.nn.Identity()), P.lora(2), "all-linear")
    assert adapter.strategy == ("factored",)
    with pytest.raises(
        tna.TargetError, match=r"cannot be merged into: it is on the meta device, or in a layout whose n"
    ):
        adapter.merge()


class Deciding(Layer):
    """A layer of GPTQModel's for CPUs: evaluated first, it repacks its words for a kernel without a backward."""

    def forward(self, x: Any) -> Any:
        if self.linear_mode is None:
            self.linear_mode = "train" if self.training or x.requires_grad else "inference"
            if self.linear_mode == "inference":
                self.qweight = self.qweight.to(torch.uint8)
        y = super().forward(x)
        return y.detach() if self.linear_mode == "inference" else y


@pytest.mark.parametrize("layer", [gptq, awq])
def test_a_layer_is_not_repacked_while_an_adapter_is_attached(layer: Any) -> None:
    made, fresh = layer(4), layer(4)
    for one in (made, fresh):
        one.__class__, one.linear_mode = Deciding, None
    base = torch.nn.Sequential(made).eval()
    adapter = tt.attach(base, P.lora(2), "all-linear")
    x = torch.randn(3, COLS)
    with torch.no_grad():
        base(x)
    x.requires_grad_()
    base(x).sum().backward()
    torch.testing.assert_close(x.grad, made.known.sum(0).expand(3, -1))
    torch.testing.assert_close(numbers(made), made.known, rtol=1e-6, atol=0.0)
    adapter.detach()
    assert made.linear_mode is None

    fresh.eval()(x.detach())
    other = torch.nn.Sequential(fresh)
    tt.attach(other, P.lora(2), "all-linear")
    with pytest.raises(tna.TargetError, match=r"Deciding passes no gradient .* attach to a freshly loaded model"):
        other(x).sum().backward()


def test_gptq_embeddings_are_no_linear_layers() -> None:
    class TorchQuantEmbeddings(Layer):
        """GPTQModel's, whose forward takes indices."""

        def forward(self, ids: Any) -> Any:
            return torch.nn.functional.embedding(ids, self.known.T)

    TorchQuantEmbeddings.__module__ = "gptqmodel.nn_modules.qlinear.torch"
    TorchQuantEmbeddings.__qualname__ = "TorchQuantEmbeddings"
    table = gptq(4)
    table.__class__ = TorchQuantEmbeddings
    base = torch.nn.Sequential(table, gptq(4))
    base[0].known = base[0].known.contiguous()
    assert [target.name for target in tt.find_targets(base, "all-linear")] == ["1.weight"]
    adapter = tt.attach(torch.nn.Sequential(table), P.lora(2), "embeddings")
    assert (adapter.targets[0].shape, adapter.targets[0].role) == ((COLS, ROWS), "embedding")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    ids = torch.tensor([[0, 5, 95]])
    expected = (table.known.T + adapter.deltas()[0])[ids]
    torch.testing.assert_close(adapter.model(ids), expected)
    torch.testing.assert_close(numbers(table), table.known.T, rtol=1e-6, atol=0.0)
    with pytest.raises(tna.TargetError, match=r"0\.weight is quantized: TorchQuantEmbeddings is quantized by GPTQ"):
        adapter.merge()
