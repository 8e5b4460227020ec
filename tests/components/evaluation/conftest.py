from tests.worlds.evaluation import *  # noqa: F403  # fixtures
