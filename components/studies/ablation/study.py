"""Runs the variants of a study: the ordinary stages up to `sft`, each in a process, then `measure`.

Fingerprints reuse the stages that a variant shares with the reference, and everything that an interrupted study has
finished.
"""

import sys
from collections.abc import Sequence

import structlog

from components.child_process import run
from components.exceptions import UrmError, UserError
from components.flow import STUDIES, stages_before
from components.studies.ablation.grid import Grid, variant_dir

log = structlog.get_logger()
STAGES = stages_before(STUDIES["measure"].inputs)
URM = (sys.executable, "-m", "components")
_USER_ERROR = 2  # exit code of an error in the input


class VariantError(UrmError):
    """A stage of a variant failed; a retry may help."""


def run_variant(
    grid: Grid, variant: str, seed: int, *, config: str, study_dir: str, overrides: Sequence[str] = ()
) -> str:
    """Train and measure one variant, or the reference, with one seed; returns its run directory.

    Overrides are KEY=VALUE for all variants; they come before those of the grid.

    Raises:
        UserError: A stage found an error in the input.
        VariantError: A stage failed otherwise.
    """
    run_dir = variant_dir(study_dir, variant, seed)
    settings = [*overrides, *grid.settings_of(variant, seed)]
    options = ["--config", config, "--run-dir", run_dir, *(part for text in settings for part in ("--set", text))]
    for command in (*((stage,) for stage in STAGES), ("ablation", "measure")):
        log.info("variant", variant=variant, seed=seed, stage=command[-1])
        code = run([*URM, *command, *options])
        if code == _USER_ERROR:
            raise UserError(
                f"variant {variant!r}",
                expected=f"`urm {' '.join(command)}` to accept its settings ({', '.join(settings)})",
                got="the error above",
                remedy="fix the grid or the configuration",
            )
        if code != 0:
            raise VariantError(
                f"variant {variant!r}: expected success of `urm {' '.join(command)}`, got exit code {code}; "
                "run the same command again to resume."
            )
    return run_dir
