"""The contract of a stage: what it reads and writes under a run directory, and when it counts as done.

    <run_dir>/<stage>/<fingerprint>/…   the stage's files, written to a temporary sibling and renamed
    <run_dir>/<stage>/result.json       written last: its presence is success
    <run_dir>/<stage>/progress.json     what a running stage last reported
    <parent of run_dir>/.stages/…       index of results by fingerprint, so that another run reuses equal work

A stage sees local paths only. Where the run directory is on an object store, inputs are fetched to the local
cache first and outputs are put there after the stage ends, through fsspec.
"""

from components.storage.code import fingerprint
from components.storage.contract import StageFunction, StageReport, StageResult, StageRun
from components.storage.results import load_result, require_json, require_result
from components.storage.runner import run_stage
