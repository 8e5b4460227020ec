"""A new URM around a backbone, with its batch builder."""

from collections.abc import Sequence
from dataclasses import dataclass

from components.caches import CachePlace
from components.config import UrmConfig
from components.items.table import ItemTable
from components.urm.data.batches import BatchBuilder, ItemReader, usable_modalities
from components.urm.data.prompt import PromptWriter, add_special_tokens
from components.urm.network.backbone import extend_vocabulary, load_backbone
from components.urm.network.files import ModelDescription
from components.urm.network.model import Urm


@dataclass(frozen=True)
class NewModel:
    """What `build_model` returns."""

    model: Urm  # the model, with new modules untrained
    builder: BatchBuilder  # makes its batches
    description: ModelDescription  # how to build it again


def build_model(config: UrmConfig, table: ItemTable, behaviors: Sequence[str], cache: CachePlace) -> NewModel:
    """Load the backbone, add the special tokens, fusion and heads.

    Modalities that the table lacks are skipped. `behaviors` are those of the training data; `cache` keeps
    packaged backbones as converted.
    """
    backbone, tokenizer = load_backbone(
        config.backbone, num_layers=config.num_layers, pretrained=config.pretrained, cache=cache
    )
    add_special_tokens(tokenizer, config.num_user_vectors)
    extend_vocabulary(backbone, len(tokenizer))
    modalities = usable_modalities(table, config.modalities)
    reader = ItemReader(table, modalities)
    writer = PromptWriter(tokenizer, config)
    return NewModel(
        model=Urm(backbone, config, reader.widths, reader.num_counts, len(behaviors)),
        builder=BatchBuilder(writer, reader, behaviors, config.copy_length),
        description=ModelDescription(
            config=config, widths=reader.widths, num_counts=reader.num_counts, behaviors=tuple(behaviors)
        ),
    )
