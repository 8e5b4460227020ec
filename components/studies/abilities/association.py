"""How strongly a model associates categories with occasions, by several methods.

A template is a sentence with a place for the category and one for the occasion. What stands in the last place is scored
after what stands before it: by a language model with the log-likelihood of its tokens, by a text encoder with the
cosine. A method is a template, or the mean z-score of several, with

- against: what is subtracted, the score with the words for an ordinary day, the mean score with the other occasions,
  or nothing. Log P(category | occasion) - log P(category | ordinary day) is the first of these;
- tokens: how the differences of a category's tokens become one number.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from components.items.text import TextEncoder
from components.studies.abilities.likelihood import LanguageModel

Floats = npt.NDArray[np.float64]
# (what stands before, texts of the last place) → scores of their tokens [texts, tokens], NaN behind the last
Rate = Callable[[str, Sequence[str]], Floats]
_CATEGORY, _OCCASION = "{category}", "{occasion}"
AGAINST = ("ordinary", "others", "nothing")
TOKENS: Mapping[str, Callable[[Floats], Floats]] = {
    "sum": lambda values: np.nansum(values, axis=-1),
    "mean": lambda values: np.nanmean(values, axis=-1),
    "max": lambda values: np.nanmax(values, axis=-1),
}
ALL, CATEGORY_LAST, OCCASION_LAST = "all", "all, category last", "all, occasion last"


@dataclass(frozen=True, order=True)
class Method:
    """A way to score; `template` may be the name of several."""

    template: str
    against: str
    tokens: str

    def templates(self, known: Sequence[str]) -> tuple[str, ...]:
        """The templates that it takes, of those known."""
        return tuple(template for template in known if self.template in (template, ALL, _kind(template)))


def rate_by_language_model(model: LanguageModel) -> Rate:
    """Log-likelihoods of the tokens, natural logarithm."""

    def rate(before: str, texts: Sequence[str]) -> Floats:
        return _pad([scores.cpu().numpy() for scores in model.continuations(before, [f" {text}" for text in texts])])

    return rate


def rate_by_encoder(encoder: TextEncoder) -> Rate:
    """Cosines of the texts with what stands before them, one "token" each."""
    known: dict[str, npt.NDArray[np.float64]] = {}

    def vectors(texts: Sequence[str]) -> Floats:
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(new, encoder.encode(new).astype(np.float64), strict=True) if new else ())
        return np.stack([known[text] for text in texts])

    return lambda before, texts: (vectors(texts) @ vectors([before])[0])[:, np.newaxis]


def score_template(rate: Rate, template: str, phrases: Sequence[str], texts: Sequence[str]) -> Floats:
    """Scores of the tokens [phrases, texts, tokens]; one number for each pair where the occasion stands last."""
    place = _CATEGORY if template.endswith(_CATEGORY) else _OCCASION
    before = template.removesuffix(place).rstrip()
    if place == _CATEGORY:
        rated = [rate(before.replace(_OCCASION, phrase), texts) for phrase in phrases]
        return np.stack(rated)
    totals = [np.nansum(rate(before.replace(_CATEGORY, text), phrases), axis=-1) for text in texts]
    return np.stack(totals, axis=1)[:, :, np.newaxis]


def score_all(
    rate: Rate, templates: Sequence[str], occasions: Sequence[str], ordinary: str, categories: Sequence[str]
) -> dict[Method, Floats]:
    """Scores of the categories for the occasions [occasions, categories] by every method over the templates."""
    scores: dict[Method, Floats] = {}
    for template in templates:
        tokens = score_template(rate, template, [*occasions, ordinary], categories)
        for against, name in itertools.product(AGAINST, TOKENS):
            scores[Method(template, against, name)] = TOKENS[name](_contrast(tokens, against))
    for group, *rest in itertools.product((ALL, CATEGORY_LAST, OCCASION_LAST), AGAINST, TOKENS):
        method = Method(group, *rest)
        members = [scores[Method(template, *rest)] for template in method.templates(templates)]
        if len(members) > 1:
            scores[method] = np.mean([standardise(member) for member in members], axis=0)
    return scores


def standardise(scores: Floats) -> Floats:
    """Scores with mean 0 and deviation 1 over the categories of each occasion."""
    spread = scores.std(axis=1, keepdims=True)
    standard: Floats = (scores - scores.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
    return standard


def _contrast(tokens: Floats, against: str) -> Floats:
    """Scores of the occasions minus those of the comparison, whose ordinary day stands last."""
    occasions, ordinary = tokens[:-1], tokens[-1:]
    others = (occasions.sum(axis=0) - occasions) / (len(occasions) - 1)
    contrasts: dict[str, Floats] = {
        "ordinary": occasions - ordinary, "others": occasions - others, "nothing": occasions,
    }  # fmt: skip
    return contrasts[against]


def _kind(template: str) -> str:
    return CATEGORY_LAST if template.endswith(_CATEGORY) else OCCASION_LAST


def _pad(rows: Sequence[npt.NDArray[np.float32]]) -> Floats:
    padded = np.full((len(rows), max(len(row) for row in rows)), np.nan)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded
