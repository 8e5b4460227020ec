r"""What a word of a text is, for URM and for its rivals: equal text is equal, and marks belong to their letters.

Python's `\w` leaves out combining marks, without which words of many scripts (Devanagari, Tamil, Thai) fall apart.
"""

import sys
import unicodedata


def _ranges_of_marks() -> str:
    """All combining marks, as ranges for a set of characters of a regular expression."""
    marks = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M"]
    starts = [code for code, before in zip(marks, [-1, *marks], strict=False) if code != before + 1]
    ends = [code for code, after in zip(marks, [*marks[1:], -1], strict=True) if code + 1 != after]
    return "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True))


MARKS = _ranges_of_marks()


def lowered(text: str) -> str:
    """Lower case in which one letter is one: σ also at the end of a word, and i for İ, which are two in Unicode's."""
    return text.lower().replace("ς", "σ").replace("i\u0307", "i")


def normalise(text: str) -> str:
    """Lower case, with composed accents, however the text was written."""
    return unicodedata.normalize("NFC", lowered(text))
