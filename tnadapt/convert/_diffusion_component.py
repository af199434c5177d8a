"""The part of a diffusion pipeline that an adapter belongs to, by the caller, the file or the modules' names.

diffusers names parts as its pipelines do, and kohya's scripts by prefixes. Both names are understood everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tnadapt.errors import ConfigError, FileError, safe_repr, summarize

__all__ = [
    "COMPONENTS", "PREFIXES", "chosen_part", "component_of", "other_path", "stored_path", "written_component",
    "written_prefix",
]  # fmt: skip

# diffusers' names, and kohya's prefixes for each; the first prefix is the one to write. kohya's scripts call the
# transformer of Flux and SD3 lora_unet, and T5 lora_te3, which is the second text encoder of Flux and the third of SD3.
_PREFIXES_OF: dict[str, tuple[str, ...]] = {
    "unet": ("lora_unet",),
    "transformer": ("lora_transformer", "lora_unet"),
    "transformer_2": (),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2", "lora_te3"),
    "text_encoder_3": ("lora_te3",),
    "controlnet": (),
    "prior": ("lora_prior_unet",),
}
#: The parts by diffusers' names.
COMPONENTS = tuple(_PREFIXES_OF)
#: The parts by kohya's prefixes.
PREFIXES = tuple(dict.fromkeys(prefix for prefixes in _PREFIXES_OF.values() for prefix in prefixes))

# transformers 5.6 dropped this from the names in CLIPTextModel. Files have it, and kohya's loaders look for it.
_CLIP = "text_model."
_FLAT_CLIP = re.compile(r"(encoder\.layers|embeddings|final_layer_norm)(\.|$)")

_UNET = re.compile(r"(down_blocks|mid_block|up_blocks)\.")
_TEXT = re.compile(r"(text_model|encoder\.layers|encoder\.block)\.|text_projection$")
_TRANSFORMER = re.compile(r"(\w+_)?transformer_blocks\.")


def component_of(paths: Sequence[str]) -> str | None:
    """Return "unet", "text_encoder" or "transformer" by the names of a model's modules; None if they do not show it.

    Examples
    --------
    >>> component_of(["down_blocks.0.attentions.0.to_q"]), component_of(["text_model.encoder.layers.0.mlp.fc1"])
    ('unet', 'text_encoder')
    >>> component_of(["transformer_blocks.0.attn.to_q", "proj_out"])
    'transformer'
    >>> component_of(["blocks.0.attn.q"]) is None
    True
    """
    patterns = {"unet": _UNET, "text_encoder": _TEXT, "transformer": _TRANSFORMER}
    found = [name for name, pattern in patterns.items() if any(map(pattern.match, paths))]
    return found[0] if len(found) == 1 else None


def stored_path(part: str, path: str) -> str:
    """Return the path under which a file of a part names a module: CLIP's begin with ``text_model``.

    Examples
    --------
    >>> stored_path("lora_te1", "encoder.layers.0.mlp.fc1"), stored_path("unet", "mid_block.attentions.0")
    ('text_model.encoder.layers.0.mlp.fc1', 'mid_block.attentions.0')
    """
    is_text = any(component.startswith("text_encoder") for component in _components(part))
    return f"{_CLIP}{path}" if is_text and _FLAT_CLIP.match(path) else path


def other_path(path: str) -> str:
    """Return the path of a module of CLIP in the releases of transformers before 5.6, given the one since, or back."""
    return path.removeprefix(_CLIP) if path.startswith(_CLIP) else _CLIP + path


def _components(part: str) -> tuple[str, ...]:
    """Return the components that a name of either kind may mean."""
    if part in COMPONENTS:
        return (part,)
    return tuple(name for name, prefixes in _PREFIXES_OF.items() if part in prefixes)


def chosen_part(found: Sequence[str], part: str | None) -> str:
    """Return which of the parts in a file the caller means, by its name there or by that of the other library.

    Raises
    ------
    FileError
        If the file has several parts and the caller names none, or lacks the one that the caller names.
    """
    listed = ", ".join(sorted(found))
    if part is None:
        if len(found) > 1:
            raise FileError(f"has adapters of several models: {listed}. Choose one, for example {_choice(min(found))}")
        return found[0]
    for component in _components(part):
        names = (part, component, *_PREFIXES_OF[component])
        if (match := next((name for name in names if name in found), None)) is not None:
            return match
    if part in found:
        return part
    raise FileError(f"has no part {safe_repr(part)}; its parts are {listed}")


def written_component(form: str, part: str | None, source: str, paths: Sequence[str]) -> str:
    """Return the component to write, by diffusers' name.

    Parameters
    ----------
    form : str
        Name of the format, for messages.
    part : str, optional
        The part that the caller names.
    source : str
        The part that was read; "" if the source has no parts.
    paths : sequence of str
        Paths of the modules.

    Raises
    ------
    ConfigError
        If it is not known.
    """
    here = component_of(paths)
    for name in (part, source):
        if name and (known := _components(name)):
            if len(known) == 1 or here in known:
                return known[0] if len(known) == 1 else str(here)
            raise ConfigError(
                f"{name} may be {' or '.join(known)}, and the module names do not show which: {summarize(paths)}. "
                f"Choose one, for example {_choice(known[0])}"
            )
    if here is None:
        raise _unknown(form, COMPONENTS, paths)
    return here


def written_prefix(form: str, part: str | None, source: str, paths: Sequence[str]) -> str:
    """Return the component to write, by kohya's prefix; the parameters are those of :func:`written_component`."""
    if part in PREFIXES or (part is None and source in PREFIXES):
        return part or source
    component = part or (source if source in COMPONENTS else component_of(paths))
    if component is None:
        raise _unknown(form, PREFIXES, paths)
    known = _PREFIXES_OF[component]
    if not known:
        raise ConfigError(f"{form} has no prefix for {component}; its prefixes are {', '.join(PREFIXES)}")
    return source if source in known else known[0]


def _unknown(form: str, known: Sequence[str], paths: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"a file of {form} names the part of the pipeline that its adapter belongs to, and the module names do not "
        f"show which one this is: {summarize(paths)}. Give it, for example {_choice(known[0])}; the parts are "
        f"{', '.join(known)}"
    )


def _choice(part: str) -> str:
    return f"part={part!r} (--part {part})"
