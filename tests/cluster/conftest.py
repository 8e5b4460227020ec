from tests.cluster.world import *  # noqa: F403  # fixtures
