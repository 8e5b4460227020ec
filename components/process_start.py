"""When a process began, which tells it from a later one with its id."""

from pathlib import Path


def ticks_at_start(pid: int) -> int | None:
    """Clock ticks from the machine's boot to the start of a process; None if it is gone.

    Unlike a time of day it stays the same when the clock is set (man 5 proc_pid_stat, field 22).
    """
    try:
        # The name of the program, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[19])
