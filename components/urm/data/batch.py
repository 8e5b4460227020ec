"""The batch."""

from __future__ import annotations

from typing import Any

Batch = dict[str, Any]


WORDS = ("lexical", "category_words")  # the modalities that queries share with items
