"""The weights of modules of many kinds: embeddings, convolutions, quantized layers, and modules without weights."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from tnadapt.errors import TargetError
from tnadapt.targets.target import Rows, Target
from tnadapt.torch._target_selection import find_targets

from .architectures import build
from .modules import Module, names, qv, roles


def test_conv1d_is_transposed() -> None:
    found = find_targets(build("gpt2")[0])
    assert [(target.name, target.stored, target.transposed) for target in found[:2]] == [
        ("transformer.h.0.attn.c_attn.weight", (32, 96), True),
        ("transformer.h.0.attn.c_attn.weight", (32, 96), True),
    ]
    assert [target.rows for target in found[:2]] == [Rows(0, 32, 96), Rows(64, 32, 96)]


def test_convolutions() -> None:
    model, _ = build("torchvision_resnet")
    found = find_targets(model, "conv")
    assert len(found) == 1 + 4 * 2 + 3
    assert (found[0].role, found[0].stored, found[0].shape) == ("conv", (64, 3, 7, 7), (64, 147))
    assert found[0].layer == ""
    assert found[1].layer == "layer1.0"
    kinds = nn.Sequential(
        nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(1, 2, 2), nn.ConvTranspose2d(4, 6, 3)
    )
    # Groups as they are stored; no transposed convolutions.
    assert roles(kinds, "conv") == [("conv", (6, 12)), ("conv", (6, 18)), ("conv", (2, 8))]
    with pytest.raises(TargetError, match="ConvTranspose2d, which holds no weight to adapt"):
        find_targets(kinds, ["3"])


def test_bags_and_norms_are_no_linear_maps() -> None:
    model = Module(bag=nn.EmbeddingBag(4, 2), norm=nn.LayerNorm(2), both=nn.Bilinear(2, 2, 2), fine=nn.Linear(2, 2))
    for name in ("bag", "norm", "both"):
        with pytest.raises(TargetError, match="which holds no weight to adapt"):
            find_targets(model, [name])


def test_an_embedding_must_be_named() -> None:
    model = Module(embed=nn.Embedding(4, 2), attn=Module(q=nn.Embedding(4, 2), v=nn.Linear(2, 2)), fine=nn.Linear(2, 2))
    assert names(model, "all-linear") == ["attn.v.weight", "fine.weight"]
    assert names(model, ["embed"]) == names(model, "embed") == ["embed.weight"]
    assert find_targets(model, ["embed"])[0].shape == (4, 2)


@pytest.mark.parametrize("targets", [["embed"], "embed", [Target("embed", (4, 2))], lambda path, _: path == "embed"])
def test_embeddings_that_cannot_be_adapted(targets: Any) -> None:
    model = Module(embed=nn.Embedding(4, 2, sparse=True))
    with pytest.raises(TargetError, match=r"embed\.weight belongs to an embedding with sparse=True.*set sparse=False"):
        find_targets(model, targets)
    model = Module(embed=nn.Embedding(4, 2, max_norm=0.5))
    with pytest.raises(TargetError, match=r"embed\.weight .* max_norm=0\.5, which rescales .* set max_norm=None"):
        find_targets(model, targets)
    model.embed.max_norm = None
    assert names(model, targets) == ["embed.weight"]


def test_a_matrix_of_an_unknown_module_must_be_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 2))

    model = nn.Sequential(Odd(), nn.Linear(2, 2))
    assert names(model, "all-linear") == ["1.weight"]
    assert names(model, ["0"]) == ["0.weight"]


def test_lazy_modules_have_no_shape_yet() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3), nn.LazyConv2d(3, 1))
    for targets in ("all-linear", "conv"):
        with pytest.raises(TargetError, match=r"[02]\.weight of Lazy\w+ has no shape yet; run the model once"):
            find_targets(model, targets)
    assert names(model, ["1"]) == ["1.weight"]


class Packed(nn.Linear):
    """A layer like bitsandbytes' 4-bit one: bytes in a column, and the sizes as attributes."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        packed = torch.zeros(in_features * out_features // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class Unpacked(nn.Module):
    """A layer of integers that does not reveal its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 2, dtype=torch.int8), requires_grad=False)


class Conv1D(Unpacked):
    """A quantized layer of transformers' ``Conv1D``, whose sizes are attributes."""

    nx, nf = 8, 6


def test_quantized_weights_of_known_shape() -> None:
    assert [(target.stored, target.transposed) for target in find_targets(Conv1D(), "all-linear")] == [((8, 6), True)]
    attention = Module(q_proj=Packed(8, 6), k_proj=Packed(8, 6), v_proj=Packed(8, 4))
    assert roles(attention) == qv((6, 8), (4, 8))
    gptq = nn.Linear(8, 6)
    del gptq.weight
    gptq.register_buffer("qweight", torch.zeros(1, 6, dtype=torch.int32))
    assert names(nn.Sequential(gptq), "all-linear") == ["0.weight"]


# They are about to leave torch for torchao, whose weights have a shape.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_torchs_quantized_linear() -> None:
    """A layer whose weight is a method."""
    engine = torch.backends.quantized.engine
    if engine == "none":
        pytest.skip("this torch has no quantized kernels")
    quantized = pytest.importorskip("torch.ao.nn.quantized.dynamic").Linear(8, 6)
    assert roles(nn.Sequential(quantized), "all-linear") == [("linear", (6, 8))]


def test_quantized_weights_of_unknown_shape() -> None:
    model = nn.Sequential(Unpacked(), nn.Linear(2, 2))
    with pytest.raises(TargetError, match=r"0\.weight of Unpacked is quantized"):
        find_targets(model, ["0"])
    assert names(model, "all-linear") == ["1.weight"]
    with pytest.raises(TargetError, match=r"q\.weight of Unpacked is quantized"):
        find_targets(Module(attn=Module(q=Unpacked(), k=nn.Linear(2, 2), v=nn.Linear(2, 2))))
