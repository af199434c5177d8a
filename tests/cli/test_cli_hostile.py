"""Hostile arguments and files: every command ends soon, with its own message and little memory, and writes only where
it was asked to."""

from __future__ import annotations

import getpass
import inspect
import os
import pickle
import shutil
import sys
import typing
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnadapt as tna
from tests.support import checkpoint_files as cp
from tests.support.depth import LONG
from tnadapt.convert import FORMS

typer = pytest.importorskip("typer")
if sys.platform != "linux":
    pytest.skip("processes are measured by /proc", allow_module_level=True)

# Where they can be imported.
from paper.command import experiment
from tnadapt.cli.terminal import COMMANDS as NAMES

from .command_lines import CommandLines, Done, command_lines

pytestmark = pytest.mark.slow

P, T = tna.presets, tna.Target
#: Those of ``tnadapt``, and ``python -m paper``.
COMMANDS = {
    **{name: getattr(import_module(f"tnadapt.cli.{NAMES[name].module}"), f"{name}_command") for name in NAMES},
    "paper": experiment,
}
TARGETS = [T(f"layers.{n}.self_attn.{x}_proj", (6, 4), x) for n in range(2) for x in "qv"]
#: Bytes that a command may take, beyond the program, to say that it cannot be done. A config may have 2^24 bytes.
MEMORY = 100 << 20

BAD = {
    "empty": b"", "zeros": b"\0" * 64, "pickle": pickle.dumps(print), "deep.json": b"[" * 100_000,
    "list.json": b"[1, 2]", "half.json": b'{"rank": ', "nan.json": b'{"rank": NaN, "alpha": 1e999}',
    "long.json": b'{"rank": 1' + b"0" * 10_000 + b"}", "bad.csv": b'text,label\n"a,0\n',
    "latin.csv": b"text,label\n\xe9,0\n", "bad.npz": b"PK\x03\x04 no archive",
    "cut.safetensors": b"\x10\0\0\0\0\0\0\0{", "long.safetensors": b"\xff" * 8 + b"{}",
    "name\nwith\x1b[31m a line": b"{}", "-o": b"{}", "'\"; rm -rf": b"{}",
}  # fmt: skip
PATHS = [
    "base", "base/model.safetensors.index.json", "adapter.safetensors", "peft", "config.json", "texts.csv",
    "images.npz", "images", "runs", *BAD, "none", "folder", "loop", "away", "pipe", "sparse", "/dev/null",
    "/dev/zero", "/dev/full",
    "/proc/self/mem", "x" * 300, "", ".", "..", "\udcff", "~", "http://[::1/",
]  # fmt: skip
PLACES = [
    "out.safetensors", "out.png", "deep/er/out", "folder", "folder/out", "adapter.safetensors", "base", "peft",
    "../out", "/proc/out", "", ".", "..", "x" * 300, "line\nend", "loop", "away",
]  # fmt: skip
INTEGERS = ["0", "-1", "1" + "0" * 30, "9" * 5000, "1e3", "0x10", "", " 1", "٣", "nan", "--", "1_0"]
NUMBERS = ["0", "-0.0", "1e-320", "1e308", "1e999", "nan", "-inf", "", "0,5", "1" * 5000]
SHAPES = [
    "1x1", "0x0", "-6x4", "6x4x2", "x", "6x", "6 x 4", "²x3", "6x4*1000000000000", "6x4*10001", "",
    "6x4*99999999999999999999", "99999999999999999999x3", "4294967296x4294967296", "nanx3", "6x4*-1", "1" * 5000 + "x2",
]  # fmt: skip
WORDS = [
    *P.__all__, *FORMS, "qv", "all-linear", "(a+)+$", "(", "[", "weight", "layer", "float32", "float7", "numpy",
    "torch", "tensorflow", "cpu", "cuda", "cuda:99", "mini", "__class__", "../../etc/passwd", "timm:",
    "timm:no/such", "freedom",
    "4kB", "1000", "-4kB", "1e99TiB", "inf", "", "\udcff", "x" * 100_000, "{", "%s%n", "$(id)", "cp", "hypercube",
    "linear", "classifier", "auto", "params", "geometry",
]  # fmt: skip
SETTINGS = [
    "rank=0", "rank=1e400", "rank=NaN", "rank=null", "rank=[1,2]", 'rank={"a":1}', "rank=" + "9" * 5000, "rank",
    "rank=1000000000000", "order=3", "order=99", "order=100000000000", "groups=1000000000", "groups=[[0,0]]",
    "groups=[[0],[1]]", "groups=[[-1]]", "groups=weight", "fold=[9999999999999,2]", "fold=[6,4]", "fold=hypercube",
    "fold=" + "[" * 10_000, "splits=2", "splits=100000000", "terms=2", "terms=1000000000000", "projection=linear",
    "projection=nonlinear_v2", "ratio=0.5", "ratio=1e-300", "alpha=1e300", "alpha=-1", "seed=-1", "format=tt",
    "seed=18446744073709551616", "format=../x", "__init__=1", "=", "=1", "",
]  # fmt: skip

# Folders beside the yard, which are watched like it, and the variables by which programs find them.
BESIDE = {
    "home": ["HOME"], "config": ["XDG_CONFIG_HOME"], "data": ["XDG_DATA_HOME"], "cache": ["XDG_CACHE_HOME"],
    "tmp": ["TMPDIR"],
}  # fmt: skip
# What other libraries keep there: matplotlib a list of fonts, numba kernels where it may not write to our folders,
# torch an empty folder when its compiler is imported.
CACHES = ("cache/matplotlib", "config/matplotlib", "cache/numba", f"tmp/torchinductor_{getpass.getuser()}")

Line = list[tuple[str, str | None]]  # names of options, and their values; arguments have no name


def some(good: Sequence[str], bad: Sequence[str]) -> st.SearchStrategy[str]:
    """As often what may be meant as what is not: one bad word alone ends most commands at once."""
    return st.one_of(st.sampled_from(good), st.sampled_from(bad))


# The values of what is no plain word, number or flag, by its name.
MODELS, OUT = some(["base", "base/model.safetensors.index.json"], PATHS), some(["out"], PLACES)
PICTURE = some(["out.png", "out.svg"], PLACES)
VALUES = {
    "model": MODELS, "base": MODELS, "tuned": MODELS, "path": some(["adapter.safetensors", "base"], PATHS),
    "adapter": some(["adapter.safetensors"], PATHS), "source": some(["adapter.safetensors", "peft"], PATHS),
    # A config may come through a pipe, <(…), and one to which nobody writes is waited for.
    "config": some(["config.json"], [path for path in PATHS if path != "pipe"]),
    "data": some(["texts.csv", "images.npz", "images"], PATHS), "features": some(["classifier"], PATHS),
    "out": OUT, "picture": PICTURE, "layout_picture": PICTURE, "cache": OUT, "shape": some(["6x4", "6x4*4"], SHAPES),
    "settings": some(["rank=1", "rank=2", "groups=1"], SETTINGS), "preset": some(P.__all__, WORDS),
    "budget": some(["1000", "4kB"], [*WORDS, *INTEGERS]), "targets": some(["qv", "v"], WORDS), "to": some(FORMS, WORDS),
    "dtype": some(["float32", "bfloat16"], WORDS), "by": some(["freedom", "cost"], WORDS), "svd": some(["full"], WORDS),
    "backend": some(["numpy"], WORDS), "scale": some(["mini", "full"], WORDS),
    "name": some(["params", "cifar10"], WORDS),
    "iterations": some(["1", "20"], ["0", "-1", "x"]),  # more of them are more work, which is what was asked for
}  # fmt: skip
INTEGER, NUMBER = some(["1", "2", "3"], INTEGERS), some(["0.5", "0.1"], NUMBERS)
# What would train or fetch for minutes says what it would do.
# Where a command may write.
WRITTEN = ("--out", "-o", "--picture", "--layout-picture")
ALWAYS: dict[str, Line] = {
    "finetune": [("--dry-run", None), ("--pretrain-epochs", "1"), ("--cache", "../cache")],
    "verify": [("--backend", "numpy")],
    "plan": [("--budget", "1000")],
}


class Parameter(NamedTuple):
    """An option or argument of a command."""

    names: list[str]  # of an argument, empty
    required: bool
    values: st.SearchStrategy[str | None]


def parameters(command: str) -> Iterator[Parameter]:
    """As the command's function declares them."""
    function = COMMANDS[command]
    usual = inspect.signature(function).parameters
    for name, hint in typing.get_type_hints(function, include_extras=True).items():
        if name != "return":
            kind, info = typing.get_args(hint)
            said = [one for one in (info.default, *(info.param_decls or ())) if isinstance(one, str) and one[:1] == "-"]
            long = "--" + name.replace("_", "-")
            names = said or ([long, long.replace("--", "--no-")] if kind is bool else [long])
            if isinstance(info, typer.models.ArgumentInfo):
                names = []
            needed = usual[name].default is inspect.Parameter.empty
            usually = INTEGER if "int" in str(kind) else NUMBER if "float" in str(kind) else st.sampled_from(WORDS)
            yield Parameter(names, needed, st.none() if kind is bool else VALUES.get(name, usually))


@st.composite
def lines(draw: st.DrawFn, command: str) -> Line:
    """What a command must have, some of what it may have, and what keeps it short."""
    known = [one for one in parameters(command) if one.names != ["--pretrain-epochs"]]
    needed, offered = ([one for one in known if one.required is wanted] for wanted in (True, False))
    chosen = needed + draw(st.lists(st.sampled_from(offered), max_size=4))
    line: Line = [(draw(st.sampled_from(one.names or [""])), draw(one.values)) for one in chosen]
    if command == "paper":
        runs = ("--out", draw(some(["runs"], PATHS)))
        line += draw(st.sampled_from([[("--dry-run", None)], [("--redraw", None), runs]]))
    line = [*ALWAYS.get(command, []), *line]
    return draw(st.permutations(line)) if draw(st.booleans()) else line


class Yard:
    """A folder with good and bad files, as new for whoever asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pristine = folder / "pristine"
        self.place = folder / "yard"
        self._make(self.pristine)
        self.renew()

    def _make(self, yard: Path) -> None:
        yard.mkdir(parents=True)
        tensors = cp.base(TARGETS)
        cp.write(yard / "base", tensors, 2)
        tna.save(yard / "adapter.safetensors", cp.adapter(P.lora(2), TARGETS, tensors))
        tna.convert(yard / "adapter.safetensors", to="peft-lora").save(yard / "peft")
        (yard / "config.json").write_text('{"rank": 2}')
        (yard / "texts.csv").write_text("text,label\n" + "".join(f"word {n},{n % 2}\n" for n in range(40)))
        np.savez(yard / "images.npz", images=np.zeros((40, 8, 8), np.uint8), labels=np.arange(40) % 2)
        (yard / "images" / "one").mkdir(parents=True)
        (yard / "runs").mkdir()
        (yard / "runs" / "results.jsonl").write_text('{"schema": 1, "task": [], "x": NaN}\n{"half')
        (yard / "folder").mkdir()
        for name, content in BAD.items():
            (yard / name).write_bytes(content)
        (yard / "loop").symlink_to("loop")
        (yard / "away").symlink_to("../away/none")

    def renew(self) -> None:
        """As it was made."""
        shutil.rmtree(self.place, ignore_errors=True)
        for beside in ("out", "away", *BESIDE):
            shutil.rmtree(self.folder / beside, ignore_errors=True)
        for beside in BESIDE:
            (self.folder / beside).mkdir()
        shutil.copytree(self.pristine, self.place, symlinks=True)
        with open(self.place / "sparse", "wb") as file:  # a hundred gigabytes that take no space
            file.truncate(100 << 30)
        os.mkfifo(self.place / "pipe")
        self.seen = self.look()

    def places(self) -> dict[str, str]:
        """The environment of commands, so that what they write at home or among temporary files is seen."""
        return {name: str(self.folder / beside) for beside, names in BESIDE.items() for name in names}

    def look(self) -> dict[str, tuple[int, ...]]:
        """What is there: of every path its kind, size and time."""
        found = {}
        for path in self.folder.rglob("*"):
            if not any(path.is_relative_to(self.folder / unseen) for unseen in ("pristine", *CACHES)):
                state = path.lstat()
                more = () if path.is_dir() and not path.is_symlink() else (state.st_size, state.st_mtime_ns)
                found[os.fspath(path)] = (state.st_mode, *more)
        return found

    def changed(self) -> list[str]:
        """Paths that are new, gone, or others than they were."""
        now = self.look()
        return sorted(path for path in {*now, *self.seen} if now.get(path) != self.seen.get(path))


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Yard:
    return Yard(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def commands(yard: Yard) -> Iterator[CommandLines]:
    with command_lines(yard.places()) as found:
        yield found


def judge(done: Done, line: Line, yard: Yard) -> list[str]:
    """What is wrong with how a command ended."""
    wrong = []
    if done.code not in (0, 1, 2):
        wrong.append("it crashed" if done.code != -9 else "it did not end, or took too much")
    if "Traceback" in done.out + done.err:
        wrong.append("a traceback")
    if done.code == 2 and not done.err.strip():
        wrong.append("no word")
    if len(done.err) > 20_000:
        wrong.append(f"{len(done.err)} letters of an error")
    if done.code == 2 and done.memory > MEMORY:
        wrong.append(f"{done.memory >> 20} MiB")
    changed = yard.changed()
    asked = [Path(os.path.normpath(yard.place / (value or "."))) for name, value in line if name in WRITTEN]
    if stray := [path for path in changed if not any(_within(Path(path), one, yard.place) for one in asked)]:
        wrong.append(f"it changed {stray}")
    if done.code == 2 and changed:
        wrong.append(f"it could not, and changed {changed}")
    return wrong


def _within(path: Path, asked: Path, yard: Path) -> bool:
    """Whether it is what was asked for, in it, or a folder on the way; the yard as a whole is no place to write to."""
    return not yard.is_relative_to(asked) and (path.is_relative_to(asked) or (path.is_dir() and path in asked.parents))


def typed(line: Line) -> list[str]:
    """As the words of a command, empty ones among them."""
    return [word for name, value in line for word in ([name] if name else []) + ([] if value is None else [value])]


def check(command: str, line: Line, commands: CommandLines, yard: Yard) -> Done:
    program = ["paper"] if command == "paper" else ["tnadapt", command]
    done = commands.run([*program, *typed(line)], yard.place)
    wrong = judge(done, line, yard)
    if yard.changed():
        yard.renew()
    assert not wrong, (wrong, done)
    return done


@pytest.mark.law("hostile-commands")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_ends_with_its_own_word(command: str, commands: CommandLines, yard: Yard) -> None:
    # A process each: fewer than of what is computed.
    @settings(max_examples=settings.default.max_examples // (4 if LONG else 8))
    @given(lines(command))
    def holds(line: Line) -> None:
        check(command, line, commands, yard)

    holds()


FOUND: dict[str, tuple[str, Line]] = {
    "a config without an end": ("verify", [("--config", "/dev/zero"), ("--backend", "numpy")]),
    "more weights than memory": ("plan", [("--budget", "1000"), ("--shape", "6x4*1000000000000")]),
    "a rank beyond memory": ("verify", [("--set", "rank=1000000000000"), ("--backend", "numpy")]),
    "a picture of the name of a folder": (
        "plan", [("--budget", "9"), ("--shape", "6x4"), ("--picture", "folder")],
    ),
    "a picture without a name": ("plan", [("--budget", "9"), ("--shape", "6x4"), ("--picture", "")]),
    "a word of a book's length": ("verify", [("--preset", "x" * 100_000)]),
    "a base trained for what cannot be": (
        "finetune", [("--dry-run", None), ("--pretrain-epochs", "1"), ("--cache", "cache"), ("--format", "none")],
    ),
}  # fmt: skip


@pytest.mark.law("hostile-commands")
@pytest.mark.parametrize(("command", "line"), FOUND.values(), ids=FOUND)
def test_what_was_found_once(command: str, line: Line, commands: CommandLines, yard: Yard) -> None:
    assert check(command, line, commands, yard).code == 2


FINE = Done(0, "", "", 1.0, 0)


@pytest.mark.law("hostile-commands")
def test_the_judge_sees_what_is_wrong(commands: CommandLines, yard: Yard) -> None:
    for done, wrong in (
        (FINE._replace(code=-9), "did not end"),
        (FINE._replace(err="Traceback"), "a traceback"),
        (FINE._replace(code=2), "no word"),
        (FINE._replace(code=2, err="no", memory=MEMORY + 1), "MiB"),
        (FINE._replace(code=2, err="no" * 20_000), "letters of an error"),
    ):
        assert wrong in " ".join(judge(done, [], yard))
    commands.run(["tnadapt", "info", "none"], yard.place)  # it has been started
    environment = Path(f"/proc/{commands.process.pid}/environ").read_bytes().decode().split("\0")
    for beside, names in BESIDE.items():
        assert {f"{name}={yard.folder / beside}" for name in names} <= set(environment)
        (yard.folder / beside / "stray").write_text("x")
        assert f"/{beside}/stray" in judge(FINE, [("--out", "out")], yard)[0]
        yard.renew()
    cached = yard.folder / CACHES[0] / "fonts"
    cached.parent.mkdir(exist_ok=True)
    cached.write_text("x")
    assert judge(FINE, [], yard) == []
    (yard.place / "stray").write_text("x")
    assert [bool(judge(FINE, [("--out", out)], yard)) for out in ("out", "stray", "")] == [True, False, True]
    assert "could not" in judge(FINE._replace(code=2, err="no"), [("--out", "stray")], yard)[0]
    yard.renew()
