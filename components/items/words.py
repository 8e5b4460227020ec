r"""What a word of a text is, for URM and for its rivals: equal text is equal, and marks belong to their letters.

Python's `\w` leaves out combining marks, without which words of many scripts (Devanagari, Tamil, Thai) fall apart.
Chinese and Japanese have no spaces: each pair of neighbours is a word there, as in Lucene's CJK analysis. Thai, Lao and
Khmer have none either, and nothing of the kind: a word is what stands between two spaces.
"""

import re
import unicodedata

# Where Unicode has marks: the first two planes and the one for special purposes. To look at all takes longer.
_PLANES = (*range(0x300, 0x20000), *range(0xE0000, 0xF0000))


def _ranges_of_marks() -> str:
    """All combining marks, as ranges for a set of characters of a regular expression."""
    marks = [code for code in _PLANES if unicodedata.category(chr(code))[0] == "M"]
    starts = [code for code, before in zip(marks, [-1, *marks], strict=False) if code != before + 1]
    ends = [code for code, after in zip(marks, [*marks[1:], -1], strict=True) if code + 1 != after]
    return "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True))


MARKS = _ranges_of_marks()
IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # with both kinds of kana
_WORD = re.compile(rf"(?:[^\W_][{MARKS}]*)+")
_RUNS = re.compile(f"[{IDEOGRAPHS}]+|[^{IDEOGRAPHS}]+")
_IDEOGRAPH = re.compile(f"[{IDEOGRAPHS}]")


def lowered(text: str) -> str:
    """Lower case that is the same whatever lowers it: σ also at the end of a word, and a plain i for İ."""
    return text.lower().replace("ς", "σ").replace("i\u0307", "i")


def normalise(text: str) -> str:
    """Lower case, with composed accents, however the text was written."""
    return unicodedata.normalize("NFC", lowered(text))


def cut_runs(words: list[str]) -> list[str]:
    """The words, with runs of ideographs and kana cut into their pairs; one that stands alone is a word."""
    if not _IDEOGRAPH.search(" ".join(words)):
        return words
    cut = []
    for run in (run for word in words for run in _RUNS.findall(word)):
        is_pairs = len(run) > 2 and _IDEOGRAPH.match(run)
        cut += [run[place : place + 2] for place in range(len(run) - 1)] if is_pairs else [run]
    return cut


def split_words(text: str) -> list[str]:
    """Words of a query or of a field of an item; "_" separates, as in the names of some categories."""
    return cut_runs(_WORD.findall(normalise(text)))
