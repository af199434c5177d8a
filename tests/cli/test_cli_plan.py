"""``tnadapt plan``, run as by a user."""

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
from safetensors.numpy import save_file

import tnadapt as tna

pytest.importorskip("typer")


from tests.support.in_process import main, run_here
from tnadapt import cli
from tnadapt.cli._options import targets_of
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
    folder = tmp_path / "model"
    folder.mkdir()
    places = {}
    for layer in range(2):
        tensors = {f"h.{layer}.attn.{x}_proj.weight": np.zeros((16, 24), np.float32) for x in "qkvo"}
        tensors |= {f"h.{layer}.norm.weight": np.ones(24, np.float32)}
        name = f"model-{layer + 1:05}-of-00002.safetensors"
        save_file(tensors, str(folder / name))
        places |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4}))
    return folder


def test_shapes_as_a_table() -> None:
    command = [sys.executable, "-m", "tnadapt", "plan", "--shape", "64x64*8", "--budget", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == str(tna.plan([(64, 64)] * 8, 300))


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


def test_only_headers_are_read(model: Path) -> None:
    # Of each file, nothing is left but the header and a hole of the tensors' length.
    for file in model.glob("*.safetensors"):
        content = file.read_bytes()
        head = 8 + int.from_bytes(content[:8], "little")
        with file.open("wb") as hollow:
            hollow.write(content[:head])
            hollow.truncate(len(content))
    assert [target.shape for target in model_targets(model)] == [(16, 24)] * 4


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


def test_by_and_all() -> None:
    done = run("--shape", "64x64*8", "--budget", "300", "--by", "rank", "--by", "cost", "--all", "--json")
    found = tna.plan([(64, 64)] * 8, 300, by=["rank", "cost"])
    read = json.loads(done.stdout)
    assert read["by"] == ["rank", "cost"]
    assert [row["front"] for row in read["rows"]] == [row in found.front for row in found.rows]


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
    table = lines[: next(number for number, line in enumerate(lines) if line.startswith("order: "))]
    assert columns < 80 or max(map(len, table)) <= columns + len("\x1b[1m\x1b[0m")
    assert any(line.startswith("\x1b[1m●") for line in table)


@pytest.mark.law("hostile-commands")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a budget: --budget 1000"),
        (["--budget", "1000"], "give a model, or the shapes of weights"),
        (["--budget", "1000", "--shape", "3x3", "here"], "one of them"),
        (["--budget", "4k", "--shape", "3x3"], "got '4k'"),
        (["--budget", "0", "--shape", "3x3"], "at least 1 parameter; got '0'"),
        (["--budget", "3 B", "--shape", "3x3"], "one parameter is 4 bytes in float32"),
        (["--budget", "100", "--shape", "3"], "--shape takes ROWSxCOLS"),
        (["--budget", "100", "--shape", "3x0"], "both at least 1"),
        (["--budget", "100", "--shape", "3x3", "--targets", "qv"], "--targets chooses among the weights of a model"),
        (["--budget", "100", "--shape", "3x3", "--by", "speed"], "by must name"),
        (["--budget", "100", "--shape", "3x3", "--dtype", "int4"], "dtype must be one of"),
        (["--budget", "100", "--shape", "3x3", "--set", "rank=2"], "give its file, too"),
        (["--budget", "100", "--shape", "3x3", "--set", "rank=0", "--layout-picture", "a.png"], "rank must be from 1"),
        (["--budget", "100", "nowhere.safetensors"], "nowhere.safetensors: No such file or directory"),
        (
            ["--budget", "100", "timm:vit_tiny"],
            "plans read the headers of files; give the model's repository on the hub",
        ),
        (["--budget", "100", "./nowhere"], "./nowhere: No such file or directory"),
        (["--budget", "100", "docs"], "has no safetensors file"),
    ],
)
def test_a_users_mistake_is_exit_code_2_and_no_traceback(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("a.nonsense", "no/such/folder/a.png"):
        done = run("--budget", "100", "--shape", "4x4", "--picture", str(tmp_path / name))
        assert done.returncode == 2
        assert done.stderr.startswith("tnadapt: ")
        assert "Traceback" not in done.stderr


def test_targets_that_are_not_there(model: Path) -> None:
    done = run(str(model), "--budget", "100", "--targets", "nothing.*")
    assert done.returncode == 2
    assert "no tensor of the checkpoint is a target" in done.stderr


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
    done = run(str(model), "--budget", "100", *(part for one in given for part in ("--targets", one)))
    assert done.returncode == 0, done.stderr
    # The lines that say how to go on select the same weights, in Python and as a command.
    call, command = done.stdout.splitlines()[-2:]
    assert call.endswith(f"targets={chosen!r})")
    found = model_targets(str(model), chosen)
    assert {target.module.rpartition(".")[2][0] for target in found} == set(roles)
    assert f"\n{len(found)} weight{'s' * (len(found) > 1)} of " in done.stdout
    again = shlex.split(command)
    given = [again[place + 1] for place, word in enumerate(again) if word == "--targets"]
    assert targets_of(given) == chosen


def test_targets_that_are_empty(model: Path) -> None:
    for given in ("", " "):
        done = run(str(model), "--budget", "100", "--targets", given)
        assert done.returncode == 2
        assert "--targets is empty; give roles such as qv, names of modules, or a regular expression" in done.stderr


# -- The hub, which is not to be had here: its client's answers are made up ------------------------


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
    # What is here is not asked for there.
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(FileError, match="empty folder"):
        model_targets("gpt2")


@pytest.mark.parametrize("config", ["{", "[]", '{"a": NaN}'])
def test_a_hub_config_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub({"a/b": {"x.q.weight": [4, 4]}}, config, tmp_path))
    with pytest.raises(FileError, match=r"a/b: config\.json"):
        model_targets("a/b")


def test_a_hub_model_without_a_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shapes = {"attn.q.weight": [4, 4], "attn.v.weight": [4, 4]}
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub({"a/b": shapes}, None, tmp_path))
    assert len(model_targets("a/b")) == 2


def test_without_the_hub_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileError, match=r"pip install 'tnadapt\[hub\]'"):
        model_targets("org/model")
