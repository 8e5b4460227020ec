"""Recall tasks: files in configs/tasks."""

from typing import Literal, Self

from pydantic import Field, model_validator

from components.config.model import NAME, Model


class TargetFilter(Model):
    """Which of the next window's events are targets of a task; empty fields do not filter."""

    behaviors: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = ()
    attributes: dict[str, str] = Field(default_factory=dict, description="Event attribute -> required value.")
    history: Literal["any", "bought", "not_bought"] = Field(
        default="any", description="Whether the user had the item before the cut, by an event of any behaviour."
    )
    new_category_level: int | None = Field(
        default=None,
        ge=-1,
        description="The user never had this level of the item's category path (0 = top, -1 = leaf).",
    )
    max_popularity_quantile: float | None = Field(
        default=None, gt=0, le=1, description="Keep items up to this quantile of training events."
    )
    max_train_events: int | None = Field(default=None, ge=0, description="Keep items with at most so many.")
    known_brand: bool = Field(default=False, description="The user had the item's brand before the cut.")
    min_history_items: int | None = Field(default=None, gt=0, description="Distinct items before the cut.")
    query_category_level: int | None = Field(
        default=None, ge=-1, description="One wanted category per user-cut, in words, becomes the query (-1 = leaf)."
    )
    held_out_query: bool | None = Field(
        default=None,
        description="Of the categories as queries: only those held out of all training (true) or only the others "
        "(false), see features.held_out_query_share.",
    )
    query_title_words: int | None = Field(
        default=None, gt=0, description="So many words of one wanted title per user-cut become the query."
    )

    @model_validator(mode="after")
    def _one_query(self) -> Self:
        if self.query_category_level is not None and self.query_title_words is not None:
            raise ValueError("expected query_category_level or query_title_words, not both")
        if self.held_out_query is not None and self.query_category_level is None:
            raise ValueError("expected held_out_query beside query_category_level only")
        return self

    @property
    def has_query(self) -> bool:
        """Whether a target comes with a query text."""
        return self.query_category_level is not None or self.query_title_words is not None


class Task(Model):
    """One recall task; tasks differ in text and filter only."""

    name: str = Field(pattern=NAME)
    description: str
    target: TargetFilter = TargetFilter()
    exclude_bought: bool = Field(
        default=False, description="Items of the user's history (its newest features.history_length) are no candidates."
    )
    prompt: str = Field(description="Jinja2; `query` is available.")
    text_target: str = Field(default="{{ categories | join(', ') }}", description="Jinja2; text after [LM].")
    k: int = Field(default=100, gt=0, le=1000)

    @model_validator(mode="after")
    def _excludes_no_target(self) -> Self:
        if self.exclude_bought and self.target.history != "not_bought" and self.target.new_category_level is None:
            raise ValueError(
                f"expected task {self.name!r} to want new items only (target.history: not_bought, or a "
                "target.new_category_level), since with exclude_bought no other can be recalled"
            )
        return self

    @property
    def needs_query(self) -> bool:
        """Whether the task is defined only with a query text."""
        return self.target.has_query

    @property
    def trains(self) -> bool:
        """Whether the task may have training examples; one with held-out queries has none on purpose."""
        return not self.target.held_out_query
