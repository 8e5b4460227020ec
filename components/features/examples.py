"""From the log to the examples: targets in the window after each cut, chosen, judged by the past, numbered."""

from typing import NamedTuple

import ibis
import ibis.expr.types as ir

from components.config import RunConfig
from components.features.log import parts
from components.features.recent import judged_by_the_past, past_frequencies
from components.features.sampling import (
    build_examples,
    choose_examples,
    last_keys,
    number_contexts,
    possible_contexts,
)
from components.features.targets import answers
from components.features.window import all_cuts, window_events
from components.progress import Report

_CHOICE = {"user_id": "string", "cut_ts": "timestamp('UTC', 6)", "split": "string", "task_index": "int64"}


class ExampleTables(NamedTuple):
    """What is asked of the models."""

    examples: ir.Table  # EXAMPLES
    recent: ir.Table  # EXAMPLES of the newest training cuts, judged by what came before them
    contexts: ir.Table  # context_id, user_id, cut_ts and split that they are asked at


def make_examples(
    engine: ibis.BaseBackend, log: ir.Table, items: ir.Table, catalogue: ir.Table, config: RunConfig, report: Report
) -> ExampleTables:
    """Find every task's targets, choose examples, and number their contexts.

    Two passes over the shards of the log: the first chooses, the second builds what was chosen. Nothing that grows with
    the log is kept: the choice among the shards so far is a choice among all their users.
    """
    chosen = _choose(engine, log, items, catalogue, config, report)
    contexts = engine.create_table("contexts", number_contexts(chosen))
    past = engine.create_table("past", past_frequencies(log, catalogue, config.features.split))
    found = {}
    for _, part in parts(log, "building examples", report):
        mine = contexts.semi_join(part, "user_id")
        with window_events(part, items, catalogue, config, mine).cache() as events:
            judged = judged_by_the_past(events, past, config.features.split)
            for name, answered in (("answers", _answers(events, config)), ("recent_answers", _answers(judged, config))):
                if name in found:
                    engine.insert(name, answered)
                else:
                    found[name] = engine.create_table(name, answered)
    asked = found["recent_answers"]
    return ExampleTables(
        engine.create_table("examples", build_examples(found["answers"], chosen, contexts)),
        engine.create_table("recent_examples", build_examples(asked, asked, contexts)),
        contexts,
    )


def _choose(
    engine: ibis.BaseBackend, log: ir.Table, items: ir.Table, catalogue: ir.Table, config: RunConfig, report: Report
) -> ir.Table:
    features, seed = config.features, config.seed
    chosen = engine.create_table("chosen", schema=ibis.schema(_CHOICE))
    cuts = all_cuts(features.split).drop("cut_end")
    for number, part in parts(log, "choosing examples", report):
        keys = last_keys(chosen, features, len(config.tasks), seed)
        possible = possible_contexts(part, cuts, keys, seed)
        with window_events(part, items, catalogue, config, possible).cache() as events:
            candidates = ibis.union(_answers(events, config).select(*_CHOICE), chosen)
            wider = engine.create_table(f"chosen_{number}", choose_examples(candidates, features, seed))
        engine.drop_table(chosen.op().name)  # Spark overwrites no table that it reads from
        chosen = wider
    return chosen


def _answers(events: ir.Table, config: RunConfig) -> ir.Table:
    return ibis.union(*(answers(events, task, index, config) for index, task in enumerate(config.tasks)))
