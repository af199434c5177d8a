"""What PEFT's ``adapter_config.json`` says about the base model: its name on the hub, and the task.

``AutoPeftModel`` loads the base by them, and programs show them. PEFT's classes for tasks that have a head train it
whole: they take a copy of it, even where the file has none. So such a task is named only if the head is in the file;
else the class of transformers that builds the model is.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from tnadapt.checkpoints.pretrained_model import TASKS, Pretrained

__all__ = ["origin_settings"]


class _PeftTask(NamedTuple):
    """PEFT's name of a task, and the modules that its class trains whole, by their names at any place in the model."""

    name: str
    heads: tuple[str, ...] = ()


_PEFT_TASKS = {
    "text-generation": _PeftTask("CAUSAL_LM"),
    "text2text-generation": _PeftTask("SEQ_2_SEQ_LM"),
    "feature-extraction": _PeftTask("FEATURE_EXTRACTION"),
    "text-classification": _PeftTask("SEQ_CLS", ("classifier", "score")),
    "token-classification": _PeftTask("TOKEN_CLS", ("classifier", "score")),
    "question-answering": _PeftTask("QUESTION_ANS", ("qa_outputs",)),
}


def origin_settings(about: Pretrained | None, saved: Collection[str] | None) -> dict[str, Any]:
    """Return the settings that are known.

    Parameters
    ----------
    about : Pretrained, optional
        What the adapter's file records of its base. The path of a local folder is not written: it is nobody else's.
    saved : collection of str, optional
        ``modules_to_save``: the modules that are in the file as a whole.

    Examples
    --------
    >>> origin_settings(Pretrained("HuggingFaceTB/SmolLM2-135M", task="text-generation"), None)
    {'base_model_name_or_path': 'HuggingFaceTB/SmolLM2-135M', 'task_type': 'CAUSAL_LM'}
    >>> bert = Pretrained("/home/me/bert", task="text-classification")
    >>> origin_settings(bert, ["classifier"])
    {'task_type': 'SEQ_CLS'}
    >>> origin_settings(bert, None)["auto_mapping"]["base_model_class"]
    'AutoModelForSequenceClassification'
    """
    if about is None or about.library != "transformers":
        return {}
    found = dict[str, Any]()
    if about.name and not about.local and not about.remote:
        found["base_model_name_or_path"] = about.name
        if about.revision:
            found["revision"] = about.revision
    task = _PEFT_TASKS.get(about.task)
    if task is not None and _has_head(task, saved or ()):
        found["task_type"] = task.name
    elif about.task:
        found["auto_mapping"] = {"base_model_class": TASKS[about.task].model, "parent_library": "transformers"}
    return found


def _has_head(task: _PeftTask, saved: Collection[str]) -> bool:
    """Return whether the modules that PEFT trains whole for a task are in the file, and as a whole."""
    inside = any(f".{head}." in f".{path}" for path in saved for head in task.heads)
    return not task.heads or (not inside and any(path.rpartition(".")[2] in task.heads for path in saved))
