"""What the tests of this folder need from inside tnadapt.finetune; each name is a debt.

Modules are here where a test replaces something in them: the period of an engine, the tokenizers of predictions.
"""

from __future__ import annotations

from tnadapt.finetune import _inputs as model_inputs
from tnadapt.finetune import _prediction as prediction
from tnadapt.finetune import _study as study_job
from tnadapt.finetune._pretrained import choose_task
from tnadapt.finetune._saved_task import recorded
from tnadapt.finetune.engines import _engine as run_folder
from tnadapt.finetune.engines import _slurm as slurm
from tnadapt.finetune.pareto_report import best_point, control_of, points_in, points_of, rows_of

__all__ = [
    "best_point",
    "choose_task",
    "control_of",
    "model_inputs",
    "points_in",
    "points_of",
    "prediction",
    "recorded",
    "rows_of",
    "run_folder",
    "slurm",
    "study_job",
]
