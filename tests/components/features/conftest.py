from tests.worlds.features import *  # noqa: F403  # fixtures
