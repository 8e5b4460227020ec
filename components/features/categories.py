"""Category paths (top → leaf) as columns, and in words that people and language models read."""

import ibis.expr.types as ir

from components.features.expressions import lowered

LEAF = -1
# The level shown to the models: one below the top ("soft drinks" of "grocery" › "soft drinks" › "cola").
WORD_LEVEL = 1


def level_of(category: ir.ArrayValue, level: int) -> ir.StringValue:
    """The category at a level of the path (0 = top, `LEAF` = the last); null where the path is shorter."""
    if level == LEAF:
        return (category.length() > 0).ifelse(category[category.length() - 1], None)
    return (category.length() > level).ifelse(category[level], None)


def in_words(category: ir.StringValue) -> ir.StringValue:
    """Lower case, with spaces for the signs that separate words; null stays null."""
    words = lowered(category).re_replace(r"[\s\x0b\p{Z}_/:;|>,\-]+", " ")
    return words.re_replace("^ | $", "").nullif("")  # on Spark, Ibis' strip also takes the letters v and f


def word_label(category: ir.ArrayValue) -> ir.StringValue:
    """The path in one label: `WORD_LEVEL` in words, the leaf if the path is shorter, null if it is empty."""
    return in_words(level_of(category, WORD_LEVEL).fill_null(level_of(category, LEAF)))
