import io
import struct
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import ExifTags, Image, ImageOps

from components.caches import CachePlace
from components.exceptions import ConfigError, DataError, UnavailableError
from components.items.image import DIMENSION, ImageEncoder, ImageVectors, _decode, encode_images
from components.items.image_files import Unreadable
from tests.worlds import DEVICE, PUBLIC_DATA

FASHION = PUBLIC_DATA / "fashion_small/items.parquet"


@pytest.fixture(scope="session")
def encoder() -> ImageEncoder:
    return ImageEncoder("efficientnet-lite0", torch.device(DEVICE))


def save(path: Path, color: str, mode: str = "RGB", size: tuple[int, int] = (40, 60)) -> str:
    Image.new("RGB", size, color).convert(mode).save(path)
    return str(path)


@pytest.mark.skipif(not FASHION.exists(), reason="the shared data folder is not beside the repository")
def test_nearest_neighbours_are_articles_of_the_same_type(encoder: ImageEncoder, tmp_path: Path) -> None:
    table = pq.read_table(FASHION, columns=["item_id", "article_type", "image_webp"]).to_pandas()
    chosen = ["Tshirts", "Watches", "Handbags", "Sunglasses", "Jeans", "Sports Shoes", "Ties", "Belts"]
    sample = table[table.article_type.isin(chosen)].groupby("article_type").head(5)
    assert sample.article_type.nunique() == len(chosen)
    uris = []
    for row in sample.itertuples():
        path = tmp_path / f"{row.item_id}.webp"
        path.write_bytes(row.image_webp)
        uris.append(str(path))

    images = encode_images(uris, encoder, CachePlace(tmp_path / "cache"))

    assert images.present.all()
    vectors = images.vectors.astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    kinds = sample.article_type.to_numpy()
    same = (kinds[similarity.argmax(axis=1)] == kinds).mean()
    assert same > 0.6  # chance: 4 of the 39 others, 0.10


def test_the_classifier_knows_a_solid_picture_from_noise(encoder: ImageEncoder) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (1, 224, 224, 3), dtype=np.uint8)
    pixels = np.concatenate([np.full_like(noise, 20), np.full_like(noise, 24), noise])
    vectors = encoder.encode(pixels).astype(np.float32)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.95 > similarity[0, 2]


def test_missing_and_unreadable_images_are_absent_and_counted(encoder: ImageEncoder, tmp_path: Path) -> None:
    good = save(tmp_path / "good.png", "red")
    torn = tmp_path / "torn.png"
    torn.write_bytes(Path(good).read_bytes()[:60])
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    uris = [None, good, str(tmp_path / "gone.png"), str(torn), "", str(text), f"file://{good}", good, "nosuch://x/y"]
    uris += [save(tmp_path / f"{color}.png", color) for color in ("blue", "green")]

    images = encode_images(uris, encoder, CachePlace(tmp_path / "cache"))

    assert images.present.tolist() == [False, True, False, False, False, False, True, True, False, True, True]
    assert images.vectors.shape == (11, DIMENSION)
    assert not images.vectors[~images.present].any()
    assert set(images.unreadable) == {str(tmp_path / "gone.png"), str(torn), str(text), "nosuch://x/y"}
    assert "FileNotFoundError" in images.unreadable[str(tmp_path / "gone.png")]
    assert "UnidentifiedImageError" in images.unreadable[str(text)]
    assert (images.num_images, images.num_unanswered) == (8, 0)


def test_equal_images_are_encoded_once(encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris = [save(tmp_path / "a.png", "red"), save(tmp_path / "b.png", "blue")]
    first = encode_images(uris, encoder, CachePlace(tmp_path / "cache"))
    assert first.num_cached == 0

    def refuse(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(ImageEncoder, "encode", refuse)
    moved = str(tmp_path / "moved.png")
    Path(uris[0]).rename(moved)
    second = encode_images([moved, uris[1]], encoder, CachePlace(tmp_path / "cache"))
    assert second.num_cached == 2
    np.testing.assert_array_equal(first.vectors, second.vectors)


def test_more_unreadable_images_than_others_are_a_mistake_in_the_data(encoder: ImageEncoder, tmp_path: Path) -> None:
    uris = [save(tmp_path / "good.png", "red"), str(tmp_path / "a.png")]
    assert encode_images(uris, encoder, CachePlace(tmp_path / "cache")).present.tolist() == [True, False]
    with pytest.raises(
        DataError, match=r"images of items, 3 in all: expected at least half .* got 2 .*, e\.g\. .*/a\.png"
    ):
        encode_images([*uris, str(tmp_path / "b.png")], encoder, CachePlace(tmp_path / "cache"))


def test_only_an_image_without_an_answer_is_tried_again(
    encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = Unreadable("TimeoutError", is_answer=False)
    contents: dict[str, bytes | Unreadable] = {
        "a": Path(save(tmp_path / "a.png", "red")).read_bytes(),
        "b": Path(save(tmp_path / "b.png", "blue")).read_bytes(),
        "gone": Unreadable("FileNotFoundError", is_answer=True),
        "silent": silent,
    }
    read: list[str] = []

    def note(uri: str) -> bytes | Unreadable:
        read.append(uri)
        return contents[uri]

    monkeypatch.setattr("components.items.image.read_image_file", note)
    images = encode_images(list(contents), encoder, CachePlace(tmp_path / "cache"))
    assert sorted(read) == ["a", "b", "gone", "silent", "silent"]
    assert (set(images.unreadable), images.num_unanswered) == ({"gone", "silent"}, 1)


def test_an_image_is_tried_twice_and_a_silent_store_said(
    encoder: ImageEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    paths = ["/red.png", "/blue.png"]
    for path in paths:
        fsspec.filesystem("memory").pipe_file(path, Path(save(tmp_path / "x.png", path[1:-4])).read_bytes())
    uris = [f"memory:/{path}" for path in paths]
    silences: dict[str, int] = {}
    open_file = MemoryFileSystem._open

    def open_in_the_end(store: MemoryFileSystem, path: str, *args: Any, **options: Any) -> Any:
        silences[path] -= 1
        if silences[path] >= 0:
            raise TimeoutError("no answer")
        return open_file(store, path, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", open_in_the_end)

    def encode(*times: int) -> ImageVectors:
        silences.update(zip(paths, times, strict=True))
        return encode_images(uris, encoder, CachePlace(tmp_path / "cache"))

    once = encode(1, 0)
    assert once.present.all() and not once.unreadable and once.num_unanswered == 0
    twice = encode(2, 0)
    assert twice.present.tolist() == [False, True]
    assert (twice.unreadable, twice.num_unanswered) == ({uris[0]: "TimeoutError: no answer"}, 1)
    sentence = r"got 2 that cannot, e\.g\. memory://.*; try again once their store answers"
    with pytest.raises(UnavailableError, match=sentence):
        encode(2, 2)
    assert encode(0, 0).present.all()


def test_items_without_images_at_all_are_absent(encoder: ImageEncoder, tmp_path: Path) -> None:
    images = encode_images([None, None], encoder, CachePlace(tmp_path / "cache"))
    assert images.vectors.shape == (2, DIMENSION)
    assert not images.present.any()


def test_a_decompression_bomb_is_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (300, 300)).save(stream, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    bomb = _decode(stream.getvalue())
    assert isinstance(bomb, Unreadable) and bomb.is_answer and "DecompressionBombError" in bomb.reason


def test_a_photo_with_a_note_of_a_wrong_type_is_read_as_it_lies() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.XResolution] = 72.0
    stream = io.BytesIO()
    Image.new("RGB", (24, 48), "black").save(stream, "JPEG", exif=exif)
    order = ">" if b"Exif\0\0MM" in stream.getvalue() else "<"
    rational, text = (struct.pack(f"{order}HH", ExifTags.Base.XResolution, kind) for kind in (5, 2))
    content = stream.getvalue().replace(rational, text)
    assert content != stream.getvalue()
    with Image.open(io.BytesIO(content)) as image, pytest.raises(TypeError):
        ImageOps.exif_transpose(image)  # Pillow's own
    pixels = _decode(content)
    assert isinstance(pixels, np.ndarray)
    assert pixels[112, 2].min() > 245  # tall, as without the note


@pytest.mark.parametrize(
    ("mode", "suffix"), [("RGB", "png"), ("L", "jpg"), ("P", "gif"), ("CMYK", "jpg"), ("1", "png")]
)
def test_every_colour_mode_becomes_rgb_on_white(tmp_path: Path, mode: str, suffix: str) -> None:
    pixels = _decode(Path(save(tmp_path / f"x.{suffix}", "black", mode)).read_bytes())
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (224, 224, 3)
    assert pixels[112, 112].max() < 10  # the picture
    assert pixels[112, 2].min() > 245  # the padding beside a tall picture


def test_sixteen_bits_of_grey_are_not_white() -> None:
    ramp = np.linspace(0, 65535, 256 * 256).astype(np.uint16).reshape(256, 256)
    stream = io.BytesIO()
    Image.fromarray(ramp).save(stream, "PNG")
    pixels = _decode(stream.getvalue())
    assert isinstance(pixels, np.ndarray)
    assert pixels.mean() == pytest.approx(127, abs=2)


def test_whatever_a_decoder_raises_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object) -> None:
        raise RuntimeError("Failed to decode frame 0: Decoding of color planes failed")

    stream = io.BytesIO()
    Image.new("RGB", (20, 20)).save(stream, "AVIF")
    monkeypatch.setattr("PIL.AvifImagePlugin.AvifImageFile.load", break_down)
    broken = _decode(stream.getvalue())
    assert isinstance(broken, Unreadable) and broken.reason.startswith("RuntimeError: Failed to decode")


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(path)
    pixels = _decode(path.read_bytes())
    assert isinstance(pixels, np.ndarray)
    assert (pixels == 255).all()


def test_an_encoder_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"expected 'efficientnet-lite0' or nothing, got 'resnet'"):
        ImageEncoder("resnet", torch.device(DEVICE))
