"""The study behind ``tnadapt finetune``: adapt a pretrained model with several methods, compare and report them.

:class:`Study` runs everything::

    from pathlib import Path
    from tnadapt.finetune import Choice, Spec, Study, Training

    if __name__ == "__main__":  # parallel trainings run in separate processes, which import this file
        study = Study(Spec(), Choice(), Training(epochs=25, batch=32), rates=[0.005, 0.01, 0.02])
        outcome = study.run(Path("runs/digits"), jobs=2)

It prints nothing; progress goes to a :class:`Reporter`. Needs torch and ``pip install "tnadapt[demo]"``.
"""

try:
    import torch as _torch  # noqa: F401  # the error that says what to install comes before any other import
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'tnadapt.finetune needs PyTorch, which is not installed: pip install "tnadapt[demo]"', name=error.name
    ) from error

from ._budget import within
from ._choice import Choice
from ._prediction import Predictions, predict
from ._problem_loading import open_problem
from ._specification import Spec
from ._study import Outcome, Reporter, Study
from .engines import Engine, open_engine, run_tasks
from .grid import Method, default_methods
from .pareto_report import Point, pareto_front
from .problem import Problem
from .training import Task, Training, usable_device

__all__ = [
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
    "default_methods",
    "open_engine",
    "open_problem",
    "pareto_front",
    "predict",
    "run_tasks",
    "usable_device",
    "within",
]
