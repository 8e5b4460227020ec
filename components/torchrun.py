"""torchrun whose exit code says why training ended: `python -m components.torchrun …`, with the arguments of torchrun.

torchrun itself ends with 1 whatever its processes ended with, so that a user's mistake (2) would look like a failure
that another try may fix.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run


def run_torchrun(arguments: list[str]) -> int:
    """Run torchrun; returns the exit code of the process that failed first, or 128 + the signal that ended it or us."""
    try:
        run(parse_args(arguments))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(run_torchrun(sys.argv[1:]))
