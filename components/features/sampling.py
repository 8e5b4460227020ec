"""Which of all possible examples are kept, by a seeded order of the contexts that all tasks share."""

import ibis
import ibis.expr.types as ir
from ibis import _

from components.config import FeaturesConfig
from components.features.expressions import microseconds, seeded_key

MAX_CATEGORIES = 5


def choose_examples(answers: ir.Table, features: FeaturesConfig, seed: int) -> ir.Table:
    """Sample training contexts with all their tasks; cap the other splits per task.

    Every task takes its first contexts in one random order, so that each task's sample is unbiased and the samples
    overlap as much as that allows (a context's prompt is computed once for all its tasks). The order is over
    user-cuts, not users: as many different users as possible make the bootstrap over users narrow.

    Returns:
        user_id, cut_ts, split, task_index of the answers (see `targets.answers`) that are kept; distinct.
    """
    examples = answers.select("user_id", "cut_ts", "split", "task_index").distinct()
    contexts = examples.select("user_id", "cut_ts", "split").distinct()
    key = seeded_key(seed, contexts.user_id, microseconds(contexts.cut_ts).cast("string"))
    order = ibis.row_number().over(ibis.window(group_by="split", order_by=[key, contexts.user_id]))
    examples = examples.join(contexts.mutate(context_order=order), ["user_id", "cut_ts", "split"])
    example_order = ibis.row_number().over(ibis.window(group_by=["split", "task_index"], order_by="context_order"))
    kept = ibis.cases(
        (_.split == "train", _.context_order < features.max_train_contexts),
        (_.split == "validation", _.example_order < features.max_validation_examples),
        else_=_.example_order < features.max_test_examples,
    )
    return examples.mutate(example_order=example_order).filter(kept).select("user_id", "cut_ts", "split", "task_index")


def number_contexts(chosen: ir.Table) -> ir.Table:
    """The distinct contexts of the chosen examples with `context_id`, by cut and user."""
    contexts = chosen.select("user_id", "cut_ts", "split").distinct()
    return contexts.mutate(context_id=ibis.row_number().over(ibis.window(order_by=[contexts.cut_ts, contexts.user_id])))


def build_examples(answers: ir.Table, chosen: ir.Table, contexts: ir.Table) -> ir.Table:
    """The EXAMPLES table, sorted by example_id: by context, then in the order of the tasks."""
    kept = answers.semi_join(chosen, ["user_id", "cut_ts", "task_index"]).join(
        contexts.drop("split"), ["user_id", "cut_ts"]
    )
    by = ["context_id", "task_index"]
    targets = kept.group_by([*by, "split", "task", "query"]).agg(target_item_ids=_.item_id.collect(order_by=_.item_id))
    counts = kept.filter(_.category.notnull()).group_by([*by, "category"]).agg(items=_.count())
    rank = ibis.row_number().over(ibis.window(group_by=by, order_by=[_.items.desc(), _.category]))
    words = (
        counts.mutate(rank=rank)
        .filter(_.rank < MAX_CATEGORIES)
        .group_by(by)
        .agg(target_categories=_.category.collect(order_by=_.rank))
    )
    joined = targets.left_join(words, by)
    return joined.select(
        "context_id",
        "split",
        "task",
        "query",
        "target_item_ids",
        example_id=ibis.row_number().over(ibis.window(order_by=[joined.context_id, joined.task_index])),
        target_categories=joined.target_categories.fill_null(ibis.literal([], type="array<string>")),
    ).order_by("example_id")
