"""The model on disk: safetensors and JSON, never pickle.

Weights stay memory-mapped: processes that load one model share its pages until one of them trains it.

backbone/          the language model and its tokenizer with the special tokens, as transformers writes them
urm.safetensors    the new modules
urm.json           how to build them: configuration, widths of the modalities, behaviours
"""

from pathlib import Path

import pydantic
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from components.config import Model, UrmConfig
from components.exceptions import DataError, MissingInputError
from components.urm.data.prompt import PromptWriter
from components.urm.network.backbone import load_pretrained
from components.urm.network.model import Urm

BACKBONE, WEIGHTS, DESCRIPTION = "backbone", "urm.safetensors", "urm.json"
_BACKBONE_PREFIX = "backbone."


class ModelDescription(Model):
    """Content of urm.json."""

    config: UrmConfig  # configuration of the training
    widths: dict[str, int]  # width of each modality
    num_counts: int  # number of popularity counts
    behaviors: tuple[str, ...]  # behaviours in the training data, in the order of their numbers


def save_model(folder: Path, model: Urm, writer: PromptWriter, description: ModelDescription) -> None:
    """Write a model to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.backbone.save_pretrained(folder / BACKBONE)
    writer.tokenizer.save_pretrained(folder / BACKBONE)
    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(_BACKBONE_PREFIX)
    }
    save_file(weights, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(description.model_dump_json(indent=2) + "\n")


def load_model(folder: Path) -> tuple[Urm, PromptWriter, ModelDescription]:
    """Read a model in float32 on the CPU.

    Raises:
        MissingInputError: A file is missing.
        DataError: A file is damaged, or files do not belong together.
    """
    for needed in (Path(BACKBONE) / "config.json", Path(WEIGHTS), Path(DESCRIPTION)):
        if not (folder / needed).is_file():
            raise MissingInputError(
                f"model {folder}", expected=f"file {needed}", got="none", remedy="run `urm sft` again"
            )
    try:
        description = ModelDescription.model_validate_json((folder / DESCRIPTION).read_text())
        backbone = load_pretrained(folder / BACKBONE)
        config = description.config
        model = Urm(backbone, config, dict(description.widths), description.num_counts, len(description.behaviors))
        map_weights(backbone, folder / BACKBONE)
        result = model.load_state_dict(load_file(folder / WEIGHTS), strict=False, assign=True)
    except (pydantic.ValidationError, SafetensorError, OSError, RuntimeError) as error:
        raise _damaged(folder, str(error).splitlines()[0]) from error
    missing = [name for name in result.missing_keys if not name.startswith(_BACKBONE_PREFIX)]
    if missing or result.unexpected_keys:
        raise _damaged(folder, f"weights that differ in {', '.join([*missing, *result.unexpected_keys][:3])}")
    tokenizer = AutoTokenizer.from_pretrained(folder / BACKBONE)
    return model, PromptWriter(tokenizer, config), description


def map_weights(backbone: PreTrainedModel, folder: Path) -> None:
    """Replace the copies that transformers made by the mapped file, except where a cast was needed."""
    state = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    own = backbone.state_dict()
    same = {name: tensor for name, tensor in state.items() if name in own and tensor.dtype == own[name].dtype}
    backbone.load_state_dict(same, strict=False, assign=True)
    backbone.tie_weights()


def _damaged(folder: Path, got: str) -> DataError:
    return DataError(
        f"model {folder}",
        expected="the files of one training, written by this version",
        got=got,
        remedy="run `urm sft` again",
    )
