"""What a run is: frozen Pydantic models read from configs/*.yaml and configs/tasks/*.yaml.

Light on purpose: DAG files import this package.
"""

from components.config.load import load_config, load_document, load_named_config
from components.config.model import NAME, Model
from components.config.run import RunConfig
from components.config.sections import (
    EVERY_TASK,
    BaselineConfig,
    EvaluationConfig,
    FeaturesConfig,
    GatePolicy,
    ItemFilter,
    ItemsConfig,
    RecallConfig,
    ReleaseConfig,
    SasRecConfig,
    UrmConfig,
    ValidationConfig,
)
from components.config.sources import CompleteJourneySource, SequenceSource, Source, TableSource
from components.config.split import MAX_TRAIN_CUTS, RECENT_WINDOWS, SEQUENCE_LAST_DAY, SPLITS, Split, SplitConfig
from components.config.tasks import TargetFilter, Task
