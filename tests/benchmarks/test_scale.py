import json
import subprocess
import sys

import pytest
import torch

from benchmarks import scale
from benchmarks.scale import read_measured, run_measured, show_curve
from components.items.text import TextEncoder

LINE = {"seconds": 10.0, "cpu_seconds": 8.0, "peak_bytes": 5e8, "scratch_bytes": 0, "output_bytes": 1e7}


def test_memory_and_scratch_of_a_command_are_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "_LOOKS_PER_DISK_LOOK", 1)
    scratch = tmp_path / "run" / "features" / ".scratch-1"
    scratch.mkdir(parents=True)
    work = f"import pathlib, time; held = b'x' * 600_000_000; f = pathlib.Path({str(scratch / 'spilled')!r}); "
    work += "f.write_bytes(held[:1000]); time.sleep(1); f.unlink()"
    cost = run_measured([sys.executable, "-c", work], tmp_path)
    assert cost.peak_bytes > 600e6
    assert cost.scratch_bytes == 1000
    assert cost.seconds >= 1 > cost.cpu_seconds


def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run_measured([sys.executable, "-c", "raise SystemExit('no memory left')"], tmp_path)
    assert caught.value.stderr.strip() == "no memory left"


def test_sizes_that_the_output_has_are_not_measured_again(tmp_path, monkeypatch, capsys):
    output, measured = tmp_path / "scale.jsonl", []
    about = scale.describe_run(seed=0)
    lines = [{"events": 1000, "stage": "ingest"} | LINE, {"events": 1000, "stage": "validate", "failed": "no disk"}]
    lines = [line | about for line in lines]
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def measure(events, seed, work, stages, keep):
        measured.append((events, stages))
        yield from ({"events": events, "stage": stage} | LINE | about for stage in stages)

    monkeypatch.setattr(scale, "measure", measure)
    for _ in range(2):
        scale.main(["--work", str(tmp_path), "--output", str(output), "--events", "1e3"])
    assert measured == [(1000, ["validate", "features", "encode"])]
    assert capsys.readouterr().out.count("| encode | 1,000 | 10 | 8 |") == 2


def test_lines_of_another_engine_are_no_lines_of_this_one(tmp_path):
    output = tmp_path / "scale.jsonl"
    about = {"engine": "duckdb", "engine_memory": "1500MB", "threads": 1}
    written = [about, about | {"engine": "spark"}, about | {"threads": 2}, about | {"seed": 1}]
    lines = [{"events": 1000, "stage": stage} | LINE | kind for stage, kind in zip("abcd", written, strict=True)]
    output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for wanted, stage in (
        (about | {"seed": 0}, "a"),
        ({"engine": "spark"}, "b"),
        ({"threads": 2}, "c"),
        ({"seed": 1}, "d"),
    ):
        assert [*read_measured(output, wanted)] == [(1000, stage)]


def test_the_curve_shows_growth_per_doubling(tmp_path):
    sizes = {1_000_000: 8.0, 4_000_000: 32.0, 8_000_000: 128.0}
    lines = {(n, "ingest"): {"events": n, "stage": "ingest"} | LINE | {"cpu_seconds": s} for n, s in sizes.items()}
    lines[16_000_000, "ingest"] = {"events": 16_000_000, "stage": "ingest", "failed": "no disk"}
    rows = [row.split(" | ") for row in show_curve(lines).splitlines()[2:]]
    assert [row[4] for row in rows[:3]] == ["", "2.00", "4.00"]
    assert rows[3][2] == "failed: no disk"
    assert read_measured(tmp_path / "nothing", {}) == {}


def test_a_stage_that_fails_ends_its_size_with_its_last_line(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "complete").touch()
    (tmp_path / "run").write_text("no folder")
    lines = list(scale.measure(1000, 0, tmp_path, ["ingest", "validate"], keep=True))
    assert [line["stage"] for line in lines] == ["ingest"]
    assert "expected" in lines[0]["failed"]
    assert "\n" not in lines[0]["failed"]


def test_the_largest_log_follows_from_the_growth_of_the_largest_sizes_and_is_measured(tmp_path, monkeypatch, capsys):
    """Twice the events take twice the time, but for the smallest: 30 minutes are 60 million events."""
    output = tmp_path / "scale.jsonl"

    def measure(events, seed, work, stages, keep):
        for stage in stages:
            yield {"events": events, "stage": stage} | LINE | {"seconds": max(events / 100_000, 9)}

    monkeypatch.setattr(scale, "measure", measure)
    options = ["--work", str(tmp_path), "--output", str(output), "--stages", "ingest", "validate", "features"]
    scale.main([*options, "--events", "1e5", "1e6", "4e6", "--minutes", "30"])
    assert capsys.readouterr().out.endswith("60,000,000 events in 1800 of 1800 s\n")
    with pytest.raises(SystemExit, match="expected two sizes with ingest"):
        scale.main(["--work", str(tmp_path), "--output", str(tmp_path / "new"), "--events", "1e6", "--minutes", "30"])
    assert scale.show_largest({}, scale.STAGES, 60) == "no size was done within 60 s"


def test_the_encoder_of_the_benchmark_is_one_that_encode_can_open(tmp_path):
    encoder = TextEncoder(str(scale.save_encoder(str(tmp_path), seed=0)), torch.device("cpu"), batch_size=2)
    near, same, far = encoder.encode(["article 7 of shelf 1", "of shelf 1 article 7", "brand"]).astype(float)
    assert encoder.dimension == 384
    assert near @ far < 0.9 < near @ same
