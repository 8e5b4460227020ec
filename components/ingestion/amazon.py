"""The tables of the Amazon sets, made from the files that several projects published of them.

All number the items as S3-Rec does, but for Toys: S3-Rec names none of those, so that they are found in the files of
another project by who bought what.
"""

import csv
import difflib
import gzip
import html
import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pandas as pd

_LEAST_ITEMS = {"amazon_beauty": 5, "amazon_sports": 2}  # of an attribute that S3-Rec kept
_ROUNDS = 4  # tell all items of Toys apart


def write_tables(name: str, raw: Path, to: Path) -> None:
    """Write the sequences and items of a data set from its public files, named as the registry does."""
    with (raw / "sequences.txt").open("rb") as lines, (to / "sequences.txt.gz").open("wb") as file:
        with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
            shutil.copyfileobj(lines, packed)
    attributes = {int(item): ids for item, ids in _read(raw / "attributes.json").items()}
    items = sorted(attributes)
    columns: dict[str, Any] = {"item_id": pd.array(items, dtype="int32")}
    if name == "amazon_toys":
        asins = _asins_by_purchases(raw)
        columns |= {"asin": [asins[item] for item in items], "attribute_ids": [attributes[item] for item in items]}
    else:
        maps = _read(raw / "names.json")
        asins = {int(item): asin for item, asin in maps["id2item"].items()}
        columns["asin"] = [asins[item] for item in items]
        if name == "amazon_beauty":
            titles = _titles(raw)
            columns["title"] = [titles.get(asins[item]) for item in items]
        names = _attribute_names(attributes, maps, _LEAST_ITEMS[name])
        columns |= _brands_and_categories([attributes[item] for item in items], names)
    phrases = dict(line.split(" ", 1) for line in (raw / "phrases.txt").read_text().splitlines())
    columns["phrase"] = [phrases[asins[item]] for item in items]
    pd.DataFrame(columns).to_parquet(to / "items.parquet", compression="zstd", compression_level=19, index=False)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _titles(raw: Path) -> dict[str, str]:
    with (raw / "titles.csv").open(newline="") as file:
        titles = {
            int(row["global_product_id"]): " ".join(html.unescape(row["name"]).split()) for row in csv.DictReader(file)
        }
    numbers = _read(raw / "title_numbers.json")
    return {asin: titles[number] for asin, number in numbers.items() if titles.get(number)}


def _attribute_names(attributes: dict[int, list[int]], maps: dict[str, Any], least: int) -> dict[int, str]:
    """Names of S3-Rec's attribute numbers: both lists are in one order, with equal counts of items."""
    ours = Counter(number for numbers in attributes.values() for number in numbers)
    theirs = {int(number): count for number, count in maps["attributeid2num"].items() if count >= least}
    order, other = sorted(ours), sorted(theirs)
    matcher = difflib.SequenceMatcher(None, [ours[n] for n in order], [theirs[n] for n in other], autojunk=False)
    return {
        order[block.a + step]: html.unescape(maps["id2attribute"][str(other[block.b + step])])
        for block in matcher.get_matching_blocks()
        for step in range(block.size)
    }


def _brands_and_categories(attributes: list[list[int]], names: dict[int, str]) -> dict[str, list[Any]]:
    """A brand is the first attribute of its items and stands nowhere later."""
    categories = {number for numbers in attributes for number in numbers[1:]}
    brands = [None if numbers[0] in categories else names.get(numbers[0]) for numbers in attributes]
    paths = [
        list(dict.fromkeys(names[n] for n in numbers[numbers[0] not in categories :] if n in names))
        for numbers in attributes
    ]
    return {"brand": brands, "categories": paths}


def _asins_by_purchases(raw: Path) -> dict[int, str]:
    ours, theirs = _marks(raw / "sequences.txt"), _marks(raw / "other_sequences.txt")
    names = _read(raw / "other_names.json")["id2item"]
    asins = {mark: names[item] for item, mark in theirs.items()}
    return {int(item): asins[mark] for item, mark in ours.items()}


def _marks(path: Path) -> dict[str, int]:
    """A number per item that its place in the graph of users and items makes, whatever the numbers in the file."""
    users = [line.split()[1:] for line in path.read_text().splitlines()]
    buyers = defaultdict(list)
    for user, items in enumerate(users):
        for item in items:
            buyers[item].append(user)
    marks = dict.fromkeys(buyers, 0)
    for _ in range(_ROUNDS):
        of_users = [hash(tuple(sorted(marks[item] for item in items))) for items in users]
        marks = {item: hash(tuple(sorted(of_users[user] for user in found))) for item, found in buyers.items()}
    return marks
