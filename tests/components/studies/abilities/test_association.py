import numpy as np
import pytest
import torch

from components.caches import CachePlace
from components.studies.abilities.association import (
    Method,
    rate_by_encoder,
    rate_by_language_model,
    score_all,
    score_template,
    standardise,
)
from components.studies.abilities.likelihood import LanguageModel
from components.urm.network.backbone import load_backbone
from tests.worlds.backbone import write_backbone
from tests.worlds.items import *  # noqa: F403  # a fixture

FORWARD, BACKWARD = "For {occasion}, people buy {category}", "People buy {category} for {occasion}"
CATEGORIES = ("ham", "turkey", "ice")
OCCASIONS, ORDINARY = ("Easter", "the Fourth of July"), "an ordinary day"


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = write_backbone(tmp_path_factory.mktemp("backbone"), num_layers=2)
    return LanguageModel(*load_backbone(str(folder), num_layers=2, pretrained=True, cache=CachePlace(folder)))


def test_a_language_model_reads_the_sentence_up_to_its_last_place(language):
    rate = rate_by_language_model(language)
    for method, text in (("sum", torch.sum), ("mean", torch.mean), ("max", torch.max)):
        scores = score_all(rate, [FORWARD], OCCASIONS, ORDINARY, CATEGORIES)[Method(FORWARD, "ordinary", method)]
        for row, occasion in enumerate(OCCASIONS):
            for column, category in enumerate(CATEGORIES):
                with_it = language.log_likelihoods(f"For {occasion}, people buy", f" {category}")
                without = language.log_likelihoods(f"For {ORDINARY}, people buy", f" {category}")
                assert scores[row, column] == pytest.approx(float(text(with_it - without)), abs=1e-3)
    backward = score_template(rate, BACKWARD, OCCASIONS, ["ham"])
    expected = [float(language.log_likelihoods("People buy ham for", f" {name}").sum()) for name in OCCASIONS]
    np.testing.assert_allclose(backward[:, 0, 0], expected, rtol=1e-4)


def test_methods_by_hand():
    """The rate of a text is its length times that of what stands before it, one token per text."""

    def rate(before, texts):
        return np.array([[float(len(before) * len(text))] for text in texts])

    templates = ["{occasion} {category}", "{category} {occasion}"]
    found = score_all(rate, templates, ("aaa", "aaaaa"), "a", CATEGORIES)
    sizes = np.array([3.0, 6, 3])
    np.testing.assert_allclose(found[Method(templates[0], "nothing", "sum")], [3 * sizes, 5 * sizes])
    np.testing.assert_allclose(found[Method(templates[0], "ordinary", "max")], [2 * sizes, 4 * sizes])
    np.testing.assert_allclose(found[Method(templates[1], "others", "mean")], [-2 * sizes, 2 * sizes])
    assert Method("all", "nothing", "sum").templates(templates) == tuple(templates)
    assert Method("all, occasion last", "nothing", "sum").templates(templates) == (templates[1],)
    alike = np.repeat(standardise(sizes[np.newaxis]), 2, axis=0)
    np.testing.assert_allclose(found[Method("all", "ordinary", "sum")], alike)


def test_an_encoder_rates_by_cosine(text_encoder):
    rate = rate_by_encoder(text_encoder)
    cosines = rate("a dog", ["a puppy", "a truck", "a dog"])[:, 0]
    assert cosines[2] == pytest.approx(1, abs=1e-2)
    assert cosines[0] > cosines[1]
