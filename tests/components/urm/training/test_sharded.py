"""A model split by FSDP2 over two processes of this machine; never run on accelerators so far."""

import json

import torch

from tests.worlds.training import launch, write_world


def test_a_model_sharded_over_processes_has_the_gradients_of_a_whole_one(tmp_path, tables, table_dir, config, steps):
    spoken = next(batch for batch in map(steps.__getitem__, range(len(steps))) if len(batch["labels"]))
    (tmp_path / "world").mkdir()
    write_world(tmp_path / "world", tables, table_dir, config)
    torch.save(spoken, tmp_path / "batch.pt")
    for output in launch("tests.worlds.sharded", [tmp_path / "world", tmp_path / "batch.pt"]):
        figures = json.loads(output)
        assert figures["compared"] > 40
        assert figures["gradients"] < 0.05  # bfloat16 where the machine has it
        assert figures["items"] < 1e-5
        assert figures["gathered"]
