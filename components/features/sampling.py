"""Which of all possible examples are kept, by a seeded order of the contexts that all tasks share."""

import ibis
import ibis.expr.types as ir
from ibis import _

from components.config import FeaturesConfig
from components.features.expressions import collect_in_order, microseconds, seeded_key

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
    key = _order_key(contexts, seed)
    order = ibis.row_number().over(ibis.window(group_by="split", order_by=[key, contexts.user_id]))
    examples = examples.join(contexts.mutate(context_order=order), ["user_id", "cut_ts", "split"])
    example_order = ibis.row_number().over(ibis.window(group_by=["split", "task_index"], order_by="context_order"))
    kept = ibis.cases(
        (_.split == "train", _.context_order < features.max_train_contexts),
        (_.split == "validation", _.example_order < features.max_validation_examples),
        else_=_.example_order < features.max_test_examples,
    )
    return examples.mutate(example_order=example_order).filter(kept).select("user_id", "cut_ts", "split", "task_index")


def last_keys(chosen: ir.Table, features: FeaturesConfig, num_tasks: int, seed: int) -> dict[str, str]:
    """The key of the order up to which a context of a split may still enter a choice, where there is such a key.

    `chosen` is the choice among some users. Once a split is full, for all its tasks, a context that comes after all of
    the chosen ones is never chosen, whichever users follow.
    """
    caps = {"validation": features.max_validation_examples, "test": features.max_test_examples}
    keyed = chosen.mutate(key=_order_key(chosen, seed))
    counts = keyed.group_by("split", "task_index").agg(examples=_.count(), last=_.key.max()).execute()
    keys = {}
    for split, cap in caps.items():
        tasks = counts[counts["split"] == split]
        if len(tasks) == num_tasks and (tasks["examples"] >= cap).all():
            keys[split] = str(tasks["last"].max())
    contexts = chosen.filter(_.split == "train").select("user_id", "cut_ts").distinct()
    if contexts.count().execute() >= features.max_train_contexts:
        keys["train"] = str(counts[counts["split"] == "train"]["last"].max())
    return keys


def possible_contexts(users: ir.Table, cuts: ir.Table, keys: dict[str, str], seed: int) -> ir.Table:
    """user_id and cut_ts of the contexts that `last_keys` leaves; `cuts` have cut_ts and split."""
    contexts = users.select("user_id").distinct().cross_join(cuts)
    last = contexts.split.cases(*keys.items(), else_="~") if keys else ibis.literal("~")  # after all hexadecimal digits
    return contexts.filter(_order_key(contexts, seed) <= last).select("user_id", "cut_ts")


def _order_key(contexts: ir.Table, seed: int) -> ir.StringValue:
    return seeded_key(seed, contexts.user_id, microseconds(contexts.cut_ts).cast("string"))


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
    targets = kept.group_by([*by, "split", "task", "query"]).agg(target_item_ids=_.item_id.collect().sort())
    counts = kept.filter(_.category.notnull()).group_by([*by, "category"]).agg(items=_.count())
    rank = ibis.row_number().over(ibis.window(group_by=by, order_by=[_.items.desc(), _.category]))
    words = (
        counts.mutate(rank=rank)
        .filter(_.rank < MAX_CATEGORIES)
        .group_by(by)
        .agg(target_categories=collect_in_order(_.rank, _.category))
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
