from tests.worlds.items import *  # noqa: F403  # fixtures
