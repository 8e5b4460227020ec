"""Query texts made of what the user wants next: its category in words, or a few words of its title."""

import ibis
import ibis.expr.types as ir
from ibis import _

from components.config import RunConfig, TargetFilter
from components.features.categories import in_words, level_of
from components.features.expressions import collect_in_order, lowered, microseconds, seeded_key

# Of a script with letters three in a row, with their marks; of Chinese, Japanese or Korean two.
_WORD = r"(\p{L}\p{M}*){3}|[\x{3040}-\x{30FF}\x{3400}-\x{9FFF}\x{AC00}-\x{D7AF}]{2}"
_HASH_DIGITS = 8  # hexadecimal digits of a hash that decide whether a category is held out


def query_column(target: TargetFilter) -> str | None:
    """Column of a task's query; None for a task without."""
    if target.query_title_words is not None:
        return f"query_title_{target.query_title_words}"
    return None if target.query_category_level is None else f"query_category_{target.query_category_level}"


def with_queries(events: ir.Table, config: RunConfig) -> ir.Table:
    """Add the query column of every task that has one.

    `events` has user_id, cut_ts, item_id, `path` (category path) and `title`; the seed chooses words of a title.
    """
    for column, target in {query_column(task.target): task.target for task in config.tasks}.items():
        if column is None:
            continue
        if target.query_category_level is not None:
            events = events.mutate(**{column: in_words(level_of(_.path, target.query_category_level))})
        elif target.query_title_words is not None:
            events = _with_title_words(events, column, target.query_title_words, config.seed)
    return events


def is_held_out(query: ir.StringValue, share: float, seed: int) -> ir.BooleanValue:
    """Whether a query is one of about this share of all queries: by its words alone, so the same in every split."""
    digits = seeded_key(seed, ibis.literal("held out"), query).substr(0, _HASH_DIGITS)
    return digits < f"{int(share * 16**_HASH_DIGITS):0{_HASH_DIGITS}x}"


def _with_title_words(events: ir.Table, column: str, num_words: int, seed: int) -> ir.Table:
    """Add up to so many distinct words of the title, in its order, chosen anew for every user, cut and item.

    A word has three letters in a row at least, two in Chinese, Japanese and Korean; a title without such a word gives
    null.
    """
    key = ["user_id", "cut_ts", "item_id"]
    # Not only letters and digits: users type l'oreal.
    text = lowered(events.title).re_replace(r"[^\p{L}\p{M}\p{N}']+", " ")
    words = events.select(*key, word=text.split(" ")).distinct().unnest("word", offset="place")
    words = words.filter(words.word.re_search(_WORD)).group_by([*key, "word"]).agg(place=_.place.min())
    order = seeded_key(
        seed, words.user_id, microseconds(words.cut_ts).cast("string"), words.item_id.cast("string"), words.word
    )
    rank = ibis.row_number().over(ibis.window(group_by=key, order_by=order))
    chosen = words.mutate(rank=rank).filter(_.rank < num_words)
    queries = chosen.group_by(key).agg(**{column: collect_in_order(chosen.place, chosen.word).join(" ")})
    return events.left_join(queries, key).drop(*(f"{name}_right" for name in key))
