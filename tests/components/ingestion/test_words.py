import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.ingestion.words import to_words


@pytest.mark.parametrize(
    ("shorthand", "words"),
    [
        ("SFT DRNK 2 LITER BTL CARB INCL", "soft drink 2 liter bottle carbonated including"),
        ("BREAD:ITALIAN/FRENCH", "bread: italian/french"),
        ("CHIPS&SNACKS", "chips & snacks"),
        ("ICE - CRUSHED/CUBED", "ice - crushed/cubed"),
        ("FOOD-MAGAZINE", "food-magazine"),
        ("  22   LB ", "22 lb"),
        ("", ""),
    ],
)
def test_to_words(shorthand: str, words: str) -> None:
    assert to_words(shorthand) == words


@given(st.text())
def test_words_are_lower_case_and_single_spaced(text: str) -> None:
    words = to_words(text)
    assert words == words.lower()
    assert words == " ".join(words.split())
