from tests.worlds.features import *  # noqa: F403  # fixtures
from tests.worlds.recall import redis_server

__all__ = ["redis_server"]  # fixture
