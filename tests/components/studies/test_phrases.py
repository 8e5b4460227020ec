import pytest
from pydantic import ValidationError

from components.config import load_config, load_document
from components.exceptions import ConfigError
from components.studies.phrases import Phrase, PhraseBook
from tests.worlds import REPOSITORY


def phrase(**fields):
    values = {"phrase": "For a pet.", "categories": ("pet care", "^grocery > dog"), "seen_in_training": False}
    return Phrase(**values | fields)


@pytest.mark.parametrize(
    ("path", "fits"),
    [("Grocery > Pet Care supplies", True), ("grocery > dog foods", True), ("toys > dog foods", False), ("", False)],
)
def test_fits(path, fits):
    assert phrase().fits(path) is fits


def test_a_bad_expression_is_named():
    with pytest.raises(ValidationError, match=r"regular expressions, but '\(pet'"):
        phrase(categories=("(pet",))


def test_a_phrase_may_have_tasks_of_its_own():
    book = PhraseBook(tasks=("a", "b"), phrases=(phrase(), phrase(phrase="x", tasks=("c",))))
    pairs = [(entry.phrase, task) for entry, task in book.pairs()]
    assert pairs == [("For a pet.", "a"), ("For a pet.", "b"), ("x", "c")]
    with pytest.raises(ValidationError, match="expected each phrase once"):
        PhraseBook(tasks=("a",), phrases=(phrase(), phrase()))


@pytest.mark.parametrize("name", ["complete_journey", "amazon_beauty"])
def test_the_shipped_phrases_fit_their_configuration(name):
    book = load_document(REPOSITORY / "configs" / "guidance" / f"{name}.yaml", PhraseBook)
    config = load_config(REPOSITORY / "configs" / f"{name}.yaml")
    for _, task in book.pairs():
        assert not config.task(task).needs_query
    assert {entry.seen_in_training for entry in book.phrases} == {True, False}


def test_an_unknown_key_names_file_and_field(tmp_path):
    path = tmp_path / "phrases.yaml"
    path.write_text("tasks: [a]\nphrases:\n  - {phrase: x, categories: [y], seen_in_training: true, task: b}\n")
    with pytest.raises(ConfigError, match=r"phrases\.yaml, field 'phrases\.0\.task': expected a known key, got 'b'"):
        load_document(path, PhraseBook)
