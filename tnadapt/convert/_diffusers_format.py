"""The format of diffusers: PEFT's LoRA in one safetensors file, by components of a pipeline and their names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from tnadapt.checkpoints.container import DTYPES, Container
from tnadapt.errors import ConfigError, FileError, safe_repr, summarize
from tnadapt.targets.roles import natural

from ._base_model import Base, target_of
from ._file_format import EncodedAdapter, ExportChoice, FileFormat, ForeignAdapter, Json
from ._files import (
    RECORD,
    Arrays,
    StoredFiles,
    decode,
    encode,
    foreign_tensor_names,
    json_text,
    recorded,
    safetensors_content,
)
from ._peft_settings import LOW_RANK, Scales, common_settings
from ._updates import Float, Module, TargetUpdate, common_dtype, uniform, widen

# -- The component of a pipeline, by the caller, the file or the modules' names ----------------------------------------

# diffusers names parts as its pipelines do, and kohya's scripts by prefixes. Both names are understood everywhere.


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
    components = [name for name, pattern in patterns.items() if any(map(pattern.match, paths))]
    return components[0] if len(components) == 1 else None


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
    """Return the components that a name may mean, whether it is of diffusers or of kohya."""
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


def stored_modules(
    container: Container,
    pattern: re.Pattern[str],
    part: str | None,
    what: str,
    suffixes: Mapping[str, str],
    refused: Mapping[str, str] = {},
) -> tuple[str, dict[str, dict[str, Float]], str]:
    """Read the tensors of one part of a file.

    Parameters
    ----------
    container : Container
    pattern : Pattern
        Matches the names of all tensors, with the groups "part", "path" and "suffix".
    part : str, optional
        The part that the caller names.
    what : str
        What the file holds, for messages.
    suffixes : mapping of str to str
        Maps those that are read to the names under which the tensors are decoded.
    refused : mapping of str to str
        Maps those of tensors that are not converted to the reason. "diff_b" is left out if it is zeros.

    Returns
    -------
    str, dict, str
        The part; the tensors by path and name; and a dtype that represents all of their values but alphas.
    """
    matches = {name: pattern.fullmatch(name) for name in container.entries}
    if unknown := [name for name, match in matches.items() if match is None]:
        raise FileError(f"has tensors that do not belong to {what}: {summarize(unknown)}")
    chosen = chosen_part(list(dict.fromkeys(match["part"] for match in matches.values() if match)), part)
    modules, dtypes = dict[str, dict[str, Float]](), set[str]()
    for name, match in matches.items():
        if match and match["part"] == chosen:
            path, suffix, tag = match["path"], match["suffix"], container.entries[name].dtype
            array = widen(name, tag, container.array(name))
            if suffix in suffixes:
                modules.setdefault(path, {})[suffixes[suffix]] = array
                dtypes |= {DTYPES[tag]} if suffix != "alpha" else set()
            elif array.any() or suffix != "diff_b":
                raise FileError(f"{safe_repr(name)} cannot be converted: {refused[suffix]}")
    return chosen, modules, common_dtype(dtypes)


def one_number(path: str, alpha: Float) -> float:
    """Return the alpha of a module."""
    if alpha.size != 1:
        raise FileError(f"alpha of {safe_repr(path)} must be one number; it has the shape {alpha.shape}")
    return float(alpha.reshape(()))


def written_component(
    form: str, part: str | None, source: str, paths: Sequence[str], parts: Sequence[str] = COMPONENTS
) -> str:
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
    parts : sequence of str
        The format's names of parts, for messages.

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
        raise ConfigError(
            f"a file of {form} names the part of the pipeline that its adapter belongs to, and the module names do not "
            f"show which one this is: {summarize(paths)}. Give it, for example {_choice(parts[0])}; the parts are "
            f"{', '.join(parts)}"
        )
    return here


def written_prefix(form: str, part: str | None, source: str, paths: Sequence[str]) -> str:
    """Return the component to write, by kohya's prefix; the parameters are those of :func:`written_component`."""
    if part in PREFIXES or (part is None and source in PREFIXES):
        return part or source
    component = written_component(form, part, source, paths, PREFIXES)
    known = _PREFIXES_OF[component]
    if not known:
        raise ConfigError(f"{form} has no prefix for {component}; its prefixes are {', '.join(PREFIXES)}")
    return source if source in known else known[0]


def _choice(part: str) -> str:
    return f"part={part!r} (--part {part})"


# -- The format --------------------------------------------------------------------------------------------------------


_NAME = re.compile(rf"(?P<part>{'|'.join(COMPONENTS)})\.(?P<path>.+)\.(?P<suffix>lora_A\.weight|lora_B\.weight|alpha)")
_SUFFIXES = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up", "alpha": "alpha"}

# Entry of a conversion's record that maps module paths in the file to the real ones, if they differ.
_RENAMED = "renamed"

# Entry of the metadata with the settings of PEFT by component.
_SETTINGS = "lora_adapter_metadata"


class DiffusersFormat(FileFormat):
    """Files saved by diffusers' ``save_lora_weights``."""

    library = "diffusers"
    kinds = ("lora",)
    kernels: Mapping[str, int] = {"lora": 3}
    parts_read = parts_written = (*COMPONENTS, *PREFIXES)
    _component = "unet"

    def detect(self, path: str) -> str | None:
        """Return the path if the names of the file's tensors begin with a component of a pipeline."""
        return path if any(map(_NAME.fullmatch, foreign_tensor_names(path) or ())) else None

    def choose_part(self, modules: Sequence[Module], part: str | None, source: str) -> None:
        """Choose the component, such as "text_encoder_2"."""
        self._component = written_component(self.name, part, source, [module.path for module in modules])

    def read(self, files: StoredFiles, base: Base | None, part: str | None) -> ForeignAdapter:
        """Read the adapter of a file; ``part`` is one of its components, such as "unet"."""
        with files.container() as container:
            return _read(container, base, part)

    def encode(self, kind: str, modules: Sequence[Module], choice: ExportChoice, kept: Sequence[str]) -> EncodedAdapter:
        """Encode the tensors.

        Without the metadata of an adapter, diffusers takes α = r. The scale is therefore multiplied into a factor.
        Older releases take the first rank for all modules: all factors have one.
        """
        tensors, renamed = dict[str, Float](), dict[str, str]()
        for module, update in zip(modules, uniform(choice.updates), strict=True):
            arrays = encode(update, module.stored, "lora_A.weight", "lora_B.weight")
            path = stored_path(self._component, module.path)
            tensors |= {f"{self._component}.{path}.{name}": array for name, array in arrays.items()}
            renamed |= {path: module.path} if path != module.path else {}
        return EncodedAdapter(tensors, record={_RENAMED: renamed} if renamed else {})

    def write(self, tensors: Arrays, dtypes: Mapping[str, str], record: Json, config: Json | None) -> dict[str, bytes]:
        """Serialize the file."""
        return {"": safetensors_content(tensors, dtypes, {RECORD: json_text(record), "format": "pt"})}


def _read(container: Container, base: Base | None, part: str | None) -> ForeignAdapter:
    """Read the adapter of an open file."""
    chosen, modules, dtype = stored_modules(container, _NAME, part, "a LoRA of diffusers", _SUFFIXES)
    scales, renamed = _scales(container.metadata, chosen), recorded(container.metadata, _RENAMED, str)
    updates = []
    for path in sorted(modules, key=natural):
        alpha = modules[path].pop("alpha", None)
        update, shape, rank = decode(path, modules[path])
        if alpha is not None and rank:
            scale = one_number(path, alpha) / rank
        else:
            scale = 1.0 if scales is None else scales.of(path, rank)
        target = target_of(_path(path, base, renamed), shape, base)
        updates.append(TargetUpdate(target, update._replace(scale=scale)))
    return ForeignAdapter("lora", updates, dtype, part=chosen)


def _path(path: str, base: Base | None, renamed: Mapping[str, str]) -> str:
    """Return the path of a module in the base or, without one, in the adapter that was converted."""
    other = other_path(path)
    if base is None:
        return other if renamed.get(path) == other else path
    return other if other in base.shapes and path not in base.shapes else path


def _scales(metadata: Mapping[str, str], component: str) -> Scales | None:
    """Return the scales by PEFT's settings that diffusers saved for a component, or None if it saved none."""
    if _SETTINGS not in metadata:
        return None
    try:
        stored = json.loads(metadata[_SETTINGS])
        settings = {name.removeprefix(f"{component}."): value for name, value in stored.items()
               if name.startswith(f"{component}.")}  # fmt: skip
    except (ValueError, AttributeError, RecursionError):
        raise FileError(f"the entry {_SETTINGS} of its metadata is not a JSON object") from None
    common_settings(settings, LOW_RANK, may_transpose=True)
    return Scales(settings) if settings else None
