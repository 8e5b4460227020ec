"""Which file a place in memory belongs to."""

from pathlib import Path


def mapped_file(address: int) -> str:
    """The file mapped at an address of this process; empty where there is none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        low, high = (int(bound, 16) for bound in fields[0].split("-"))
        if low <= address < high:
            return fields[5] if len(fields) > 5 else ""
    return ""
