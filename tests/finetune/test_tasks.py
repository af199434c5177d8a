"""Each task: its metrics against other libraries', what is learnt of its samples, and what is said of its adapters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tnadapt as tna
from tnadapt.errors import FileError, TnadaptError
from tnadapt.finetune import Point, Spec, open_problem, predict
from tnadapt.finetune.data import Samples, Table, open_source
from tnadapt.finetune.grid import Method, head_alone
from tnadapt.finetune.loop import evaluate
from tnadapt.finetune.tasks import TASKS

from . import tiny_models as tiny
from .internals import control_of

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {{ '[SEP] ' if m.role == 'assistant' else '' }}{% endfor %}"
    "{{ 'assistant ' if add_generation_prompt else '' }}"
)


# -- Metrics -----------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_metrics_of_several_labels_are_those_of_sklearn(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    logits = torch.tensor(random.normal(size=(12, 4)), dtype=torch.float32)
    labels = torch.tensor(random.integers(0, 2, (12, 4)), dtype=torch.float32)
    found = TASKS["multi-label"](tuple("abcd")).measure(list(logits), labels)
    here = (logits > 0).numpy()
    assert found.score == pytest.approx(metrics.f1_score(labels, here, average="micro", zero_division=0))
    assert found.more["macro F1"] == pytest.approx(metrics.f1_score(labels, here, average="macro", zero_division=0))
    assert found.more["all labels right"] == pytest.approx(metrics.accuracy_score(labels, here))


@given(st.integers(0, 10_000), st.booleans())
def test_metrics_of_tags_are_those_of_sklearn(seed: int, outside: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(seed)
    names = ("A", "B", "O" if outside else "C")
    labels = torch.tensor(random.integers(0, 3, (6, 5)))
    labels[random.random((6, 5)) < 0.3] = -100
    labels[0, 0] = 0
    task = TASKS["token-classification"](names)
    logits = torch.tensor(random.normal(size=(6, 5, 3)), dtype=torch.float32)
    rows = task.rows(logits, labels)
    found = task.measure(rows, labels)
    here, truth = torch.cat(list(rows)).argmax(1), labels[labels != -100]
    inside = [0, 1] if outside else [0, 1, 2]
    assert found.score == pytest.approx(metrics.f1_score(truth, here, labels=inside, average="micro", zero_division=0))
    assert found.more["accuracy"] == pytest.approx(metrics.accuracy_score(truth, here))
    assert found.more["macro F1"] == pytest.approx(metrics.f1_score(truth, here, average="macro", zero_division=0))
    assert found.loss == pytest.approx(float(task.loss(logits, labels)), rel=1e-5)


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=20))
def test_correlations_are_those_of_scipy(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    found, truth = np.array(pairs, np.float64).T
    task = TASKS["regression"](3.0, 2.0)
    measured = task.measure([torch.tensor([one]) for one in found], torch.tensor(truth))
    assert measured.score == pytest.approx(2.0 * math.sqrt(((found - truth) ** 2).mean()))
    if len(set(found)) > 1 and len(set(truth)) > 1:
        assert measured.more["Pearson"] == pytest.approx(stats.pearsonr(found, truth)[0], abs=1e-9)
        assert measured.more["Spearman"] == pytest.approx(stats.spearmanr(found, truth)[0], abs=1e-9)
    else:
        assert measured.more["Pearson"] == 0


def test_numbers_come_back_in_their_unit(tmp_path: Path) -> None:
    problem = open_problem(Spec(model=tiny.bert(tmp_path / "bert"), data=tiny.numbers(tmp_path / "a.jsonl")))
    task, labels = problem.task, problem.parts["training"].labels
    assert float(labels.mean()) == pytest.approx(0, abs=1e-6)
    assert float(labels.double().std(correction=0)) == pytest.approx(1, abs=1e-5)
    truth = {round(2.5 * ("good" in t) - 1.25 * ("bad" in t) + 0.1 * t.count("very"), 6) for t in tiny.films()}
    assert {round(task.answer(one.reshape(1))["prediction"], 4) for one in labels} <= {round(one, 4) for one in truth}


# -- Words and completions ---------------------------------------------------------------------


def test_the_first_token_of_each_word_has_its_tag() -> None:
    words = [*tiny.WORDS, "act", "##or"]
    tokenizer = transformers.BertTokenizerFast({word: place for place, word in enumerate(words)})
    task = TASKS["token-classification"](("A", "B"))
    labels = np.empty(2, object)
    labels[:] = [[0, 1, 0], [1]]
    samples = Samples([["the", "actor", "good"], ["film"]], labels)
    part = task.encode(samples, tokenizer, 32)
    assert tokenizer.convert_ids_to_tokens(part.tokens[0].tolist()) == ["[CLS]", "the", "act", "##or", "good", "[SEP]"]
    assert part.labels.tolist() == [[-100, 0, 1, -100, 0, -100], [-100, 1, -100, -100, -100, -100]]
    # What is cut off has no tag.
    assert task.encode(samples, tokenizer, 4).labels.tolist() == [[-100, 0, 1, -100], [-100, 1, -100, -100]]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tiny.gpt2(tmp_path_factory.mktemp("models") / "gpt2", template=TEMPLATE))


@pytest.fixture
def tokenizer(gpt2: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(gpt2, pad_token="[SEP]")


def test_only_completions_are_learnt_and_ends_of_prompts_are_kept(tokenizer: Any) -> None:
    task = TASKS["causal-lm"]("completion")
    samples = Samples([("what is it", "good film"), ("the", "bad")], np.zeros(2, np.int64))

    def encoded(longest: int) -> tuple[list[str], list[int]]:
        part = task.encode(samples, tokenizer, longest)
        return tokenizer.convert_ids_to_tokens(part.tokens[0].tolist()), part.labels[0].tolist()

    good, film, end = (tiny.WORDS.index(word) for word in ("good", "film", "[SEP]"))
    assert encoded(9) == (["what", "is", "it", "good", "film", "[SEP]"], [-100] * 3 + [good, film, end])
    assert encoded(4) == (["it", "good", "film", "[SEP]"], [-100, good, film, end])
    assert encoded(3) == (["it", "good", "film"], [-100, good, film])


def test_the_last_turn_of_a_conversation_is_learnt(tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "good"}]
    samples = Samples([turns], np.zeros(1, np.int64))
    part = TASKS["causal-lm"]("messages").encode(samples, tokenizer, 32)
    assert tokenizer.decode(part.tokens[0]) == "user what is it assistant good [SEP]"
    assert (part.labels[0] != -100).tolist() == [False] * 5 + [True] * 2
    tokenizer.chat_template = None
    with pytest.raises(TnadaptError, match=r"the tokenizer has no chat template.*give another with --tokenizer"):
        TASKS["causal-lm"]("messages").encode(samples, tokenizer, 32)


def test_exact_matches_are_those_of_greedy_decoding(gpt2: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2).eval()

    def greedy(prompt: Any, count: int) -> list[int]:
        settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 3}
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
        return list(output[0, prompt.shape[1] :].tolist())

    rows = []
    for place, text in enumerate(tiny.films()):
        words = tokenizer.convert_ids_to_tokens(greedy(tokenizer(text, return_tensors="pt")["input_ids"], 4))
        # Every other completion is what the model says, and the rest differ in one word.
        if place % 2:
            words[place % len(words)] = "Rome" if words[place % len(words)] != "Rome" else "Paris"
        rows.append({"prompt": text, "completion": " ".join(words)})
    problem = open_problem(Spec(model=str(gpt2), data=tiny.rows(tmp_path / "a.jsonl", rows)))
    part = problem.parts["training"]
    outputs = evaluate(problem.build(0), problem.logits, problem.task, part, CPU)
    right, expected = [], []
    for output, tokens, labels in zip(outputs, part.tokens, part.labels, strict=True):
        # Four words are not followed by the end of the text, which the task adds, so it is left out here.
        learnt = labels[labels != -100][:-1]
        right.append(bool((output[: len(output) - 1, 1] == learnt).all()))
        expected.append(greedy(tokens[: len(tokens) - len(learnt) - 1][None], len(learnt)) == learnt.tolist())
    assert right == expected
    assert 0 < sum(expected) < len(expected)


def test_a_text_model_that_sees_what_it_is_to_predict_is_refused(tmp_path: Path) -> None:
    spec = Spec(model=tiny.bert(tmp_path / "bert"), data=tiny.completions(tmp_path / "a.jsonl"))
    message = "sees the tokens that it is to predict, so it is no causal language model: use --model with one, such as "
    with pytest.raises(TnadaptError, match=message + "GPT-2 or Llama"):
        open_problem(spec)


def test_a_tokenizer_for_a_model_without_one_is_found_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, data = tiny.gpt2(tmp_path / "gpt2", tokenizer=False), tiny.completions(tmp_path / "a.jsonl")
    tiny.words(tmp_path / "words")
    monkeypatch.chdir(tmp_path)
    problem = open_problem(Spec(model=bare, data=data, tokenizer="words"))
    assert problem.source["tokenizer"] == str(tmp_path / "words")
    assert problem.task.name == "causal-lm"


# -- Language models: conversations, rows without anything to predict, and greedy completions ------

CausalLM = TASKS["causal-lm"]


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "good film"} for role in roles]


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
    columns = {"messages": [turns("user", "assistant")] * 4}
    table = Table("chats", "chats", columns, {"test": {"messages": [turns(*roles)]}})
    message = f"row 0 of the test part of chats: the last turn is of the role '{roles[-1]}'"
    with pytest.raises(FileError, match=message):
        CausalLM.read(table, Spec())


def test_conversations_to_predict_may_end_with_a_question(gpt2: Path, tmp_path: Path) -> None:
    whole = tiny.rows(tmp_path / "a.jsonl", [{"messages": turns("user", "assistant")}] * 8)
    file = tiny.untrained(tmp_path / "a.safetensors", str(gpt2), whole)
    rows = [{"messages": turns("user")}, {"messages": turns("user", "assistant")}]
    found = predict(file, tiny.rows(tmp_path / "b.jsonl", rows), new_tokens=2)
    assert found.metrics == {}
    assert found.rows[0]["prediction"] == found.rows[1]["prediction"]


def test_a_row_without_targets_is_no_exact_match_and_has_no_gap_and_no_loss() -> None:
    empty, wrong, right = torch.zeros(0, 2), torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 7.0]])
    rows = [row.double() for row in (empty, wrong, right)]
    labels = torch.tensor([[-100, -100], [-100, 7], [-100, 7]])
    task = CausalLM("completion")
    assert task.measure(rows, labels).more["exact match"] == 0.5
    assert "exact match" not in task.measure(rows[:1], labels[:1]).more
    assert task.largest_gap([empty], [empty]) == 0
    assert task.largest_gap([empty, wrong], [empty, torch.tensor([[1.5, 9.0]])]) == 0.5
    assert TASKS["token-classification"](("O", "A")).largest_gap([empty], [empty]) == 0
    assert task.answer(empty) == {"loss": None, "perplexity": None}


def completed(model: Any, tokenizer: Any, *prompts: str) -> Any:
    samples = Samples([(prompt, "") for prompt in prompts], np.zeros(len(prompts), np.int64))
    return CausalLM("completion").complete(model, tokenizer, samples, 32, 8, 6, CPU)


def test_completions_are_greedy_whatever_the_model_prefers(gpt2: Path, tokenizer: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2).eval()
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
def test_an_empty_prompt_is_named(gpt2: Path, tokenizer: Any, form: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2)
    inputs = [("good", ""), ("", "")] if form == "completion" else ["good", ""]
    message = "finds no token in the prompt of row 1, '', so there is nothing to continue; give each row a prompt"
    with pytest.raises(TnadaptError, match=message):
        CausalLM(form).complete(model, tokenizer, Samples(inputs, np.zeros(2, np.int64)), 8, 2, 2, CPU)


ACCURACY, RMSE = (TASKS[name].metric for name in ("classification", "regression"))


def point(method: Method, *test: float, metric: Any) -> Point:
    return Point(method, 0, 1, 0.1, test, test, 1.0, tuple({"diverged": False} for _ in test), metric=metric)


LORA = Method("LoRA", "r = 1", tna.presets.lora(1))


@pytest.mark.parametrize(
    ("head", "best", "metric", "warning"),
    [
        ((0.8,), (0.9,), ACCURACY, None),
        ((0.8, 0.82), (0.9, 0.92), ACCURACY, None),
        ((2.0,), (1.5,), RMSE, None),
        (
            (0.9,), (0.9,), ACCURACY,
            "the head alone reaches 90.0% (accuracy), the best adapter 90.0%: the adapter adds nothing measurable "
            "(with one seed; --seeds 3 shows the spread)",
        ),
        (
            (0.8, 0.82), (0.81, 0.83), ACCURACY,
            "the head alone reaches 81.0% ± 1.4 (accuracy), the best adapter 82.0% ± 1.4, a difference within the "
            "spread over seeds: the adapter adds nothing measurable",
        ),
        (
            (1.5,), (2.0,), RMSE,
            "the head alone reaches 1.5 (RMSE, lower is better), the best adapter 2: the adapter adds nothing "
            "measurable (with one seed; --seeds 3 shows the spread)",
        ),
    ],
)  # fmt: skip
def test_an_adapter_that_adds_nothing(
    head: tuple[float, ...], best: tuple[float, ...], metric: Any, warning: str | None
) -> None:
    adapter = point(LORA, *best, metric=metric)
    control = control_of([point(head_alone(), *head, metric=metric), adapter], adapter)
    assert control.warning == warning
    assert control_of([adapter], adapter) is None
    assert control_of([adapter], None) is None
