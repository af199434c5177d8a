"""Attention layouts registered by other packages, for models in memory and checkpoints on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna

from .internals import AttentionLayout, StoredWeight, forget_layouts, of_class, of_config, register_layout, rules

# Values first, then keys, then queries: an order that nothing built in has.
PARROT = AttentionLayout(
    lambda facts, fused: (1, [(letter, fused.out // 3) for letter in "vkq"]),
    ("to_qkv",),
    ("ParrotAttention",),
    ("parrot",),
)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    forget_layouts()
    yield
    forget_layouts()


def test_it_is_found_by_class_and_by_model_type() -> None:
    assert of_class(["ParrotAttention"], lambda name: False) is None
    register_layout("parrot", PARROT)
    assert of_class(["MyAttention", "ParrotAttention"], lambda name: False) is PARROT
    assert of_config({"model_type": "parrot"}, StoredWeight("to_qkv")) is PARROT
    assert of_config({"model_type": "parrot"}, StoredWeight("in_proj")) is None


def test_a_model_and_its_checkpoint_have_the_same_rows(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    import tnadapt.torch as tt

    class ParrotAttention(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 2
            self.to_qkv = torch.nn.Linear(8, 24)
            self.out_proj = torch.nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            v, k, q = self.to_qkv(x).split(8, -1)
            return self.out_proj(torch.nn.functional.scaled_dot_product_attention(q, k, v))

    register_layout("parrot", PARROT)
    model = torch.nn.ModuleDict({"attention": ParrotAttention()})
    found = {target.role: target.rows for target in tt.find_targets(model, "qkv")}
    assert found == {"q": tna.Rows(16, 8, 24), "k": tna.Rows(8, 8, 24), "v": tna.Rows(0, 8, 24)}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "parrot", "num_attention_heads": 2}))
    stored = {target["role"]: target for target in tna.info(tmp_path)["targets"]}
    assert {role: stored[role]["rows"] for role in "qv"} == {"q": [16, 8, 24, 1], "v": [0, 8, 24, 1]}
    assert np.all([stored[role]["name"].startswith("attention.to_qkv") for role in "qv"])


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("Parrot", PARROT, "lower-case letters"),
        ("parrot", {}, "takes an AttentionLayout; got {}"),
        ("parrot", AttentionLayout(rules.by_head, ("qkv",)), "nothing to recognize its attention by"),
        ("parrot", AttentionLayout(rules.by_head, ("weight3",), ("A",)), "does not say which of q, k and v"),
        ("parrot", AttentionLayout(rules.by_head, ("Wqkv",), ("MptAttention",)), "MptAttention already has a layout"),
        ("parrot", AttentionLayout(rules.by_head, ("in_proj",), (), ("deberta",)), "deberta already has a layout"),
    ],
)
def test_what_cannot_be_registered_is_refused(name: str, layout: Any, message: str) -> None:
    with pytest.raises(tna.ConfigError, match=message):
        tna.register_layout(name, layout)


def test_another_package_s_layout_is_not_replaced_either() -> None:
    register_layout("parrot", PARROT)
    register_layout("parrot", PARROT)
    with pytest.raises(tna.ConfigError, match="ParrotAttention already has a layout"):
        register_layout("budgie", PARROT)
