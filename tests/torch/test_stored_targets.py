"""What is found in a checkpoint by names and shapes is what tnadapt.torch finds in the model itself."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from tnadapt.errors import TargetError  # noqa: E402
from tnadapt.stored_targets import find_stored  # noqa: E402
from tnadapt.torch.targets import find_targets  # noqa: E402

from .architectures import MODELS, build  # noqa: E402

# Layouts that only the class of the attention knows: refused, never guessed.
REFUSED = {
    "codegen", "deepseek_v3", "falcon_multi_query", "falcon_new", "falcon_old", "gpt_bigcode", "gpt_bigcode_heads",
}  # fmt: skip


def _stored(model: nn.Module) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config or {})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, settings


@pytest.mark.parametrize("roles", ["qv", "q", "k"])
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"torchvision_resnet"}))
def test_a_checkpoint_has_the_targets_of_its_model(name: str, roles: str) -> None:
    model, _ = build(name)
    shapes, config = _stored(model)
    if name in REFUSED and (name, roles) != ("deepseek_v3", "q"):
        with pytest.raises(TargetError, match="which rows make which"):
            find_stored(shapes, roles, config)
        return

    def keys(targets: Any) -> set[Any]:
        return {(t.name, t.stored, t.role, t.rows, t.transposed) for t in targets}

    assert keys(find_stored(shapes, roles, config)) == keys(find_targets(model, roles))


def test_all_roles_of_a_bert_and_a_llama() -> None:
    for name in ("bert", "llama"):
        model, _ = build(name)
        assert find_stored(_stored(model)[0], "qkvo") == find_targets(model, "qkvo")


def test_paths_and_patterns() -> None:
    model, _ = build("bert")
    shapes = _stored(model)[0]
    by_path = find_stored(shapes, ["attention.self.query", "intermediate.dense"])
    assert {target.role for target in by_path} == {"q", "linear"}
    assert find_stored(shapes, r".*\.query") == [target for target in by_path if target.role == "q"]
    for wrong, match in (
        (["qery"], "such as .*query"),
        ("(", "no regular expression"),
        (3, "must be roles"),
        ("nothing.*", "no tensor of the checkpoint"),
    ):
        with pytest.raises(TargetError, match=match):
            find_stored(shapes, wrong)


def test_an_empty_checkpoint_says_so() -> None:
    with pytest.raises(TargetError, match="no weights of layers at all"):
        find_stored({"norm.weight": (4,)})
