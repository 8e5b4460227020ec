"""From the log to the examples: targets in the window after each cut, chosen, judged by the past, numbered."""

from typing import NamedTuple

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from components.config import RunConfig
from components.features.recent import judged_by_the_past
from components.features.sampling import build_examples, choose_examples, number_contexts
from components.features.targets import answers
from components.features.window import window_events


class ExampleTables(NamedTuple):
    """What is asked of the models."""

    examples: ir.Table  # EXAMPLES
    recent: ir.Table  # EXAMPLES of the newest training cuts, judged by what came before them
    contexts: ir.Table  # the users and cuts they are asked at, with the users' shards


def make_examples(
    engine: ibis.BaseBackend, log: ir.Table, items: ir.Table, catalogue: ir.Table, config: RunConfig
) -> ExampleTables:
    """Find every task's targets, choose examples, and number their contexts."""
    features = config.features
    events = engine.create_table("window_events", window_events(log, items, catalogue, config))
    found = engine.create_table("answers", _answers(events, config))
    chosen = engine.create_table("chosen", choose_examples(found, features, config.seed))
    contexts = engine.create_table("contexts", number_contexts(chosen))
    examples = engine.create_table("examples", build_examples(found, chosen, contexts))
    judged = engine.create_table("recent_events", judged_by_the_past(events, log, catalogue, features.split))
    asked = engine.create_table("recent_answers", _answers(judged, config))
    recent = engine.create_table("recent_examples", build_examples(asked, asked, contexts))
    shards = log.select("user_id", "shard").distinct()
    return ExampleTables(examples, recent, contexts.join(shards, "user_id"))


def _answers(events: ir.Table, config: RunConfig) -> ir.Table:
    return ibis.union(*(answers(events, task, index, config) for index, task in enumerate(config.tasks)))


def split_by_shard(contexts: ir.Table) -> list[pa.Table]:
    """Contexts by the users' shards, so that one retrieval joins a bounded number of rows."""
    table = contexts.to_pyarrow().sort_by("context_id")
    shards = table["shard"].to_numpy()
    return [table.filter(pa.array(shards == shard)).drop_columns("shard") for shard in sorted(set(shards))]
