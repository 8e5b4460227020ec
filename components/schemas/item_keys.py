"""The number of an item by the shop's own id, in pure Python: ingest's rule, which it applies in DuckDB."""

import hashlib

HASHED_FROM = 2**62  # ids below are plain numbers, those from here on are made of texts
_DIGITS = len(str(HASHED_FROM))


def item_key(external_id: str) -> int:
    """A plain decimal number below 2^62 stays itself; any other text becomes a number from there on, by its MD5."""
    if external_id.isascii() and external_id.isdecimal() and len(external_id) <= _DIGITS:
        number = int(external_id)
        if number < HASHED_FROM and str(number) == external_id:
            return number
    digest = hashlib.md5(external_id.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[8:], "little") % HASHED_FROM + HASHED_FROM
