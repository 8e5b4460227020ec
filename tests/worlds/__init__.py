"""Small worlds that tests share: logs, item tables, models, releases and servers, with their fixtures."""

from pathlib import Path

from components.settings import Settings

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
PUBLIC_DATA = REPOSITORY.parent / "shared" / "data"  # real data sets; tests of them are skipped where it is absent


def make_settings(home: Path, redis_url: str = "redis://127.0.0.1:1/0") -> Settings:
    """Settings with all state under a folder, for one core; without an address there is no Redis."""
    repository = REPOSITORY / "feature_repo"
    return Settings(home=home, feature_repo_dir=repository, redis_url=redis_url, device="cpu", num_threads=1)
