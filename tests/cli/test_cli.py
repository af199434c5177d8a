"""The command line, run as by a user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tnadapt
import tnadapt as tna
from tests.support.in_process import main, run_here

pytest.importorskip("typer")

import typer

from tnadapt import cli
from tnadapt.cli._finetune_command import PROJECTIONS
from tnadapt.cli.terminal import COMMANDS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tnadapt", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


BARE = """
import sys
sys.modules["typer"] = None  # as if only the core were installed
import runpy
sys.argv[1:] = {}
runpy.run_module("tnadapt", run_name="__main__")
"""


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BARE.format(list(arguments))]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_version_and_help_need_no_extra() -> None:
    done = bare("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tnadapt {tnadapt.__version__}\n", "")
    for arguments in ([], ["-h"], ["--help"]):
        done = bare(*arguments)
        assert done.returncode == 0
        assert 'pip install "tnadapt[cli]"' in done.stdout
        names = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]  # it is a group
        assert all(name in done.stdout for name in names)
    done = bare("plan", "--budget", "10")
    assert done.returncode == 2
    assert 'the command line needs its extra: pip install "tnadapt[cli]"' in done.stderr


#: What a user can get wrong, and what the message says.
MISTAKES: list[tuple[str, str]] = [
    ("fintune", "No such command 'fintune'. Did you mean 'finetune'?"),
    ("finetune --presett lora", "No such option: --presett"),
    ("finetune --preset lorra", "no preset 'lorra'; did you mean 'lora'? The presets are"),
    ("finetune --set rnak=3", "no setting 'rnak'; did you mean 'rank'?"),
    ("finetune --set lora_alpha=3", "no setting 'lora_alpha'; PEFT's 'lora_alpha' is 'alpha' here"),
    ("finetune --set xyzzy=3", "no setting 'xyzzy'; the settings are rank, order,"),
    ("finetune --set rank", "--set takes FIELD=VALUE"),
    ("finetune --set rank=0", "rank must be from 1"),
    ("finetune --rank -1", "rank must be from 1"),
    ("finetune --preset lora --set seed=3", "give --seeds N"),
    ("finetune --preset cara", "needs the number of 'heads'"),
    ("finetune --groups bla", "groups must be"),
    ("finetune --order -1", "order must be from 1"),
    ("finetune --splits 0", "splits must be from 1"),
    ("finetune --format cpp", "format must be one of"),
    ("finetune --fold hyper", "fold must be one of"),
    ("finetune --projection liner", "got 'liner'"),
    ("finetune --ratio 0.5", "needs a projection that changes the length"),
    ("finetune --projection linear --ratio 7", "ratio must be above 0 and at most 1"),
    ("finetune --budget 0", "a budget must be at least 1 parameter"),
    ("finetune --budget 9 --rank 1", "a budget or settings, not both"),
    ("finetune --lr -1", "--lr must be above 0 and at most 1e6; got -1.0"),
    ("finetune --epochs 0", "Invalid value for '--epochs'"),
    ("finetune --engine rey", "no engine 'rey'; expected one of local, ray, slurm"),
    ("finetune --engine-option gpus", "--engine-option takes KEY=VALUE"),
    ("finetune --engine-option gpus=1", "engine local has no option 'gpus'"),
    ("finetune --report-to nowhere", "Invalid value for '--report-to'"),
    ("finetune --task regression", "--task needs --model and --data"),
    ("finetune --text-column text", "--text-column needs --model and --data"),
    ("finetune --image-size 8", "--image-size and --max-length need --model and --data"),
    ("finetune --model here", "--model needs --data, too"),
    ("finetune --data here.csv", "--data needs --model, too"),
    ("finetune --model bert --data none.csv", "no data at none.csv: there is no such file or folder"),
    ("finetune --model bert --data a.txt", "cannot read data from a.txt"),
    ("finetune --model ./none --data a.csv", "no model at ./none: there is no such folder"),
    ("finetune --model folder --data a.csv", "no model at folder: the folder has no config.json"),
    ("finetune --out a.txt", "a.txt is a file and should be a folder; give another folder with --out"),
    ("finetune --cache a.txt", "a.txt is a file and should be a folder; give another folder with --cache"),
    ("predict none --data a.csv", "no adapter at none: there is no such file"),
    ("predict a.txt --data a.csv", "a.txt: is not a safetensors file"),
    ("predict a.txt --data a.csv --out b.txt", "--out must end in .csv or .jsonl"),
    ("presets --shape 3", "--shape takes ROWSxCOLS"),
    ("plan", "give a budget"),
    ("plan --shape 8x8 --budget -5", "a budget is a number of parameters"),
    ("plan --shape 8x8 --budget 5 --by speed", "by must name criteria among parameters"),
    ("extract none none -o a.txt", "a.txt exists; give another path, or --overwrite"),
    ("extract none none -o b.safetensors", "none: No such file or directory"),
    ("convert none", "none: No such file or directory"),
    ("convert a.txt --to pfet", "got 'pfet'"),
    ("convert a.txt --max-error 5", "max_error (--max-error) must be a number from 0 to 1"),
    ("merge none none -o out", "none: No such file or directory"),
    ("info a.txt", "a.txt: is not a safetensors file"),
    ("verify --preset lorra", "no preset 'lorra'; did you mean 'lora'?"),
    ("verify --preset lora --set rank=0", "rank must be from 1"),
    ("verify --shape 3x3", "shapes belong to a config"),
    ("verify --backend torhc", "no backend named 'torhc'"),
]

# One process for all: whatever one of them imports stays imported.
ONE_BY_ONE = """
import contextlib, io, json, sys
import runpy
found = []
for line in json.loads(sys.argv[1]):
    sys.argv[1:] = line.split()
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        try:
            runpy.run_module("tnadapt", run_name="__main__")
        except SystemExit as end:
            slow = [name for name in ("torch", "transformers", "sklearn", "scipy", "matplotlib") if name in sys.modules]
            found.append((end.code, told.getvalue(), slow))
print(json.dumps(found))
"""


@pytest.mark.law("hostile-commands")
def test_mistakes_are_refused_before_anything_slow_is_imported(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.csv").write_text("text,label\na,b\n")
    (tmp_path / "folder").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, json.dumps([line for line, _ in MISTAKES])],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
        env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for (line, message), (code, told, slow) in zip(MISTAKES, json.loads(done.stdout), strict=True):
        assert (code, slow) == (2, []), (line, told)
        assert message in " ".join(told.replace("│", " ").split()), (line, told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.txt", "folder"]


def test_a_misspelt_option_is_refused_before_numpy_is_imported() -> None:
    code = """
import sys
import runpy
for command in sys.argv[1].split():
    sys.argv[1:] = [command, "--nonsense"]
    try:
        runpy.run_module("tnadapt", run_name="__main__")
    except SystemExit as end:
        print(command, end.code, "numpy" in sys.modules)
"""
    # The help pages of finetune and convert list the registered formats, whose modules import NumPy.
    commands = [name for name in COMMANDS if name not in ("finetune", "convert")]
    done = subprocess.run(
        [sys.executable, "-c", code, " ".join(commands)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.splitlines() == [f"{name} 2 False" for name in commands], done.stderr
    assert done.stderr.count("No such option: --nonsense") == len(commands)


def test_commands_are_imported_when_they_are_used() -> None:
    code = """
import sys, typer
from tnadapt.cli import app
group = typer.main.get_command(app)
print(group.list_commands(None), [name for name in sys.modules if name.endswith(("_command", "_commands"))])
print(group.get_command(None, "info").name, [name for name in sys.modules if name.endswith(("_command", "_commands"))])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == [f"{list(COMMANDS)} []", "info ['tnadapt.cli._file_commands']"]


def test_shells_complete_presets() -> None:
    environment = {**os.environ, "_TNADAPT_COMPLETE": "complete_bash", "COMP_WORDS": "tnadapt finetune --preset lora_"}
    code = "import sys; sys.argv = ['tnadapt']; import runpy; runpy.run_module('tnadapt', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**environment, "COMP_CWORD": "3"},
    )
    assert done.stdout.split() == ["lora_fa", "lora_xs"]


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == f"tnadapt {tnadapt.__version__}"
    assert "verify" in run("--help").stdout
    assert "--preset" in run("verify", "--help").stdout


def test_h_is_help_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for words in ([], *([name] for name in COMMANDS)):
        short, long = run_here(main, *words, "-h"), run_here(main, *words, "--help")
        assert (short.returncode, short.stdout) == (0, long.stdout)
        assert "Usage: " in short.stdout


def test_verify_a_preset() -> None:
    done = run("verify", "--preset", "superlora", "--set", "rank=2", "--set", "projection=linear", "--set", "ratio=0.1",
               "--shape", "12x8*4", "--backend", "numpy")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "all laws hold" in done.stdout
    assert "F = its dense matrix" in done.stdout


def test_verify_a_file_as_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tnadapt.presets.lorta(2, order=3).to_dict()))
    done = run("verify", "--config", str(path), "--shape", "6x5", "--shape", "3x4", "--backend", "numpy", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["holds"]
    assert all(law["backend"] == "numpy" for law in report["laws"])


def test_a_broken_law_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from tnadapt import cli
    from tnadapt.testing import _reference as reference

    monkeypatch.setattr(reference, "count", lambda *a: 0)
    done = CliRunner().invoke(cli.app, ["verify", "--preset", "lora", "--backend", "numpy"])
    assert done.exit_code == 1
    assert "BROKEN" in done.output
    assert "NOT all laws hold" in done.output


@pytest.mark.slow
@pytest.mark.law("hostile-commands")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "lorra"], "no preset 'lorra'; did you mean 'lora'? The presets are c3a, cara"),
        (["--preset", "lora", "--set", "rank=0"], "rank must be from 1"),
        (["--preset", "lora", "--set", "rank"], "--set takes FIELD=VALUE"),
        (["--preset", "lora", "--set", "dropout=1"], "no field 'dropout'"),
        (["--preset", "lotr"], "needs groups of weights of one shape, and group 0 has 2 of 12×8"),
        (["--preset", "lora", "--config", "x.json"], "give one of them"),
        (["--config", "no/such/file.json"], "cannot read a config from"),
        (["--preset", "lora", "--shape", "12"], "--shape takes ROWSxCOLS"),
        (["--preset", "lora", "--shape", "0x3"], "expected (rows, cols), both at least 1"),
        (["--preset", "lora", "--shape", "12x8*0"], "--shape takes ROWSxCOLS"),
        (["--preset", "superlora", "--set", "projection=linear", "--shape", "300x300"], "give smaller shapes"),
        (["--preset", "lora", "--set", "alpha=1e-300"], "alpha must be from"),
        (["--shape", "3x3"], "shapes belong to a config"),
        (["--backend", "tensorflow"], "no backend named 'tensorflow'"),
        (["--set", "groups=layer"], "needs layers"),
        (["--preset"], "requires an argument"),
        (["--seed", "-1"], "Invalid value for '--seed'"),
        (["--nonsense"], "No such option"),
    ],
)
def test_a_users_mistake_is_exit_code_2_and_no_traceback(arguments: list[str], message: str) -> None:
    done = run_here(main, "verify", *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_without_the_extra_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; import runpy; runpy.run_module('tnadapt', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'pip install "tnadapt[cli]"' in done.stderr


HOSTILE = {
    "a list": "[1, 2]",
    "half": "{",
    "no number": '{"rank": NaN}',
    "deep": "[" * 100_000,
    "an object for a number": '{"rank": {"a": 1}}',
    "a zero byte": "\x00",
    "a long number": '{"rank": 1' + "0" * 10_000 + "}",
}


@pytest.mark.skipif(sys.platform == "win32", reason="no /dev/stdin")
def test_a_config_may_come_through_a_pipe() -> None:
    command = [sys.executable, "-m", "tnadapt", "verify", "--config", "/dev/stdin", "--backend", "numpy", "--json"]
    done = subprocess.run(command, input='{"rank": 3}', capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["holds"]


@pytest.mark.law("allocation-limit", "hostile-commands")
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    done = run("verify", "--config", str(path), "--backend", "numpy")
    assert done.returncode == 2
    assert done.stderr.startswith("tnadapt: ")
    assert "Traceback" not in done.stderr


def test_a_chain_of_maps_is_set_as_json() -> None:
    chain = '[{"map": "scatter", "size": 5}, "dft2"]'
    settings = [f"projection={chain}", "on=weight", "order=1", "format=dense"]
    options = [part for text in settings for part in ("--set", text)]
    done = run("verify", *options, "--shape", "6x4", "--backend", "numpy")
    assert done.returncode == 0, done.stderr
    assert "all laws hold" in done.stdout
    done = run("verify", "--set", "projection=scatter", "--backend", "numpy")
    assert done.returncode == 2
    assert "map 'scatter' needs settings" in done.stderr


def test_every_option_says_its_default_and_what_it_does() -> None:
    commands: Any = typer.main.get_command(cli.app)
    for name, command in commands.commands.items():
        for option in command.params:
            if option.param_type_name != "option" or option.name == "help":
                continue
            assert option.help, (name, option.opts)
            known = option.required or option.is_flag or option.default not in (None, ())
            stated = isinstance(option.show_default, str) or "by default" in option.help or "Without it" in option.help
            assert known or stated, (name, option.opts, option.help)


def test_projections_that_help_names_are_maps() -> None:
    for name in PROJECTIONS:
        assert tna.SuperLoRA(tna.Config(rank=2, fold="hypercube", projection=name), [(8, 8)]).num_parameters
