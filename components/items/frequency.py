"""Negatives: items drawn by their interaction counts."""

import numpy as np
import numpy.typing as npt


class FrequencySampler:
    """Draws items with replacement at probability ∝ count ** power."""

    def __init__(self, counts: npt.NDArray[np.number], num_draws: int, power: float) -> None:
        """Take the interaction count per item [n]; an item with none is never drawn."""
        weights = counts.astype(np.float64) ** power * (counts > 0)
        chance = weights / max(weights.sum(), np.finfo(np.float64).tiny)
        self.num_draws = num_draws
        self._cumulative = np.cumsum(chance)
        with np.errstate(divide="ignore"):  # what is never drawn is never looked up
            self._log_expected = np.log(num_draws * chance)

    def draw(self, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Places of the items drawn [N], and log(N q) of each: the log of how often it is expected among them [N]."""
        places = np.searchsorted(self._cumulative, rng.random(self.num_draws) * self._cumulative[-1], side="right")
        places = np.minimum(places, len(self._cumulative) - 1)
        return places, self._log_expected[places].astype(np.float32)
