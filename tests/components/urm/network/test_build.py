"""Other families of language models, a lookup in their place, low-rank item spaces: trained, saved, read again."""

import dataclasses
import json
import shutil

import numpy as np
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

from components.caches import CachePlace
from components.exceptions import ConfigError
from components.items.ramps import num_ramps
from components.items.table import ItemTable
from components.urm.data.batches import usable_modalities
from components.urm.data.request import RecallRequest
from components.urm.inference import UrmRecaller, write_candidates
from components.urm.network.build import build_model
from components.urm.network.files import load_model, make_lookup, save_model
from components.urm.network.heads import POPULARITY_RAMPS
from components.urm.network.model import Urm
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


def make_world(folder, tables, table_dir, config, **changed):
    folder.mkdir()
    urm = config.urm.model_copy(update={"max_steps": 2, "eval_steps": 2, "max_seconds": 1e6} | changed)
    write_world(folder, tables, table_dir, config.model_copy(update={"urm": urm}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_built_trained_saved_and_read_again(family, tmp_path, tokenizer, tables, table_dir, config, groups):
    backbone = write_family(tmp_path / "backbone", tokenizer, family)
    world = make_world(tmp_path / "world", tables, table_dir, config, backbone=backbone)
    new = build_untrained(world)
    start = {name: weight.clone() for name, weight in new.model.state_dict().items()}
    model, summary = run_training(world, Checkpoints(tmp_path / "scratch"), lambda step, metrics: None)
    assert summary.steps == 2
    frozen = {name for name, weight in model.state_dict().items() if torch.equal(weight, start[name])}
    untrained = ("fusion.absent", "user_head.id_")  # the latter are set after training
    assert not {name for name in frozen if not name.startswith(untrained)}, "weights that two steps left alone"

    save_model(tmp_path / "model", model.eval(), new.builder.writer, new.description)
    read, writer, _ = load_model(tmp_path / "model")
    assert type(read.backbone) is type(model.backbone)
    batch = build_batch(new, groups[:4])
    with torch.inference_mode():
        before, after = model._forward(batch), read.eval()._forward(batch)
    torch.testing.assert_close(after.user_vectors, before.user_vectors)
    torch.testing.assert_close(after.text_logits, before.text_logits)
    assert writer.user_ids == new.builder.writer.user_ids


def test_a_model_of_before_the_scale_of_popularity_is_read_as_it_was(tmp_path, new_model, groups):
    """Its description has no scale, and its layer gives the weights themselves."""
    folder, head = tmp_path / "model", new_model.model.user_head
    batch = build_batch(new_model, groups[:4])
    with torch.inference_mode():
        wanted = new_model.model._forward(batch).user_vectors
    for part in (head.gains.weight, head.gains.bias):
        part.data *= head.scales.reshape(-1, *[1] * (part.dim() - 1))
    save_model(folder, new_model.model, new_model.builder.writer, new_model.description)
    description = json.loads((folder / "urm.json").read_text())
    assert description.pop("popularity_scale") < 1
    (folder / "urm.json").write_text(json.dumps(description))
    with torch.inference_mode():
        torch.testing.assert_close(load_model(folder)[0].eval()._forward(batch).user_vectors, wanted)


def test_a_model_of_before_names_of_kinds_is_read_as_it_was(tmp_path, new_model, groups, config, table_dir):
    """Its item table names no kind, and its description does not speak of them."""
    shutil.copytree(table_dir, tmp_path / "table", ignore=shutil.ignore_patterns("*.names.npy"))
    new = build_model(config.urm, ItemTable.open(tmp_path / "table"), ["purchase"], CachePlace(tmp_path))
    wanted = new_model.model.user_head.gains.out_features - 1
    assert new.model.user_head.gains.out_features == wanted
    save_model(tmp_path / "model", new.model.eval(), new.builder.writer, new.description)
    description = json.loads((tmp_path / "model" / "urm.json").read_text())
    assert description.pop("names") is False
    (tmp_path / "model" / "urm.json").write_text(json.dumps(description))
    batch = build_batch(new, groups[:4])
    with torch.inference_mode():
        vectors = [
            model._forward(batch).user_vectors for model in (new.model, load_model(tmp_path / "model")[0].eval())
        ]
    torch.testing.assert_close(*vectors)


def test_a_model_of_before_finer_ramps_is_read_as_it_was(tmp_path, groups, config, table_dir):
    """Its description speaks neither of ramps, it has one for each doubling, nor of what ID vectors alone say."""
    plain = config.urm.model_copy(update={"backbone": "none"})
    prompts = [task.prompt for task in config.tasks]
    new = build_model(plain, ItemTable.open(table_dir), ["purchase"], CachePlace(tmp_path), prompts)
    old = Urm(make_lookup(new.description), plain, new.description.widths, 1, 1, names=True, ramps=1).eval()
    assert old.dimension == new.model.dimension - num_ramps(1, POPULARITY_RAMPS) + num_ramps(1, 1)
    save_model(tmp_path / "model", old, new.builder.writer, new.description)
    description = json.loads((tmp_path / "model" / "urm.json").read_text())
    assert (description.pop("ramps"), description.pop("id_scores")) == (POPULARITY_RAMPS, True)
    assert description.pop("open_ramps") is True
    (tmp_path / "model" / "urm.json").write_text(json.dumps(description))
    batch = build_batch(new, groups[:4])
    with torch.inference_mode():
        vectors = [model._forward(batch).user_vectors for model in (old, load_model(tmp_path / "model")[0].eval())]
    torch.testing.assert_close(*vectors)
    bestsellers = new.builder.reader.read(np.arange(2)) | {"popularity": torch.tensor([4_095, 1e6]).log1p()[:, None]}
    with torch.inference_mode():
        ramps = [
            model.item_vectors(bestsellers)[:, -num_ramps(1, model.ramps) :]
            for model in (load_model(tmp_path / "model")[0], new.model)
        ]
    assert ramps[0][1].equal(ramps[0][0]) and ramps[1][1, -1] > ramps[1][0, -1] + 5


@pytest.mark.parametrize("family", ["mistral_window", "qwen2_window"])
def test_a_sliding_window_does_not_hide_the_prefix(family, tmp_path, tokenizer, tables, table_dir, config, groups):
    """The mask is ours (packing.py): a block sees its whole prefix, also where the model was trained with a window."""
    answers = []
    for window in (NARROW, 4096):
        backbone = write_family(tmp_path / f"backbone{window}", tokenizer, family, sliding_window=window)
        new = build_untrained(make_world(tmp_path / f"world{window}", tables, table_dir, config, backbone=backbone))
        with torch.inference_mode():
            answers.append(new.model.eval()._forward(build_batch(new, groups[:4])).user_vectors)
    torch.testing.assert_close(*answers)


FORMS = {
    "lookup": {"backbone": "none"},
    "low_rank": {"item_dimension": 5},
    "low_rank_without_copies": {"item_dimension": 5, "copy_path": False},
    "low_rank_lookup": {"backbone": "none", "item_dimension": 5},
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_train_and_serve_as_the_default_does(
    form, tmp_path, backbone_dir, tables, table_dir, config, groups, monkeypatch
):
    monkeypatch.setattr("components.urm.inference.ITEMS_PER_PASS", 7)  # several passes
    changed = {"backbone": str(backbone_dir)} | FORMS[form]
    world = make_world(tmp_path / "world", tables, table_dir, config, **changed)
    new = build_untrained(world)
    before = {name: weight.clone() for name, weight in new.model.state_dict().items()}
    model, _ = run_training(world, Checkpoints(tmp_path / "scratch"), lambda step, metrics: None)
    moved = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    expected = {"user_head.project.weight"} | {"lookup.states.weight", "fusion.reduce.weight"} & before.keys()
    assert moved >= expected

    new = dataclasses.replace(new, model=model.eval())
    save_model(tmp_path / "model", model, new.builder.writer, new.description)
    write_candidates(tmp_path / "candidates", new, tables.catalogue)
    recaller = UrmRecaller.load(tmp_path / "model", table_dir, tmp_path / "candidates")
    requests = [example.request for _, examples in groups[:4] for example in examples]
    users = recaller.encode_users(requests)
    width = changed.get("item_dimension", 8 + 12 + 3) + num_ramps(1, POPULARITY_RAMPS)
    assert users.vectors.shape == (len(requests), 3, width)
    candidates = np.load(tmp_path / "candidates" / "vectors.npy")
    assert candidates.shape == (len(tables.item_ids), width)
    assert len(candidates) > 7
    np.testing.assert_array_equal(candidates, recaller.encode_items(tables.item_ids))
    for number, (found, scores) in enumerate(zip(*recaller.recall(requests, 4), strict=True)):
        every = (users.vectors[number] @ candidates.T).max(axis=0)
        every[np.searchsorted(tables.item_ids, users.copy_items[number])] += users.copy_scores[number]
        every[np.isin(tables.item_ids, requests[number].excluded_items)] = -np.inf
        np.testing.assert_allclose(scores, np.sort(every)[::-1][:4], rtol=1e-4)
        assert set(found.tolist()) <= set(tables.item_ids.tolist())


@pytest.fixture
def lookup(tmp_path, tables, table_dir, config):
    """A model without a language model that has learned something, and its recaller."""
    new = build_untrained(make_world(tmp_path / "world", tables, table_dir, config, backbone="none"))
    torch.nn.init.normal_(new.model.user_head.project.weight)
    return UrmRecaller(new.model.eval(), new.builder, "max")


def test_a_lookup_knows_the_task_and_nothing_of_user_or_query(lookup, config, groups):
    """What is left of two users' vectors without their copies is equal; that of two tasks is not."""
    lookup.model.user_head.copy_path = False
    tasks = {task.name: task for task in config.tasks}
    asked = [("next_purchase", None), ("text_query", "milk"), ("text_query", "bread"), ("new_item", None)]
    one, other = (
        lookup.encode_users([RecallRequest(context, tasks[name], query) for name, query in asked]).vectors
        for context in (groups[0][0], groups[1][0])
    )
    np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(one[1], one[2], atol=1e-6)
    assert np.abs(one[0] - one[3]).max() > 0.1
    assert np.abs(one[:, 0] - one[:, 1]).max() > 0.1, "the H vectors of a task are the same"


def test_without_a_language_model_there_is_no_text_and_no_new_task(lookup, config, groups):
    request = groups[0][1][0].request
    with pytest.raises(ConfigError, match=r"text: expected a model with a language model, got .*`urm.backbone: none`"):
        lookup.generate_text(request)
    task = config.tasks[0].model_copy(update={"prompt": "Task: something else."})
    with pytest.raises(ConfigError, match=r"expected a prompt of the training.*got 'Task: something else\.'"):
        lookup.encode_users([RecallRequest(request.context, task)])


def test_kinds_alone_make_no_token_and_the_error_names_what_does(table_dir):
    table = ItemTable.open(table_dir)
    with pytest.raises(ConfigError, match=r"urm.modalities: expected at least one of id, text, got category_0"):
        usable_modalities(table, ["category_0"])
    assert usable_modalities(table, ["category_0", "text", "image"]) == ("category_0", "text")
