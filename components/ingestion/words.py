"""The retailer's shorthand in readable words: "SFT DRNK 2 LITER BTL" → "soft drink 2 liter bottle"."""

import re

# Shorthand of the till's product hierarchy that stands for at least some thousand purchases each.
_WORDS = {
    "bg": "bag", "bkd": "baked", "bn": "bean", "brkfst": "breakfast", "btl": "bottle", "btr": "butter",
    "carb": "carbonated", "cleang": "cleaning", "cnd": "canned", "crbntd": "carbonated", "crystl": "crystal",
    "dnr": "dinner", "dnrs": "dinners", "drnk": "drink", "drnking": "drinking", "drnks": "drinks",
    "drsng": "dressing", "dsh": "dish", "fd": "food", "flvrd": "flavored", "frz": "frozen", "frzn": "frozen",
    "gds": "goods", "incl": "including", "misc": "miscellaneous", "mneral": "mineral", "mx": "mix", "mxs": "mixes",
    "pckgd": "packaged", "pk": "pack", "pkg": "package", "pkld": "pickled", "pnt": "peanut", "prem": "premium",
    "pwdr": "powder", "refrgratd": "refrigerated", "reg": "regular", "sald": "salad", "sft": "soft",
    "sgl": "single", "sherbts": "sherbets", "sndwch": "sandwich", "sngl": "single", "sprd": "spread",
    "srv": "serving", "sw": "sweet", "sweetners": "sweeteners", "tiss": "tissue", "trsh": "trash", "veg": "vegetable",
    "wate": "water", "whl": "whole", "whlsm": "wholesome", "wtr": "water",
}  # fmt: skip
_PUNCTUATION = re.compile(r"\s*([/&:,;-])\s*")
_SPACED = {"&": " & ", ":": ": ", ",": ", ", ";": "; "}


def to_words(text: str) -> str:
    """Lower-case words without shorthand; unknown words stay as they are, blank text gives ""."""
    hyphenated = re.sub(r"(?<=\w)-(?=\w)", "‐", text.strip().lower())  # a hyphen inside a word is no dash
    spaced = _PUNCTUATION.sub(lambda match: _SPACED.get(match[1], " - " if match[1] == "-" else match[1]), hyphenated)
    words = re.sub(r"[a-z]+", lambda match: _WORDS.get(match[0], match[0]), spaced)
    return " ".join(words.replace("‐", "-").split())
