import unicodedata
from typing import Any, Literal

import ibis
import pytest

from components.config import RunConfig
from components.features.queries import is_held_out, with_queries
from components.items.codes import list_words, unknown_share
from tests.worlds.logs import START, make_config, task

TITLES = [
    "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce",
    "L'Oréal Paris: L'Oréal Élixir (2 x 100 ml)",
    "AB 12 C3",
    "Soap",
]

SCRIPTS = {
    "हिन्दी साहित्य की": "हिन्दी साहित्य",
    "ผ้าขนหนูเช็ดตัว ผืนใหญ่": "ผ้าขนหนูเช็ดตัว ผืนใหญ่",
    "தமிழ் புத்தகம்": "தமிழ் புத்தகம்",
    "Café Crème, 2 €": "café crème",
    "ΚΟΚΚΙΝΟΣ ΟΙΝΟΣ": "κοκκινοσ οινοσ",
    "İSTANBUL Çay": "istanbul çay",
    "口红 哑光 红": "口红 哑光",
}
Form = Literal["NFC", "NFD"]


def make_query_config(seed: int = 0, **target: Any) -> RunConfig:
    return make_config([task(**target)]).model_copy(update={"seed": seed})


def title_queries(titles: list[str], config: RunConfig, num_users: int = 1) -> list[str | None]:
    """One query a user and title, in that order."""
    rows = [
        {"user_id": f"user{user}", "cut_ts": START, "item_id": item, "title": title, "path": ["A"]}
        for user in range(num_users)
        for item, title in enumerate(titles)
    ]
    types = {"user_id": "string", "cut_ts": "timestamp('UTC', 6)", "item_id": "int64"}
    events = ibis.memtable(rows, schema=types | {"title": "string", "path": "array<string>"})
    found = with_queries(events, config).order_by("user_id", "item_id").to_pyarrow()
    assert found.num_rows == len(rows)
    return list(found["query_title_3"].to_pylist())


def test_title_words_stand_in_the_order_of_the_title(engine: ibis.BaseBackend) -> None:
    words = ["opi", "nail", "lacquer", "simmer", "and", "shimmer", "fluid", "ounce"]
    queries = title_queries(TITLES[:1], make_query_config(query_title_words=3), num_users=40)
    for query in queries:
        assert query is not None
        places = [words.index(word) for word in query.split()]
        assert len(places) == 3
        assert places == sorted(set(places))
    assert len(set(queries)) > 20  # of 56
    assert {word for query in queries if query for word in query.split()} == set(words)


def test_title_words_are_distinct_and_have_letters(engine: ibis.BaseBackend) -> None:
    queries = title_queries(TITLES, make_query_config(query_title_words=3))
    assert queries[1:] == ["l'oréal paris élixir", None, "soap"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_title_words_of_any_script_are_words_of_the_item(engine: ibis.BaseBackend, form: Form) -> None:
    titles = [unicodedata.normalize(form, title) for title in SCRIPTS]
    queries = title_queries(titles, make_query_config(query_title_words=3))
    for title, query, expected in zip(titles, queries, SCRIPTS.values(), strict=True):
        assert query is not None and unicodedata.normalize("NFC", query) == expected
        assert unknown_share(query, list_words([title])) == 0


def test_title_words_depend_on_the_seed_alone(engine: ibis.BaseBackend) -> None:
    first, second = (title_queries(TITLES, make_query_config(seed, query_title_words=3), 10) for seed in (0, 1))
    assert first == title_queries(TITLES, make_query_config(query_title_words=3), 10)
    assert first != second


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
def test_about_the_share_of_the_queries_is_held_out(engine: ibis.BaseBackend, share: float) -> None:
    table = ibis.memtable({"query": [f"category {number}" for number in range(3000)]})

    def held_out(share: float, seed: int) -> set[str]:
        return set(table.filter(is_held_out(table["query"], share, seed)).execute()["query"])

    found = held_out(share, 0)
    assert abs(len(found) - share * 3000) < 100  # four standard deviations
    assert found == held_out(share, 0)
    assert found <= held_out(0.9, 0)
    assert share == 0 or found != held_out(share, 1)
