"""Shared helpers of the conversion tests: small models, adapters of this library, and random foreign ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt import AdapterFile, Config, Target, UpdatePlan

# Of what the peers make in float32 and we in float64, and once more in between: a few roundings of 6e-8.
TOLERANCE = 1e-6

SHAPES: dict[str, tuple[int, ...]] = {
    "blocks.0.attn.q_proj": (12, 18),
    "blocks.0.attn.v_proj": (8, 18),
    "blocks.10.mlp.fc_1": (24, 12),
}
CONVS: dict[str, tuple[int, ...]] = {
    "stem.conv": (8, 6, 3, 3),
    "stem.point": (4, 8, 1, 1),
    "stem.line": (6, 4, 3),
}


P = tna.presets
#: Configs of ours, each with the method of PEFT and LyCORIS that it is exactly.
EXPORTED: dict[str, tuple[Config, str]] = {
    "lora": (P.lora(3, alpha=7), "lora"),
    "tucker": (Config(rank=(2, 3), format="tucker"), "lora"),
    "krona": (P.krona(alpha=3), "lokr"),
    "lokr": (P.lokr(1, alpha=3), "lokr"),
    "lokr of low-rank W1": (P.lokr(1, leading="same"), "lokr"),
    "lokr of a factor": (P.lokr(1, split_size=2), "lokr"),
    "lonkr": (P.lonkr(1, splits=3, groups="weight", fold="stack", split_size="balanced"), "lokr"),
    "lora to lokr": (P.lora(2), "lokr"),
    "loha": (P.loha(2, alpha=3), "loha"),
    "lora to loha": (P.lora(2, alpha=6), "loha"),
}


def model(shapes: dict[str, tuple[int, ...]] | None = None) -> Any:
    """A torch model with these weights, random, each in a Linear or a convolution without a bias."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    root = nn.Module()
    for path, shape in (shapes or SHAPES).items():
        *parents, last = path.split(".")
        holder = root
        for name in parents:
            if not hasattr(holder, name):
                holder.add_module(name, nn.Module())
            holder = getattr(holder, name)
        rows, cols, *kernel = shape
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
        holder.add_module(last, kinds[len(kernel)](cols, rows, *([kernel] if kernel else ()), bias=False))
    return root.requires_grad_(False)


def made(
    config: Config, shapes: dict[str, tuple[int, ...]] | None = None, seed: int = 0, dtype: str = "f4"
) -> AdapterFile:
    """An adapter of ours on a model's weights, with random numbers."""
    targets = [
        Target(path, shape, "linear" if len(shape) == 2 else "conv", layer=path.split(".")[1])
        for path, shape in (shapes or SHAPES).items()
    ]
    return adapter_on(targets, config, seed, dtype)


def adapter_on(targets: Sequence[Target], config: Config, seed: int = 0, dtype: str = "f4") -> AdapterFile:
    """An adapter of ours on these targets, with random numbers."""
    rng = np.random.default_rng(seed)
    plan = UpdatePlan(
        config, [target.shape for target in targets], [target.layer for target in targets],
        roles=[target.role for target in targets],
    )  # fmt: skip
    arrays = {name: (rng.standard_normal(shape) / 2).astype(dtype) for name, shape in plan.param_shapes.items()}
    return AdapterFile(config, targets, arrays)


def converted(source: Any, *arguments: Any, **options: Any) -> AdapterFile:
    """What a conversion to this library's own form makes of an adapter."""
    file = tna.convert(source, *arguments, **options).file
    assert file is not None
    return file


def updates(file: AdapterFile) -> dict[str, np.ndarray]:
    """Path -> update in the shape in which the weight is stored."""
    found: dict[str, np.ndarray] = {}
    wide = {name: array.astype(np.float64) for name, array in file.arrays.items()}
    for number, target in enumerate(file.targets):
        whole = found.setdefault(target.module, np.zeros(target.stored))
        target.block(whole)[...] += target.like_block(file.plan.delta(wide, number))
    return found


def error(one: Any, other: Any) -> float:
    """Relative Frobenius error."""
    one, other = (np.asarray(a.detach().double() if hasattr(a, "detach") else a, np.float64) for a in (one, other))
    assert one.shape == other.shape, (one.shape, other.shape)
    return float(np.linalg.norm(one - other) / max(np.linalg.norm(other), 1e-30))


def assert_same_updates(ours: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    """Compare two adapters, each a file of ours or a mapping of paths to updates, weight by weight."""
    ours, expected = (updates(one) if isinstance(one, AdapterFile) else one for one in (ours, expected))
    assert ours.keys() == expected.keys()
    for path, delta in expected.items():
        assert error(ours[path], delta) <= tolerance, path


def peft_updates(wrapped: Any) -> dict[str, Any]:
    """Path -> update, as a model of PEFT has it."""
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in wrapped.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def loaded_by_peft(folder: Path, base: Any) -> dict[str, Any]:
    """Path -> update, as PEFT loads a folder onto a model, or onto one of these shapes."""
    peft = pytest.importorskip("peft")
    return peft_updates(peft.PeftModel.from_pretrained(model(base) if isinstance(base, dict) else base, folder))


def trained_by_peft(folder: Path, base: Any, config: Any, seed: int = 0, scale: float = 0.5) -> Any:
    """PEFT's model of a base with random numbers in all that is trained, which PEFT has saved in a folder."""
    wrapped = pytest.importorskip("peft").get_peft_model(base, config)
    fill(wrapped.parameters(), seed, scale)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def fill(parameters: Iterable[Any], seed: int = 0, scale: float = 0.5) -> None:
    """Random numbers in all of them that are trained."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def tiny_unet() -> tuple[Any, dict[str, tuple[int, ...]]]:
    """A UNet of diffusers with random weights, and the shapes of some of its linear layers and convolutions."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that diffusers imports
        diffusers = pytest.importorskip("diffusers")
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16), layers_per_block=1, sample_size=8, cross_attention_dim=12, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    ends = ("to_q", "to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "time_emb_proj")
    return unet, {path: tuple(layer.weight.shape) for path, layer in unet.named_modules() if path.endswith(ends)}
