"""A pytest plugin that runs PEFT's own tests with tnadapt's plug-in next to LoRA; :mod:`peft_suite` loads it.

Wherever PEFT's tests are parametrized over configs, rows of plain LoRA stay, as the control, and each gets rows of
the plug-in with the same target modules; all other rows are left out. No PEFT code is changed or copied.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

#: The name of the control in the results.
CONTROL = "LoRA"
#: Settings for every row, and further settings for one row of the custom models.
PRESETS: dict[str, dict[str, Any]] = {
    "lora": {"preset": "lora", "settings": {"rank": 8}},
    "superlora": {"preset": "superlora", "settings": {"rank": 4}},
}
MORE_PRESETS: dict[str, dict[str, Any]] = {
    "lokr": {"preset": "lokr", "settings": {"rank": 2}},
    "loha": {"preset": "loha", "settings": {"rank": 2}},
    "dense": {"preset": "dense"},
    "linear F": {"preset": "superlora", "settings": {"rank": 4, "projection": "linear", "ratio": 0.5}},
}
#: The models of such rows.
FIRST = ("MLP",)

#: Tests that look at the class of the config.
BY_CLASS = ("test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches")

# How plain LoRA's keywords translate. A row with any other keyword tests something that only LoRA has.
_LEFT_OUT = ("r", "lora_alpha", "lora_dropout")
_SAME = ("task_type", "modules_to_save", "target_modules")


def plain(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Translate keywords of a plain LoraConfig to TnadaptConfig; None if they need something that only LoRA has."""
    found = {}
    for name, value in settings.items():
        if name in _SAME:
            found[name] = "qv" if name == "target_modules" and value is None else copy.deepcopy(value)
        elif name == "init_lora_weights":
            if not isinstance(value, bool):
                return None
            found["init_weights"] = value
        elif name not in _LEFT_OUT and (name, value) != ("bias", "none"):
            return None
    return found


class Suite:
    """The plugin."""

    def __init__(self, out: Path) -> None:
        import tnadapt.torch.peft

        tnadapt.torch.peft.register()
        from peft import LoraConfig

        self.out = out
        self.lora, self.ours = LoraConfig, tnadapt.torch.peft.TnadaptConfig
        # The method and settings that a dictionary of keywords belongs to, by its id.
        self.labels: dict[int, str] = {}
        self.kept: list[Any] = []
        self.left_out: Counter[str] = Counter()

    # -- Parametrizations ------------------------------------------------------------------------

    def pytest_collectstart(self, collector: Any) -> None:
        if isinstance(collector, pytest.Module):
            module = collector.obj
            common = sys.modules.get(f"{module.__package__}.testing_common")
            for one in (module, common):
                if hasattr(one, "hub_online_once"):
                    # All models are in the local cache, and each access to the hub would take half a minute to fail.
                    one.hub_online_once = lambda *args, **kwargs: contextlib.nullcontext()
            if common is not None:
                # It has a list of the methods that can adapt GPT-2's layers; tnadapt can, too.
                _lengthen(common, self.ours)
            for function in _functions(module):
                function.pytestmark = [self._changed(mark) for mark in function.pytestmark]

    def _changed(self, mark: Any) -> Any:
        if mark.name != "parametrize" or len(mark.args) < 2:
            return mark
        names, rows = mark.args[0], mark.args[1]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        place = next((names.index(name) for name in ("config_cls", "config_class") if name in names), None)
        if place is None:
            return mark
        rows = [row for one in rows for row in self._rows(one, place, single=len(names) == 1)]
        return pytest.mark.parametrize(mark.args[0], rows, *mark.args[2:], **mark.kwargs).mark

    def _rows(self, row: Any, place: int, single: bool) -> Iterator[Any]:
        values = [row] if single else list(getattr(row, "values", row))
        if values[place] is not self.lora:
            return
        keywords = [index for index, value in enumerate(values) if isinstance(value, dict)]
        ours = {index: plain(values[index]) for index in keywords}
        if any(found is None for found in ours.values()):
            own = {name for index in keywords for name in values[index] if plain({name: values[index][name]}) is None}
            self.left_out[" and ".join(sorted(own))] += 1
            return
        yield self._named(row, values, CONTROL, single)
        chosen = {**PRESETS, **(MORE_PRESETS if _several(values) else {})}
        for name, preset in chosen.items() if keywords else [("superlora", {})]:
            changed = [self.ours if index == place else value for index, value in enumerate(values)]
            # PEFT's tests use this word to recognize LoRA's own features.
            changed = ["tnadapt" if value == "lora" else value for value in changed]
            for index, found in ours.items():
                changed[index] = {**found, **copy.deepcopy(preset)}
            yield self._named(row, changed, name, single)

    def _named(self, row: Any, values: list[Any], label: str, single: bool) -> Any:
        for index, value in enumerate(values):
            if isinstance(value, dict):
                # A copy, since several rows may share one; kept alive, so that no other object gets its id.
                values[index] = value = dict(value)
                self.kept.append(value)
                self.labels[id(value)] = label
        return pytest.param(*values) if not single else values[0]

    # -- Selection and results of tests -------------------------------------------------------------

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        chosen = [item for item in items if self.label(item) is not None]
        others = [item for item in items if self.label(item) is None]
        items[:] = chosen
        config.hook.pytest_deselected(items=others)

    def label(self, item: Any) -> str | None:
        """Return the method that an item tests; None if it is not parametrized over configs."""
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        classes = [parameters[name] for name in ("config_cls", "config_class") if name in parameters]
        if not classes or classes[0] not in (self.lora, self.ours):
            return None
        for value in parameters.values():
            if id(value) in self.labels:
                return self.labels[id(value)]
        return CONTROL if classes[0] is self.lora else "superlora"

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if item.originalname in BY_CLASS and self.label(item) != CONTROL:
                # They are skipped for other classes than those that PEFT lists: ours takes LoRA's place in the list.
                for module in (item.module, sys.modules.get(f"{item.module.__package__}.testing_common")):
                    if hasattr(module, "LoraConfig"):
                        patch.setattr(module, "LoraConfig", self.ours)
            yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Iterator[None]:
        outcome = yield
        report = outcome.get_result()
        if report.when != "call" and report.outcome == "passed":
            return
        text = ""
        if report.outcome != "passed":
            text = str(report.longrepr[2]) if report.skipped and isinstance(report.longrepr, tuple) else _short(report)
        row = {"file": item.path.name, "test": item.originalname, "method": self.label(item), "row": self._row(item)}
        row |= {"outcome": report.outcome, "why": text}
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _row(self, item: Any) -> str:
        """Return the parameters that identify the same test for another method."""
        words = []
        for name, value in item.callspec.params.items():
            if isinstance(value, dict) or name in ("config_cls", "config_class", "mandatory_kwargs"):
                if isinstance(value, dict):
                    targets = value.get("target_modules")
                    words.append(json.dumps(["qv" if targets is None else targets, value.get("modules_to_save")]))
            elif name not in ("test_name", "tuner_method"):
                words.append(str(value).rpartition("/")[2])
        return " ".join(words)

    def pytest_sessionfinish(self) -> None:
        with self.out.open("a") as file:
            file.write(json.dumps({"left_out": dict(self.left_out)}) + "\n")


def _several(values: Sequence[Any]) -> bool:
    """Return whether a row only concerns several weights of a model of ``FIRST``."""
    targets = [value.get("target_modules") for value in values if isinstance(value, dict) and len(value) == 1]
    on_first = any(isinstance(value, str) and value in FIRST for value in values)
    return on_first and any(isinstance(target, list) and len(target) > 1 for target in targets)


def _lengthen(common: Any, ours: type) -> None:
    skip = common._skip_if_conv1d_not_supported
    if not hasattr(skip, "original"):

        def changed(model_id: str, config_cls: type, config_kwargs: Any) -> None:
            if config_cls is not ours:
                skip(model_id, config_cls, config_kwargs)

        changed.original = skip  # type: ignore[attr-defined]
        common._skip_if_conv1d_not_supported = changed


def _functions(module: Any) -> Iterator[Any]:
    for value in list(vars(module).values()):
        held = vars(value).values() if isinstance(value, type) and value.__module__ == module.__name__ else [value]
        yield from (one for one in held if inspect.isfunction(one) and hasattr(one, "pytestmark"))


def _short(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash is not None else str(report.longrepr))[-2000:].strip()[:400]


def pytest_configure(config: Any) -> None:
    config.pluginmanager.register(Suite(Path(os.environ["PEFT_SUITE_RESULTS"])), "peft-suite")
