"""The component of a diffusion pipeline that an adapter is of."""

from __future__ import annotations

from collections.abc import Sequence

from tnadapt.errors import ConfigError, safe_repr

__all__ = ["checked_component", "component_of"]

_UNET = {
    "add_embedding", "class_embedding", "conv_in", "conv_out", "down_blocks", "mid_block", "time_embedding",
    "up_blocks",
}  # fmt: skip
_TEXT = {"encoder", "text_model", "text_projection"}


def component_of(paths: Sequence[str]) -> str:
    """Return "unet", "text_encoder" or "transformer" by the names of a model's modules.

    Examples
    --------
    >>> component_of(["down_blocks.0.attentions.0.to_q"]), component_of(["text_model.encoder.layers.0.mlp.fc1"])
    ('unet', 'text_encoder')
    >>> component_of(["transformer_blocks.0.attn.to_q"])
    'transformer'
    """
    roots = {path.partition(".")[0] for path in paths}
    if roots <= _UNET:
        return "unet"
    return "text_encoder" if roots <= _TEXT else "transformer"


def checked_component(part: str | None, known: Sequence[str], form: str) -> str | None:
    """Return the caller's ``part``; raise ConfigError unless it is None or known."""
    if part is not None and part not in known:
        raise ConfigError(f"part of {form} must be one of {', '.join(known)}; got {safe_repr(part)}")
    return part
