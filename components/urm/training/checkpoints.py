"""Checkpoints of a training: folders `checkpoint-<step>`, each of which is complete or does not count.

The file COMPLETE is written last and holds the size and the SHA-256 of all others: a killed process may leave a
checkpoint without it, and a disk or a store may damage one. The best checkpoint and the newest are kept.

With a store, the local folder is this attempt's alone. A thread copies each checkpoint to the store while the training
goes on, and an attempt on another machine begins by fetching the newest.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog
from safetensors import SafetensorError

from components.addresses import join, open_store
from components.exceptions import UnavailableError

log = structlog.get_logger()

COMPLETE = "budget.json"
_SHARDS = "shards"
_PREFIX = "checkpoint-"


class Checkpoints:
    """The checkpoints of one attempt, used by its first process; the others only fetch."""

    def __init__(
        self, folder: Path, store: str = "", minutes: float = math.inf, owns_store: Callable[[], bool] = lambda: True
    ) -> None:
        """Take a local folder, the URI of the store if the folder does not outlive the machine, and the interval.

        `owns_store` says whether this attempt is still the one that may write to the store.
        """
        self.folder = folder
        self._store = store.rstrip("/")
        self._seconds = minutes * 60
        self._owns_store = owns_store
        self._saved = time.monotonic()
        # One thread throughout: fsspec opens new connections for every thread.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._upload: Future[None] | None = None
        self._in_store: set[int] = set()  # steps whose checkpoint the store has as it is here

    @property
    def is_due(self) -> bool:
        """Whether the interval since the last one is over."""
        return time.monotonic() - self._saved >= self._seconds

    def path(self, step: int) -> Path:
        """Local folder of a step's checkpoint."""
        return self.folder / f"{_PREFIX}{step}"

    def restore(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none; a damaged one is skipped with a warning.

        Raises:
            UnavailableError: The store does not answer.
        """
        skipped: set[int] = set()
        # Listed anew after every failure: an attempt that has not noticed its end yet may have replaced it by a newer.
        while found := self._steps() - skipped:
            step = max(found)
            if self.fetch(step):
                return step
            skipped.add(step)
        return None

    def fetch(self, step: int) -> bool:
        """Make a step's checkpoint local; False, and a warning, if it is damaged.

        Raises:
            UnavailableError: The store does not answer.
        """
        damage = (self._download(step) if self._store else "") or find_damage(self.path(step))
        if self._store and damage:  # perhaps only here
            shutil.rmtree(self.path(step), ignore_errors=True)
            damage = self._download(step) or find_damage(self.path(step))
        if self._store and not damage:
            shards = json.loads((self.path(step) / COMPLETE).read_text())["shards"]
            damage = "" if not shards or self._shard_sizes(step) == shards else f"other {_SHARDS} than were written"
        if damage:
            log.warning("checkpoint is damaged and not used", checkpoint=self.path(step).name, damage=damage)
        elif self._store:
            self._in_store.add(step)
        return not damage

    def shards(self, step: int) -> str:
        """URI of the folder to which all processes write the shards of a step, where the model is sharded."""
        return join(self._store or str(self.folder), self.path(step).name, _SHARDS)

    def begin(self, step: int) -> None:
        """Make room for a step's checkpoint, once the one before is in the store.

        Raises:
            UnavailableError: Another attempt has taken over, so that this one must end.
        """
        self.wait()
        self._saved = time.monotonic()
        self._in_store.discard(step)
        shutil.rmtree(self.path(step), ignore_errors=True)

    def save(
        self,
        step: int,
        best_step: int | None,
        seconds: float,
        write: Callable[[Path], None],
        *,
        sharded: bool = False,
    ) -> bool:
        """After `begin`, let `write` fill a step's folder, complete it, and drop all others but the best.

        Args:
            step: Steps done.
            best_step: Step whose weights are the best so far, None if none was evaluated.
            seconds: Time spent on the training so far.
            write: Writes all files of the checkpoint but shards.
            sharded: Whether all processes have written shards before.

        Returns:
            False, with a warning, if that fails.
        """
        folder = self.path(step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write(folder)
            files = {str(path.relative_to(folder)): _digest(path) for path in folder.rglob("*") if path.is_file()}
            shards = self._shard_sizes(step) if self._store and sharded else {}
            (folder / COMPLETE).write_text(json.dumps({"seconds": seconds, "files": files, "shards": shards}))
        except (OSError, RuntimeError, SafetensorError, UnavailableError) as error:  # RuntimeError: torch's
            log.warning("checkpoint cannot be saved, the training goes on without", step=step, error=str(error))
            shutil.rmtree(folder, ignore_errors=True)
            return False
        for other in self.folder.glob(f"{_PREFIX}*"):
            if other not in (folder, self.path(best_step or step)):
                shutil.rmtree(other, ignore_errors=True)
        if self._store:
            self._upload = self._thread.submit(self._copy_to_store)
        return True

    def wait(self) -> None:
        """Return once the store has what was saved, or the attempt to copy it has failed.

        Raises:
            UnavailableError: Another attempt has taken over, so that this one must end.
        """
        if self._upload is not None:
            self._upload.result()

    def _steps(self) -> set[int]:
        if not self._store:
            return {_step(path.name) for path in self.folder.glob(f"{_PREFIX}*")}
        filesystem, root = open_store(self._store)
        try:
            filesystem.invalidate_cache()  # other machines write here
            names = [path.rstrip("/").rsplit("/", 1)[1] for path in filesystem.ls(root, detail=False)]
        except FileNotFoundError:
            return set()
        except Exception as error:  # each driver has errors of its own
            raise self._no_answer(error) from error
        return {_step(name) for name in names if name.startswith(_PREFIX)}

    def _download(self, step: int) -> str:
        """Copy a checkpoint from the store unless it is here already; returns what is wrong with it."""
        folder = self.path(step)
        filesystem, root = open_store(join(self._store, folder.name))
        try:
            marker = filesystem.cat_file(f"{root}/{COMPLETE}")
            if (folder / COMPLETE).is_file() and (folder / COMPLETE).read_bytes() == marker:
                return ""
            shutil.rmtree(folder, ignore_errors=True)
            for name in json.loads(marker)["files"]:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(f"{root}/{name}", str(folder / name))
            (folder / COMPLETE).write_bytes(marker)
        except FileNotFoundError as error:
            return f"no {error}"
        except (ValueError, KeyError, TypeError) as error:
            return f"{COMPLETE}: {error}"
        except Exception as error:
            raise self._no_answer(error) from error
        return ""

    def _shard_sizes(self, step: int) -> dict[str, int]:
        """Bytes of each shard of a step in the store."""
        filesystem, root = open_store(self.shards(step))
        try:
            filesystem.invalidate_cache()
            return {entry["name"].rsplit("/", 1)[1]: entry["size"] for entry in filesystem.ls(root, detail=True)}
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise self._no_answer(error) from error

    def _copy_to_store(self) -> None:
        """Make the store equal to the local folder; what fails is tried again after the next checkpoint."""
        try:
            owns = self._owns_store()
            if owns:
                self._mirror()
        except Exception as error:
            log.warning("checkpoint cannot be copied, tried again later", store=self._store, error=str(error))
            return
        if not owns:
            raise UnavailableError(
                f"checkpoints {self._store}",
                expected="one attempt at a time",
                got="another attempt that has taken over",
                remedy="leave the work to it",
            )

    def _mirror(self) -> None:
        filesystem, root = open_store(self._store)
        local = {_step(path.parent.name): path.parent for path in self.folder.glob(f"{_PREFIX}*/{COMPLETE}")}
        for step in sorted(local.keys() - self._in_store):  # the best before the newest, which refers to it
            path, target = local[step], f"{root}/{local[step].name}"
            marker = (path / COMPLETE).read_bytes()
            for name in json.loads(marker)["files"]:
                filesystem.makedirs(f"{target}/{name}".rsplit("/", 1)[0], exist_ok=True)
                filesystem.put_file(str(path / name), f"{target}/{name}")
            filesystem.pipe_file(f"{target}/{COMPLETE}", marker)
            self._in_store.add(step)
        for step in self._steps() - local.keys():
            target = f"{root}/{_PREFIX}{step}"
            if filesystem.exists(f"{target}/{COMPLETE}"):  # it is complete no longer
                filesystem.rm_file(f"{target}/{COMPLETE}")
            if filesystem.exists(target):  # folders of object stores go with their last file
                filesystem.rm(target, recursive=True)

    def _no_answer(self, error: Exception) -> UnavailableError:
        return UnavailableError(
            f"checkpoints {self._store}", expected="an answer", got=error, remedy="start the stage again later"
        )


def find_damage(folder: Path) -> str:
    """What is wrong with a checkpoint; empty if it is complete and every file is as it was written."""
    try:
        files = json.loads((folder / COMPLETE).read_text())["files"]
        changed = [name for name, digest in files.items() if _digest(folder / name) != digest]
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror or error}"  # a failed read names no file
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{COMPLETE}: {error}"
    return f"other content than was written in {', '.join(changed)}" if changed else ""


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _step(name: str) -> int:
    return int(name.removeprefix(_PREFIX))
