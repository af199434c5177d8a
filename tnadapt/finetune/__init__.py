"""The study behind ``tnadapt finetune``: adapt a pretrained model with several methods, compare and report them.

:class:`Study` runs everything::

    from pathlib import Path
    from tnadapt.finetune import Choice, Spec, Study, Training

    if __name__ == "__main__":  # parallel trainings run in separate processes, which import this file
        study = Study(Spec(), Choice(), Training(epochs=25, batch=32), rates=[0.005, 0.01, 0.02])
        outcome = study.run(Path("runs/digits"), jobs=2)

It prints nothing; progress goes to a :class:`Reporter`. Needs torch and ``pip install "tnadapt[demo]"``.
"""

import importlib.util
from typing import TYPE_CHECKING

from tnadapt.lazy_names import lazy_names

if TYPE_CHECKING:
    from ._prediction import Predictions, predict
    from ._pretrained import open_problem
    from ._specification import Spec
    from ._study import BarReporter, Outcome, Reporter, Study
    from .data import require_data
    from .engines import Engine, open_engine, register_engine, run_tasks
    from .grid import Choice, Method, Task, default_methods, within
    from .pareto_report import Point, pareto_front
    from .problem import Problem
    from .results import check_out
    from .training import Training, usable_device

if importlib.util.find_spec("torch") is None:
    raise ModuleNotFoundError(
        'tnadapt.finetune needs PyTorch, which is not installed: pip install "tnadapt[demo]"', name="torch"
    )

__all__ = [
    "BarReporter",
    "Choice",
    "Engine",
    "Method",
    "Outcome",
    "Point",
    "Predictions",
    "Problem",
    "Reporter",
    "Spec",
    "Study",
    "Task",
    "Training",
    "check_out",
    "default_methods",
    "open_engine",
    "open_problem",
    "pareto_front",
    "predict",
    "register_engine",
    "require_data",
    "run_tasks",
    "usable_device",
    "within",
]

# Imported on first use: checks of a user's options must not wait for torch, whose import takes seconds.
_LAZY = {
    name: module
    for module, names in {
        "_prediction": ("Predictions", "predict"),
        "_pretrained": ("open_problem",),
        "_specification": ("Spec",),
        "_study": ("BarReporter", "Outcome", "Reporter", "Study"),
        "data": ("require_data",),
        "engines": ("Engine", "open_engine", "register_engine", "run_tasks"),
        "grid": ("Choice", "Method", "Task", "default_methods", "within"),
        "pareto_report": ("Point", "pareto_front"),
        "problem": ("Problem",),
        "results": ("check_out",),
        "training": ("Training", "usable_device"),
    }.items()
    for name in names
}


__getattr__, __dir__ = lazy_names(__name__, _LAZY)
