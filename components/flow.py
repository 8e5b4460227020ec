"""The flow, told once: what each stage reads, leaves, depends on and needs of a machine.

Commands, help, DAG tasks and their arrows, time-outs, pods, lists of stages and the tables of the documentation
derive from it. The entry of a stage is `components.stages.<name>:run`. Plain dataclasses: DAG files import this.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Resources:
    """What a stage needs of the machine that runs it."""

    hours: float  # longest run, without the wait for a node; then the process or pod is ended and tried again
    cpu: str = "2"  # cores requested of Kubernetes
    memory: str = "8Gi"  # memory requested of, and limited by, Kubernetes
    ephemeral_storage: str = "20Gi"  # disk of its pod for caches, temporary files and logs together
    gpus: int = 0  # GPUs of its pod
    # whether it takes a slot of the pool `compute`: heavy stages never share the cores of one machine
    pool: bool = True


# Class of a stage: what its pod may reach. Each has one ServiceAccount and one Secret, both named `urm-<class>`.
Access = Literal["data", "training", "tracking", "promotion"]


@dataclass(frozen=True)
class StageSpec:
    """A row of the flow."""

    name: str  # of the command, the task, the folder under the run directory, and the module in `components/stages`
    summary: str  # what it does, in one sentence
    inputs: tuple[str, ...]  # stages whose results it reads
    outputs: Mapping[str, str]  # name → what it is; the report of a stage must name these
    sections: tuple[str, ...]  # sections of the configuration it reads, or single fields of one (`section.field`)
    resources: Resources = field(default_factory=lambda: Resources(hours=1))
    access: Access = "data"
    notes: str = ""  # what its task page says beside the summary
    optional: tuple[str, ...] = ()  # outputs that only some configurations make
    # options of a call that are no part of the configuration, name → help; false by default
    flags: Mapping[str, str] = field(default_factory=dict)
    # its own MLflow run (`run`), notes on the run of the whole flow (`parent`), or `none`
    tracking: Literal["run", "parent", "none"] = "none"
    recall: bool = False  # whether it changes what the recall runtime serves
    spark: bool = False  # whether it runs on Spark, too, as `URM_ENGINE` says
    parallel: bool = False  # whether torchrun may start several processes of it
    reusable: bool = True  # whether an equal earlier result may stand in; false for acts on the world
    module: str = ""  # where its code is, if not in `components/stages`

    @property
    def entry(self) -> str:
        """Module of its code; a stage's has a function `run`."""
        return self.module or f"components.stages.{self.name}"

    @property
    def credentials(self) -> frozenset[str]:
        """Services whose credentials its process needs (`components.settings.child_environment`)."""
        tracking = {"mlflow"} if self.tracking != "none" else set()
        # The smoke check of a promotion reads the features that the workers read.
        features = {"feast"} if self.recall or "feature_store" in self.outputs else set()
        return frozenset(tracking | features | ({"redis", "recall"} if self.recall else set()))


STAGES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (
        StageSpec(
            name="ingest",
            summary="Raw logs → the canonical tables `events` and `items`.",
            notes="A missing column or file ends the run at once.",
            inputs=(),
            outputs={
                "events": "folder, EVENTS, partitioned `date=YYYY-MM-DD/`",
                "items": "file, ITEMS",
                "rejected": "file, QUARANTINE: rows that do not fit the canonical types",
            },
            sections=("source",),
            resources=Resources(hours=2),
        ),
        StageSpec(
            name="validate",
            summary="Great Expectations over both tables; bad rows go to the quarantine with a reason.",
            notes="Too large a share of them ends the run with a sentence of the rule, the share and the limit.",
            inputs=("ingest",),
            outputs={
                "events": "as above, accepted rows only",
                "items": "as above, accepted rows only",
                "quarantine": "file, QUARANTINE: table, row key, reason code, message, the row as JSON; ingest's "
                "`rejected` and what the rules refuse, each row once",
                "data_docs": "folder: GX Data Docs (HTML)",
            },
            sections=("validation",),
            spark=True,
            resources=Resources(hours=1),
        ),
        StageSpec(
            name="features",
            summary="Behaviour sequences as Feast feature views, and task examples by point-in-time retrieval.",
            inputs=("validate",),
            outputs={
                "feature_store": "folder: Feast's Parquet sources, registry.db, online.db",
                "catalogue": "file, CATALOGUE",
                "contexts": "file, CONTEXTS, sorted by context_id",
                "examples": "file, EXAMPLES, sorted by example_id",
                "recent_examples": "the same of the newest training cuts (`features.split.recent_cuts`), with what is "
                "rare judged by what came before them; URM trains on these unless `urm.train_cuts` is "
                "all (docs/model.md)",
            },
            sections=("features", "tasks"),
            resources=Resources(hours=3, memory="16Gi"),
            spark=True,
        ),
        StageSpec(
            name="encode",
            summary="ID, text and image vectors of every item, as a memory-mapped item table.",
            notes="Where the cache is kept, only new texts are encoded.",
            inputs=("validate",),
            outputs={
                "item_table": "folder, see below, of the items with accepted events: modalities id (in two roles), "
                "popularity (several counts, see `components/items/popularity.py`), text, lexical, category_words, "
                "brand, category, its kinds by level (see `components/items/kinds.py`) and, where the run has an image "
                "encoder, image; what comes from events ends with the training window",
                "item_table_past": "the same, its ID vectors and counts those of what came before the newest training "
                "cuts (`features.split.recent_cuts`), with which URM trains unless `urm.train_cuts` is all",
            },
            sections=("items", "features.split", "features.min_item_events"),
            resources=Resources(hours=3),
        ),
        StageSpec(
            name="baseline",
            summary="Popularity, own history, item-kNN and the target-attention network, with their test predictions.",
            notes="Target attention is the model to beat. Its item vectors are its own.",
            access="training",
            inputs=("validate", "features", "encode"),
            outputs={
                "model": "folder: safetensors and JSON of the target-attention network",
                "sasrec": "folder, as `model`, where `baseline.models` names it",
                "target_attention_text": "folder, as `model`, where `baseline.models` names it",
                "popularity": "file, POPULARITY, at most 1,000 items per task",
                "predictions": "file, PREDICTIONS on the test examples: popularity, own_history, item_knn, "
                "target_attention and the models that `baseline.models` names",
            },
            optional=("sasrec", "target_attention_text"),
            sections=("baseline", "items", "tasks", "evaluation.k"),
            resources=Resources(hours=4),
            tracking="run",
        ),
        StageSpec(
            name="sft",
            summary="Full-parameter SFT of the universal recommendation model on a pretrained language model.",
            notes="A retry, on whatever node, goes on from the last complete checkpoint.",
            access="training",
            inputs=("features", "encode"),
            outputs={
                "model": "folder: `backbone/` unless that is `none` (transformers, safetensors, tokenizer), "
                "`urm.safetensors`, `urm.json`",
                "item_table": "folder: encode's, beside the model that reads it",
                "candidates": "folder: `keys.npy` int64 [n] (catalogue order), `vectors.npy` float32 [n, d]: an item's "
                "score for a user vector is their inner product; items of the user's history add a copy score "
                "(docs/model.md)",
            },
            sections=("urm", "items.text_encoder", "tasks", "evaluation.k"),
            resources=Resources(hours=12, cpu="8", memory="64Gi", ephemeral_storage="100Gi", gpus=1),
            tracking="run",
            parallel=True,
        ),
        StageSpec(
            name="evaluate",
            summary="Recall per task on the full catalogue, each with a paired bootstrap interval.",
            notes="Every model is compared with target attention; tasks with a query are a table of their own.",
            access="tracking",
            inputs=("features", "baseline", "sft"),
            outputs={
                "predictions": "file, PREDICTIONS of urm on the test examples",
                "hits": "file, HITS: example_id, user_id, task, model, k, hits, targets, ndcg, held_out_query, cut_ts, "
                "of urm and of every model in the baseline's predictions, at 5, 10, 20, 100, 500 and the headline's k",
                "segments": 'file: segment, task ("all": the examples of all tasks), model, examples, recall@k',
                "report": "file: Markdown table",
                "figure": "PNG",
            },
            sections=("evaluation.k", "evaluation.bootstrap_samples", "evaluation.gate.confidence", "tasks"),
            resources=Resources(hours=2, memory="16Gi"),
            tracking="run",
        ),
        StageSpec(
            name="gate",
            summary="Pass or fail by the policy in the configuration, with reasons.",
            notes="A failure skips release and promote unless the run was triggered with *promote_anyway*; the reasons "
            "stand in this task's log and in the notes of task and run.",
            access="tracking",
            inputs=("evaluate",),
            outputs={"verdict": "file, JSON: passed, verdict (one paragraph in words), reasons (list)"},
            sections=("evaluation", "tasks"),
            resources=Resources(hours=1 / 6, cpu="500m", memory="2Gi", pool=False),
            tracking="parent",
        ),
        StageSpec(
            name="release",
            summary="Model, item table, index and tasks as one bundle under one manifest; registered in MLflow as "
            "`candidate`.",
            access="tracking",
            inputs=("validate", "features", "baseline", "sft", "evaluate", "gate"),
            outputs={
                "bundle": "folder: `model/ item_table/ index.faiss tasks.json titles.parquet fallback.parquet "
                "smoke.json manifest.json`"
            },
            sections=("release", "recall", "tasks"),
            # Builds the candidate index: minutes and gigabytes from a million items on.
            resources=Resources(hours=2, memory="16Gi"),
            flags={"promote_anyway": "Build the release although the gate failed; tagged as such."},
            tracking="run",
            reusable=False,
        ),
        StageSpec(
            name="promote",
            summary="The recall workers take the release and check it; what fails is undone.",
            notes="Workers of one machine load it beside the serving one and flip, or reject it. On a cluster pods are "
            "replaced, and what serves is asked through the API (ADR 23). The aliases `champion` and `previous` move "
            "only after that.",
            access="promotion",
            inputs=("release",),
            outputs={
                "deployment": "file, JSON: release, version, previous, order, outcome, seconds, and on a cluster what "
                "the smoke check measured"
            },
            sections=("release", "recall"),
            # Loads the release itself, for the smoke check on a cluster. It may wait for three times
            # `release.promote_timeout_seconds`: for a promotion before it, what that left half done, and its own pods.
            resources=Resources(hours=1, pool=False),
            tracking="run",
            recall=True,
            reusable=False,
        ),
    )
}

# Studies keep the contract of a stage, but are no part of the flow and of no release. None reads the test split.
STUDIES: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (
        StageSpec(
            name="steering",
            summary="How far guidance phrases move the recall, by `configs/guidance/<name of the configuration>.yaml`.",
            inputs=("validate", "features", "sft"),
            outputs={
                "steering": "file, JSON: per phrase and task the share of the top-K in its categories with and without "
                "it, the gain with its interval, overlap with the history; and recall of users' next items in these "
                "categories without it, with it, and in the guided list of another user"
            },
            sections=("tasks", "evaluation.k"),
            tracking="run",
            module="components.studies.steering",
        ),
        StageSpec(
            name="measure",
            summary="Recall of a finished run on all validation examples (`urm ablation measure`).",
            inputs=("features", "sft"),
            outputs={"recalls": "file: example_id, user_id, task, recall of every validation example"},
            sections=("tasks", "evaluation.k"),
            tracking="run",
            module="components.studies.ablation.measure",
        ),
        StageSpec(
            name="ablation_summary",
            summary="Every variant of `configs/ablations/<grid>.yaml` against the reference (`urm ablation summary`).",
            inputs=(),
            outputs={
                "table": "file: CSV",
                "report": "file: Markdown",
                "figures": "folder: a PNG per group of variants",
            },
            sections=("evaluation",),
            tracking="run",
            reusable=False,
            module="components.studies.ablation.summary",
        ),
    )
}

FLOWS: dict[str, tuple[str, ...]] = {"recall_training": tuple(STAGES)}


def stages_before(names: Collection[str]) -> tuple[str, ...]:
    """The named stages and all that they read, in the order of the flow."""
    needed = set(names)
    for name in reversed(STAGES):
        if name in needed:
            needed |= set(STAGES[name].inputs)
    return tuple(name for name in STAGES if name in needed)


def direct_inputs(name: str, within: Collection[str]) -> tuple[str, ...]:
    """Inputs `within` a picture of the flow that no other input of the stage implies: the arrows that it needs."""
    inputs = [other for other in STAGES[name].inputs if other in within]
    implied = {earlier for other in inputs for earlier in stages_before([other]) if earlier != other}
    return tuple(other for other in inputs if other not in implied)
