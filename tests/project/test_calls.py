"""Every public call with one bad argument works or raises an error of ours that names the parameter."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import os
import re
import resource
import shutil
import signal
import traceback
import types
import typing
import unittest.mock
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.bad_values import BAD_VALUES
from tests.support.depth import long_only
from tests.support.valid_calls import CALLS, OWNERS, Workbench
from tnadapt import backends
from tnadapt.errors import TnadaptError
from tnadapt.plugins import forget_registered
from tnadapt.targets import attention_layouts

SECONDS = 5.0
BYTES = 1 << 30


#: How messages call a parameter in place of its name. Of arrays that do not go together, none is the wrong one.
WORDS = {
    "adapter": ("a path", "No such file"),
    "adapter_file": ("AdapterFile",),
    "base": ("a path", "No such file"),
    "cache": ("a path",),
    "cfg": ("Config", "preset", "patterns to configs"),
    "cols": ("columns", "shape"),
    "cls": ("class",),
    "cp": ("CP",),
    "given": ("a projection", "arrays", "settings of a map"),
    "deltas": ("update", "tensor"),
    "exclude": ("a list of targets", "no module of"),
    "factory": ("a callable",),
    "folder": ("a path",),
    "index": ("slice", "part"),
    "init": ("core",),
    "items": ("weights",),
    "layout": ("AttentionLayout",),
    "kind": ("projection", "settings", "maps"),
    "model": ("torch module", "a path", "No such file"),
    "matrix": ("matrix_or_vector", "the tensor holds", "does not multiply"),
    "matrix_or_vector": ("does not multiply", "a matrix or a vector"),
    "matrices_or_vectors": ("does not multiply",),
    "module": ("embedding",),
    "matrices": ("matrix",),
    "name": ("no engine", "no device"),
    "names": ("no adapter",),
    "nonnegative": ("mode",),
    "numbers": ("indices", "index"),
    "out": ("a path", "must end with", "the folder", "is a folder", "exists"),
    "path": ("No such file", "is not a file", "the folder", "an adapter folder"),
    "projection": ("settings of", "maps"),
    "settings": ("a mapping", "field"),
    "shapes": ("no tensor of the checkpoint",),
    "source": ("a path", "No such file"),
    "targets": ("holds no weight", "is a target", "no module of"),
    "terms": ("factor",),
    "to": ("array",),
    "tensor1": ("tensors of shapes",),
    "tensor2": ("tensors of shapes",),
    "transpose": ("does not multiply",),
    "tuned": ("a path", "No such file"),
    "batches": ("batch",),
    "rows": ("shape",),
    "unfolded": ("the unfolding",),
    "value": ("a target",),
    "values": ("keys",),
    "weights": ("no adapter",),
    "where": ("a path", "no such file", "this folder"),
    "vec": ("a vector",),
}


#: Python's own messages about a callable that the caller gave.
_FROM_CALLABLES = "positional argument|unexpected keyword argument|takes no arguments"


class _TooSlow(BaseException):
    """Raised into a call that takes too long."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Limit the time and the additional memory of what is called inside."""

    def stop(number: int, frame: types.FrameType | None) -> None:
        raise _TooSlow

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, most))
    handler = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, (before, most))


def attribute(name: str) -> Any:
    """Return the function, class, or method of a class, that a name of the table means."""
    *places, last = name.split(".")
    found: Any = importlib.import_module("tnadapt")
    for place in places:
        path = f"{found.__name__}.{place}"
        is_module = hasattr(found, "__path__") and importlib.util.find_spec(path) is not None
        found = importlib.import_module(path) if is_module else getattr(found, place)
    return getattr(found, last)


def function_of(name: str, bench: Workbench) -> Callable[..., Any]:
    """Return what a name of the table means; a method is that of a new object."""
    place, _, last = name.rpartition(".")
    if place not in OWNERS:
        return attribute(name)  # type: ignore[no-any-return]
    return getattr(OWNERS.get(name, OWNERS[place])(bench), last)  # type: ignore[no-any-return]


def arguments_of(name: str, bench: Workbench) -> dict[str, Any]:
    """Return the keyword arguments of a valid call, for all parameters that the tests vary."""
    arguments = dict(CALLS[name](bench))
    if name == "torch.peft.TnadaptConfig":  # its other parameters are PEFT's
        return arguments
    function = attribute(name)
    parameters = inspect.signature(function.__init__ if isinstance(function, type) else function).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
    if name == "finetune.run_tasks":
        del defaults["jobs"]  # so many processes take long to start; open_engine refuses the same values
    for field in dataclasses.fields(function) if dataclasses.is_dataclass(function) else ():
        if field.name in defaults and field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return {**arguments, **{key: value for key, value in defaults.items() if key not in arguments}}


def called(name: str, bench: Workbench, changes: Mapping[str, Any]) -> Any:
    """Call a function with valid arguments but for the given ones, and use up a result that is lazy."""
    arguments = {**arguments_of(name, bench), **changes}
    positional = next((list(value) for key, value in arguments.items() if key.startswith("*")), [])
    keywords = {key: value for key, value in arguments.items() if not key.startswith("*")}
    function = function_of(name, bench)
    if positional and keywords:  # the keywords that come before them
        before = [keywords.pop(key) for key in list(keywords) if list(arguments).index(key) < 1]
        positional = [*before, *positional]
    try:
        with unittest.mock.patch.dict(backends._factories):
            result = function(*positional, **keywords)
    finally:
        if "register" in name:
            forget_registered()
            attention_layouts.forget_layouts()
    if isinstance(result, types.GeneratorType):
        return list(result)
    if isinstance(result, contextlib.AbstractContextManager) and not isinstance(result, Path):
        with result:
            pass
    return result


def complaint(name: str, parameter: str, value: Callable[[], Any], bench: Workbench) -> str | None:
    """Return what is wrong with how a call takes a bad value; None if nothing is."""
    bad = value()
    given = [bad] if parameter.startswith("*") else bad
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            called(name, bench, {parameter: given})
    except TnadaptError as error:
        return wrong_message(str(error), parameter)
    except _TooSlow:
        return "takes too long"
    except (SystemExit, Exception) as error:
        if isinstance(error, TypeError) and re.search(_FROM_CALLABLES, str(error)):
            return None
        if any(frame.name == "<lambda>" and "valid_calls" in frame.filename for frame in frames_of(error)):
            return None  # the caller's own function, with the caller's own batch
        return described(error)
    return None


def wrong_message(message: str, parameter: str) -> str | None:
    """Return what is wrong with a message; None if nothing is."""
    if len(message) > 2000:
        return f"a message of {len(message)} characters: {message[:80]}"
    name = parameter.lstrip("*")
    words = [name, name + "s", name.replace("_", " "), name.removesuffix("s"), "arrays of two", *WORDS.get(name, ())]
    if not any(re.search(rf"\b{re.escape(word)}\b", message, re.IGNORECASE) for word in words):
        return f"does not name it: {message[:300]}"
    return None


def frames_of(error: BaseException) -> list[traceback.FrameSummary]:
    return list(traceback.extract_tb(error.__traceback__))


def described(error: BaseException) -> str:
    frames = frames_of(error)
    last = ([frame for frame in frames if "/tnadapt/" in frame.filename] or frames)[-1]
    text = str(error) if not isinstance(error, RecursionError) else ""
    return f"{type(error).__name__} at {last.filename.rpartition('/tnadapt/')[2]}:{last.lineno}: {text[:120]}"


#: Modules all of whose ``__all__`` is public, by the prefix in the table.
MODULES = (
    "tnadapt", "presets", "maps", "sources", "tensors", "decomposition", "planning", "plot", "convert", "serving",
    "torch", "torch.starts", "torch.peft", "testing", "finetune",
)  # fmt: skip

#: What is listed there without taking a caller's arguments: the library calls it, or makes it.
CALLED_BY_THE_LIBRARY = {
    # Results, and records of the library's own making.
    "MergeReport", "TnadaptError", "ConfigError", "ShapeError", "BackendError", "FileError", "TargetError",
    "decomposition.Fit", "decomposition.FitReport", "decomposition.FoundRank", "decomposition.GroupReport",
    "decomposition.Limits", "decomposition.Step", "planning.Name", "planning.Plan", "planning.PresetCall",
    "planning.Rank", "planning.Row", "tensors.FitOutcome", "tensors.Decomposed", "torch.RequantizationReport",
    "torch.RequantizedWeight", "torch.Adapter", "torch.Member", "torch.Population", "convert.Conversion",
    "convert.PopulationConversion",
    "finetune.Outcome", "finetune.Point", "finetune.Method", "finetune.Predictions", "finetune.Task",
    "finetune.Problem", "sources.Place", "sources.Stream", "sources.Origin", "sources.FrozenArray",
    "sources.FrozenArrays",
    # What plug-ins and other packages inherit from, and the functions between the library and them.
    "maps.Space", "maps.Map", "maps.MapSettings", "maps.BroughtMap", "maps.Dft2", "maps.Linear", "maps.LinearV2",
    "maps.Nonlinear",
    "maps.Shuffle", "maps.tanhshrink", "maps.is_brought", "maps.is_linear", "maps.projection_name",
    "maps.projection_to_json", "maps.require_ratio_fits", "maps.takes_ratio", "sources.Source", "sources.Multiplied",
    "sources.BaseCore", "sources.Trained", "sources.check_term", "sources.dominant_svd", "sources.inner_source",
    "sources.leading_qr", "sources.minor_svd", "sources.origins_of", "decomposition.fit_format", "convert.Base",
    "convert.EncodedAdapter", "convert.ExportChoice", "convert.FileFormat", "convert.ForeignAdapter", "convert.Module",
    "convert.ModuleUpdate", "convert.Pair", "convert.StoredFiles", "convert.TargetUpdate", "convert.target_of",
    "torch.QuantizedLayer", "finetune.Engine", "finetune.Reporter", "finetune.BarReporter", "testing.BackendContract",
    "testing.FormatContract", "testing.MapContract", "testing.SourceContract",
    # A finished study is needed, and vLLM; tests/finetune and tests/serving have their refusals. PEFT makes the others.
    "finetune.predict", "serving.vllm_resolver",
    "torch.peft.TnadaptLayer", "torch.peft.TnadaptModel", "torch.peft.PeftMissingError",
}  # fmt: skip

#: Calls of the table that no ``__all__`` lists, as their modules have none, and methods.
DEFINED_ELSEWHERE = [name for name in CALLS if name.startswith(("targets.", "checkpoints."))]
DEFINED_ELSEWHERE += [name for name in CALLS if name.rpartition(".")[0] in OWNERS]


def public_calls() -> set[str]:
    """Return the names of all functions and classes that users call with arguments, but for methods."""
    found = set[str]()
    for place in MODULES:
        module = importlib.import_module("tnadapt" if place == "tnadapt" else f"tnadapt.{place}")
        for name in module.__all__:
            value = getattr(module, name)
            if not callable(value) or typing.get_origin(value) is not None or value in seen_at_the_top(place):
                continue
            found.add(name if place == "tnadapt" else f"{place}.{name}")
    return {name for name in found - CALLED_BY_THE_LIBRARY if takes_arguments(name)}


def seen_at_the_top(place: str) -> list[Any]:
    """Return what ``tnadapt`` or an earlier module lists, too."""
    import tnadapt

    found = [getattr(tnadapt, name) for name in tnadapt.__all__] if place != "tnadapt" else []
    if place == "torch":
        found += [tnadapt.Target, tnadapt.Rows]
    return found


def takes_arguments(name: str) -> bool:
    parameters = inspect.signature(attribute(name)).parameters.values()
    return any(one.kind is not one.VAR_KEYWORD for one in parameters)


#: Values that are no bad ones: a path has open(), as work has.
GOOD = {("finetune.run_tasks", "work", "path")}

#: Calls that take seconds each, as they train, or measure every library.
SLOW = {"verify"}

#: Their flags are stored in files as they are.
STORED = ("Config", "Target", "maps.", "sources.")

VALUES = list(BAD_VALUES)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workbench]:
    """Return what the calls are made with; they run in a folder of their own, as some write to relative paths."""
    pytest.importorskip("huggingface_hub")
    folder = tmp_path_factory.mktemp("calls")
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("here"))
    with unittest.mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        yield Workbench(folder)
    os.chdir(before)


def complaints(name: str, parameter: str, labels: Iterable[str], bench: Workbench) -> list[str]:
    called(name, bench, {})  # imports take time, which is not that of the bad value
    for path in Path.cwd().iterdir():  # what another call wrote to a relative path
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = ((label, complaint(name, parameter, BAD_VALUES[label], bench)) for label in labels)
    return [
        f"{name}({parameter}={label}) {wrong}"
        for label, wrong in found
        if wrong and (name, parameter, label) not in GOOD
    ]


def test_flags_take_numpys_bools(bench: Workbench) -> None:
    number = 0
    for name in CALLS:
        if name in SLOW or name.startswith(STORED):
            continue
        for parameter, value in arguments_of(name, bench).items():
            if isinstance(value, bool) and parameter != "nonnegative":  # which can be a list of modes, too
                called(name, bench, {parameter: np.bool_(value)})
                number += 1
    assert number > 20


def test_a_sample_of_bad_values(bench: Workbench) -> None:
    """Each parameter gets two values, each value about equally often; all get all in the long profile."""
    wrong, number = list[str](), 0
    for name in CALLS:
        for parameter in [] if name in SLOW else arguments_of(name, bench):
            number += 1
            labels = [VALUES[(number + step) % len(VALUES)] for step in range(0, len(VALUES), len(VALUES) // 2)]
            wrong += complaints(name, parameter, labels, bench)
    assert wrong == []


@long_only
@pytest.mark.parametrize("name", CALLS)
def test_all_bad_values(name: str, bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some calls write to the path that is the bad value of another
    for parameter in arguments_of(name, bench):
        assert complaints(name, parameter, VALUES, bench) == []


def test_every_public_callable_has_a_valid_call_and_every_call_is_public() -> None:
    public = public_calls()
    assert public - set(CALLS) == set()
    assert set(CALLS) - public - set(DEFINED_ELSEWHERE) == set()


def test_a_wrong_result_is_noticed(bench: Workbench) -> None:
    """The judge itself: silence, raw errors, other words and long messages."""
    assert wrong_message("rank must be an integer; got None", "rank") is None
    assert wrong_message("it must be an integer; got None", "rank") is not None
    assert wrong_message("rank " * 1000, "rank") is not None
    assert complaint("kronecker", "*arrays", lambda: [np.ones(2), np.ones(3)], bench) is None
    with unittest.mock.patch("tnadapt.kronecker", lambda *arrays: arrays[0].shape):
        wrong = complaint("kronecker", "*arrays", lambda: 3, bench)
    assert wrong is not None
    assert wrong.startswith("AttributeError")
