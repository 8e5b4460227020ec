"""What the pod of each task needs of the cluster: a table in YAML, by default `k8s/jobs/pods.yaml`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from components.exceptions import ConfigError
from components.flow import STAGES, Resources
from components.settings import Settings
from components.yaml_text import parse

POD_TABLE = Path(__file__).parents[2] / "k8s" / "jobs" / "pods.yaml"
DEFAULTS = "defaults"
COMMAND_TASKS = ("reference", "variant", "summary", "rollback", "backfill")
_NOT_OF_A_JOB = frozenset({"shared_memory", "cache_claim", "queue_hours", "disruptions"})
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|k|[MGTPE]|[KMGTPE]i)?$", coerce_numbers_to_str=True)]


class Toleration(BaseModel):
    """As in a pod."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = None


class PodNeeds(BaseModel):
    """A row of the table, filled in; the head of `k8s/jobs/pods.yaml` says what each field is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image: str
    hours: float = Field(gt=0)
    cpu: Quantity
    memory: Quantity
    ephemeral_storage: Quantity
    gpus: int = Field(ge=0)
    nodes: int = Field(default=1, gt=0)
    shared_memory: Quantity | None = None
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    priority_class: str | None = None
    queue_hours: float = Field(default=24, gt=0)
    disruptions: int = Field(default=20, ge=0)
    cache_claim: str | None = None
    kueue_queue: str | None = None


def read_pod_needs(task_id: str, resources: Resources, settings: Settings) -> PodNeeds:
    """The task's row of the table; what it leaves out comes from the defaults, the resources and the settings.

    Raises:
        ConfigError: The table cannot be read, or a field or task of it is unknown or out of range.
    """
    path = settings.pods_file or POD_TABLE
    remedy = "correct the table that URM_PODS_FILE names" if settings.pods_file else "correct it"
    try:
        table = parse(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"table of pods {path}", expected="a readable YAML file", got=error, remedy=remedy) from None
    known = [DEFAULTS, *STAGES, *COMMAND_TASKS]
    if not isinstance(table, dict) or set(table) - set(known):
        got = sorted(set(table) - set(known)) if isinstance(table, dict) else type(table).__name__
        raise ConfigError(f"table of pods {path}", expected="blocks of " + ", ".join(known), got=got, remedy=remedy)
    needs = {name: value for name, value in asdict(resources).items() if name in PodNeeds.model_fields}
    given: dict[str, Any] = {**(table.get(DEFAULTS) or {}), **(table.get(task_id) or {})}
    try:
        found = PodNeeds(**{"image": settings.image, **needs, **given})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in (task_id, *first["loc"]))
        unknown = first["type"] == "extra_forbidden"
        expected = (
            "one of " + ", ".join(PodNeeds.model_fields) if unknown else first["msg"].removeprefix("Input should be ")
        )
        got = "another field" if unknown else repr(first["input"])
        raise ConfigError(f"table of pods {path}, {place}", expected=expected, got=got, remedy=remedy) from None
    if foreign := sorted(_NOT_OF_A_JOB & set(table.get(task_id) or {})) if task_id == "backfill" else []:
        expected = "no " + ", ".join(sorted(_NOT_OF_A_JOB)) + ", which a Job cannot have"
        raise ConfigError(f"table of pods {path}, {task_id}", expected=expected, got=foreign[0], remedy=remedy)
    if found.nodes > 1 and task_id != "sft":
        raise ConfigError(f"table of pods {path}, {task_id}.nodes", expected="1", got=found.nodes, remedy=remedy)
    return found
