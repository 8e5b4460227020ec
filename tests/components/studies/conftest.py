from tests.worlds.finished import *  # noqa: F403  # fixtures
