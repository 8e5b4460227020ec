import os
from pathlib import Path

import pytest

from components.config import CompleteJourneySource, TableSource
from components.exceptions import DataError
from components.ingestion.files import fingerprint_files


def test_a_changed_or_added_file_changes_the_fingerprint(tmp_path: Path) -> None:
    source = TableSource(events=str(tmp_path / "e*.csv"), items=str(tmp_path / "items.csv"))
    (tmp_path / "e1.csv").write_text("a")
    (tmp_path / "items.csv").write_text("a")
    first = fingerprint_files(source)
    assert fingerprint_files(source) == first
    (tmp_path / "e1.csv").write_text("b")
    os.utime(tmp_path / "e1.csv", (1, 1))
    second = fingerprint_files(source)
    (tmp_path / "e2.csv").write_text("b")
    assert len({first, second, fingerprint_files(source)}) == 3


def test_the_packaged_log_has_none() -> None:
    assert fingerprint_files(CompleteJourneySource()) == ""


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got none"):
        fingerprint_files(TableSource(events=str(tmp_path / "e.csv"), items="i.csv"))
