from tests.worlds.abilities import *  # noqa: F403  # fixtures
