"""The rows found in a checkpoint are those found in its model: the same numbers, role by role.

transformers may save weights under other names than in memory, so the numbers are compared: no two rows of these models
are equal.
"""

from __future__ import annotations

import contextlib
import copy
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.errors import TargetError
from tnadapt.targets.attention_layouts import TABLE
from tnadapt.targets.checkpoint_targets import find_stored
from tnadapt.targets.fused_rows import LayoutError
from tnadapt.targets.prefixes import paired
from tnadapt.targets.target import Target
from tnadapt.torch._target_selection import attentions, find_targets

from .architectures import MODELS, build
from .configured import CONFIGURED, configured
from .test_fused_weights import ATTENTIONS, SPLITS

# A checkpoint has lists of sizes, one for each stage, and nothing says which stage a weight belongs to.
REFUSED = {"levit": "queries_keys_values"}

# What a role's targets are, told by their numbers.
Numbers = dict[tuple[str, bytes], Target]


def numbers(targets: list[Target], tensors: Mapping[str, Tensor]) -> Numbers:
    found = {}
    for target in targets:
        array = target.select(tensors[target.name].detach()).contiguous().numpy()
        found[target.role, array.tobytes()] = target
    assert len(found) == len(targets)
    return found


def compare(model: nn.Module, stored: Mapping[str, Tensor], config: Any) -> None:
    """The checkpoint's targets have the model's numbers, in layers of the same weights, q before k before v."""
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    in_memory = {**dict(model.named_parameters()), **model.state_dict()}
    for roles in ("qkvo", "qv", "q", "k", "v", "o"):
        there = find_targets(model, roles, untie=True)
        here = find_stored(shapes, roles, config)
        theirs, ours = numbers(there, in_memory), numbers(here, stored)
        assert theirs.keys() == ours.keys(), roles
        assert [theirs[key].shape for key in ours] == [target.shape for target in here]
        layers = {(theirs[key].layer, target.layer) for key, target in ours.items()}
        assert len(layers) == len({one for one, _ in layers}) == len({one for _, one in layers})
        # Where the names say at all which is which, they say it rightly.
        pairs = paired(there, here)
        if pairs is not None:
            assert pairs == [ours[key] for key in theirs]
        if all(target.name in stored for target in there):
            assert set(there) == set(here)
            assert pairs == there


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize("name", CONFIGURED)
def test_a_saved_model_has_the_targets_of_the_one_in_memory(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = configured(name)
    model.save_pretrained(tmp_path)
    stored, config = load_file(tmp_path / "model.safetensors"), open_checkpoint(tmp_path).config
    if name in REFUSED:
        with pytest.raises(LayoutError, match=f"'{REFUSED[name]}' in different ways"):
            compare(model, stored, config)
    else:
        compare(model, stored, config)


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize("name", sorted(MODELS.keys() - CONFIGURED.keys() - {"torchvision_resnet"}))
def test_a_state_dict_has_the_targets_of_its_model(name: str) -> None:
    model, _ = build(name)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(number))
    config: Any = getattr(model, "config", None)
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config) if config is not None else None
    compare(model, model.state_dict(), config)


# -- Every class of the table ------------------------------------------------------------------

# The config.json of a model of the attention in each case of test_fused; None for what a checkpoint says too little of.
CONFIGS: dict[str, dict[str, Any] | None] = {
    "gpt_neox_japanese": {"model_type": "gpt_neox_japanese", "num_attention_heads": 4},
    "persimmon": {"model_type": "persimmon", "num_attention_heads": 4},
    "deberta": {"model_type": "deberta", "num_attention_heads": 4},
    "exaone_vision": {"model_type": "exaone4_5_vision", "num_heads": 4, "num_key_value_heads": 2},
    "dbrx": {"model_type": "dbrx", "n_heads": 4, "attn_config": {"kv_n_heads": 2}},
    "bark": {"model_type": "semantic", "num_heads": 4},
    "openai_gpt": {"model_type": "openai-gpt", "n_head": 4},
    "kolors_text": {
        "model_type": "chatglm", "num_attention_heads": 4, "multi_query_attention": True, "multi_query_group_num": 2,
    },
    "kolors_text_heads": {"model_type": "chatglm", "num_attention_heads": 4, "multi_query_attention": False},
    "chatglm": {"model_type": "chatglm", "num_attention_heads": 4, "position_encoding_2d": True},
    "internlm2": {"model_type": "internlm2", "num_attention_heads": 4, "num_key_value_heads": 2},
    "moss": {"model_type": "moss", "n_head": 8},
    "qwen": {"model_type": "qwen", "num_attention_heads": 4},
    "mpt_grouped": {"model_type": "mpt", "n_heads": 4, "attn_config": {"kv_n_heads": 2}},
    "baichuan": {"model_type": "baichuan", "num_attention_heads": 4},
    "mobilevit_transformers": {"model_type": "mobilevitv2"},
    "minimax_lightning": {"model_type": "minimax", "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3_next": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 8,
    },
    "qwen3_5": {
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 8,
    },
    # Plain names, which need no config.
    "tnt": {}, "maxxvit": None, "gcvit": None, "mobilenet_multi_query": {}, "joy_image": {}, "guided_diffusion": None,
}  # fmt: skip

# Whole models of these are above, or the library that ships the class is the model's own repository.
ELSEWHERE = {
    "BloomAttention", "GPTNeoXAttention", "FalconAttention", "GPTBigCodeAttention", "CodeGenAttention", "GPT2Attention",
    "ImageGPTAttention", "DecisionTransformerGPT2Attention", "Phi3Attention", "MptAttention", "ModernBertAttention",
    "LSHSelfAttention", "DeepseekV4Attention",
}  # fmt: skip
# Of the same code as one that is compared: Phi3Attention's, and ParallelScalingBlock's.
ALIKE = {"Phi4MultimodalAttention", "timm.models.vision_transformer.DiffParallelScalingBlock"}


def _cases() -> dict[str, Callable[[], Any]]:
    return {**ATTENTIONS, **{name: make for name, (_, make) in SPLITS.items()}}


def _in_checkpoint(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {f"layers.0.attn.{name}": tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _rows(targets: list[Target]) -> set[Any]:
    return {(t.name.removeprefix("layers.0.attn."), t.stored, t.role, t.rows, t.transposed) for t in targets}


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize("name", _cases())
def test_an_attention_in_a_checkpoint_is_read_as_in_memory_or_refused(name: str) -> None:
    torch.manual_seed(0)
    module, _, _ = _cases()[name]()
    in_memory = _rows([target for found in attentions(module) for target in found.targets("qkv")])
    shapes, own = _in_checkpoint(module), CONFIGS.get(name)
    if name.startswith("maxxvit"):
        # timm's models all have it; bare, this attention cannot be told from a vision transformer's.
        shapes["layers.0.attn.rel_pos.relative_position_bias_table"] = (2, 7, 7)
    if own is not None:
        assert _rows(find_stored(shapes, "qkv", own)) == in_memory
    # With a config that says less, or with none, never other rows.
    others: list[Any] = [None, {}, {"model_type": "unheard of"}, {"num_attention_heads": 4, "num_key_value_heads": 2}]
    for config in others:
        with contextlib.suppress(TargetError):
            assert _rows(find_stored(shapes, "qkv", config)) == in_memory, config


@pytest.mark.law("fused-on-disk")
def test_every_class_of_the_table_is_built_somewhere() -> None:
    seen = set(ELSEWHERE | ALIKE)
    for make in _cases().values():
        try:
            module, _, _ = make()
        except pytest.skip.Exception:
            pytest.skip("a library whose classes the table has is not installed")
        for part in module.modules():
            seen |= {name for cls in type(part).__mro__ for name in (cls.__name__, f"{cls.__module__}.{cls.__name__}")}
    missing = {name for entry in TABLE for name in entry.classes} - seen
    assert not missing
    models = {type(part).__name__ for name in CONFIGURED for part in configured(name).modules()}
    assert models >= ELSEWHERE


# -- Models of timm ---------------------------------------------------------------------------

_TIMM = {
    # As a state dict has them, with or without timm's config.json.
    True: [
        "vit_small_patch14_dinov2", "swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224", "cait_xxs24_224",
        "mvitv2_tiny", "volo_d1_224", "tnt_s_patch16_224", "hiera_tiny_224", "mobilenetv4_hybrid_medium",
    ],
    # Of layouts that only the classes tell.
    False: [
        "coatnet_0_rw_224", "maxvit_tiny_rw_224", "levit_128s", "tiny_vit_5m_224", "efficientformer_l1",
        "gcvit_xxtiny", "shvit_s1", "efficientvit_b0", "halonet26t", "botnet26t_256", "lambda_resnet26t",
    ],
}  # fmt: skip


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize(("name", "found"), [(name, found) for found, names in _TIMM.items() for name in names])
def test_a_model_of_timm_is_read_as_in_memory_or_refused(name: str, found: bool) -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for config in ({"architecture": name}, None):
        if found:
            assert set(find_stored(shapes, "qkvo", config)) == set(find_targets(model, "qkvo"))
        else:
            assert find_targets(model, "qkv")
            with pytest.raises(LayoutError, match="in an unknown layout"):
                find_stored(shapes, "qkv", config)


def test_a_mobilevit_of_timm_needs_its_config() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("mobilevitv2_050", pretrained=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert set(find_stored(shapes, "qkvo", {"architecture": "mobilevitv2_050"})) == set(find_targets(model, "qkvo"))
    with pytest.raises(LayoutError, match=r"there is no config\.json"):
        find_stored(shapes, "qkvo")


# -- From two checkpoints and back --------------------------------------------------------------

FUSED = [
    "deberta", "bloom", "gpt_neox", "persimmon", "falcon_old", "falcon_multi_query", "falcon_new", "gpt_bigcode",
    "gpt_bigcode_heads", "codegen", "mpt", "phi3", "modernbert", "gpt2", "minimax", "qwen3_next", "deepseek_v2",
    "qwen2_vl", "radio", "reformer",
]  # fmt: skip


@pytest.mark.law("fused-on-disk")
@pytest.mark.parametrize("name", FUSED)
def test_an_adapter_from_two_checkpoints_is_all_that_was_tuned_in_memory(name: str, tmp_path: Path) -> None:
    base = configured(name)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for target in find_targets(tuned, "qv", untie=True):
            block = target.block(tuned.get_parameter(target.name))
            block += torch.randn(block.shape, generator=torch.Generator().manual_seed(1))
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    found = tna.extract(tmp_path / "base", tmp_path / "tuned", tna.presets.dense())
    # Nothing was tuned but the rows that were found, and these wholly.
    assert found.others == ()
    tna.save(tmp_path / "a.safetensors", found.file)
    adapter = tt.load(base, tmp_path / "a.safetensors")
    adapter.merge()
    merged = base.state_dict()
    for key, expected in tuned.state_dict().items():
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=1e-5)


# -- Order ------------------------------------------------------------------------------------------------------

# Models whose linear layers have the order of common models.
ORDERED = [
    "bart", "bert", "bloom", "clip", "deberta", "dinov2", "falcon_new", "gpt2", "gpt_neox", "gptj", "hiera", "llama",
    "minicpm3", "modernbert", "mpt", "openai_gpt", "opt", "qwen2_vl", "reformer", "sam", "siglip", "swin", "t5",
    "torch_encoder", "vit", "whisper",
]  # fmt: skip


def _spelled(names: list[str], seed: int) -> list[Any]:
    """Return the same targets in several spellings."""
    shuffled = random.Random(seed).sample(names, len(names))
    return [names, shuffled, [*shuffled, *names[:3]], "|".join(map(re.escape, shuffled)), tuple(reversed(names))]


@pytest.mark.parametrize("name", ORDERED)
def test_targets_of_a_checkpoint_are_in_the_order_of_the_model(name: str) -> None:
    model = configured(name) if name in CONFIGURED else build(name)[0]
    config = model.config.to_dict() if hasattr(model, "config") else None
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    shuffled = dict(random.Random(0).sample(list(shapes.items()), len(shapes)))
    for roles in ("qv", "kqvo"):
        assert find_stored(shuffled, roles, config) == find_targets(model, roles, untie=True)
    names = [target.module for target in find_targets(model, "all-linear", untie=True)]
    expected = find_targets(model, names, untie=True)
    for spelling in _spelled(names, 1):
        assert find_targets(model, spelling, untie=True) == expected
        assert find_stored(shuffled, spelling, config) == expected


def test_given_targets_keep_their_order_on_disk() -> None:
    model, _ = build("bert")
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    targets = find_targets(model)[::-1]
    assert find_stored(shapes, targets) == find_targets(model, targets) == targets


# -- Named cases --------------------------------------------------------------------------------


def test_all_roles_of_a_bert_and_a_llama() -> None:
    for name in ("bert", "llama"):
        model, _ = build(name)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert find_stored(shapes, "qkvo") == find_targets(model, "qkvo")


def test_paths_and_patterns() -> None:
    model, _ = build("bert")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    by_path = find_stored(shapes, ["attention.self.query", "intermediate.dense"])
    assert {target.role for target in by_path} == {"linear"}
    assert find_stored(shapes, r".*\.query") == [target for target in by_path if "query" in target.module]
    for wrong, match in (
        (["qery"], "such as .*query"),
        ("(", "nor a regular expression"),
        (3, "must be roles"),
        ("nothing.*", "no tensor of the checkpoint"),
    ):
        with pytest.raises(TargetError, match=match):
            find_stored(shapes, wrong)


def test_an_empty_checkpoint_says_so() -> None:
    with pytest.raises(TargetError, match="no weights of layers at all"):
        find_stored({"norm.weight": (4,)})
