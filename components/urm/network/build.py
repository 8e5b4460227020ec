"""A new URM around a backbone, with its batch builder."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from components.caches import CachePlace
from components.config import UrmConfig
from components.items.table import ItemTable
from components.urm.data.batches import BatchBuilder, ItemReader, usable_modalities
from components.urm.data.meaning import QueryMeaning
from components.urm.data.prompt import PromptWriter, TaskWriter, Writer, add_special_tokens
from components.urm.network.backbone import TaskLookup, extend_vocabulary, load_backbone
from components.urm.network.files import ModelDescription, make_lookup
from components.urm.network.heads import POPULARITY_RAMPS, POPULARITY_SCALE
from components.urm.network.model import Urm


@dataclass(frozen=True)
class NewModel:
    """What `build_model` returns."""

    model: Urm  # the model, with new modules untrained
    builder: BatchBuilder  # makes its batches
    description: ModelDescription  # how to build it again


def build_model(
    config: UrmConfig,
    table: ItemTable,
    behaviors: Sequence[str],
    cache: CachePlace,
    prompts: Sequence[str] = (),
    text_encoder: str = "",
) -> NewModel:
    """Load the backbone, add the special tokens, fusion and heads.

    Modalities that the table lacks are skipped. `behaviors` are those of the training data; `cache` keeps
    packaged backbones as converted; `prompts` are the templates that a model without a language model knows. With
    `text_encoder`, that of the items' texts, the model reads what queries mean.
    """
    reader = ItemReader(table, usable_modalities(table, config.modalities))
    reads_meaning = bool(text_encoder) and config.copy_path and "text" in reader.widths
    meaning = QueryMeaning(text_encoder, table, reader.modalities) if reads_meaning else None
    reads_names = config.copy_path and any(name in table.names for name in reader.modalities)
    has_id_scores = config.copy_path and "id" in reader.widths
    description = ModelDescription(
        config=config,
        widths=reader.widths,
        num_counts=reader.num_counts,
        behaviors=tuple(behaviors),
        prompts=() if config.has_language_model else tuple(dict.fromkeys(prompts)),
        meaning=reads_meaning,
        names=reads_names,
        id_scores=has_id_scores,
        popularity_scale=POPULARITY_SCALE,
        ramps=POPULARITY_RAMPS,
        open_ramps=True,
    )
    backbone: PreTrainedModel | TaskLookup
    writer: Writer
    if config.has_language_model:
        backbone, tokenizer = load_backbone(
            config.backbone, num_layers=config.num_layers, pretrained=config.pretrained, cache=cache
        )
        num_old = len(tokenizer)
        add_special_tokens(tokenizer, config.num_user_vectors)
        extend_vocabulary(backbone, num_old, len(tokenizer))
        writer = PromptWriter(tokenizer, config)
    else:
        backbone, writer = make_lookup(description), TaskWriter(description.prompts, config.num_user_vectors)
    return NewModel(
        model=Urm(
            backbone,
            config,
            reader.widths,
            reader.num_counts,
            len(behaviors),
            meaning=reads_meaning,
            names=reads_names,
            id_scores=has_id_scores,
        ),
        builder=BatchBuilder(writer, reader, behaviors, config.copy_length, meaning),
        description=description,
    )
