"""Join public sequence files of several shops into one, so that one model can be trained on all of them.

    python -m benchmarks.join_logs data/amazon_beauty data/amazon_sports data/joined

Each folder has the two files that configs/amazon_toys.yaml describes. Numbers of users and items of each but the first
begin where those of the one before end; shops share neither. Items keep `asin`, marked by the shop's folder, and
`phrase`, which all of these files have.
"""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from components.exceptions import ConfigError, DataError

SEQUENCES, ITEMS = "sequences.txt.gz", "items.parquet"


def join(shops: Sequence[Path], folder: Path) -> None:
    """Write the joined files of the shops into a folder.

    Raises:
        ConfigError: Two shops have folders of one name, so that their items could not be told apart.
        DataError: A file is missing.
    """
    for path in (shop / name for shop in shops for name in (SEQUENCES, ITEMS)):
        if not path.is_file():
            remedy = "see configs/amazon_toys.yaml for what a folder holds"
            raise DataError(f"shop {path.parent}", expected=f"file {path.name}", got="none", remedy=remedy)
    names = [shop.name for shop in shops]
    if len(set(names)) < len(names):
        raise ConfigError("shops", expected="folders of different names", got=", ".join(names), remedy="rename one")
    lines: list[str] = []
    items: list[pd.DataFrame] = []
    users = numbers = 0
    for shop in shops:
        with gzip.open(shop / SEQUENCES, "rt") as file:
            sequences = [[int(word) for word in line.split()] for line in file if line.strip()]
        table = pd.read_parquet(shop / ITEMS, columns=["item_id", "asin", "phrase"])
        items.append(table.assign(item_id=table["item_id"] + numbers, asin=f"{shop.name}/" + table["asin"]))
        for user, *bought in sequences:
            lines.append(" ".join(map(str, [user + users, *(item + numbers for item in bought)])))
        users += max(user for user, *_ in sequences)
        numbers += max(int(table["item_id"].max()), *(item for _, *bought in sequences for item in bought))
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / SEQUENCES, "wt") as file:
        file.writelines(f"{line}\n" for line in lines)
    pd.concat(items, ignore_index=True).to_parquet(folder / ITEMS, index=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Join the folders of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shops", nargs="+", type=Path, help="Folders")
    parser.add_argument("output", type=Path, help="Folder")
    options = parser.parse_args(arguments)
    join(options.shops, options.output)


if __name__ == "__main__":
    main()
