"""Causal language models of other families: built, trained two steps, saved, and read again with the same answers."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from components.urm.network.files import load_model, save_model
from components.urm.training.checkpoints import Checkpoints
from tests.worlds.backbone import TINY
from tests.worlds.training import build_untrained, run_training, write_world
from tests.worlds.urm import build_batch

NARROW = 4  # tokens; a window far shorter than a prompt
FAMILIES = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2_window": (Qwen2Config, {"use_sliding_window": True, "sliding_window": NARROW, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 8}),
    "mistral_window": (MistralConfig, {"sliding_window": NARROW}),
    "phi3": (Phi3Config, {}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "sliding_window": NARROW, "layer_types": None}),
}


def write_family(folder, tokenizer, family, **changed):
    """Two random layers of a family; the same weights whatever is changed that has none."""
    kind, special = FAMILIES[family]
    torch.manual_seed(0)
    shape = kind(
        vocab_size=len(tokenizer), num_hidden_layers=3, pad_token_id=1, bos_token_id=1, **TINY | special | changed
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_world(folder, backbone, tables, table_dir, config):
    folder.mkdir()
    urm = config.urm.model_copy(update={"backbone": backbone, "max_steps": 2, "eval_steps": 2, "max_seconds": 1e6})
    write_world(folder, tables, table_dir, config.model_copy(update={"urm": urm}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_built_trained_saved_and_read_again(family, tmp_path, tokenizer, tables, table_dir, config, groups):
    backbone = write_family(tmp_path / "backbone", tokenizer, family)
    world = make_world(tmp_path / "world", backbone, tables, table_dir, config)
    new = build_untrained(world)
    start = {name: weight.clone() for name, weight in new.model.state_dict().items()}
    model, summary = run_training(world, Checkpoints(tmp_path / "scratch"), lambda step, metrics: None)
    assert summary.steps == 2
    frozen = {name for name, weight in model.state_dict().items() if torch.equal(weight, start[name])}
    assert not {name for name in frozen if not name.startswith("fusion.absent")}, "weights that two steps left alone"

    save_model(tmp_path / "model", model.eval(), new.builder.writer, new.description)
    read, writer, _ = load_model(tmp_path / "model")
    assert type(read.backbone) is type(model.backbone)
    batch = build_batch(new, groups[:4])
    with torch.inference_mode():
        before, after = model._forward(batch), read.eval()._forward(batch)
    torch.testing.assert_close(after.user_vectors, before.user_vectors)
    torch.testing.assert_close(after.text_logits, before.text_logits)
    assert writer.user_ids == new.builder.writer.user_ids


@pytest.mark.parametrize("family", ["mistral_window", "qwen2_window"])
def test_a_sliding_window_does_not_hide_the_prefix(family, tmp_path, tokenizer, tables, table_dir, config, groups):
    """The mask is ours (packing.py): a block sees its whole prefix, also where the model was trained with a window."""
    answers = []
    for window in (NARROW, 4096):
        backbone = write_family(tmp_path / f"backbone{window}", tokenizer, family, sliding_window=window)
        new = build_untrained(make_world(tmp_path / f"world{window}", backbone, tables, table_dir, config))
        with torch.inference_mode():
            answers.append(new.model.eval()._forward(build_batch(new, groups[:4])).user_vectors)
    torch.testing.assert_close(*answers)
