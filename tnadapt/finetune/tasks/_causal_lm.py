"""Causal language modeling: texts, completions of prompts, or the last turn of conversations."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tnadapt.errors import FileError, TnadaptError, safe_repr

from .._inputs import IGNORED, Texts, token_targets
from .._learning_task import Evidence, LearningTask, Measured, Metric, Rows
from .._specification import Part, Spec
from ..data import Data, Samples, Table
from ._classification import columns_of

PROMPT_COLUMNS = ("prompt", "instruction", "question")
COMPLETION_COLUMNS = ("completion", "response", "answer", "output")
_USUAL = {*PROMPT_COLUMNS, *COMPLETION_COLUMNS}
MESSAGES = "messages"
_FORMS = ("text", "completion", MESSAGES)


@dataclasses.dataclass(frozen=True)
class CausalLM(LearningTask):
    """The model continues texts: loss per token, perplexity, and exact matches of completions.

    The model is trained on whole texts, on the completions of prompts, or on the last turn of conversations. An exact
    match is a completion that greedy decoding reproduces up to its end. No text is generated to count them: greedy
    decoding does so if and only if every token of the completion is the most probable one after those before it.

    Attributes
    ----------
    form : {"text", "completion", "messages"}
    """

    name: ClassVar[str] = "causal-lm"
    auto: ClassVar[str] = "AutoModelForCausalLM"
    metric: ClassVar[Metric] = Metric("loss per token", lower=True, percent=False)
    needs_head: ClassVar[bool] = False
    evaluation_factor: ClassVar[int] = 1
    numbers: ClassVar[str] = "losses"

    form: str

    def __post_init__(self) -> None:
        self._require("form", self.form, self.form in _FORMS, f"one of {', '.join(map(repr, _FORMS))}")

    @classmethod
    def fits(cls, source: Table, spec: Spec) -> Evidence:
        """Conversations and completions are for this task alone, and so are texts with nothing else."""
        columns = _columns(source, spec)
        if len(columns) == 2 or columns == [MESSAGES]:
            # Columns with other names, given by the user, may also be texts and labels.
            usual = columns == [MESSAGES] or {name.strip().lower() for name in columns} & _USUAL
            what = "are" if usual else "may be"
            return Evidence(
                "evident" if usual else "possible", f"{' and '.join(map(repr, columns))} {what} prompts and completions"
            )
        if columns and len(source.columns) == 1:
            return Evidence("evident", f"{columns[0]!r} has texts, and there is no other column")
        if columns:
            labelled = columns_of(source, spec)[1] is not None
            return Evidence(
                "allowed" if labelled else "possible", f"the texts in {columns[0]!r} may be what is to be learned"
            )
        needed = "a column text, columns prompt and completion, or a column messages"
        return Evidence("no", f"{source.name} has {source.listed()}; it needs {needed}")

    @classmethod
    def read(cls, source: Table, spec: Spec) -> Data:
        """Return texts, pairs of prompt and completion, or conversations."""
        columns = _columns(source, spec)
        source.filled(columns)
        return Data(source.name, "text", (), *(_to_train_on(part, columns) for part in source.parts(columns)))

    @classmethod
    def of(cls, data: Data, training: Samples) -> Self:
        """Return the task with the form of the data."""
        first = training.inputs[0]
        return cls("text" if isinstance(first, str) else "completion" if isinstance(first, tuple) else "messages")

    def samples(self, source: Table, spec: Spec) -> tuple[Samples, bool]:
        """Return prompts, with what follows them if it is known."""
        columns = _columns(source, spec, alone=True)
        if not columns or (columns == [MESSAGES]) != (self.form == MESSAGES):
            needed = {"text": "text", "completion": "prompt", "messages": MESSAGES}[self.form]
            raise FileError(f"{source.name} has {source.listed()}; the adapter was trained on a column {needed!r}")
        samples = _samples(source, columns[:1] if self.form == "text" else columns)
        if self.form == MESSAGES:
            return samples, all(turns[-1]["role"] == "assistant" for turns in samples.inputs)
        if self.form == "completion" and len(columns) == 1:
            return Samples([(prompt, "") for prompt in samples.inputs], samples.labels), False
        return samples, True

    @property
    def outputs(self) -> int | None:
        """As many as the model has tokens."""
        return None

    def encode(self, samples: Samples, tokenizer: Any, longest: int) -> Part:
        """Return tokens; what the model is not trained on has no target.

        Of a completion that is too long the end is cut off, and of a prompt the beginning.
        """
        tokens, targets = [], []
        for sample in samples.inputs:
            before, after = _split(sample, tokenizer)
            after = after[:longest] if not before else after[: longest - 1]
            before = before[max(0, len(before) + len(after) - longest) :]
            tokens.append([*before, *after])
            targets.append([IGNORED] * len(before) + after)
        return Texts(tokens, token_targets(targets), tokenizer.pad_token_id)

    def check(self, compute: Callable[[Any], Tensor], inputs: Any, model: str, data: str) -> None:
        """Raise an error if logits depend on later tokens, as those of a BERT do."""
        first = {name: tensor[:1] for name, tensor in inputs.items()}
        if first["input_ids"].shape[1] < 2:
            raise TnadaptError(f"the longest of two texts of {data} has one token; there is nothing to continue")
        other = first["input_ids"].clone()
        other[:, -1] = (other[:, -1] + 1) % 2
        logits, changed = compute(first), compute({**first, "input_ids": other})
        if not torch.allclose(logits[:, :-1], changed[:, :-1], rtol=1e-3, atol=1e-4):
            raise TnadaptError(
                f"{model} sees the tokens that it is to predict, so it is no causal language model: use --model with "
                "one, such as GPT-2 or Llama"
            )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of the next token, the mean over tokens."""
        some, truth = _next(logits, labels)
        chosen = truth != IGNORED
        return nn.functional.cross_entropy(some[chosen].float(), truth[chosen])

    def rows(self, logits: Tensor, labels: Tensor) -> Rows:
        """Return the loss of each token that has a target, and the token that the model expected there."""
        rows = []
        for some, truth in zip(*_next(logits, labels.to(logits.device)), strict=True):
            chosen = truth != IGNORED
            here = some[chosen].float()
            losses = nn.functional.cross_entropy(here, truth[chosen], reduction="none")
            # Doubles hold any token exactly.
            rows.append(torch.stack([losses.double(), here.argmax(1).double()], 1).cpu())
        return rows

    def measure(self, rows: Rows, labels: Tensor) -> Measured:
        """Return loss, perplexity, and the fraction of exact matches unless the data are whole texts."""
        loss = float(torch.cat([row[:, 0] for row in rows]).mean())
        more = {"perplexity": math.exp(min(loss, 700.0))}
        if self.form != "text":
            right = [
                bool((row[:, 1] == truth[truth != IGNORED]).all())
                for row, truth in zip(rows, labels[:, 1:], strict=True)
                if len(row)  # else there is nothing to match
            ]
            if right:
                more["exact match"] = sum(right) / len(right)
        return Measured(loss, loss, more)

    def predicted(self, row: Tensor) -> Tensor:
        """Return the tokens that the model expected."""
        return row[:, 1].long()

    def largest_gap(self, rows: Rows, others: Rows) -> float:
        """Return the largest difference of the loss of a token."""
        return super().largest_gap([row[:, 0] for row in rows], [row[:, 0] for row in others])

    def complete(
        self,
        model: Any,
        tokenizer: Any,
        samples: Samples,
        longest: int,
        batch: int,
        new_tokens: int | None,
        device: torch.device,
    ) -> list[str] | None:
        """Return what greedy decoding writes after each prompt, up to the end of the text or ``new_tokens`` tokens."""
        if not getattr(model, "can_generate", lambda: False)():
            raise TnadaptError(
                f"the adapter's task is {self.name!r}, but its model, a {type(model).__name__}, cannot continue texts"
            )
        positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        new_tokens = min(64, positions // 2) if new_tokens is None else new_tokens
        if new_tokens >= positions:
            raise TnadaptError(
                f"--max-new-tokens must be below the {positions} positions of the model; got {new_tokens}"
            )
        prompts = _prompts(samples, tokenizer, min(longest, positions - new_tokens))
        completions = [""] * len(prompts)
        # Prompts of similar length share a batch, to reduce padding.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        with _greedy(model, tokenizer, new_tokens):
            for start in range(0, len(order), batch):
                some = order[start : start + batch]
                texts = _continued(model, tokenizer, [prompts[index] for index in some], device)
                for index, text in zip(some, texts, strict=True):
                    completions[index] = text
        return completions

    def answer(self, row: Tensor) -> dict[str, Any]:
        """Return the loss and the perplexity; None if nothing follows the prompt."""
        if not len(row):
            return {"loss": None, "perplexity": None}
        loss = float(row[:, 0].mean())
        return {"loss": round(loss, 6), "perplexity": round(math.exp(min(loss, 700.0)), 4)}


@contextlib.contextmanager
def _greedy(model: Any, tokenizer: Any, new_tokens: int) -> Iterator[None]:
    """Switch the model to greedy decoding inside ``with``, whatever its own settings are."""
    # Settings passed to generate() are completed by the model's own, such as a repetition penalty.
    config = model.generation_config
    model.generation_config = type(config)(
        max_new_tokens=new_tokens, do_sample=False, use_cache=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    try:
        yield
    finally:
        model.generation_config = config


def _prompts(samples: Samples, tokenizer: Any, longest: int) -> list[list[int]]:
    """Return the last ``longest`` tokens, or fewer, of each prompt."""
    prompts = [_given(sample, tokenizer)[-longest:] for sample in samples.inputs]
    for row, (tokens, sample) in enumerate(zip(prompts, samples.inputs, strict=True)):
        if not tokens:
            raise TnadaptError(
                f"the tokenizer finds no token in the prompt of row {row}, "
                f"{safe_repr(sample[0] if isinstance(sample, tuple) else sample)}, so there is nothing to continue; "
                "give each row a prompt"
            )
    return prompts


def _continued(model: Any, tokenizer: Any, prompts: Sequence[list[int]], device: torch.device) -> list[str]:
    """Return the model's continuation of each prompt in a batch, which is padded on the left."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    tokens = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    sequences = model.generate(tokens.to(device), attention_mask=mask.to(device))
    texts: list[str] = tokenizer.batch_decode(sequences[:, tokens.shape[1] :], skip_special_tokens=True)
    return texts


def _given(one: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that the model is to continue."""
    return _plain(one, tokenizer) if isinstance(one, str) else _split(one, tokenizer)[0]


def _next(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits and targets aligned so that each position predicts the next token."""
    return logits[:, :-1], labels[:, 1 : logits.shape[1]]


def _columns(table: Table, spec: Spec, alone: bool = False) -> list[str]:
    """Return the columns of prompts and completions (optional if ``alone``), of conversations, or of texts, if any."""
    prompt = table.column(spec.text_column, PROMPT_COLUMNS)
    completion = table.column(spec.label_column, COMPLETION_COLUMNS)
    if prompt is not None and completion is not None:
        return [prompt, completion]
    if MESSAGES in list(table.columns) and spec.text_column is None:
        return [MESSAGES]
    text = columns_of(table, spec)[0] or (prompt if alone else None)
    return [] if text is None else [text]


def _to_train_on(table: Table, names: Sequence[str]) -> Samples:
    """Return samples for training, where conversations must end with a turn of the assistant."""
    samples = _samples(table, names)
    for row, turns in enumerate(samples.inputs if names[0] == MESSAGES else ()):
        if turns[-1]["role"] != "assistant":
            raise FileError(
                f"{table.place(row)}: the last turn is of the role {safe_repr(turns[-1]['role'])}; expected "
                "'assistant', because the model is trained on the last turn: end each conversation with an answer"
            )
    return samples


def _samples(table: Table, names: Sequence[str]) -> Samples:
    inputs: list[Any] = list(table.columns[names[0]])
    if names[0] == MESSAGES:
        for row, turns in enumerate(inputs):
            _check_messages(table, row, turns)
        return Samples(inputs, np.zeros(len(inputs), np.int64))
    for name in names:
        for row, text in enumerate(table.columns[name]):
            if not isinstance(text, str):
                raise FileError(f"{table.place(row)}: {safe_repr(text)} in {name!r} is not a text")
    if len(names) == 2:
        inputs = list(zip(inputs, table.columns[names[1]], strict=True))
    return Samples(inputs, np.zeros(len(inputs), np.int64))


def _check_messages(table: Table, row: int, turns: Any) -> None:
    whole = isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)
    if not whole or not all(isinstance(turn.get(key), str) for turn in turns for key in ("role", "content")):
        raise FileError(
            f'{table.place(row)}: {safe_repr(turns)} is not a conversation; expected [{{"role": …, "content": …}}, …]'
        )


def _plain(text: Any, tokenizer: Any) -> list[int]:
    """Return the tokens of the beginning of a text, without a token for the end."""
    tokens: list[int] = tokenizer(text)["input_ids"]
    return tokens[:-1] if len(tokens) > 1 and tokens[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else tokens


def _split(one: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the given tokens, and the tokens to train on, which include the end token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if isinstance(one, str):
        return [], [*_plain(one, tokenizer), *end]
    if isinstance(one, tuple):
        return _plain(one[0], tokenizer), [*tokenizer(one[1], add_special_tokens=False)["input_ids"], *end]
    return _turns(one, tokenizer)


def _turns(turns: list[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    if tokenizer.chat_template is None:
        raise TnadaptError(
            "the tokenizer has no chat template, by which conversations become text; give another with --tokenizer, "
            "or data with columns prompt and completion"
        )
    answered = turns[-1]["role"] == "assistant"
    prompt = turns[:-1] if answered else turns
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(turns, tokenize=False) if answered else before
    if not whole.startswith(before):
        raise TnadaptError(
            "the chat template writes a conversation otherwise once it has an answer, so the answer cannot be told "
            "apart; give data with columns prompt and completion"
        )
    first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, whole[len(before) :]))
    return first, second
