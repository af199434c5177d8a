"""PEFT's adapters of random settings on real models: the outputs stay the same here, and back in PEFT.

Each case is drawn from its number. PEFT makes the adapter, changes its parameters at random and saves it with its
defaults. What this library loads from the folder, and what PEFT loads of what this library writes, must give the
outputs of PEFT's own model; or the conversion is refused for the reason that the case predicts.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import random
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.support.array_presets import P
from tests.support.depth import in_depth
from tnadapt.convert import FORMS

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

import tnadapt.torch as tt

from .conversions import adapter_on, converted, fill, trained_by_peft

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.law("foreign-files")]


class Pixels(torch.nn.Module):  # type: ignore[name-defined, misc]
    """Convolutions of all kinds: plain, strided, of one pixel, grouped, depthwise, and along one axis."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 2, stride=2)
        self.point = nn.Conv2d(12, 12, 1, bias=False)
        self.grouped = nn.Conv2d(12, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.line = nn.Conv1d(12, 8, 3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, pixels: Any) -> Any:
        x = self.down(torch.tanh(self.stem(pixels)))
        x = self.point(x) + self.grouped(x) + self.depthwise(x)
        return self.head(torch.tanh(self.line(torch.tanh(x).flatten(2))).mean(-1))


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(tied: bool) -> Any:
    more = {"num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": tied}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=48, **SIZES, **more))


def gpt2() -> Any:
    sizes = {"vocab_size": 48, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def t5() -> Any:
    sizes = {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=48, **SIZES))


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=8, patch_size=4))


TOKENS = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model, and what there is to adapt in it.

    ``attention`` are weights of a layer all of whose sizes are equal; ``targets`` are all linear ones and, if there are
    any, ``convolutions``; ``embedding`` and ``head`` are their names.
    """

    build: Callable[[], Any]
    targets: tuple[str, ...]
    alike: tuple[str, ...]
    convolutions: tuple[str, ...] = ()
    embedding: str = ""
    head: str = ""
    norm: str = ""


LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS: dict[str, Model] = {
    **{
        name: Model(
            functools.partial(llama, name != "llama"), LLAMA_LAYERS, ("q_proj", "o_proj"), (), "embed_tokens",
            "lm_head", "norm",
        )
        for name in ("llama", "tied llama")
    },
    "gpt2": Model(
        gpt2, ("c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"), ("attn.c_proj",), (), "wte", "lm_head", "ln_f",
    ),
    "t5": Model(t5, ("q", "k", "v", "o", "wi", "wo"), ("q", "k", "v", "o"), (), "shared", "lm_head"),
    "bert": Model(
        bert, ("query", "key", "value", "attention.output.dense", "intermediate.dense"), ("query", "key", "value"), (),
        "word_embeddings", "classifier", "LayerNorm",
    ),
    "vit": Model(
        vit, ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"), ("q_proj", "k_proj", "v_proj", "o_proj"),
        ("projection",), "", "classifier", "layernorm",
    ),
    "pixels": Model(
        Pixels, ("head",), ("head",), ("stem", "down", "point", "grouped", "depthwise", "line"), "", "head",
    ),
}  # fmt: skip


@functools.cache
def pristine(name: str) -> Any:
    torch.manual_seed(7)
    model = MODELS[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return model


def fresh(name: str) -> Any:
    return copy.deepcopy(pristine(name))


def output(name: str, model: Any) -> Any:
    tokens = torch.tensor(TOKENS)
    side = 8
    pixels = torch.linspace(-3, 3, 2 * 3 * side * side).reshape(2, 3, side, side).sin()
    with torch.no_grad():
        if name == "pixels":
            return model(pixels).double()
        if name == "vit":
            return model(pixel_values=pixels).logits.double()
        more = {"decoder_input_ids": tokens[:, :4]} if name == "t5" else {}
        return model(input_ids=tokens, **more).logits.double()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of each model, saved by its own library."""

    @functools.cache
    def folder(name: str) -> Path:
        place = tmp_path_factory.mktemp("base")
        if name == "pixels":
            save_file(pristine(name).state_dict(), place / "model.safetensors")
        else:
            pristine(name).save_pretrained(place)
        return place

    return folder


# -- Cases ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of one adapter."""

    model: str
    method: str
    settings: dict[str, Any]
    dtype: str
    base: str

    @property
    def targets(self) -> Any:
        return self.settings["target_modules"]

    def config(self) -> Any:
        return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[self.method]](**self.settings)


# How often each method is drawn.
WEIGHTS = {"LORA": 8, "LOKR": 2, "LOHA": 2, "HIRA": 2}

# Methods that PEFT applies to weights that are stored as (in, out), and to convolutions.
TRANSPOSED = ("LORA", "HIRA", "VERA", "RANDLORA", "FOURIERFT", "WAVEFT", "UNILORA", "TINYLORA", "VBLORA")
CONVOLUTIONS = ("LORA", "LOKR", "LOHA", "HIRA")
GROUPED = {"grouped", "depthwise"}


def drawn(number: int) -> Case:
    """The case of a number."""
    rng = random.Random(f"round trips {number}")
    method = rng.choices([*OPTIONS], [WEIGHTS.get(name, 1) for name in OPTIONS])[0]
    names = [name for name in MODELS if method in TRANSPOSED or name != "gpt2"]
    if method == "TRAINABLE_TOKENS":
        names = [name for name in MODELS if MODELS[name].embedding]
    name = rng.choice(names)
    model = MODELS[name]
    convolutions = [one for one in model.convolutions if method != "HIRA" or one not in GROUPED]
    several = list(model.targets) + convolutions * (method in CONVOLUTIONS)
    if method in ("RANDLORA", "VBLORA", "WAVEFT", "C3A", "UNILORA") and rng.random() < 0.5:
        several = list(model.alike)
    count = rng.randint(1, min(4, len(several)))
    targets = sorted(rng.sample(several, count))
    settings: dict[str, Any] = {"target_modules": targets}
    settings |= options(rng, method, model, targets)
    if (
        name in ("llama", "tied llama", "vit")
        and targets != ["projection"]  # which is in no layer
        and method not in ("SHIRA", "TRAINABLE_TOKENS", "UNILORA")
        and rng.random() < 0.15
    ):
        settings["layers_to_transform"] = [1]
    settings |= kept_and_tied(random.Random(f"kept and tied {number}"), method, name, targets)
    dtype = rng.choice(["float32", "float32", "bfloat16", "float16"])
    if method == "VBLORA" or settings.get("save_indices"):
        dtype = "float32"  # equal logits, and scales that are rounded, are another adapter
    bases = ["folder", "shapes"] if method in CONVOLUTIONS else ["shapes"]
    # LoKr and LoHa of a convolution may be matrices, whose kernels only the base tells.
    if method in CONVOLUTIONS and (method == "LORA" or not set(targets) & set(model.convolutions)):
        bases.append("none")
    base = "folder" if {"trainable_token_indices", "token_indices"} & settings.keys() else rng.choice(bases)
    return Case(name, method, settings, dtype, base)


def kept_and_tied(rng: random.Random, method: str, name: str, targets: list[str]) -> dict[str, Any]:
    """Settings of adapted embeddings and heads, trained tokens, saved modules and biases."""
    model, found = MODELS[name], dict[str, Any]()
    if method == "TRAINABLE_TOKENS":
        return {"target_modules": [model.embedding]}
    saved = [[model.head], [model.norm], [model.embedding], [model.head, model.embedding]]
    saved = [names for names in saved if all(names) and not set(names) & set(targets)]
    if rng.random() < 0.25 and saved:
        found["modules_to_save"] = rng.choice(saved)
    if method != "LORA":
        return found
    if rng.random() < 0.25:
        found["bias"] = rng.choice(["all", "lora_only"])
    free = [one for one in (model.head, model.embedding) if one and one not in found.get("modules_to_save", ())]
    if rng.random() < 0.25 and free and "classifier" not in free:
        found["target_modules"] = sorted({*targets, rng.choice(free)})
    elif rng.random() < 0.25 and model.embedding and len(free) == 2:
        tokens = sorted(rng.sample(range(10), 3))
        found["trainable_token_indices"] = rng.choice([tokens, {model.embedding: tokens}])
    if name == "tied llama" and rng.random() < 0.5:
        found["ensure_weight_tying"] = True
    return found


#: The settings of each method: one of several values, or True with a probability; those without a name, several.
OPTIONS: dict[str, dict[str, Any]] = {
    "LORA": {
        "r": range(1, 6), "lora_alpha": [1, 4, 16, 2.5], "use_rslora": 0.25, "use_dora": 0.2, "fan_in_fan_out": 0.3,
        "lora_dropout": [0.0, 0.1], "init_lora_weights": [True, True, True, False, "gaussian"],
    },
    "HIRA": {"r": range(1, 6)},
    "LOKR": {
        "r": range(1, 6), "alpha": [1, 4, 2.5], "use_effective_conv2d": 0.5, "init_weights": 0.5,
        "decompose_both": 0.4, "decompose_factor": [-1, -1, 2, 4, 8],
    },
    "LOHA": {"r": range(1, 6), "alpha": [1, 4, 2.5], "use_effective_conv2d": 0.5, "init_weights": 0.5},
    "VERA": {"r": range(1, 10), "projection_prng_key": range(10), "save_projection": 0.7},
    "RANDLORA": {
        "r": range(2, 9), "randlora_alpha": range(1, 10), "save_projection": 0.7,
        "": [{}, {}, {"sparse": True}, {"very_sparse": True}],
    },
    "FOURIERFT": {"n_frequency": range(5, 101), "scaling": [2.0, 25.0], "random_loc_seed": range(10)},
    "WAVEFT": {
        "n_frequency": range(5, 101), "scaling": [2.0, 25.0], "random_loc_seed": range(10),
        "wavelet_family": ["db1", "db2", "db3"], "use_idwt": 0.8, "proportional_parameters": 0.3,
    },
    "C3A": {"block_size": [2, 4]},
    "SHIRA": {"r": range(1, 5), "random_seed": [None, 3]},
    "MISS": {"r": range(2, 7), "": [{}, {}, {"r": 4, "mini_r": 4, "init_weights": "mini"}]},
    "UNILORA": {"r": range(1, 5), "theta_d_length": range(5, 61), "save_indices": 0.5},
    "TINYLORA": {"r": range(1, 4), "u": range(2, 10), "weight_tying": [0.0, 0.5, 1.0], "save_projection": 0.7},
    "VBLORA": {
        "r": range(1, 4), "num_vectors": [9], "vector_length": [4], "topk": range(1, 4), "save_only_topk_weights": 0.5,
    },
    "TRAINABLE_TOKENS": {},
}  # fmt: skip


def options(rng: random.Random, method: str, model: Model, targets: Sequence[str]) -> dict[str, Any]:
    found = dict[str, Any]()
    for name, values in OPTIONS[method].items():
        value = rng.random() < values if isinstance(values, float) else rng.choice(values)
        found |= {name: value} if name else value
    grouped, small = not GROUPED.isdisjoint(targets), model.build is Pixels
    if method == "TRAINABLE_TOKENS":
        found["token_indices"] = sorted(rng.sample(range(10), 3))
    if method == "LORA" and grouped:
        found |= {"r": 12 * rng.randint(1, 2), "use_dora": False}
    if method == "LORA" and model.head == "lm_head" and rng.random() < 0.3:
        found["task_type"] = "SEQ_2_SEQ_LM" if model.build is t5 else "CAUSAL_LM"
    if method in ("LORA", "LOKR", "LOHA") and rng.random() < 0.3 and (method != "LORA" or not grouped):
        found["rank_pattern"] = {rng.choice(targets): rng.randint(1, 6)}
    if method in ("LORA", "LOKR", "LOHA") and rng.random() < 0.3:
        found["alpha_pattern"] = {rng.choice(targets): rng.choice([3, 7.5])}
    if method in ("FOURIERFT", "WAVEFT") and rng.random() < 0.3:
        found["n_frequency_pattern"] = {rng.choice(targets): rng.randint(5, 15 if small else 50)}
    limits = {"n_frequency": 30, "r": 2 if method == "SHIRA" else 100} if small else {}
    return found | {name: min(found[name], most) for name, most in limits.items() if name in found}


# -- Refusals ------------------------------------------------------------------------------------


#: Reasons for which reading a folder is refused.
Reasons = dict[str, Callable[[Case], bool]]

#: Messages with which reading a folder is refused, and of which cases.
NOT_READ: Reasons = {
    "or are embeddings, which cannot have DoRA here: .*; merge the adapter with PEFT": (
        lambda case: (
            bool(case.settings.get("use_dora"))
            and ("trainable_token_indices" in case.settings or MODELS[case.model].embedding in case.targets)
        )
    ),
    r"is a convolution in \d+ groups, and in PEFT's LoRA each reads the channels of all groups": (
        lambda case: case.method == "LORA" and not GROUPED.isdisjoint(case.targets)
    ),
    "lacks (tinylora_P|base_model.randlora_A, which a RandLoRA adapter needs: save it with save_projection=True)": (
        lambda case: case.method in ("TINYLORA", "RANDLORA") and not case.settings["save_projection"]
    ),
}

#: Reasons for which an adapter is not written in its own form; PEFT's LoRA is tried then.
#: Messages with which an adapter is not written in its own form; PEFT's LoRA is tried then.
NOT_WRITTEN: Reasons = {
    "cannot be written as PEFT's TinyLoRA: it needs one θ for all weights, and both factors frozen": (
        lambda case: case.method == "TINYLORA" and not is_one_vector(case)
    ),
    "cannot be written as PEFT's RandLoRA: (it needs ⌈smaller side / rank⌉ terms|some weights have more rows)": (
        lambda case: (
            case.method == "RANDLORA"
            and len({(-(-min(shape) // case.settings["r"]), shape[1] <= shape[0]) for shape in sizes(case)}) > 1
        )
    ),
    "cannot be written as PEFT's WaveFT: PEFT draws the positions from a seed": (
        lambda case: case.method == "WAVEFT" and not case.settings["use_idwt"]
    ),
    "cannot be written as PEFT's Uni-LoRA: it needs one θ for all factors": (
        lambda case: (
            case.method == "UNILORA"
            and case.settings["theta_d_length"] > sum(case.settings["r"] * sum(shape) for shape in sizes(case))
        )
    ),
    "PEFT multiplies other axes|LoRA of that rank is larger than the update itself": (
        lambda case: case.method == "LOKR" and "line" in case.targets and is_full(case, 12, 8)
    ),
}


def sizes(case: Case) -> list[tuple[int, int]]:
    """The shapes (out, in) of the adapted matrices."""
    found = []
    for name, module in pristine(case.model).named_modules():
        layer = [int(part) for part in name.split(".") if part.isdecimal()][:1]
        chosen = case.settings.get("layers_to_transform", layer)
        if layer == chosen and any(f".{name}".endswith(f".{target}") for target in case.targets):
            shape = tuple(module.weight.shape)
            found.append(shape[::-1] if case.model == "gpt2" else shape)
    return found


def is_one_vector(case: Case) -> bool:
    """Whether the trained numbers of TinyLoRA are fewer than those that they make, and not each weight's own."""
    weights = len(sizes(case))
    vectors = max(1, round(weights * (1.0 - case.settings["weight_tying"])))
    numbers, core = case.settings["u"], case.settings["r"] ** 2
    return vectors * numbers <= weights * core and (vectors < weights or weights == 1 or numbers > core)


def is_apart(case: Case) -> bool:
    """Whether PEFT changes a matrix of a tied model in one module alone."""
    model = MODELS[case.model]
    adapted = () if case.method == "TRAINABLE_TOKENS" or "layers_to_transform" in case.settings else case.targets
    changed = {model.embedding, model.head} & {*adapted, *case.settings.get("modules_to_save", ())}
    return case.model in ("tied llama", "gpt2", "t5") and bool(changed) and not case.settings.get("ensure_weight_tying")


def is_full(case: Case, inner: int, outer: int) -> bool:
    """Whether PEFT has no factors of W2, and W1 is not a number."""
    split = pytest.importorskip("peft.tuners.lokr.layer").factorization
    (p, k), (q, n) = (split(side, case.settings["decompose_factor"]) for side in (outer, inner))
    rank = case.settings.get("rank_pattern", {}).get("line", case.settings["r"])
    return bool(rank >= max(k, n) / 2 and (p, q) != (1, 1))


def reason(case: Case, reasons: Reasons) -> str | None:
    """The message with which a case is refused, or None if it must work."""
    return next((message for message, is_of in reasons.items() if is_of(case)), None)


# -- The round trip ------------------------------------------------------------------------------


def base_of(model: str, base: str, folder: Path) -> Any:
    if base != "shapes":
        return folder if base == "folder" else None
    modules = pristine(model).named_modules()
    return {name: tuple(module.weight.shape) for name, module in modules if hasattr(module, "weight")}


def trained(case: Case, place: Path) -> Any:
    """PEFT's model of a case, saved at a place."""
    torch.manual_seed(11)
    wrapped = peft.get_peft_model(fresh(case.model), case.config())
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_((0.5 if case.method == "LOHA" else 0.2) * torch.randn(parameter.shape))
    wrapped.save_pretrained(place)
    if case.dtype == "float32":
        return wrapped.eval()
    weights = place / "adapter_model.safetensors"
    dtype = getattr(torch, case.dtype)
    tensors = {
        # PEFT would also load a weight of the base that is stored next to the update, and round the model.
        name: one.to(dtype) if one.is_floating_point() and ".base_layer." not in name else one
        for name, one in load_file(weights).items()
    }
    save_file(tensors, weights, {"format": "pt"})
    return peft.PeftModel.from_pretrained(fresh(case.model), place).eval()


def check(name: str, model: Any, expected: Any) -> None:
    plain = output(name, pristine(name))
    size, change = torch.linalg.norm(plain), torch.linalg.norm(expected - plain)
    assert change > 1e-4 * size
    off = torch.linalg.norm(output(name, model) - expected)
    # The outputs themselves are rounded, too.
    assert off <= 1e-4 * change + 1e-6 * size, f"off by {float(off / change):.3g} of the update"


def run(case: Case, folder: Path, place: Path) -> None:
    wrapped = trained(case, place / "theirs")
    expected = output(case.model, wrapped)
    base = base_of(case.model, case.base, folder)
    refused = reason(case, NOT_READ)
    if refused is not None:
        with pytest.raises(tna.errors.TnadaptError, match=refused):
            tna.convert(place / "theirs", base=base)
        return
    found = tna.convert(place / "theirs", place / "ours.safetensors", base=base)
    assert found.exact
    assert found.file is not None
    if not found.notes and case.method in ("VERA", "FOURIERFT", "WAVEFT", "C3A", "SHIRA", "MISS"):
        assert found.file.dtype == case.dtype
    ours = fresh(case.model)
    apart = is_apart(case)
    if apart:
        with pytest.raises(tna.FileError, match="of that module alone: load it with untie=True"):
            tt.load(ours, place / "ours.safetensors")
    adapter = tt.load(ours, place / "ours.safetensors", untie=apart)
    check(case.model, ours, expected)

    form = f"peft-{case.method.lower()}"
    form = form if form in FORMS else "peft-lora"
    refused = reason(case, NOT_WRITTEN)
    if refused is not None:
        with pytest.raises(tna.errors.TnadaptError, match=refused):
            tna.convert(place / "ours.safetensors", to=form)
        form = "peft-lora"
    # LoRA of full rank is what PEFT has for dense updates. Only the model tells in how many groups channels are.
    adapter.save(place / "saved.safetensors")
    source = place / ("saved.safetensors" if refused else "ours.safetensors")
    tna.convert(source, place / "back", to=form, base=base, rank=48 if refused else None)
    with warnings.catch_warnings():
        # GPT-2's head is no Conv1D, and PEFT has one setting for all: the head is written if it is a target, or tied to
        # an embedding of which rows are trained.
        if case.model != "gpt2" or not ("lm_head" in case.targets or "trainable_token_indices" in case.settings):
            warnings.filterwarnings("error", message=".*fan_in_fan_out")
        if case.method != "RANDLORA":  # PEFT says so of its own folders, too
            warnings.filterwarnings("error", message=".*(missing|unexpected)")
        back = peft.PeftModel.from_pretrained(fresh(case.model), place / "back").eval()
    check(case.model, back, expected)


CASES = range(500)


def traits(case: Case) -> set[Any]:
    """What a case tries: its model and, of its method, the base, the dtype, the kinds of layers and the settings."""
    model, found = MODELS[case.model], {("model", case.model), (case.method, case.base), (case.method, case.dtype)}
    for target in case.targets:
        layer = "convolution" if target in model.convolutions else "linear"
        found.add((case.method, "embedding" if target in (model.embedding, model.head) else layer))
        found.add((case.method, "in, out" if case.model == "gpt2" else "out, in"))
    for name, value in case.settings.items():
        found.add((case.method, name, str(value) if isinstance(value, (bool, str)) else type(value).__name__))
    return found


def reasons(case: Case) -> set[Any]:
    return {message for message, is_of in (NOT_READ | NOT_WRITTEN).items() if is_of(case)}


def few_cases() -> list[int]:
    """Numbers of a few cases that together have the traits of all, and are refused for every reason."""
    having = {number: traits(drawn(number)) | reasons(drawn(number)) for number in CASES}
    missing, chosen = set[Any]().union(*having.values()), list[int]()
    while missing:
        chosen.append(max(CASES, key=lambda number: len(having[number] & missing)))
        missing -= having[chosen[-1]]
    return chosen


@pytest.mark.parametrize("number", in_depth(CASES, few_cases()))
def test_round_trip(number: int, folders: Callable[[str], Path], tmp_path: Path) -> None:
    case = drawn(number)
    run(case, folders(case.model), tmp_path)


def test_few_are_refused() -> None:
    cases = [drawn(number) for number in CASES]
    assert sum(reason(case, NOT_READ) is not None for case in cases) <= 0.1 * len(cases)
    assert sum(reason(case, NOT_WRITTEN) is not None for case in cases) <= 0.2 * len(cases)
    # Every reason, method and model occurs.
    assert set().union(*map(reasons, cases)) == {*NOT_READ, *NOT_WRITTEN}
    assert ({case.method for case in cases}, {case.model for case in cases}) == ({*OPTIONS}, {*MODELS})


def test_every_method_is_read_or_refused_by_name(tmp_path: Path) -> None:
    kinds = {kind.value for kind in peft.PeftType}
    assert kinds >= OPTIONS.keys()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for kind in sorted(kinds - OPTIONS.keys()):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        message = f"peft_type is '{kind}'; only LORA, LOKR, .* can be converted"
        with pytest.raises(tna.FileError, match=message) as caught:
            tna.convert(tmp_path)
        (known,) = re.findall("; only (.*) can be converted", str(caught.value))
        assert set(known.split(", ")) == OPTIONS.keys()


# -- Convolutions in groups -----------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_peft_loads_lora_of_convolutions_in_groups(rank: int, tmp_path: Path) -> None:
    ours = fresh("pixels")
    adapter = tt.attach(ours, "lora", ["grouped", "depthwise", "point"], rank=rank, alpha=3.0)
    groups = {"point": 1, "grouped": 2, "depthwise": 12}
    assert {target.module: target.groups for target in adapter.targets} == groups
    fill(adapter.parameters(), scale=0.3)
    expected = output("pixels", ours)
    adapter.save(tmp_path / "ours.safetensors")
    found = tna.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", to="peft-lora")
    assert found.exact
    assert found.config is not None
    ranks = {name: found.config["rank_pattern"].get(name, found.config["r"]) for name in groups}
    assert ranks == {name: number * rank for name, number in groups.items()}
    check("pixels", peft.PeftModel.from_pretrained(fresh("pixels"), tmp_path / "theirs").eval(), expected)
    again = converted(tmp_path / "theirs", tmp_path / "again.safetensors")
    assert {target.module: target.groups for target in again.targets} == groups
    assert again.config.rank == rank
    model = fresh("pixels")
    tt.load(model, tmp_path / "again.safetensors")
    check("pixels", model, expected)


def test_groups_that_nothing_records(tmp_path: Path) -> None:
    """Only the model tells them: a file that was loaded onto it and saved again has them."""
    base, tuned, targets = fresh("pixels"), fresh("pixels"), ["grouped", "head"]
    adapter = tt.attach(tuned, "lora", targets, rank=1)
    fill(adapter.parameters(), scale=0.3)
    expected = output("pixels", tuned)
    adapter.bake()
    for name, model in (("base", base), ("tuned", tuned)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    file = tna.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", "lora", targets, rank=1).file
    tna.save(tmp_path / "ours.safetensors", file)
    tt.load(fresh("pixels"), tmp_path / "ours.safetensors").save(tmp_path / "again.safetensors")
    tna.convert(tmp_path / "again.safetensors", tmp_path / "theirs", to="peft-lora")
    check("pixels", peft.PeftModel.from_pretrained(fresh("pixels"), tmp_path / "theirs").eval(), expected)


def test_dora_of_groups_is_refused(tmp_path: Path) -> None:
    tt.attach(fresh("pixels"), "dora", ["grouped"], rank=2).save(tmp_path / "ours.safetensors")
    message = "'grouped' is a convolution in 2 groups: PEFT's DoRA of it takes the norms"
    with pytest.raises(tna.ConfigError, match=message):
        tna.convert(tmp_path / "ours.safetensors", to="peft-lora")


@pytest.mark.parametrize(
    "config",
    [P.dora(2, alpha=3), P.hira(2, alpha=3), P.lokr(2, split_size=1, apply="hadamard"), P.dora(2).replace(terms=2)],
    ids=["dora", "hira", "lokr", "terms"],
)
@pytest.mark.parametrize("name", ["pixels", "gpt2"])
def test_ours_that_do_more_than_add_become_peft_s(config: tna.Config, name: str, tmp_path: Path) -> None:
    ours = fresh(name)
    adapter = tt.attach(ours, config, ["attn.c_proj", "c_fc"] if name == "gpt2" else ["head", "stem", "point"])
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    adapter.save(tmp_path / "ours.safetensors")
    found = tna.convert(tmp_path / "ours.safetensors", tmp_path / "theirs", to="peft-lora", dtype="float32", rank=None)
    assert found.error < 1e-6
    assert found.config is not None
    assert found.config["peft_type"] == ("LORA" if config.apply == "magnitude" else "HIRA")
    expected = output(name, ours)
    check(name, peft.PeftModel.from_pretrained(fresh(name), tmp_path / "theirs").eval(), expected)
    again = fresh(name)
    file = converted(tmp_path / "theirs", tmp_path / "again.safetensors")
    assert file.config.apply == config.apply
    tt.load(again, tmp_path / "again.safetensors")
    check(name, again, expected)
    assert tna.convert(adapter_on(adapter.targets[:1], config), to="peft-lora").exact
    own = {target.module: f"weight{number}.magnitude" for number, target in enumerate(adapter.targets)}
    for number, target in enumerate(file.targets) if config.apply == "magnitude" else ():
        magnitude = file.arrays[f"weight{number}.magnitude"]
        assert np.array_equal(magnitude, adapter.arrays()[own[target.module]].detach().numpy())


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.HiraConfig])
@pytest.mark.parametrize("says", [True, False, None])
@pytest.mark.parametrize("known", [True, False])
def test_gpt2_is_right_whatever_fan_in_fan_out_says(
    config: Any, says: bool | None, known: bool, tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    """PEFT has one setting, of the last module or, with HiRA, of the user; on loading it corrects it for each."""
    settings = config(r=2, target_modules=["attn.c_proj", "c_attn", "mlp.c_proj"])
    expected = output("gpt2", trained_by_peft(tmp_path / "theirs", fresh("gpt2"), settings, scale=0.2))
    place = tmp_path / "theirs" / "adapter_config.json"
    saved = json.loads(place.read_text())
    changes = ({} if says is None else {"fan_in_fan_out": says}) | ({} if known else {"auto_mapping": None})
    place.write_text(json.dumps(saved | changes))
    clear = known or (says is not False and saved["fan_in_fan_out"]) or says is True
    for base in ("folder", "shapes", "none"):
        ours, given = fresh("gpt2"), base_of("gpt2", base, folders("gpt2"))
        unknown = pytest.raises(tna.FileError, match=r"(?i)(give|again with) base= \(--base\), the folder")
        with contextlib.nullcontext() if clear or base == "folder" else unknown:
            tna.convert(tmp_path / "theirs", tmp_path / "ours.safetensors", base=given, overwrite=True)
            tt.load(ours, tmp_path / "ours.safetensors")
            check("gpt2", ours, expected)


def test_a_square_weight_is_not_merged_the_wrong_way(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    shape = tuple(fresh("gpt2").transformer.h[0].attn.c_proj.weight.shape)
    assert shape[0] == shape[1]
    targets = [tna.Target("transformer.h.0.attn.c_proj", shape)]
    config = tna.presets.lora(1)
    plan = tna.UpdatePlan(config, [shape])
    tna.save(tmp_path / "a.safetensors", tna.AdapterFile(config, targets, plan.init()))
    message = r"c_proj\.weight' is stored as \(in, out\), and the adapter's update is one of"
    with pytest.raises(tna.FileError, match=message):
        tna.merge(folders("gpt2"), tmp_path / "a.safetensors", tmp_path / "merged")
    right = [dataclasses.replace(targets[0], transposed=True)]
    tna.save(tmp_path / "b.safetensors", tna.AdapterFile(config, right, plan.init()))
    tna.merge(folders("gpt2"), tmp_path / "b.safetensors", tmp_path / "merged")
