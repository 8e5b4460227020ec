"""Processes that end with the one that has started them."""

import shutil
import subprocess
from collections.abc import Sequence


def die_with_parent() -> list[str]:
    """Prefix of a command that kills it when its parent ends, however that is, so that nothing is left over.

    Empty where util-linux is missing: there a killed process leaves its children to their end.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


def run(command: Sequence[str]) -> int:
    """Run a command to its end; its exit code.

    What ends this process meanwhile, such as SIGTERM, ends the command by SIGTERM and waits for it: a training saves a
    checkpoint first, for which `subprocess.run` leaves no time.
    """
    with subprocess.Popen([*die_with_parent(), *command]) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
