"""The device and the threads that the settings ask for."""

from collections.abc import Iterator

import faiss
import pytest
import torch

from components.device import choose_device, has_bfloat16, prepare_device, set_threads
from components.exceptions import ConfigError
from components.settings import Settings


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Leave the process as it was."""
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


def test_threads_of_torch_and_faiss_are_set_together(monkeypatch: pytest.MonkeyPatch) -> None:
    set_threads(Settings(num_threads=3))
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (3, 3)
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # for joblib as the limit of a container is
    set_threads(Settings(num_threads=0))
    assert (torch.get_num_threads(), faiss.omp_get_max_threads()) == (1, 1)


def test_cpu_is_taken_where_it_is_asked_for() -> None:
    assert prepare_device(Settings(device="cpu", num_threads=2)) == "cpu"
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_cuda_auto_is_the_cpu_and_a_demand_is_refused() -> None:
    assert choose_device(Settings(device="auto")) == "cpu"
    with pytest.raises(ConfigError, match="URM_DEVICE: expected a CUDA device, got none on this machine; use an image"):
        choose_device(Settings(device="cuda"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_with_cuda_auto_takes_it() -> None:
    assert choose_device(Settings(device="auto")) == choose_device(Settings(device="cuda")) == "cuda"


def test_bfloat16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (({"avx2": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert has_bfloat16("cpu") is expected
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not has_bfloat16("cuda"), "as of a T4, which emulates it"
