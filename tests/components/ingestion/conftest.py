from tests.worlds.ingestion import *  # noqa: F403  # fixtures
