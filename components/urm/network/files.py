"""The model on disk: safetensors and JSON, never pickle.

Weights stay memory-mapped: processes that load one model share its pages until one of them trains it.

backbone/          the language model, if there is one, and its tokenizer with the special tokens, as written by
                   transformers
urm.safetensors    the new modules
urm.json           how to build them: configuration, widths of the modalities, behaviours, prompts of a lookup
text_encoder/      the encoder of queries, if the model reads what they mean; it encoded the texts of the items
"""

from pathlib import Path

import pydantic
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from components.config import Model, UrmConfig
from components.exceptions import DataError, MissingInputError
from components.items.text import copy_encoder
from components.urm.data.prompt import PromptWriter, TaskWriter, Writer
from components.urm.network.backbone import TaskLookup, load_pretrained
from components.urm.network.model import Urm

BACKBONE, WEIGHTS, DESCRIPTION, TEXT_ENCODER = "backbone", "urm.safetensors", "urm.json", "text_encoder"
_BACKBONE_PREFIX = "backbone."


class ModelDescription(Model):
    """Content of urm.json."""

    config: UrmConfig  # configuration of the training
    widths: dict[str, int]  # width of each modality
    num_counts: int  # number of popularity counts
    behaviors: tuple[str, ...]  # behaviours in the training data, in the order of their numbers
    prompts: tuple[str, ...] = ()  # templates that a model without a language model knows, in the same order
    meaning: bool = False  # whether it reads what queries mean
    names: bool = False  # whether it reads which kinds queries name
    id_scores: bool = False  # whether it can add what ID vectors alone say
    popularity_scale: float = 1.0  # of the user head, 1 in older models
    ramps: int = 1  # of popularity, for each doubling, 1 in older models
    open_ramps: bool = False  # whether the last of them goes on; older models know no count above 4,095 baskets


def make_lookup(description: ModelDescription) -> TaskLookup:
    """What stands in the place of a language model, with random states."""
    config = description.config
    return TaskLookup(len(description.prompts), config.num_user_vectors, config.fusion_dimension)


def save_model(
    folder: Path, model: Urm, writer: Writer, description: ModelDescription, text_encoder: Path | None = None
) -> None:
    """Write a model to a folder; one that reads what queries mean takes the folder of its encoder along."""
    folder.mkdir(parents=True, exist_ok=True)
    if text_encoder is not None:
        copy_encoder(text_encoder, folder / TEXT_ENCODER)
    if isinstance(writer, PromptWriter):
        model.language_model.save_pretrained(folder / BACKBONE)
        writer.tokenizer.save_pretrained(folder / BACKBONE)
    weights = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(_BACKBONE_PREFIX)
    }
    save_file(weights, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(description.model_dump_json(indent=2) + "\n")


def load_model(folder: Path) -> tuple[Urm, Writer, ModelDescription]:
    """Read a model in float32 on the CPU.

    Raises:
        MissingInputError: A file is missing.
        DataError: A file is damaged, or files do not belong together.
    """
    _require(folder, Path(DESCRIPTION), Path(WEIGHTS))
    try:
        description = ModelDescription.model_validate_json((folder / DESCRIPTION).read_text())
        if description.meaning:
            _require(folder, Path(TEXT_ENCODER) / "config.json")
        backbone, writer = _load_backbone(folder, description)
        model = Urm(
            backbone,
            description.config,
            dict(description.widths),
            description.num_counts,
            len(description.behaviors),
            meaning=description.meaning,
            names=description.names,
            id_scores=description.id_scores,
            popularity_scale=description.popularity_scale,
            ramps=description.ramps,
            open_ramps=description.open_ramps,
        )
        result = model.load_state_dict(load_file(folder / WEIGHTS), strict=False, assign=True)
    except (pydantic.ValidationError, SafetensorError, OSError, RuntimeError) as error:
        raise _damaged(folder, str(error).splitlines()[0]) from error
    missing = [name for name in result.missing_keys if not name.startswith(_BACKBONE_PREFIX)]
    if missing or result.unexpected_keys:
        raise _damaged(folder, f"weights that differ in {', '.join([*missing, *result.unexpected_keys][:3])}")
    return model, writer, description


def _load_backbone(folder: Path, description: ModelDescription) -> tuple[PreTrainedModel | TaskLookup, Writer]:
    config = description.config
    if not config.has_language_model:
        return make_lookup(description), TaskWriter(description.prompts, config.num_user_vectors)
    _require(folder, Path(BACKBONE) / "config.json")
    backbone = load_pretrained(folder / BACKBONE)
    map_weights(backbone, folder / BACKBONE)
    return backbone, PromptWriter(AutoTokenizer.from_pretrained(folder / BACKBONE), config)


def _require(folder: Path, *files: Path) -> None:
    for needed in files:
        if not (folder / needed).is_file():
            raise MissingInputError(
                f"model {folder}", expected=f"file {needed}", got="none", remedy="run `urm sft` again"
            )


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
