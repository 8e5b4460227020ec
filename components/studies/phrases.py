"""Guidance phrases of a data set, and the items that each should recall (configs/guidance/*.yaml)."""

import re
from collections.abc import Iterable
from typing import Self

from pydantic import Field, field_validator, model_validator

from components.config import Model


class Phrase(Model):
    """One guidance and the categories it asks for."""

    phrase: str = Field(min_length=1)
    categories: tuple[str, ...] = Field(min_length=1, description="Regular expressions over the category path.")
    seen_in_training: bool = Field(description="Whether training prompts contain these words.")
    tasks: tuple[str, ...] = Field(default=(), description="Default: the tasks of the file.")

    @field_validator("categories")
    @classmethod
    def _expressions(cls, categories: tuple[str, ...]) -> tuple[str, ...]:
        for category in categories:
            try:
                re.compile(category)
            except re.error as error:
                raise ValueError(f"expected regular expressions, but {category!r}: {error}") from None
        return categories

    def fits(self, category_path: str) -> bool:
        """Whether an item of this category path "top > middle > leaf" matches the phrase."""
        return re.search("|".join(f"(?:{part})" for part in self.categories), category_path, re.IGNORECASE) is not None


class PhraseBook(Model):
    """Content of a file in configs/guidance."""

    tasks: tuple[str, ...] = Field(min_length=1)
    phrases: tuple[Phrase, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        texts = [phrase.phrase for phrase in self.phrases]
        repeated = [text for text in texts if texts.count(text) > 1]
        if repeated:
            raise ValueError(f"expected each phrase once, not {repeated[0]!r} again")
        return self

    def pairs(self) -> Iterable[tuple[Phrase, str]]:
        """Every phrase with each of its tasks."""
        return ((phrase, task) for phrase in self.phrases for task in phrase.tasks or self.tasks)
