"""The tasks of ``tnadapt finetune``: one class each for text generation, classification, tagging, regression.

A new one is a subclass of :class:`LearningTask`, registered with :func:`register_task`.
"""

from tnadapt.finetune._learning_task import Evidence, LearningTask, Measured
from tnadapt.plugins import Registry

from ._causal_lm import CausalLM
from ._classification import Classification, ImageClassification, MultiLabel, Regression
from ._token_classification import TokenClassification

__all__ = [
    "TASKS",
    "CausalLM",
    "Classification",
    "Evidence",
    "ImageClassification",
    "LearningTask",
    "Measured",
    "MultiLabel",
    "Regression",
    "TokenClassification",
    "register_task",
]

_BUILT_IN = (Classification, MultiLabel, Regression, TokenClassification, CausalLM, ImageClassification)

TASKS: Registry[LearningTask] = Registry(
    "task",
    LearningTask,  # type: ignore[type-abstract]  # only to check the classes of plug-ins
    {task.name: task for task in _BUILT_IN},
)


def register_task(cls: type[LearningTask]) -> None:
    """Make a task known by its ``name``.

    Parameters
    ----------
    cls : type
        A subclass of :class:`LearningTask`.

    Raises
    ------
    ConfigError
        If its name is built in, registered by another module or of another form, or the class is not such a subclass.

    Examples
    --------
    Classification that never applies unless ``--task strict`` asks for it:

    >>> class Strict(Classification):
    ...     name = "strict"
    ...     @classmethod
    ...     def fits(cls, source, spec):
    ...         return Evidence("possible", "it was asked for")
    >>> register_task(Strict)
    >>> list(TASKS)[-1]
    'strict'
    """
    TASKS.register(cls.name, cls)
