"""``tnadapt plan`` and ``tnadapt presets``, run as by a user."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tests.support import checkpoint_files as cp

pytest.importorskip("typer")


from tests.support.in_process import main, run_here
from tnadapt import cli
from tnadapt.errors import FileError
from tnadapt.planning import model_targets


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_here(main, "plan", *arguments)


@pytest.mark.parametrize("name", ["model.gguf", "."])
def test_a_gguf_model_gets_a_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    done = run(str(tmp_path / name), "--budget", "1000")
    assert done.returncode == 2
    assert "For a GGUF file give the shapes of its weights by --shape, or open it with transformers and" in done.stderr
    assert "tnadapt.plan([target.shape for target in tnadapt.torch.find_targets(model)], budget)" in done.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers in two shards, with an index, a config and tensors of other kinds."""
    names = [f"h.{layer}.attn.{x}_proj.weight" for layer in range(2) for x in "qkvo"]
    tensors: cp.Tensors = {name: ("F32", np.zeros((16, 24), np.float32)) for name in names}
    tensors |= {f"h.{layer}.norm.weight": ("F32", np.ones(24, np.float32)) for layer in range(2)}
    folder = cp.write(tmp_path / "model", tensors, 2)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4}))
    return folder


def test_shapes_as_a_table_and_as_json() -> None:
    done = run("--shape", "64x64*8", "--budget", "300")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == str(tna.plan([(64, 64)] * 8, 300))
    done = run("--shape", "64x64*8", "--budget", "300", "--by", "rank", "--by", "cost", "--all", "--json")
    plan = tna.plan([(64, 64)] * 8, 300, by=["rank", "cost"])
    read = json.loads(done.stdout)
    assert read["by"] == ["rank", "cost"]
    assert [row["front"] for row in read["rows"]] == [row in plan.front for row in plan.rows]


def test_a_model_as_json(model: Path) -> None:
    done = run(str(model), "--budget", "4 kB", "--json", "--all", "--targets", "qv", "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read["targets"] == [f"h.{layer}.attn.{x}_proj.weight" for layer in range(2) for x in "qv"]
    shapes, layers, roles = [(16, 24)] * 4, ["h.0.attn"] * 2 + ["h.1.attn"] * 2, ["q", "v"] * 2
    assert read["budget"] == 2000
    assert {"layer", "role"} < {str(row["config"]["groups"]) for row in read["rows"]}
    for row in read["rows"]:
        config = tna.Config.from_dict(row["config"])
        assert row["parameters"] == tna.parameter_count(config, shapes, layers, roles)
        assert row["bytes"] == 2 * row["parameters"]
    assert run(str(model / "model.safetensors.index.json"), "--budget", "2000").returncode == 0


def test_pictures(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines, places = tmp_path / "lines.svg", tmp_path / "places.svg"
    done = run(
        str(model), "--budget", "100", "--picture", str(lines), "--layout-picture", str(places),
        "--preset", "superlora", "--set", "groups=3",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"where SuperLoRA G = 3, r = 4 places each weight: {places}" in done.stdout
    assert "<!-- budget, 100 -->" in lines.read_text()
    for name in ("q0", "v0", "q1", "v1", "group 2"):
        assert f"<!-- {name} -->" in places.read_text()
    # Without a setting: the one with most parameters in the table.
    first = tna.plan([(64, 64)] * 8, 300).shown[0].name
    done = run("--shape", "64x64*8", "--budget", "300", "--layout-picture", str(places))
    assert f"where {first} places each weight" in done.stdout


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_a_terminal_of_any_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.app(["plan", "--shape", "64x64*8", "--budget", "300"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    titles = next(line for line in lines if "setting" in line)
    assert "fastfood" in "".join(lines)
    assert ("padding" in titles) == (columns >= 120)
    table = lines[lines.index(titles) : next(number for number, line in enumerate(lines) if line.startswith("order: "))]
    assert columns < 80 or max(map(len, table)) <= columns + len("\x1b[1m\x1b[0m")
    assert any(line.startswith("\x1b[1m●") for line in table)


@pytest.mark.parametrize(
    ("given", "roles", "chosen"),
    [
        (["q_proj"], "q", ["q_proj"]),
        (["1.attn.k_proj"], "k", ["1.attn.k_proj"]),
        (["q_proj", "o_proj"], "qo", ["q_proj", "o_proj"]),
        (["k"], "k", "k"),
        (["q", "k"], "qk", "qk"),
        ([".*k_proj"], "k", ".*k_proj"),
        (["h.0.attn.[kv]_proj"], "kv", "h.0.attn.[kv]_proj"),
    ],
)
def test_targets_are_names_roles_or_a_pattern(model: Path, given: list[str], roles: str, chosen: Any) -> None:
    done = run(str(model), "--budget", "100", *(part for name in given for part in ("--targets", name)))
    assert done.returncode == 0, done.stderr
    targets = model_targets(str(model), chosen)
    assert {target.module.rpartition(".")[2][0] for target in targets} == set(roles)
    assert f"\n{len(targets)} weight{'s' * (len(targets) > 1)} of " in done.stdout
    # The lines that say how to go on select the same weights, in Python and as a command.
    call, command = done.stdout.splitlines()[-2:]
    assert call.endswith(f"targets={chosen!r})")
    words = shlex.split(command)
    again = [part for place, word in enumerate(words) if word == "--targets" for part in words[place : place + 2]]
    assert run(str(model), "--budget", "100", *again).stdout == done.stdout


def listed(*arguments: str) -> dict[str, dict[str, object]]:
    done = run_here(main, "presets", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return {row["preset"]: row for row in json.loads(done.stdout)["presets"]}


def test_every_preset_is_listed_with_its_arguments_and_its_method() -> None:
    presets = listed()
    assert list(presets) == list(tna.presets.__all__)
    assert presets["lora"] == {
        "preset": "lora", "arguments": "rank=4", "from": 36864,
        "method": "LoRA: ΔW = (alpha / r) B A (table 1; Hu et al., arXiv 2106.09685)",
    }  # fmt: skip
    assert presets["randlora"]["arguments"] == "rank=32, rows, cols"
    assert [name for name, row in presets.items() if row["from"] is None] == ["cara", "lorta_cp"]


def test_the_fewest_parameters_are_those_of_a_setting(model: Path) -> None:
    presets = listed("--shape", "64x48*4")
    for name, sizes in {"lora": (1,), "dense": (), "unilora": (1,)}.items():
        config = getattr(tna.presets, name)(*sizes)
        assert presets[name]["from"] == tna.UpdatePlan(config, [(64, 48)] * 4).num_parameters
    assert listed(str(model))["lora"]["from"] == 4 * 40
    assert listed(str(model), "--targets", "qkvo")["lora"]["from"] == 8 * 40


def test_a_table_of_presets() -> None:
    lines = run_here(main, "presets", "--shape", "64x64*8").stdout.splitlines()
    assert lines[0].split() == ["preset", "arguments", "from", "method"]
    assert len(lines) == 1 + len(tna.presets.__all__) + 3
    assert lines[-3] == "from: the fewest parameters on 8 weights of 64 x 64"
    assert "1 weight of 64 x 64" in run_here(main, "presets", "--shape", "64x64").stdout
    assert "on 2 weights\n" in run_here(main, "presets", "--shape", "64x64", "--shape", "8x8").stdout


class MissingError(Exception):
    """Not one of ours, like the errors of the client."""


def stub(answers: dict[str, Any], config: str | None, folder: Path) -> types.ModuleType:
    module = types.ModuleType("huggingface_hub")

    def get_safetensors_metadata(name: str) -> Any:
        if name not in answers:
            raise MissingError(f"404: {name}\nRequest ID: 7")
        entries = {tensor: types.SimpleNamespace(shape=shape) for tensor, shape in answers[name].items()}
        return types.SimpleNamespace(files_metadata={"model.safetensors": types.SimpleNamespace(tensors=entries)})

    def hf_hub_download(name: str, file: str) -> str:
        (folder / file).write_text(config or "")
        return str(folder / file)

    module.get_safetensors_metadata = get_safetensors_metadata  # type: ignore[attr-defined]
    module.file_exists = lambda name, file: config is not None  # type: ignore[attr-defined]
    module.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]
    return module


def test_a_hub_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    shapes = {f"h.{i}.attn.c_attn.weight": [8, 24] for i in range(2)}
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub({"gpt2": shapes}, '{"model_type": "gpt2"}', tmp_path))
    found = model_targets("gpt2")
    assert [(target.role, target.shape, target.transposed) for target in found[:2]] == [
        ("q", (8, 8), True), ("v", (8, 8), True),
    ]  # fmt: skip
    with pytest.raises(FileError, match=r"org/none: no such file .* loading it from the hub failed: 404: org/none$"):
        model_targets("org/none")
    with pytest.raises(FileError, match=r"404: unilra; a model is expected here, and 'unilora' is a method$"):
        model_targets("unilra")
    # What is here is not asked for there.
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(FileError, match="empty folder"):
        model_targets("gpt2")


@pytest.mark.parametrize("config", ["{", "[]", '{"a": NaN}'])
def test_a_hub_config_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str) -> None:
    shapes = {"attn.q.weight": [4, 4], "attn.v.weight": [4, 4]}
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub({"a/b": shapes}, None, tmp_path))
    assert len(model_targets("a/b")) == 2
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub({"a/b": shapes}, config, tmp_path))
    with pytest.raises(FileError, match=r"a/b: config\.json"):
        model_targets("a/b")


def test_without_the_hub_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileError, match=r"pip install 'tnadapt\[hub\]'"):
        model_targets("org/model")
