"""The number of an item by the shop's own id: what Python says is what ingest writes."""

import random

import ibis
import pyarrow as pa

from components.ingestion import convert
from components.schemas.item_keys import item_key

_SPECIAL = (
    "", " ", "0", "00", "-0", "+1", "-1", "01", "1.0", "1e3", "1_000", "0x10", " 7", "7 ", "7\n", "٣", "７", "²", "\0",
    "7\0", "nan", "true", "é", "e\u0301", "😀", "9" * 5000, "B00004TFT1", "SKU-1",
    *(str(2**power + step) for power in (53, 62, 63, 64) for step in (-1, 0, 1)),
)  # fmt: skip
_ALPHABET = "0123456789" * 3 + "-+._ eExX\t\0aZé٣７😀"


def test_numbers_are_those_of_ingest() -> None:
    draw = random.Random(7)
    lengths = [draw.randrange(1, 24) for _ in range(10_000)]
    texts = [*_SPECIAL, *("".join(draw.choices(_ALPHABET if n % 2 else "0123456789", k=n)) for n in lengths)]
    table = ibis.memtable(pa.table({"number": range(len(texts)), "text": texts}))
    keyed = table.select("number", key=convert.item_key(table.text)).order_by("number")
    assert [item_key(text) for text in texts] == ibis.duckdb.connect().to_pyarrow(keyed)["key"].to_pylist()
    assert item_key("42") == 42 and item_key("042") >= 2**62
