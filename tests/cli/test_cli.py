"""The command line, run as by a user."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tnadapt as tna
from tests.support import checkpoint_files as cp
from tests.support.in_process import main, run_here

pytest.importorskip("typer")

import typer
from typer.testing import CliRunner

from tnadapt import cli
from tnadapt.cli.terminal import COMMANDS, EscapingCommand

ROOT = Path(__file__).parents[2]


def python(code: str, *arguments: str, more: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, which reads ``more`` from its standard input."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, check=False, input=more,
        env={**os.environ, **environment},
    )  # fmt: skip


RUN = 'import runpy, sys\nsys.argv[0] = "tnadapt"\nrunpy.run_module("tnadapt", run_name="__main__")'
#: As if only the core were installed.
BARE = f'import sys\nsys.modules["typer"] = None\n{RUN}'


def test_version_and_help_need_no_extra() -> None:
    done = python(BARE, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"tnadapt {tna.__version__}\n", "")
    for arguments in ([], ["-h"], ["--help"]):
        done = python(BARE, *arguments)
        assert done.returncode == 0
        assert 'pip install "tnadapt[cli]"' in done.stdout
        names = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]  # it is a group
        assert all(name in done.stdout for name in names)
    done = python(BARE, "plan", "--budget", "10")
    assert done.returncode == 2
    assert 'the command line needs its extra: pip install "tnadapt[cli]"' in done.stderr


#: What a user can get wrong, and what the message says.
MISTAKES: list[tuple[str, str]] = [
    ("fintune", "No such command 'fintune'. Did you mean 'finetune'?"),
    ("finetune --preset lorra", "no preset 'lorra'; did you mean 'lora'? The presets are c3a, cara"),
    ("finetune --set rnak=3", "no setting 'rnak'; did you mean 'rank'?"),
    ("finetune --set lora_alpha=3", "no setting 'lora_alpha'; PEFT's 'lora_alpha' is 'alpha' here"),
    ("finetune --set hedas=3", "no setting 'hedas'; did you mean 'heads'?"),
    ("finetune --preset lora --set hedas=3", "no setting 'hedas'; the settings are rank, order,"),  # of another preset
    ("finetune --set xyzzy=3", "no setting 'xyzzy'; the settings are rank, order,"),
    ("finetune --set rank", "--set takes FIELD=VALUE"),
    ("finetune --set rank=2 --set rank=8", "--set gives rank twice; it applies to every preset: run the command"),
    ("finetune --rank 2 --set rank=8", "--rank and --set rank=… both give rank; leave one of them out"),
    ("finetune --rank -1", "rank must be at least 1"),
    ("finetune --groups bla", 'groups must be "weight", "layer"'),
    ("finetune --targets ''", "--targets is empty; give roles such as qv, names of modules, or a regular expression"),
    ("finetune --lr -1", "--lr must be above 0 and at most 1e6; got -1.0"),
    ("finetune --lr nan", "--lr must be above 0 and at most 1e6; got nan"),
    ("finetune --epochs 0", "Invalid value for '--epochs'"),
    ("finetune --rank half", "'half'"),  # by Typer before 0.29 in other words
    ("finetune --seeds 0", "Invalid value for '--seeds'"),
    ("finetune --engine rey", "no engine 'rey'; expected one of local, ray, slurm"),
    ("finetune --engine-option gpus", "--engine-option takes KEY=VALUE; got 'gpus'"),
    ("finetune --engine-option gpus=1", "engine local has no option 'gpus'; it has none"),
    ("finetune --engine-option a=1 --engine-option a=2", "--engine-option a is given twice"),
    ("finetune --report-to nowhere", "Invalid value for '--report-to'"),
    (
        "finetune --task regression",
        "--task needs --model and --data; without them the data are scikit-learn's digits",
    ),
    ("finetune --budget 1q", "a budget is a number of parameters, such as 1000 or '1k', or of bytes"),
    ("finetune --report-to wandb", "--report-to needs --model and --data"),
    ("finetune --image-size 8", "--image-size needs --model and --data"),
    ("finetune --model x --data y.csv --task ' '", "--task is empty"),
    ("finetune --model here", "--model needs --data, too; with neither, the data are scikit-learn's digits"),
    ("finetune --data here.csv", "--data needs --model, too"),
    ("finetune --model bert --data none.csv", "no data at none.csv: there is no such file or folder"),
    ("finetune --model bert --data a.txt", "cannot read data from a.txt"),
    ("finetune --model ./none --data a.csv", "no model at ./none: there is no such folder"),
    ("finetune --model folder --data a.csv", "no model at folder: the folder has no config.json"),
    ("finetune --out a.txt", "a.txt is a file and should be a folder; give another folder with --out"),
    ("predict none --data a.csv", "no adapter at none: there is no such file"),
    ("predict . --data a.csv", "no adapter at .: it is a folder; give a file such as best.safetensors"),
    ("predict a.txt --data a.csv", "a.txt: is not a safetensors file"),
    ("predict a.safetensors --data none.csv", "no data at none.csv: there is no such file or folder"),
    ("predict a.safetensors --data a.csv --out b.txt", "--out must end in .csv or .jsonl; got b.txt"),
    ("predict a.safetensors --data a.csv --out none/p.csv", "is in a folder that does not exist"),
    ("presets --shape 3x", "--shape takes ROWSxCOLS, e.g. 768x768 or 768x768*24; got '3x'"),
    ("presets --targets qv", "give either a model or the shapes of weights, --shape ROWSxCOLS"),
    ("plan", "give a budget: --budget 1000"),
    ("plan --budget 1000", "give either a model or the shapes of weights"),
    ("plan --budget 1000 --shape 3x3 here", "give either a model or the shapes"),
    ("plan --shape 3x3 --budget 4q", "got '4q'"),
    ("plan --budget 100 --shape 3x3 --targets qv", "--targets chooses among the weights of a model"),
    ("plan --budget 100 folder --targets ' '", "--targets is empty; give roles such as qv, names of modules, or a"),
    ("plan --budget 100 --shape 3x3 --set rank=2", "give its file, too"),
    ("plan --budget 100 --shape 3x3 --set rank=0 --layout-picture a.png", "rank must be at least 1"),
    ("plan --budget 100 nowhere.safetensors", "nowhere.safetensors: No such file or directory"),
    ("plan --budget 100 a.safetensors", "a.safetensors: is an adapter; give the model that it is for"),
    ("plan --budget 100 timm:vit_tiny", "plans read the headers of files; give the model's repository on the hub"),
    ("extract none none -o a.txt", "a.txt exists; give another path, or --overwrite"),
    ("extract none none -o b.safetensors", "none: No such file or directory"),
    ("convert a.txt --to pfet", "got 'pfet'"),
    ("convert a.txt --to peft-lora --rank 0", "Invalid value for '--rank'"),
    ("convert a.safetensors --base no/such", "base: no/such: No such file or directory"),
    ("convert a.safetensors out", "unexpected extra argument(s) (out); give the output by -o"),
    ("finetune bert --data a.csv", "unexpected extra argument(s) (bert); give the model by --model"),
    ("convert none.safetensors -o a.txt", "none.safetensors: No such file or directory"),
    ("convert a.safetensors -o .", "exists; give another path, or overwrite=True (--overwrite)"),
    ("merge", "Missing argument 'BASE'"),
    ("merge base a.safetensors", "Missing option '--out'"),
    (
        "merge base base -o out",
        "base: is the folder of a model and not an adapter; give the path of the adapter's file",
    ),
    ("merge a.safetensors base -o out", "a.safetensors: is an adapter; BASE comes first, ADAPTER second"),
    ("merge base a.safetensors -o ''", ".: contains an input of the merge: give another place"),
    ("info none", "none: No such file or directory"),
    ("info base/config.json", "is not an index: its weight_map must be an object of tensors and files; got None"),
    ("info a.txt", "a.txt: is not a safetensors file"),
    ("verify --preset lora --config x.json", "give one of them"),
    ("verify --config no/such/file.json", "cannot read a config from"),
    ("verify --shape 3x3", "shapes belong to a config"),
    ("verify --backend torhc", "no backend named 'torhc'"),
    ("verify --seed -1", "Invalid value for '--seed'"),
]
#: Of maps, which take a library to make.
OF_MAPS: list[tuple[str, str]] = [
    ("verify --set projection=scatter --backend numpy", "map 'scatter' needs settings"),
    ("verify --preset superlora --set projection=linear --shape 300x300 --backend numpy", "give smaller shapes"),
]
#: Files of settings that are none, and how their messages begin.
HOSTILE = {
    "list": "[1, 2]",
    "half": "{",
    "no-number": '{"rank": NaN}',
    "deep": "[" * 100_000,
    "object-for-number": '{"rank": {"a": 1}}',
    "zero-byte": "\x00",
    "long-number": '{"rank": 1' + "0" * 10_000 + "}",
}
#: The help pages of finetune and convert list the registered formats, whose modules import NumPy.
MISSPELT = [f"{name} --nonsense" for name in COMMANDS if name not in ("finetune", "convert")]
CONFIGS = [f"verify --config {name}.json --backend numpy" for name in HOSTILE]

# One process for all: whatever one of them imports stays imported.
ONE_BY_ONE = """
import contextlib, io, json, runpy, shlex, sys
results = []
for line in json.loads(sys.argv[1]):
    sys.argv[1:] = shlex.split(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module("tnadapt", run_name="__main__")
        except SystemExit as end:
            slow = ("numpy", "torch", "transformers", "sklearn", "scipy", "matplotlib")
            results.append((end.code, out.getvalue(), err.getvalue(), [name for name in slow if name in sys.modules]))
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str, list[str]]]:
    """Return for each mistake the exit code, what was printed, and the slow libraries that have been imported by then.

    Nothing is written.
    """
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "a.txt").write_text("x")
    (folder / "a.csv").write_text("text,label\na,b\n")
    (folder / "folder").mkdir()
    targets = [tna.Target(f"layers.{n}.self_attn.q_proj", (6, 4), "q") for n in range(2)]
    cp.write(folder / "base", tensors := cp.base(targets), 2)
    tna.save(folder / "a.safetensors", cp.adapter(tna.presets.lora(2), targets, tensors))
    for name, text in HOSTILE.items():
        (folder / f"{name}.json").write_text(text)
    before = sorted(path.name for path in folder.rglob("*"))
    lines = [*MISSPELT, *(line for line, _ in MISTAKES), *CONFIGS, *(line for line, _ in OF_MAPS)]
    done = subprocess.run(
        [sys.executable, "-c", ONE_BY_ONE, json.dumps(lines)], capture_output=True, text=True, timeout=120,
        check=False, cwd=folder, env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in folder.rglob("*")) == before
    return dict(zip(lines, json.loads(done.stdout), strict=True))


@pytest.mark.law("hostile-commands")
@pytest.mark.parametrize(
    ("line", "message"), [*((line, "No such option: --nonsense") for line in MISSPELT), *MISTAKES, *OF_MAPS]
)
def test_a_mistake_is_refused_before_anything_slow_is_imported(line: str, message: str, refusals: Any) -> None:
    code, out, err, slow = refusals[line]
    assert (code, out) == (2, "")
    assert (slow == [] if line in MISSPELT else slow in ([], ["numpy"])) or (line, message) in OF_MAPS
    assert message in " ".join(err.replace("│", " ").split())
    assert err.startswith(("Usage: ", "╭─ Error ")) or (err.startswith("tnadapt: ") and err.count("\n") == 1)


@pytest.mark.law("allocation-limit", "hostile-commands")
@pytest.mark.parametrize("line", CONFIGS)
def test_hostile_files(line: str, refusals: Any) -> None:
    code, out, err, _ = refusals[line]
    assert (code, out) == (2, "")
    assert err.startswith("tnadapt: ")
    assert "Traceback" not in err


def test_commands_are_imported_when_they_are_used() -> None:
    code = """
import sys, typer
from tnadapt.cli import app
group = typer.main.get_command(app)
print(group.list_commands(None), [name for name in sys.modules if name.endswith(("_command", "_commands"))])
print(group.get_command(None, "info").name, [name for name in sys.modules if name.endswith(("_command", "_commands"))])
"""
    done = python(code)
    assert done.stdout.splitlines() == [f"{list(COMMANDS)} []", "info ['tnadapt.cli._file_commands']"]


def test_shells_complete_presets() -> None:
    words = {"COMP_WORDS": "tnadapt finetune --preset lora_", "COMP_CWORD": "3"}
    done = python(RUN, _TNADAPT_COMPLETE="complete_bash", **words)
    assert done.stdout.split() == ["lora_fa", "lora_xs"]


def test_h_is_help_of_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    assert python(RUN, "--version").stdout.strip() == f"tnadapt {tna.__version__}"
    monkeypatch.setenv("COLUMNS", "120")
    for words in ([], *([name] for name in COMMANDS)):
        short, long = run_here(main, *words, "-h"), run_here(main, *words, "--help")
        assert (short.returncode, short.stdout) == (0, long.stdout)
        assert "Usage: " in short.stdout
        assert not re.search(r"<(bool|list|int|float)", short.stdout)


def test_another_program_may_have_options_of_any_type() -> None:
    def command(day: datetime.datetime, place: tuple[int, str] = (1, "a")) -> None:
        """Print nothing."""

    command.__annotations__ = {"day": datetime.datetime, "place": tuple[int, str], "return": None}

    program = typer.Typer()
    program.command(cls=EscapingCommand)(command)
    done = CliRunner().invoke(program, ["--help"])
    assert done.exit_code == 0, done.output
    assert all(option in done.output for option in ("DAY", "--place"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_and_a_page(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    lines = filter(str.strip, run_here(main, name, "--help").stdout.splitlines())
    *_, example, address = lines
    assert example.strip() == f"Example: tnadapt {name} {COMMANDS[name].example}"
    page = Path(address.strip()).stem
    assert [*Path(__file__).parents[2].glob(f"docs/{page}.*")], address
    command: Any = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]  # it is a group
    command.make_context(name, COMMANDS[name].example.split())  # parses it


def test_verify_a_file_as_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tna.presets.lorta(2, order=3).to_dict()))
    words = ["--shape", "6x5", "--shape", "3x4", "--backend", "numpy", "--json"]
    done = run_here(main, "verify", "--config", path, *words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["holds"]
    assert all(law["backend"] == "numpy" for law in report["laws"])


def test_a_broken_law_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = tna.UpdatePlan.delta
    monkeypatch.setattr(tna.UpdatePlan, "delta", lambda self, params, i: delta(self, params, 0))
    done = run_here(main, "verify", "--only", "lora", "--backend", "numpy")
    assert done.returncode == 1
    assert "BROKEN" in done.stdout
    assert "  to reproduce: tnadapt verify --only lora --backend numpy --seed 0\n" in done.stdout
    assert done.stdout.endswith("NOT all laws hold\n")


ONLY = ("--only", "lora", "--only", "lokr", "--only", "conversion", "--backend", "numpy")


def test_verify_shows_a_bar_for_each_part_on_a_terminal_and_the_report_alone_in_a_pipe() -> None:
    done = python(RUN, "verify", *ONLY)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("law ")
    assert f"\ntnadapt {tna.__version__}, Python " in done.stdout
    assert "\x1b" not in done.stdout
    pty = pytest.importorskip("pty")
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-c", RUN, "verify", *ONLY]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, stdin=subprocess.DEVNULL) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # Linux says so where the other end is closed
            while piece := os.read(terminal, 1 << 16):
                seen += piece
    os.close(terminal)
    assert process.returncode == 0
    bars = [line.rpartition("\x1b[K")[2] for line in seen.decode().split("\r\n")]
    full = f"[{'#' * 20}] 100%"
    assert bars == [f"numpy, presets {full} lora, 2 of 2", f"conversion {full}", ""]


@pytest.mark.skipif(sys.platform == "win32", reason="no /dev/stdin")
def test_a_config_may_come_through_a_pipe() -> None:
    words = ["--config", "/dev/stdin", "--backend", "numpy", "--json"]
    done = python(RUN, "verify", *words, more='{"rank": 3}')
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["holds"]


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        (["rank=2", "projection=linear", "ratio=0.1"], "12x8*4"),
        (['projection=[{"map": "scatter", "size": 5}, "dft2"]', "on=weight", "order=1", "format=dense"], "6x4"),
    ],
)
def test_verify_settings(settings: list[str], shape: str) -> None:
    options = [part for text in settings for part in ("--set", text)]
    done = run_here(main, "verify", "--preset", "superlora", *options, "--shape", shape, "--backend", "numpy")
    assert done.returncode == 0, done.stderr
    assert "all laws hold" in done.stdout
    assert "F = its dense matrix" in done.stdout


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
    commands: Any = typer.main.get_command(cli.app)
    (option,) = (option for option in commands.commands["finetune"].params if option.name == "projection")
    names = option.help.partition(": ")[2].partition("; ")[0].split(", ")
    assert len(names) == 7
    for name in names:
        assert tna.UpdatePlan(tna.Config(rank=2, fold="hypercube", projection=name), [(8, 8)]).num_parameters
