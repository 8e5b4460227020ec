from tests.worlds.recall import *  # noqa: F403  # fixtures
