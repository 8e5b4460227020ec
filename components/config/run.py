"""A run: everything that defines one."""

import hashlib
import json
import math
from functools import reduce
from operator import getitem

from pydantic import Field, ValidationInfo, field_validator

from components.config.model import NAME, Model
from components.config.sections import (
    EVERY_TASK,
    BaselineConfig,
    EvaluationConfig,
    FeaturesConfig,
    ItemsConfig,
    RecallConfig,
    ReleaseConfig,
    UrmConfig,
    ValidationConfig,
)
from components.config.sources import Source
from components.config.tasks import Task
from components.exceptions import ConfigError


class RunConfig(Model):
    """Everything that defines a run."""

    name: str = Field(pattern=NAME)
    seed: int = Field(default=0, ge=0)
    source: Source
    validation: ValidationConfig = ValidationConfig()
    features: FeaturesConfig
    tasks: tuple[Task, ...] = Field(min_length=1, description="In YAML: names of files in configs/tasks.")
    items: ItemsConfig = ItemsConfig()
    baseline: BaselineConfig = BaselineConfig()
    urm: UrmConfig = UrmConfig()
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), validate_default=True)
    release: ReleaseConfig = ReleaseConfig()
    recall: RecallConfig = RecallConfig()

    @field_validator("features")
    @classmethod
    def _split_suits_source(cls, features: FeaturesConfig, info: ValidationInfo) -> FeaturesConfig:
        source = info.data.get("source")  # absent if it is wrong itself
        if source is not None and features.split.kind == "leave_one_out" and source.kind != "sequences":
            raise ValueError("expected split.kind leave_one_out with source.kind sequences only; others have dates")
        return features

    @field_validator("tasks")
    @classmethod
    def _distinct(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        names = [task.name for task in tasks]
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise ValueError(f"expected each task once, not {repeated[0]!r} again")
        return tasks

    @field_validator("evaluation")
    @classmethod
    def _draws_can_prove(cls, evaluation: EvaluationConfig, info: ValidationInfo) -> EvaluationConfig:
        """With fewer draws no task could be won or lost: Holm multiplies the smallest p-value, 2 / (draws + 1)."""
        num_tasks = len(info.data.get("tasks", ()))  # absent if they are wrong themselves
        needed = math.ceil(2 * num_tasks / (1 - evaluation.gate.confidence))
        if evaluation.bootstrap_samples < needed:
            confidence = evaluation.gate.confidence
            raise ValueError(
                f"expected at least {needed} bootstrap_samples for {num_tasks} tasks and confidence {confidence:g}"
            )
        return evaluation

    @field_validator("urm")
    @classmethod
    def _prompt_is_read(cls, urm: UrmConfig) -> UrmConfig:
        if urm.history_length > urm.copy_length:
            raise ValueError(
                f"expected a copy_length of at least history_length, {urm.history_length}, not {urm.copy_length}: "
                "what the copy path does not reach is in no prompt"
            )
        return urm

    @field_validator("recall")
    @classmethod
    def _filters_of_tasks(cls, recall: RecallConfig, info: ValidationInfo) -> RecallConfig:
        known = [task.name for task in info.data.get("tasks", ())]  # absent if they are wrong themselves
        unknown = [name for name in recall.filters if name not in (EVERY_TASK, *known)]
        if known and unknown:
            raise ValueError(f"expected filters of {EVERY_TASK} or one of {', '.join(known)}, not of {unknown[0]!r}")
        return recall

    def task(self, name: str) -> Task:
        """The task of that name.

        Raises:
            ConfigError: The run has no such task.
        """
        for task in self.tasks:
            if task.name == name:
                return task
        raise ConfigError(
            "task",
            expected="one of " + ", ".join(task.name for task in self.tasks),
            got=repr(name),
            remedy="name a task of this run",
        )

    def fingerprint(self, parts: tuple[str, ...]) -> str:
        """SHA-256 over the named sections, or fields of them (`section.field`), and the seed.

        What a task's description says to people decides nothing.
        """
        whole = self.model_dump(mode="json", exclude={"tasks": {"__all__": {"description"}}})
        content = {part: reduce(getitem, part.split("."), whole) for part in (*parts, "seed")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
