import numpy as np

from components.items.hashing import GAMMA, mix_bits


def test_the_sequence_of_seed_zero_is_the_published_one() -> None:
    state = np.arange(1, 4, dtype=np.uint64) * GAMMA
    assert mix_bits(state).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
