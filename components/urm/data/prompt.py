"""Prompts as token ids: a PREFIX of one user context, and a BLOCK for each of its tasks.

    prefix  the template `urm.profile`: text, and where it calls items(), one [ITEM] token per history item, newest
            first; items('view') and the like make several lists
    block   task text, guidance if there is one, [UM_0] … [UM_{H-1}], [LM], and in training the target text and the end
            token

Without a language model a prefix is empty, and a block the number of its task's prompt (TaskWriter).

All blocks of a context attend to the whole prefix and to themselves, never to one another (see packing.py).
The H user tokens are H added tokens of the vocabulary, so that their embeddings differ from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import jinja2
import numpy as np
import numpy.typing as npt
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from components.config import Task, UrmConfig
from components.exceptions import ConfigError
from components.urm.data.request import UserContext

_MARK = "\x00"  # of a list of item tokens in rendered text, before and behind its number
ITEM_TOKEN, LM_TOKEN, USER_TOKEN = "[ITEM]", "[LM]", "[UM_{}]"


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, num_user_vectors: int) -> None:
    """Add [ITEM], [LM] and [UM_0] … to the vocabulary; they are saved with the tokenizer."""
    names = [ITEM_TOKEN, LM_TOKEN, *(USER_TOKEN.format(i) for i in range(num_user_vectors))]
    tokenizer.add_special_tokens({"additional_special_tokens": names})


@dataclass(frozen=True)
class Prefix:
    """Token ids that all tasks of a context share."""

    token_ids: tuple[int, ...]  # text with item tokens in it
    # where the item tokens stand, and which history item each is: (place in token_ids, column)
    items: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Block:
    """Token ids of one task of a context."""

    prompt: tuple[int, ...]  # task text
    text: tuple[int, ...] = ()  # target text and end token; empty without a text target
    query: str = ""  # what the user searches for in words; empty without a query
    guidance: str = ""  # what the recall should prefer in words; empty without guidance. The prompt contains it, too
    words_withheld: bool = False  # in training: the query acts by its meaning, and none of its words is copied

    def continued(self, generated: Sequence[int]) -> Block:
        """This block with the text generated so far; the last label is a placeholder for the next token."""
        return replace(self, text=(*generated, 0))


class Writer(Protocol):
    """Makes prefixes and blocks."""

    user_ids: tuple[int, ...]  # token ids of [UM_0] …
    lm_id: int  # token id of [LM]
    end_id: int  # token id that ends a text; also padding

    def prefix(self, context: UserContext, places: Sequence[int] | npt.NDArray[np.int64]) -> Prefix:
        """The part of the prompt that all tasks of a context share, see `PromptWriter`."""

    def block(
        self, task: Task, query: str | None, categories: Sequence[str] | None = None, guidance: str | None = None
    ) -> Block:
        """The block of a task, see `PromptWriter`."""


class TaskWriter:
    """Numbers the tasks by their prompts, for a model without a language model; writes no text."""

    def __init__(self, prompts: Sequence[str], num_user_vectors: int) -> None:
        """Take the prompt templates that the model has states of, in the order of their numbers."""
        self.user_ids = (0,) * num_user_vectors
        self.lm_id = self.end_id = 0
        self._numbers = {prompt: number for number, prompt in enumerate(prompts)}

    def prefix(self, context: UserContext, places: Sequence[int] | npt.NDArray[np.int64]) -> Prefix:
        """Nothing: the history acts through the copy path alone."""
        return Prefix((), ())

    def block(
        self, task: Task, query: str | None, categories: Sequence[str] | None = None, guidance: str | None = None
    ) -> Block:
        """The number of the task's prompt; query and guidance act through the copy path alone.

        Raises:
            ConfigError: The model has no states of this prompt.
        """
        number = self._numbers.get(task.prompt)
        if number is None:
            raise ConfigError(
                f"task {task.name!r}",
                expected="a prompt of the training, since with `urm.backbone: none` nothing reads another",
                got=repr(task.prompt),
                remedy="train again with this task, or with a language model",
            )
        return Block((number,), query=query or "", guidance=_one_line(guidance))


class _NoItems(str):
    """Text that stands for an empty list of items, which is false in a condition of a template."""

    def __bool__(self) -> bool:
        return False


class PromptWriter:
    """Renders contexts and tasks to token ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: UrmConfig) -> None:
        """Take a tokenizer that has the special tokens, and section `urm` of the configuration."""
        self.tokenizer = tokenizer
        self.history_length = config.history_length
        self.item_id = self._id(ITEM_TOKEN)
        self.lm_id = self._id(LM_TOKEN)
        self.user_ids = tuple(self._id(USER_TOKEN.format(i)) for i in range(config.num_user_vectors))
        self.end_id = int(tokenizer.eos_token_id)
        # The text is input of a model, never a web page: nothing to escape. Templates come with a bundle, from
        # wherever that was fetched: they reach nothing but their variables.
        self._jinja = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)
        self._profile = self._jinja.from_string(config.profile)
        self._template = lru_cache(maxsize=256)(self._jinja.from_string)
        self._tokens = lru_cache(maxsize=8192)(self._tokenise)  # few distinct texts

    def prefix(self, context: UserContext, places: Sequence[int] | npt.NDArray[np.int64]) -> Prefix:
        """The part of the prompt that all tasks of a context share.

        `places` are the history items that may be in the prompt, newest first; their order numbers the columns.

        Raises:
            ConfigError: The template names a variable that does not exist.
        """
        lists: list[list[int]] = []

        def items(*behaviors: str) -> str:
            """Stands for item tokens: of the whole history, or of the behaviours named; the newest ones."""
            wanted = [c for c, place in enumerate(places) if not behaviors or context.behaviors[place] in behaviors]
            lists.append(wanted[: self.history_length])
            mark = f"{_MARK}{len(lists) - 1}{_MARK}"
            return mark if wanted else _NoItems(mark)

        try:
            text = self._profile.render(
                num_events=context.num_events,
                num_items=context.num_items,
                num_active_days=context.num_active_days,
                days_since_last=context.days_since_last,
                top_categories=[name.replace(_MARK, "") for name in context.top_categories],
                items=items,
            )
        except jinja2.TemplateError as error:
            raise _bad_template("field urm.profile", "items, num_events, num_items, …", error) from None
        token_ids: list[int] = []
        found: list[tuple[int, int]] = []
        for number, piece in enumerate(text.split(_MARK)):
            if number % 2:  # between two marks
                found += [(len(token_ids) + offset, column) for offset, column in enumerate(lists[int(piece)])]
                token_ids += [self.item_id] * len(lists[int(piece)])
            else:
                token_ids += self._tokens(piece)
        return Prefix(tuple(token_ids), tuple(found))

    def block(
        self, task: Task, query: str | None, categories: Sequence[str] | None = None, guidance: str | None = None
    ) -> Block:
        """The block of a task; with `categories` also its target text.

        Guidance follows the task's text; its line breaks become spaces.

        Raises:
            ConfigError: A template of the task names a variable that does not exist.
        """
        wanted = _one_line(guidance)
        asked = self._render(task, "prompt", query=query or "")
        prompt = self._tokens(f"{asked} {wanted}" if wanted else asked)
        if categories is None:
            return Block(prompt, query=query or "", guidance=wanted)
        text = self._render(task, "text_target", categories=list(categories), query=query or "")
        return Block(prompt, (*self._tokens(" " + text), self.end_id), query or "", wanted)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated token ids."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def _render(self, task: Task, field: str, **variables: object) -> str:
        try:
            return self._template(getattr(task, field)).render(**variables)
        except jinja2.TemplateError as error:
            raise _bad_template(f"task {task.name!r}, field {field!r}", ", ".join(variables), error) from None

    def _tokenise(self, text: str) -> tuple[int, ...]:
        # User input is text, even if it contains [ITEM] or a special token of the backbone.
        return tuple(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _id(self, token: str) -> int:
        number = self.tokenizer.convert_tokens_to_ids(token)
        if not isinstance(number, int) or number == self.tokenizer.unk_token_id:
            raise ConfigError(
                "tokenizer of the model",
                expected=f"the special token {token}",
                got="a vocabulary without it",
                remedy="use the model directory that the sft stage wrote",
            )
        return number


def _one_line(guidance: str | None) -> str:
    return " ".join((guidance or "").split())


def _bad_template(subject: str, variables: str, error: jinja2.TemplateError) -> ConfigError:
    return ConfigError(
        subject, expected=f"a Jinja2 template over {variables}", got=error.message, remedy="fix the template"
    )
