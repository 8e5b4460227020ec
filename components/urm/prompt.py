"""Prompts as token ids: a PREFIX of one user context, and a BLOCK for each task asked of it.

    prefix  profile text, then one [ITEM] token a history item, newest first
    block   task text, [UM_0] … [UM_{H-1}], [LM], and in training the target text and the end token

All blocks of a context attend to the whole prefix and to themselves, never to one another (see packing.py).
The H user tokens are H added tokens of the vocabulary, so that their embeddings differ from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import jinja2
from transformers import PreTrainedTokenizerBase

from components.config import Task, UrmConfig
from components.exceptions import ConfigError
from components.urm.request import UserContext

ITEM_TOKEN, LM_TOKEN, USER_TOKEN = "[ITEM]", "[LM]", "[UM_{}]"


def add_special_tokens(tokenizer: PreTrainedTokenizerBase, num_user_vectors: int) -> None:
    """Add [ITEM], [LM] and [UM_0] … to the vocabulary; they are saved with the tokenizer."""
    names = [ITEM_TOKEN, LM_TOKEN, *(USER_TOKEN.format(i) for i in range(num_user_vectors))]
    tokenizer.add_special_tokens({"additional_special_tokens": names})


@dataclass(frozen=True)
class Block:
    """Token ids of one task asked of a context.

    Attributes:
        prompt: Task text.
        text: Target text and end token; empty where no text is trained.
        query: What the user asks for, in words; empty where the task has no query.
    """

    prompt: tuple[int, ...]
    text: tuple[int, ...] = ()
    query: str = ""

    def continued(self, spoken: Sequence[int]) -> Block:
        """This block with text said so far; the last label stands for the token to come."""
        return Block(self.prompt, (*spoken, 0), self.query)


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
        # The text is a model's input, never a web page: nothing to escape.
        self._jinja = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)  # noqa: S701
        self._profile = self._jinja.from_string(config.profile)
        self._template = lru_cache(maxsize=256)(self._jinja.from_string)
        self._tokens = lru_cache(maxsize=8192)(self._tokenise)  # few texts, asked again and again

    def profile(self, context: UserContext) -> list[int]:
        """Token ids of the profile text."""
        text = self._profile.render(
            num_events=context.num_events,
            num_items=context.num_items,
            num_active_days=context.num_active_days,
            days_since_last=context.days_since_last,
            top_categories=context.top_categories,
        )
        return list(self._tokens(text))

    def block(self, task: Task, query: str | None, categories: Sequence[str] | None = None) -> Block:
        """The block of a task; with `categories` also its target text.

        Raises:
            ConfigError: A template of the task names a variable that does not exist.
        """
        prompt = self._tokens(self._render(task, "prompt", query=query or ""))
        if categories is None:
            return Block(prompt, query=query or "")
        text = self._render(task, "text_target", categories=list(categories), query=query or "")
        return Block(prompt, (*self._tokens(" " + text), self.end_id), query or "")

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated token ids."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True)).strip()

    def _render(self, task: Task, field: str, **variables: object) -> str:
        try:
            return self._template(getattr(task, field)).render(**variables)
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"task {task.name!r}, field {field!r}",
                expected=f"a Jinja2 template over {', '.join(variables)}",
                got=error.message,
                remedy="mend the template",
            ) from None

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

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
