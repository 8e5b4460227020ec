"""Words of scripts with combining marks, and of text that is composed or not."""

import re
import sys
import unicodedata

import pytest

from components.items.codes import lexical_vectors, list_words, query_vector, unknown_share
from components.items.words import MARKS, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी किताब", ["हिन्दी", "किताब"]),
        ("மொபைல் கவர்", ["மொபைல்", "கவர்"]),
        ("กางเกงยีนส์", ["กางเกงยีนส์"]),
        ("Café-Crème", ["café", "crème"]),
        ("ΚΟΚΚΙΝΟΣ ΟΙΝΟΣ", ["κοκκινοσ", "οινοσ"]),  # whatever lowers it: Python, DuckDB and Spark differ
        ("İpek", ["ipek"]),
        ("纯牛奶 250ml", ["纯牛", "牛奶", "250ml"]),
        ("茶 abc牛奶粉", ["茶", "abc", "牛奶", "奶粉"]),
        ("コーヒー豆", ["コー", "ーヒ", "ヒー", "ー豆"]),
        ("don't 2×4", ["don", "t", "2", "4"]),
    ],
)
def test_marks_belong_to_their_letters(text: str, words: list[str]) -> None:
    for form in ("NFC", "NFD"):
        written = unicodedata.normalize(form, text)
        assert split_words(written) == [unicodedata.normalize("NFC", word) for word in words]
        found = list_words([written])
        assert unknown_share(text, found) == (0.0 if any(len(word) > 1 for word in words) else 1.0)


def test_what_stands_inside_of_other_words_is_found_without_spaces() -> None:
    titles = ["纯牛奶 250ml", "全脂牛奶粉", "红色 口红", "乌龙茶"]
    vectors, _ = lexical_vectors(titles, 2048)
    scores = vectors.astype("float32") @ query_vector("牛奶", 2048)
    assert scores[:2].min() > 0.3 > 0.1 > abs(scores[2:]).max()
    assert unknown_share("牛奶", list_words(titles)) == 0
    assert unknown_share("豆奶", list_words(titles)) == 1
    assert unknown_share("牛奶", list_words([])) == 1


def test_a_query_finds_a_title_however_both_are_written() -> None:
    titles = [unicodedata.normalize("NFD", "café crème"), "tea"]
    vectors, present = lexical_vectors(titles, 2048)
    assert present.all()
    scores = vectors.astype("float32") @ query_vector(unicodedata.normalize("NFC", "Crème"), 2048)
    assert scores[0] > 0.5 > abs(scores[1])


def test_all_marks_of_unicode_are_known() -> None:
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    marks = [character for character in characters if unicodedata.category(character)[0] == "M"]
    assert re.findall(f"[{MARKS}]", characters) == marks
