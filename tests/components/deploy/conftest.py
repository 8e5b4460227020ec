from tests.worlds.cluster import *  # noqa: F403  # fixtures
from tests.worlds.recall import *  # noqa: F403  # fixtures
