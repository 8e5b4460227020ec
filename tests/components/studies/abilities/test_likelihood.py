import math
from types import SimpleNamespace

import pytest
import torch

from components.caches import CachePlace
from components.config import load_document
from components.exceptions import DataError
from components.studies.abilities.likelihood import (
    LanguageModel,
    Question,
    Questions,
    accuracy,
    chance,
    perplexity,
    read_passages,
)
from components.urm.network.backbone import load_backbone
from tests.worlds import REPOSITORY
from tests.worlds.backbone import write_backbone

LETTERS = "abcdefgh .?:\nQuestionAswer"
VOCABULARY = {letter: number for number, letter in enumerate(dict.fromkeys(LETTERS))}


class Bigrams(torch.nn.Module):
    """A language of letters in which "b" follows "a" with probability 0.9 and all else is equally likely."""

    device = torch.device("cpu")

    def forward(self, input_ids):
        size = len(VOCABULARY)
        table = torch.full((size, size), 1 / size)
        table[VOCABULARY["a"]] = 0.1 / (size - 1)
        table[VOCABULARY["a"], VOCABULARY["b"]] = 0.9
        return SimpleNamespace(logits=table.log()[input_ids])


@pytest.fixture
def model():
    def tokenise(text, add_special_tokens):
        return {"input_ids": [VOCABULARY[letter] for letter in text]}

    return LanguageModel(Bigrams(), tokenise)


def test_perplexity_by_hand(model):
    # Predicted are b after a, c after b, then b after a: the passages are read on their own.
    expected = math.exp(-(2 * math.log(0.9) + math.log(1 / len(VOCABULARY))) / 3)
    assert perplexity(model, ["abc", "ab"]) == pytest.approx(expected, rel=1e-5)


def test_only_the_text_is_scored_after_a_prompt(model):
    scores = model.log_likelihoods("ca", "bd")
    torch.testing.assert_close(scores, torch.tensor([0.9, 1 / len(VOCABULARY)]).log())


def test_continuations_are_likelihoods_of_each_text_by_itself(tmp_path):
    folder = write_backbone(tmp_path, num_layers=2)
    backbone, tokenizer = load_backbone(str(folder), num_layers=2, pretrained=True, cache=CachePlace(tmp_path))
    language = LanguageModel(backbone, tokenizer)
    texts = [" turkey", "a", " sweet potatoes", "b"] * 20  # more than a batch, of several lengths
    found = language.continuations("For Thanksgiving,", texts)
    for text, scores in zip(texts, found, strict=True):
        torch.testing.assert_close(scores, language.log_likelihoods("For Thanksgiving,", text), rtol=1e-4, atol=1e-4)
    assert language.continuations("For", ["a"])[0].shape == (1,)  # no second token to read


def test_the_likeliest_choice_is_the_answer(model):
    right = Question(question="c", choices=("ab", "dc"))
    wrong = Question(question="c", choices=("dc", "ab"))
    tie = Question(question="c", choices=("de", "fg"))
    assert accuracy(model, [right]) == 1
    assert accuracy(model, [right, wrong, tie]) == pytest.approx(1 / 3)


def test_chance():
    questions = [Question(question="c", choices=("a", "b")), Question(question="c", choices=("a", "b", "c", "d"))]
    assert chance(questions) == pytest.approx(3 / 8)


def test_passages_without_comments_and_blank_lines(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("# Source\nOne\nline.\n\n# Another\n\nTwo.\n\n\n")
    assert read_passages(path) == ["One line.", "Two."]
    path.write_text("# nothing\n")
    with pytest.raises(DataError, match="expected at least one passage"):
        read_passages(path)


def test_the_shipped_text_and_questions():
    folder = REPOSITORY / "configs" / "language"
    assert sum(map(len, read_passages(folder / "plain_text.txt"))) > 5000
    questions = load_document(folder / "questions.yaml", Questions).questions
    assert len(questions) >= 30
    for question in questions:
        assert len(set(question.choices)) == len(question.choices) == 4
