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
from tests.support.in_process import run_here
from tnadapt.__main__ import main

pytest.importorskip("typer")

import typer

from tnadapt import cli
from tnadapt.cli._finetune_command import PROJECTIONS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tnadapt", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


BARE = """
import sys
sys.modules["typer"] = None  # as if only the core were installed
from tnadapt.__main__ import main
sys.argv[1:] = {}
main()
"""


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BARE.format(list(arguments))]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_version_and_help_need_no_extra() -> None:
    done = bare("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tnadapt {tnadapt.__version__}\n", "")
    for arguments in ([], ["--help"]):
        done = bare(*arguments)
        assert done.returncode == 0
        assert 'pip install "tnadapt[cli]"' in done.stdout
        names = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]  # it is a group
        assert all(name in done.stdout for name in names)
    done = bare("plan", "--budget", "10")
    assert done.returncode == 2
    assert 'the command line needs its extra: pip install "tnadapt[cli]"' in done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (["--preset", "lorra"], "no preset 'lorra'; did you mean 'lora'? The presets are"),
    (["--set", "rnak=3"], "no setting 'rnak'; did you mean 'rank'?"),
    (["--set", "lora_alpha=3"], "no setting 'lora_alpha'; PEFT's 'lora_alpha' is 'alpha' here"),
    (["--set", "xyzzy=3"], "no setting 'xyzzy'; the settings are rank, order,"),
    (["--lr", "-1"], "--lr must be above 0 and at most 1e6; got -1.0"),
])  # fmt: skip
def test_bad_options_are_refused_before_torch_is_imported(arguments: list[str], message: str) -> None:
    code = "import sys; sys.modules['torch'] = None; from tnadapt.__main__ import main; main()"
    command = [sys.executable, "-c", code, "finetune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"tnadapt: {message}")


def test_shells_complete_presets() -> None:
    environment = {**os.environ, "_TNADAPT_COMPLETE": "complete_bash", "COMP_WORDS": "tnadapt finetune --preset lora_"}
    code = "import sys; sys.argv = ['tnadapt']; from tnadapt.__main__ import main; main()"
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
    code = "import sys; sys.modules['typer'] = None; from tnadapt.__main__ import main; main()"
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
