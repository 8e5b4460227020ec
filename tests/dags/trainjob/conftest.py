from tests.worlds.trainer import trainer  # noqa: F401  # fixture
