from tests.worlds.baseline import *  # noqa: F403  # fixtures
