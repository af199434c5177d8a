"""A board of PEFT in small: its own run.py on the CPU, with a tiny model and tiny data in the place of the Hub's.

``python -m tests.project.tiny_board BOARD HOME EXPERIMENT [OPTIONS]`` runs in a process of its own, because it replaces
functions of torch and datasets. The board refuses to run without a GPU, so the CPU poses as one.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
WORDS = [
    "<pad>",
    "<end>",
    "<unknown>",
    "Question",
    "Answer",
    "Think",
    "step",
    "by",
    "The",
    "answer",
    "is",
    "one",
    "two",
]
WORDS += [*"0123456789", ":", ".", "#", "plus"]
SUMS = [(first, second) for first in range(5) for second in range(5)]


class _PosingCPU(str):
    """The CPU's name; the boards' module ``utils``, which asks for CUDA while it is imported, takes it for that."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        frame = sys._getframe(1)
        asked = frame.f_code.co_name == "<module>" and frame.f_globals["__name__"] == "utils"
        return (asked and other == "cuda") or str.__eq__(self, other) is True

    def __hash__(self) -> int:
        return str.__hash__(self)


def load_dataset(name: str, *args: Any, **kwargs: Any) -> Any:
    """Return sums of two digits, in the columns of each of MetaMathQA's data sets, or the images of image-gen."""
    from datasets import Dataset, DatasetDict
    from PIL import Image

    questions = [f"{first} plus {second}" for first, second in SUMS]
    texts = [f"The answer is : {first + second}" for first, second in SUMS]
    if name == "meta-math/MetaMathQA":
        columns = {"query": questions, "response": texts, "type": ["sum"] * len(SUMS), "original_question": questions}
        return DatasetDict(train=Dataset.from_dict(columns))
    if name == "openai/gsm8k":
        columns = {"question": questions[:6], "answer": [f"#### {first + second}" for first, second in SUMS[:6]]}
        return DatasetDict(train=Dataset.from_dict(columns), test=Dataset.from_dict(columns))
    if name == "HuggingFaceFW/finewiki":
        return Dataset.from_dict({"text": texts[:4]})
    if name == "peft-internal-testing/cat-image-dataset":
        return Dataset.from_dict({"image": [Image.new("RGB", (8, 8), (30 * shade, 0, 90)) for shade in range(6)]})
    raise ValueError(f"the board asks for data set {name!r}, for which there is no small one")


def pose_as_gpu() -> None:
    """Give the CPU the functions that the boards call of an accelerator."""
    import peft.utils

    peft.utils.infer_device = lambda: _PosingCPU("cpu")
    none: Callable[..., int] = lambda *_: 0  # noqa: E731
    for name in ("memory_allocated", "memory_reserved", "max_memory_reserved", "reset_peak_memory_stats"):
        setattr(torch.cpu, name, none)
    for name in ("manual_seed_all", "empty_cache"):
        setattr(torch.cpu, name, none)
    torch.cpu.get_device_name = lambda *_: "none"  # type: ignore[attr-defined]


class _Folder(tempfile.TemporaryDirectory):  # type: ignore[type-arg]
    """That of Python 3.12, of which the boards use ``delete``."""

    def __init__(self, *, delete: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not delete:
            self._finalizer.detach()

    def cleanup(self) -> None:
        if self._finalizer.alive:
            super().cleanup()


def launcher() -> Any:
    """Return the module benchmarks/peft_boards/run.py."""
    spec = importlib.util.spec_from_file_location("peft_boards_run", BENCHMARKS / "peft_boards" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_llama(**settings: Any) -> Any:
    """Return a Llama with the board's module names, heads of 128, and fewer values than queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 8, **settings}
    return LlamaForCausalLM(
        LlamaConfig(
            num_attention_heads=2, num_key_value_heads=1, head_dim=128, vocab_size=len(WORDS), pad_token_id=0,
            bos_token_id=1, eos_token_id=1, max_position_embeddings=256, **sizes,
        )
    )  # fmt: skip


def tiny_flux(**settings: Any) -> Any:
    """Return a FLUX.2 transformer with the board's module names and heads of 128."""
    from diffusers import Flux2Transformer2DModel

    torch.manual_seed(0)
    sizes = {"in_channels": 4, "num_layers": 2, "num_single_layers": 4, "num_attention_heads": 1, **settings}
    model = Flux2Transformer2DModel(
        attention_head_dim=128, joint_attention_dim=24, timestep_guidance_channels=16, guidance_embeds=False, **sizes
    )
    return model.requires_grad_(False)


def tokenizer() -> Any:
    """Return a tokenizer of words, with a chat template that adds nothing."""
    import tokenizers
    import transformers

    words = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unknown>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<unknown>",
        chat_template="{{ messages[0]['content'] }}",
    )  # fmt: skip


def save_model(folder: Path) -> None:
    """Save what MetaMathQA loads: the tiny Llama and the tokenizer.

    The board stops if the base model's loss on the texts of finewiki is not between 1 and 2; two steps make it 1.6.
    """
    model, words = tiny_llama(), tokenizer()
    ids = torch.tensor(words([f"The answer is : {first + second}" for first, second in SUMS[:4]])["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def save_pipeline(folder: Path) -> None:
    """Save what image-gen loads: in ``model`` a pipeline around the tiny transformer, in ``dino`` a tiny DINOv2."""
    import diffusers
    import transformers

    qwen = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "vocab_size": len(WORDS), "head_dim": 8}
    vision = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
        "initializer_range": 1.0,
    }
    diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=diffusers.AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,),
            layers_per_block=1, latent_channels=1, norm_num_groups=1, mid_block_add_attention=False,
        ),
        text_encoder=transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(num_attention_heads=1, num_key_value_heads=1, **qwen)
        ),
        tokenizer=tokenizer(),
        transformer=tiny_flux(),
    ).save_pretrained(folder / "model")  # fmt: skip
    transformers.Dinov2Model(transformers.Dinov2Config(**vision)).save_pretrained(folder / "dino")
    size = {"height": 8, "width": 8}
    transformers.BitImageProcessor(size={"shortest_edge": 8}, crop_size=size).save_pretrained(folder / "dino")


def image_training_params(folder: Path, **changes: Any) -> Mapping[str, Any]:
    """Return image-gen's settings for a few steps and small images on what :func:`save_pipeline` saved."""
    return {
        "model_id": str(folder / "model"),
        "dino_model_id": str(folder / "dino"),
        "dino_image_size": 8,
        "resolution": 8,
        "repeats": 4,
        "max_steps": 4,
        "eval_steps": 2,
        "valid_size": 1,
        "test_size": 1,
        "num_inference_steps": 2,
        "max_sequence_length": 4,
        "text_encoder_out_layers": [1, 2, 3],
        "instance_prompts": "one",
        "sample_image_prompts": ["one"],
        "drift_image_prompts": ["two", "step"],
        "optimizer_kwargs": {"lr": 0.5},  # so that the images differ after four steps, in spite of their 8 bits
        **changes,
    }


def training_params(model: Path, **changes: Any) -> Mapping[str, Any]:
    """Return MetaMathQA's settings for a few steps on the tiny model; the rest is the board's default."""
    return {
        "model_id": str(model),
        "max_seq_length": 64,
        "batch_size": 4,
        "batch_size_eval": 6,
        "max_steps": 4,
        "eval_steps": 2,
        "generation_kwargs": {"max_length": 64, "max_new_tokens": 8},
        **changes,
    }


def main(board: str, home: str, experiment: str, *options: str) -> None:
    import datasets

    pose_as_gpu()
    datasets.load_dataset = load_dataset
    if sys.version_info < (3, 12):
        tempfile.TemporaryDirectory = _Folder  # type: ignore[misc]
    launcher().launch(Path(board), Path(home), experiment, options)


if __name__ == "__main__":
    main(*sys.argv[1:])
