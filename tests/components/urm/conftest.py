from tests.worlds.urm import *  # noqa: F403  # fixtures
