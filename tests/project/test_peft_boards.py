"""The experiments for PEFT's boards: their files, their counts, and what the boards' code does with them."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import BENCHMARKS

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import tnadapt as tna  # noqa: E402
import tnadapt.torch as tt  # noqa: E402
import tnadapt.torch.peft as plugin  # noqa: E402
from tests.project import tiny_board  # noqa: E402
from tests.support.depth import in_depth  # noqa: E402

plugin.register()

pytestmark = [
    pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not in this copy of the project"),
    # PEFT 0.21 asks transformers 5 for a property under its old name.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

FOLDER = BENCHMARKS / "peft_boards"
CHECKOUT = os.environ.get("PEFT_CHECKOUT")
ROOT = Path(__file__).parents[2]


# The folders of which the fast tests try one each; the slow ones try all.
QUICK = ("unilora-256", "superlora-layer-linear-rank1-ratio1e-3", "lora_xs-rank8")


def folders(board: str) -> list[Any]:
    found = sorted((FOLDER / board).glob("experiments/*/*"))
    quick = [path for path in found if path.name.endswith(QUICK)]
    return [
        pytest.param(path, id=path.name, marks=() if path in quick else pytest.mark.slow)
        for path in in_depth(found, [*quick, *(path for path in found if path not in quick)][: len(found) // 3])
    ]


@pytest.fixture(scope="module")
def experiments() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("experiments")
    finally:
        sys.path.remove(str(FOLDER))
        del sys.modules["experiments"]


# -- The files ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_files_are_what_the_script_writes(experiments: ModuleType) -> None:
    pytest.importorskip("diffusers")
    made = experiments.files()
    there = {
        path.relative_to(FOLDER) for path in FOLDER.rglob("*") if path.is_file() and path.suffix in (".json", ".md")
    }
    assert there == set(made)
    for path, content in made.items():
        assert (FOLDER / path).read_text(encoding="utf-8") == content, f"run {FOLDER / 'experiments.py'}"


def test_the_shapes_are_those_of_the_base_models(experiments: ModuleType) -> None:
    # The total of the first is known, that of the second is in the results of PEFT's board.
    pytest.importorskip("diffusers")
    for board in experiments.BOARDS:
        base = board.base()
        assert sum(parameter.numel() for parameter in base.parameters()) == board.num_parameters
        assert all(parameter.device.type == "meta" for parameter in base.parameters())


def test_a_setting_that_is_too_large_is_refused(experiments: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    large = experiments.Experiment("large", "lora", {"rank": 8})
    board = experiments.Board("b", "B", "b", tiny_board.tiny_llama, 0, (large,))
    monkeypatch.setattr(experiments, "BOARDS", (board,))
    monkeypatch.setattr(experiments, "LIMIT", 57_344)
    with pytest.raises(ValueError, match="trains 57,344 parameters; only fewer than 57,344 belong here"):
        experiments.files()


# -- What the boards' code does with a folder -------------------------------------------------------


def llama_loss(model: Any) -> Any:
    ids = torch.randint(3, len(tiny_board.WORDS), (2, 6), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, labels=ids).loss


def flux_loss(model: Any) -> Any:
    rng = torch.Generator().manual_seed(1)
    dtype = model.dtype
    image, text = torch.randn(2, 6, 4, generator=rng).to(dtype), torch.randn(2, 3, 24, generator=rng).to(dtype)
    places = {"img_ids": torch.zeros(2, 6, 4, dtype=dtype), "txt_ids": torch.zeros(2, 3, 4, dtype=dtype)}
    made = model(
        hidden_states=image, encoder_hidden_states=text, timestep=torch.tensor([0.3, 0.7], dtype=dtype), guidance=None,
        return_dict=False, **places,
    )[0]  # fmt: skip
    return (made - image).square().float().mean()


def training_rate(folder: Path) -> dict[str, float]:
    params = json.loads((folder / "training_params.json").read_text(encoding="utf-8"))
    assert list(params) == ["optimizer_kwargs"]
    return dict(params["optimizer_kwargs"])


def check(folder: Path, tmp_path: Path, base: Any, loss_of: Any, targets: set[str], autocast: bool = True) -> Any:
    """Take the steps of the boards' code with one folder, and return the adapter's handle."""
    config = peft.PeftConfig.from_pretrained(str(folder))
    assert type(config) is plugin.TnadaptConfig
    model = peft.get_peft_model(base().to(torch.bfloat16), config, autocast_adapter_dtype=autocast)
    with torch.no_grad():
        expected = loss_of(base().to(torch.bfloat16))
        assert torch.equal(loss_of(model), expected)
    handle = tt.adapters(model)["default"]
    assert {target.module.rpartition(".")[2] for target in handle.targets} == targets
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32 if autocast else torch.bfloat16}
    total = sum(parameter.numel() for parameter in base().parameters())
    assert model.get_nb_trainable_parameters() == (handle.num_parameters, total + handle.num_parameters)

    optimizer = torch.optim.AdamW(model.parameters(), **training_rate(folder))
    for _ in range(3):  # the third step of a product of arrays also moves those that start at zero's side
        optimizer.zero_grad()
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        after = loss_of(model.eval())
        assert torch.isfinite(after)
        assert not torch.equal(after, expected)
        with model.disable_adapter():
            assert torch.equal(loss_of(model), expected)

    model.save_pretrained(str(tmp_path))
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    each = 4 if autocast else 2
    assert each * handle.num_parameters < size < each * handle.num_parameters + 20_000
    again = peft.PeftModel.from_pretrained(base().to(torch.bfloat16), str(tmp_path), autocast_adapter_dtype=autocast)
    with torch.no_grad():
        assert torch.equal(loss_of(again.eval()), after)
    json.dumps(config.to_dict())
    return handle


ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def llama_targets(name: str) -> set[str]:
    return ALL if "all-linear" in name else {"v_proj"} if "-values" in name else {"q_proj", "v_proj"}


@pytest.mark.parametrize("folder", folders("MetaMathQA"))
def test_a_folder_of_metamathqa_trains(folder: Path, tmp_path: Path, experiments: ModuleType) -> None:
    handle = check(folder, tmp_path, tiny_board.tiny_llama, llama_loss, llama_targets(folder.name))
    (one,) = (one for one in experiments.BOARDS[0].experiments if folder.name.endswith(f"3B-{one.name}"))
    # The plan that the page counts with is that of the adapter.
    assert handle.num_parameters == experiments.plan(tiny_board.tiny_llama(), one).num_parameters


FUSED = "to_qkv_mlp_proj"


@pytest.mark.parametrize("folder", folders("image-gen"))
def test_a_folder_of_image_gen_trains(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    values = {FUSED, "to_v", "add_v_proj"}
    targets = values if "-values" in folder.name else {*values, "to_q", "add_q_proj"}
    check(folder, tmp_path, tiny_board.tiny_flux, flux_loss, targets)


@pytest.mark.parametrize(
    "name", ["unilora-256", "lora_xs-rank8", "superlora-layer-linear-rank1-ratio1e-3", "lotr-rank4"]
)
def test_the_arrays_may_have_the_base_dtype(name: str, tmp_path: Path) -> None:
    folder = FOLDER / "MetaMathQA" / "experiments" / "tnadapt" / f"llama-3.2-3B-{name}"
    check(folder, tmp_path, tiny_board.tiny_llama, llama_loss, {"q_proj", "v_proj"}, autocast=False)


def test_gradient_checkpointing_as_the_image_board_uses_it() -> None:
    pytest.importorskip("diffusers")
    folder = FOLDER / "image-gen" / "experiments" / "tnadapt" / "flux2-klein-unilora-256"
    grads = []
    for checkpointing in (False, True):
        base = tiny_board.tiny_flux()
        if checkpointing:
            base.enable_gradient_checkpointing()
        model = peft.get_peft_model(base, peft.PeftConfig.from_pretrained(str(folder)))
        flux_loss(model.train()).backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(bool(grad.any()) for grad in grads[0][:1])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


# -- The launcher ---------------------------------------------------------------------------------

RECORDING = """
import json, os, sys
import utils
from peft import PeftConfig
config = PeftConfig.from_pretrained(sys.argv[1])
seen = [__name__, os.path.basename(__file__), sys.argv[1:], os.getcwd(), utils.WORD, type(config).__name__]
with open(os.path.join(os.path.dirname(__file__), "seen.json"), "w") as file:
    json.dump(seen, file)
"""


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A board of the name of PEFT's whose run.py records how it was started."""
    folder = tmp_path / "method_comparison" / "MetaMathQA"
    folder.mkdir(parents=True)
    (folder / "run.py").write_text(RECORDING)
    (folder / "utils.py").write_text("WORD = 'of the board'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    yield folder
    sys.modules.pop("utils", None)


NAME = "experiments/tnadapt/llama-3.2-3B-unilora-1000"


def test_the_board_is_run_as_its_own_script(board: Path) -> None:
    run = tiny_board.launcher()
    run.launch(board, run.home_of(board, NAME), NAME, ["-v", "--clean"])
    seen = json.loads((board / "seen.json").read_text())
    here = str(FOLDER / "MetaMathQA")
    assert seen == ["__main__", "run.py", [NAME, "-v", "--clean"], here, "of the board", "TnadaptConfig"]


def test_an_experiment_of_the_board_itself_can_be_run(board: Path) -> None:
    own = "experiments/lora/mine"
    (board / own).mkdir(parents=True)
    (board / own / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    run = tiny_board.launcher()
    run.launch(board, run.home_of(board, own), own, [])
    seen = json.loads((board / "seen.json").read_text())
    assert seen[2:4] == [[own], str(board)]
    assert seen[5] == "LoraConfig"


def test_the_launcher_says_what_is_missing(board: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_board.launcher()
    with pytest.raises(SystemExit, match=r"usage: run\.py BOARD EXPERIMENT"):
        run.main(["-v", str(board)])
    with pytest.raises(SystemExit, match=r"has no run\.py: give a folder of method_comparison/ in a clone of PEFT"):
        run.main([str(tmp_path), NAME])
    with pytest.raises(
        SystemExit, match=r"no folder experiments/none in .*board:\n  experiments/tnadapt/llama-3.2-3B-c"
    ):
        run.main([str(board), "experiments/none"])
    monkeypatch.setattr(sys, "version_info", (3, 11, 7, "final", 0))
    with pytest.raises(SystemExit, match=r"need Python 3\.12 or newer; this is 3"):
        run.main([str(board), NAME])
    monkeypatch.setattr(sys, "version_info", (3, 12, 1, "final", 0))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    with pytest.raises(
        SystemExit, match=r"is not in a git repository: install PEFT from the clone with\n  pip install -e"
    ):
        run.main([str(board), NAME])


# -- The boards' own code -------------------------------------------------------------------------


def run_board(tmp_path: Path, name: str, experiment: Path, params: dict[str, Any]) -> dict[str, Any]:
    """Run a copy of a board on one experiment with other training parameters, and return its result file."""
    source = Path(str(CHECKOUT)) / "method_comparison" / name
    board, home = tmp_path / name, tmp_path / "home"
    board.mkdir()
    for path in [*source.glob("*.py"), source / "default_training_params.json"]:
        shutil.copy(path, board)
    for folder in ("results", "temporary_results", "cancelled_results"):
        (board / folder).mkdir()
        (board / "sample-images" / folder).mkdir(parents=True)
    place = Path("experiments", "tnadapt", experiment.name)
    shutil.copytree(experiment, home / place)
    own = json.loads((experiment / "training_params.json").read_text())
    (home / place / "training_params.json").write_text(json.dumps({**own, **params}))
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q", "-b", "try"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "GIT_DIR": str(tmp_path / ".git"), "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", "tests.project.tiny_board", str(board), str(home), str(place)]
    done = subprocess.run([*command, "-v", "--clean"], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Failed to save" not in done.stdout
    (result,) = (path for path in board.glob("*results/*.json"))
    found: dict[str, Any] = json.loads(result.read_text())
    assert found["run_info"]["error_msg"] == ""
    assert result.parent.name == "temporary_results"
    assert result.name.startswith(f"tnadapt--{experiment.name}--")
    return found


def own_code(test: Any) -> Any:
    """Mark a test that runs the code of a clone of PEFT, which is no part of this project."""
    reason = "PEFT_CHECKOUT is not set to a clone of PEFT"
    return pytest.mark.slow(pytest.mark.skipif(CHECKOUT is None, reason=reason)(test))


@own_code
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("unilora-256", {}),
        ("superlora-layer-linear-rank1-ratio1e-3", {"use_gc": True, "autocast_adapter_dtype": False}),
        ("lora_xs-rank8", {"use_amp": True, "dtype": "float32"}),
    ],
)
def test_metamathqa_runs_on_a_tiny_model(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("datasets")
    tiny_board.save_model(tmp_path / "model")
    experiment = FOLDER / "MetaMathQA" / "experiments" / "tnadapt" / f"llama-3.2-3B-{name}"
    params = {**tiny_board.training_params(tmp_path / "model"), **changes}
    found = run_board(tmp_path, "MetaMathQA", experiment, params)
    config = peft.PeftConfig.from_pretrained(str(experiment))
    handle = tt.attach(tiny_board.tiny_llama(), tna.Config.from_dict(config.settings), config.target_modules)
    info = found["train_info"]
    assert info["status"] == "success"
    assert info["num_trainable_params"] == handle.num_parameters
    assert info["file_size"] < 4 * handle.num_parameters + 20_000
    assert [entry["step"] for entry in info["metrics"]] == [2, 4, 4]
    assert info["metrics"][1]["train loss"] < info["metrics"][0]["train loss"]
    assert info["metrics"][2]["forgetting"] != 0
    assert found["run_info"]["peft_config"]["peft_type"] == "TNADAPT"


@own_code
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("unilora-256", {}),
        ("superlora-layer-linear-rank1-ratio1e-3", {"use_gc": False, "autocast_adapter_dtype": False}),
        ("lora_xs-rank8", {"use_amp": True, "dtype": "float32"}),
    ],
)
def test_image_gen_runs_on_a_tiny_model(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    for module in ("datasets", "diffusers", "torchvision"):
        pytest.importorskip(module)
    tiny_board.save_pipeline(tmp_path)
    experiment = FOLDER / "image-gen" / "experiments" / "tnadapt" / f"flux2-klein-{name}"
    found = run_board(tmp_path, "image-gen", experiment, {**tiny_board.image_training_params(tmp_path), **changes})
    config = peft.PeftConfig.from_pretrained(str(experiment))
    handle = tt.attach(tiny_board.tiny_flux(), tna.Config.from_dict(config.settings), config.target_modules)
    info = found["train_info"]
    assert info["status"] == "success"
    assert info["num_trainable_params"] == handle.num_parameters
    assert info["file_size"] < 4 * handle.num_parameters + 20_000
    assert [entry["step"] for entry in info["metrics"]] == [2, 4, 4]
    assert info["metrics"][2]["drift"] > 0
    assert len(list((tmp_path / "image-gen" / "sample-images").rglob("*.png"))) == 1
