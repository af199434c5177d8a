"""PEFT's VB-LoRA: parts of A and B are mixtures of a few vectors of a bank, which no config has: read as LoRA."""

from __future__ import annotations

import numpy as np

from tnadapt.errors import FileError, safe_repr

from ._peft_content import PeftContent
from ._peft_method import OwnStructure, PeftMethod
from ._peft_settings import integer_of
from ._updates import Float, ModuleUpdate, Pair

__all__ = ["PeftVbLora"]

_NOTE = "stored as LoRA of the same rank, as no config has mixtures of the vectors of a bank"


class PeftVbLora(PeftMethod):
    """``ΔW = B A``, whose parts are means of the k vectors with the largest logits, weighted by their softmax."""

    title = "VB-LoRA"
    tensors = tuple(f"vblora_logits_{side}{end}" for side in "AB" for end in ("", "_topk_indices", "_topk_weights"))
    shared = ("vblora_vector_bank",)
    integers = ("vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices")
    fields = (
        "r", "num_vectors", "vector_length", "topk", "save_only_topk_weights", "vblora_dropout",
        "init_vector_bank_bound", "init_logits_std",
    )  # fmt: skip
    may_transpose = True
    writable = False

    @property
    def kind(self) -> str:
        """The last part of the form's name."""
        return "vblora"

    def read(self, content: PeftContent) -> OwnStructure:
        """Compute A and B."""
        content.require_modules()
        bank = content.shared_tensor("vblora_vector_bank", 2)
        count = integer_of("topk", content.config.get("topk", 2))
        targets, updates = [], []
        for path in content.modules:
            a, b = (self._mixed(content, path, side, bank, count) for side in "AB")
            # A is (rank, parts, length), B (parts, rank, length).
            if len(a) != b.shape[1]:
                raise content.misfit(path, "A must have (r, parts) mixtures, and B (parts, r)")
            pair = Pair(b.transpose(0, 2, 1).reshape(-1, b.shape[1]), a.reshape(len(a), -1).T)
            targets.append(content.target(path, pair.shape))
            updates.append(ModuleUpdate("lora", pair.shape, (pair,)))
        return OwnStructure(targets, updates=updates, notes=(_NOTE,))

    @staticmethod
    def _mixed(content: PeftContent, path: str, side: str, bank: Float, count: int) -> Float:
        name = f"vblora_logits_{side}"
        if f"{name}_topk_indices" in content.modules[path]:
            index = content.tensor(path, f"{name}_topk_indices", 3)
            first = (
                content.tensor(path, f"{name}_topk_weights", 3)
                if index.shape[2] > 1
                else np.zeros((*index.shape[:2], 0))
            )
            if first.shape != (*index.shape[:2], index.shape[2] - 1) or (index < 0).any() or (index >= len(bank)).any():
                raise content.misfit(
                    path, f"{name}_topk_indices must name {len(bank)} vectors, with one weight less each"
                )
            weights = np.concatenate([first, 1.0 - first.sum(axis=2, keepdims=True)], axis=2)
        else:
            logits = content.tensor(path, name, 3)
            if logits.shape[2] != len(bank) or count > len(bank):
                raise content.misfit(
                    path, f"{name} must have a logit for each of the {len(bank)} vectors, topk of them"
                )
            order = np.argsort(-logits, axis=2, kind="stable")
            ranked = np.take_along_axis(logits, order, axis=2)
            if count < len(bank) and (ranked[:, :, count - 1] == ranked[:, :, count]).any():
                raise FileError(
                    f"{name} of {safe_repr(path)} has equal logits, of which topk={count} takes one and leaves the "
                    "other, as torch decides: save the adapter with save_only_topk_weights=True, or in float32"
                )
            index = order[:, :, :count]
            top = np.take_along_axis(logits, index, axis=2)
            weights = np.exp(top - top.max(axis=2, keepdims=True))
            weights /= weights.sum(axis=2, keepdims=True)
        mixed: Float = np.einsum("abk,abkl->abl", weights, bank[index])
        return mixed
