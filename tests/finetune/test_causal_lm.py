"""Language models: conversations, rows without anything to predict, and greedy completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tnadapt.errors import FileError, TnadaptError
from tnadapt.finetune import Spec, open_problem, predict
from tnadapt.finetune.data import Samples, Table, open_source
from tnadapt.finetune.tasks import TASKS

from . import tiny_models as tiny
from .untrained import untrained

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {{ '[SEP] ' if m.role == 'assistant' else '' }}{% endfor %}"
    "{{ 'assistant ' if add_generation_prompt else '' }}"
)
CausalLM = TASKS["causal-lm"]


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "good film"} for role in roles]


# -- Conversations -----------------------------------------------------------------------------


@pytest.mark.parametrize("roles", [("user",), ("user", "assistant", "user"), ("system",)])
def test_conversations_to_train_on_end_with_an_answer(tmp_path: Path, roles: tuple[str, ...]) -> None:
    rows = [{"messages": turns("user", "assistant")}, {"messages": turns(*roles)}]
    source = open_source(tiny.rows(tmp_path / "a.jsonl", rows))
    message = (
        f"row 1 of .*a.jsonl: the last turn is of the role '{roles[-1]}'; expected 'assistant', because the model is "
        "trained on the last turn: end each conversation with an answer"
    )
    with pytest.raises(FileError, match=message):
        CausalLM.read(source, Spec())


def test_conversations_of_a_test_part_end_with_an_answer() -> None:
    columns = {"messages": [turns("user", "assistant")] * 4}
    table = Table("chats", "chats", columns, {"test": {"messages": [turns("user")]}})
    with pytest.raises(FileError, match="row 0 of the test part of chats: the last turn is of the role 'user'"):
        CausalLM.read(table, Spec())


def test_conversations_to_predict_may_end_with_a_question(tmp_path: Path) -> None:
    whole = tiny.rows(tmp_path / "a.jsonl", [{"messages": turns("user", "assistant")}] * 8)
    file = untrained(tmp_path / "a.safetensors", tiny.gpt2(tmp_path / "gpt2", template=TEMPLATE), whole)
    rows = [{"messages": turns("user")}, {"messages": turns("user", "assistant")}]
    found = predict(file, tiny.rows(tmp_path / "b.jsonl", rows), new_tokens=2)
    assert found.metrics == {}
    assert found.rows[0]["prediction"] == found.rows[1]["prediction"]


# -- Rows without targets ----------------------------------------------------------------------


def test_a_row_without_targets_is_no_exact_match() -> None:
    empty, wrong, right = torch.zeros(0, 2), torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 7.0]])
    rows = [one.double() for one in (empty, wrong, right)]
    labels = torch.tensor([[-100, -100], [-100, 7], [-100, 7]])
    assert CausalLM("completion").measure(rows, labels).more["exact match"] == 0.5
    assert "exact match" not in CausalLM("completion").measure(rows[:1], labels[:1]).more


def test_a_row_without_targets_has_no_gap_and_no_loss() -> None:
    empty, one, other = torch.zeros(0, 2), torch.tensor([[1.0, 5.0]]), torch.tensor([[1.5, 9.0]])
    task = CausalLM("completion")
    assert task.largest_gap([empty], [empty]) == 0
    assert task.largest_gap([empty, one], [empty, other]) == 0.5
    assert TASKS["token-classification"](("O", "A")).largest_gap([empty], [empty]) == 0
    assert task.answer(empty) == {"loss": None, "perplexity": None}


# -- Completions -------------------------------------------------------------------------------


def completed(model: Any, tokenizer: Any, *prompts: str) -> list[str]:
    samples = Samples([(prompt, "") for prompt in prompts], np.zeros(len(prompts), np.int64))
    found = CausalLM("completion").complete(model, tokenizer, samples, 32, 8, 6, torch.device("cpu"))
    assert found is not None
    return found


def test_completions_are_greedy_whatever_the_model_prefers(tmp_path: Path) -> None:
    folder = tiny.gpt2(tmp_path / "gpt2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "[SEP]"
    prompts = ("what is it", "the film was very very good")
    plain = completed(model, tokenizer, *prompts)
    for text, prompt in zip(plain, prompts, strict=True):
        before = tokenizer(prompt)["input_ids"]
        tokens = list(before)
        while len(tokens) < len(before) + 6 and tokens[-1] != tokenizer.eos_token_id:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert text == tokenizer.decode(tokens[len(before) :], skip_special_tokens=True)
    own = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 6, "suppress_tokens": [5, 6, 7]}
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert completed(model, tokenizer, *prompts) == plain
    assert {name: getattr(model.generation_config, name) for name in own} == own


@pytest.mark.parametrize("form", ["completion", "text"])
def test_an_empty_prompt_is_named(tmp_path: Path, form: str) -> None:
    folder = tiny.gpt2(tmp_path / "gpt2")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = [("good", ""), ("", "")] if form == "completion" else ["good", ""]
    message = "finds no token in the prompt of row 1, '', so there is nothing to continue; give each row a prompt"
    with pytest.raises(TnadaptError, match=message):
        CausalLM(form).complete(
            model, tokenizer, Samples(inputs, np.zeros(2, np.int64)), 8, 2, 2, torch.device("cpu")
        )  # fmt: skip


def test_a_model_that_is_none_of_language(tmp_path: Path) -> None:
    spec = Spec(model=tiny.bert(tmp_path / "bert"), data=tiny.completions(tmp_path / "a.jsonl"))
    with pytest.raises(TnadaptError, match="no causal language model: use --model with one, such as GPT-2 or Llama"):
        open_problem(spec)
