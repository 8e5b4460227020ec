from tests.worlds.validation import *  # noqa: F403  # fixtures
