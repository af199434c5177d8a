"""Training while the adapter is merged or inactive is warned of, and nothing else is."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn

import tnadapt.torch as tt

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
MERGED = (
    "adapter 'default' is merged, so training does not change it: unmerge() it first; to train only what else is "
    "trainable, bake() or detach() it"
)
INACTIVE = MERGED.replace("merged", "not active (its weight is 0)").replace("unmerge() it", "activate() it")


class Net(nn.Module):
    """Returns its result as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Any) -> dict[str, Any]:
        return {"loss": None, "hidden": (self.body(x),), "logits": self.head(self.body(x))}


def attached(keep: str = "head") -> tuple[Net, tt.Adapter]:
    model = Net()
    return model, tt.attach(model, "lora", ["body"], rank=2, keep_trainable=keep or ())


@pytest.mark.parametrize(("message", "keep"), [(MERGED, "head"), (INACTIVE, "head"), (MERGED, "")])
def test_it_is_said_once(message: str, keep: str) -> None:
    model, adapter = attached(keep)
    if not keep:  # as with checkpointing, whose inputs have gradients
        model.body.register_forward_pre_hook(lambda module, args: (args[0].clone().requires_grad_(),))
    adapter.merge() if message == MERGED else tt.mix(model, {"default": 0.0})
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        model(X)["logits"].sum().backward()
    model(X)["logits"].sum().backward()  # a warning would be an error


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_where_nothing_is_trained_or_the_caller_chose_so() -> None:
    model, adapter = attached(keep="")
    adapter.merge()
    model(X)  # in training mode, as models are when they are built
    model(X.clone().requires_grad_())
    model, adapter = attached()
    adapter.merge()
    model.eval()(X)
    with torch.no_grad():
        model.train()(X)
    adapter.unmerge()
    model(X)
    with adapter.disabled():
        model(X)
    # Another adapter is trained.
    second = tt.attach(model, "lora", ["body"], "second", rank=2)
    adapter.merge()
    model(X)
    adapter.unmerge()
    second.activate()
    model(X)
    # A frozen adapter is not in training.
    model, adapter = attached()
    for array in adapter.parameters():
        array.requires_grad_(False)
    adapter.merge()
    model(X)


SHARED = (
    "adapter 'default' is merged into weights that a reference_model() of this model shares, so the reference changes, "
    "too. If it is still used, unmerge() first, or merge into a copy that was loaded for it; if not, delete it before "
    "the merge"
)


def test_a_merge_beside_a_reference_is_warned_of() -> None:
    model, adapter = attached()
    reference = tt.reference_model(model)
    with pytest.warns(UserWarning, match=f"^{re.escape(SHARED)}$") as caught:
        adapter.merge()
    assert caught[0].filename == __file__
    adapter.unmerge()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # has no reference
            tt.adapters(duplicate)["default"].merge()
        with pytest.raises(UserWarning, match="the reference changes"):
            adapter.merge()
        assert not adapter.merged
        del reference
        adapter.merge()
