"""Small models whose linear layers are quantized by the libraries that tnadapt knows."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from .internals import quantized_type

#: Multiples of every library's block or group.
SIZE, OUT = 128, 64


class Kind(NamedTuple):
    """A library's way of quantizing: its module, and what makes a linear layer of numbers quantized."""

    library: str
    quantize: Callable[[Any, Any], Any]
    #: Whether the layer leaves its input alone, so that gradients are those of a layer of numbers.
    exact: bool = True
    #: Whether its model can be deep-copied, without an adapter too.
    copies: bool = True


def library(name: str) -> Any:
    """Import a library without its warnings about itself, or skip the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)
        try:
            return importlib.import_module(name)
        except ImportError:
            pytest.skip(f"{name} is not installed")


def numbers(layer: Any) -> Any:
    """Return the weight that a layer's codes stand for; None where that is unknown."""
    quantized = quantized_type(layer)
    return None if quantized is None else quantized.dequantize(layer)


def plain(dtype: Any = torch.float32) -> Any:
    """Return the model before quantization; its layers always have the same numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE, dtype=dtype), nn.Tanh(), nn.Linear(SIZE, OUT, dtype=dtype))


def model(name: str, dtype: Any = torch.float32) -> Any:
    """Return the quantized model of one of ``KINDS``."""
    kind = KINDS[name]
    own = library(kind.library)
    made = plain(dtype)
    for place in (0, 2):
        made[place] = kind.quantize(own, made[place])
    return made


def values(made: Any) -> dict[str, Any]:
    """Return copies of everything in a state dict but the adapter's arrays, in the library's own form."""
    found = {}
    for name, value in made.state_dict().items():
        if "tnadapt" not in name:
            found.update(tensors_in(name, value))
    return {name: value.detach().clone() for name, value in found.items()}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether two of them have the same bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def tensors_in(name: str, value: Any) -> dict[str, Tensor]:
    """Return the tensors that a value consists of."""
    # A tensor of torchao or quanto consists of others.
    if not hasattr(value, "__tensor_flatten__"):
        return {name: value.as_subclass(Tensor)} if isinstance(value, Tensor) else {}
    parts, _ = value.__tensor_flatten__()
    return {key: tensor for part in parts for key, tensor in tensors_in(f"{name}.{part}", getattr(value, part)).items()}


def _four_bit(kind: str, nested: bool) -> Callable[[Any, Any], Any]:
    def quantize(own: Any, linear: Any) -> Any:
        made = own.nn.Linear4bit(
            linear.in_features, linear.out_features, compute_dtype=linear.weight.dtype, quant_type=kind,
            compress_statistics=nested,
        )  # fmt: skip
        made.weight = own.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type=kind, compress_statistics=nested
        )
        made.bias = linear.bias
        return made.to("cpu")

    return quantize


def _int8(own: Any, linear: Any) -> Any:
    made = own.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
    made.weight = own.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    made.bias = linear.bias
    return made.to("cpu")


def _torchao(config: str, **settings: Any) -> Callable[[Any, Any], Any]:
    def quantize(own: Any, layer: Any) -> Any:
        groups = library("torchao.quantization.granularity")
        how = getattr(own, config)(**{name: value(groups) for name, value in settings.items()})
        own.quantize_(layer, how, lambda module, _: isinstance(module, (nn.Linear, nn.Embedding)))
        return layer

    return quantize


def _quanto(weights: str, frozen: bool = True) -> Callable[[Any, Any], Any]:
    def quantize(own: Any, linear: Any) -> Any:
        made = nn.Sequential(linear)
        own.quantize(made, weights=getattr(own, weights))
        if frozen:
            own.freeze(made)
        return made[0]

    return quantize


def _hqq(bits: int, group: int, axis: int = 1) -> Callable[[Any, Any], Any]:
    def quantize(own: Any, linear: Any) -> Any:
        settings = own.BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis)
        return own.HQQLinear(linear, settings, compute_dtype=linear.weight.dtype, device="cpu")

    return quantize


def embedding(name: str) -> Any:
    """Return the quantized embedding of one of ``EMBEDDINGS``, always of the same numbers."""
    kind = EMBEDDINGS[name]
    torch.manual_seed(0)
    return kind.quantize(library(kind.library), nn.Embedding(OUT, SIZE))


def _embedding_of_bitsandbytes(name: str) -> Callable[[Any, Any], Any]:
    def quantize(own: Any, table: Any) -> Any:
        made = getattr(own.nn, name)(table.num_embeddings, table.embedding_dim)
        made.weight.data = table.weight.data
        return made.to("cpu")

    return quantize


def _after_training(own: Any, table: Any) -> Any:
    quantizer = own.Int4WeightOnlyEmbeddingQATQuantizer(group_size=32)
    return quantizer.convert(quantizer.prepare(nn.Sequential(table)))[0]


def _gguf(kind: str) -> Callable[[Any, Any], Any]:
    """Return what makes a layer of transformers that holds GGUF's blocks."""

    def quantize(own: Any, layer: Any) -> Any:
        gguf = library("gguf")
        number = gguf.GGMLQuantizationType[kind]
        if isinstance(layer, nn.Embedding):
            made = own.GgufEmbedding(layer.num_embeddings, layer.embedding_dim, int(number))
        else:
            made = own.GgufLinear(layer.in_features, layer.out_features, int(number), layer.bias is not None)
            made.bias = layer.bias
        blocks = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().float().numpy(), number))
        made.weight = nn.Parameter(blocks, requires_grad=False)
        return made

    return quantize


GGUF = "transformers.integrations.gguf.utils"
BNB, AO, QUANTO, HQQ = "bitsandbytes", "torchao.quantization", "optimum.quanto", "hqq.core.quantize"
INT4 = _torchao("IntxWeightOnlyConfig", weight_dtype=lambda _: torch.int4, granularity=lambda g: g.PerGroup(32))

KINDS = {
    "bitsandbytes nf4": Kind(BNB, _four_bit("nf4", False)),
    "bitsandbytes nf4, double": Kind(BNB, _four_bit("nf4", True)),
    "bitsandbytes fp4": Kind(BNB, _four_bit("fp4", False)),
    "bitsandbytes int8": Kind(BNB, _int8),
    "torchao int8": Kind(AO, _torchao("Int8WeightOnlyConfig")),
    "torchao int8, one scale": Kind(AO, _torchao("Int8WeightOnlyConfig", granularity=lambda g: g.PerTensor())),
    "torchao int8 dynamic": Kind(AO, _torchao("Int8DynamicActivationInt8WeightConfig"), exact=False),
    "torchao float8": Kind(AO, _torchao("Float8WeightOnlyConfig")),
    "torchao int4": Kind(AO, INT4),
    "quanto int8": Kind(QUANTO, _quanto("qint8"), copies=False),
    "quanto int8, not frozen": Kind(QUANTO, _quanto("qint8", frozen=False)),
    "quanto int4": Kind(QUANTO, _quanto("qint4"), copies=False),
    "quanto float8": Kind(QUANTO, _quanto("qfloat8"), copies=False),
    "gguf q8_0": Kind(GGUF, _gguf("Q8_0")),
    "gguf q4_1": Kind(GGUF, _gguf("Q4_1")),
    "hqq 4 bits": Kind(HQQ, _hqq(4, 64), copies=False),
    "hqq 3 bits": Kind(HQQ, _hqq(3, 64), copies=False),
    "hqq 8 bits, axis 0": Kind(HQQ, _hqq(8, 64, axis=0), copies=False),
}

EMBEDDINGS = {
    "bitsandbytes nf4 embedding": Kind(BNB, _embedding_of_bitsandbytes("EmbeddingNF4")),
    "bitsandbytes fp4 embedding": Kind(BNB, _embedding_of_bitsandbytes("EmbeddingFP4")),
    "bitsandbytes int8 embedding": Kind(BNB, _embedding_of_bitsandbytes("Embedding8bit")),
    "torchao int8 embedding": Kind(AO, _torchao("Int8WeightOnlyConfig")),
    "torchao float8 embedding": Kind(AO, _torchao("Float8WeightOnlyConfig")),
    "torchao int4 embedding": Kind(AO, INT4),
    "torchao int4 embedding, trained": Kind("torchao.quantization.qat.embedding", _after_training),
    "gguf q8_0 embedding": Kind(GGUF, _gguf("Q8_0")),
}
