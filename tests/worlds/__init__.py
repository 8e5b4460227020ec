"""Small worlds that tests share: logs, item tables, models, releases and servers, with their fixtures."""

from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
PUBLIC_DATA = REPOSITORY.parent / "shared" / "data"  # real data sets; tests of them are skipped where it is absent
