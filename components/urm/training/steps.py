"""Training data: the batch of every step, a pure function of the seed and the step's number.

Because a step's batch depends on nothing else, a resumed training sees exactly the batches of an uninterrupted one.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from components.config import RunConfig
from components.items.frequency import FrequencySampler
from components.urm.data.batch import Targets, TrainingBatch
from components.urm.data.batches import BatchBuilder
from components.urm.data.examples import Example, Groups
from components.urm.data.prompt import Block
from components.urm.data.request import Ids

MAX_TARGETS = 32  # larger target sets are sampled down to this, to bound the memory of a batch
BUCKET_STEPS = 32
BLOCK_TOKENS = 12  # typical task text, for length bucketing
WITHHELD_SHARE = 0.25  # of the queries: their words are not copied, so that their meaning has to do
TEXT_SHARE = 0.25  # of the contexts, one block of each: text in all blocks would cost a third of a step


class NegativeSampler:
    """Draws catalogue items with replacement at probability ∝ train_events ** power."""

    def __init__(self, catalogue: pa.Table, num_negatives: int, power: float) -> None:
        """Take a table of schema CATALOGUE."""
        self.item_ids: Ids = catalogue["item_id"].to_numpy()
        self._sampler = FrequencySampler(np.maximum(catalogue["train_events"].to_numpy(), 1), num_negatives, power)

    def draw(self, rng: np.random.Generator) -> tuple[Ids, npt.NDArray[np.float32]]:
        """Item ids [N], and log(N q) of each: the log of its expected count among them [N]."""
        places, log_expected = self._sampler.draw(rng)
        return self.item_ids[places], log_expected


class TrainingSteps(Dataset[TrainingBatch]):
    """Item s is the whole batch of step s."""

    def __init__(
        self,
        groups: Groups,
        builder: BatchBuilder,
        sampler: NegativeSampler,
        config: RunConfig,
    ) -> None:
        """Take the training examples grouped by context."""
        self._groups = groups
        self._builder = builder
        self._sampler = sampler
        self._seed = config.seed
        self._size = min(config.urm.contexts_per_batch, len(groups))
        self._epoch = lru_cache(maxsize=2)(self._order)
        self._length = config.urm.max_steps
        self._with_text = config.urm.text_loss_weight > 0
        self._tasks = config.urm.tasks_per_context
        self._rarity = {name: count**-0.5 for name, count in groups.count_tasks().items()}
        block = BLOCK_TOKENS + config.urm.num_user_vectors
        blocks = np.minimum(groups.num_examples, self._tasks)
        self._lengths = np.minimum(groups.history_lengths, config.urm.history_length) + block * blocks

    def __len__(self) -> int:
        """Number of steps."""
        return self._length

    def __getitem__(self, step: int) -> TrainingBatch:
        """The batch of a step: the model's input, targets, negatives."""
        rng = np.random.default_rng([self._seed, step])
        places = self._places(step)
        groups = [
            (context, self._choose(examples, rng)) for context, examples in (self._groups[place] for place in places)
        ]
        prompts = [(context, self._blocks(examples, rng)) for context, examples in groups]
        answers = [_sample(example.targets, rng) for _, examples in groups for example in examples]
        negatives, log_expected = self._sampler.draw(rng)
        batch, where = self._builder.build(prompts, np.concatenate([negatives, *answers]))
        full = [example.targets for _, examples in groups for example in examples]
        return {
            **batch,
            **_place_targets(answers, where[len(negatives) :]),
            "negatives": torch.from_numpy(where[: len(negatives)]),
            "log_expected": torch.from_numpy(log_expected),
            "accidental": torch.from_numpy(np.stack([np.isin(negatives, targets) for targets in full])),
            "recall_share": torch.tensor(1.0),
            "text_share": torch.tensor(1.0 if len(batch["labels"]) else 0.0),
        }

    def _places(self, step: int) -> npt.NDArray[np.int64]:
        """Contexts of a step, of about equal length."""
        epoch, piece = divmod(step, len(self._epoch(0)))
        places: npt.NDArray[np.int64] = self._epoch(epoch)[piece]
        return places

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Contexts of every step of an epoch [steps, size].

        All are shuffled and cut into buckets of BUCKET_STEPS steps; within a bucket, contexts of about the same length
        share a batch, which keeps padding short. The steps are in random order.
        """
        rng = np.random.default_rng([self._seed, epoch, len(self._groups)])
        order = rng.permutation(len(self._groups))[: len(self._groups) // self._size * self._size]
        steps: list[npt.NDArray[np.int64]] = []
        for start in range(0, len(order), BUCKET_STEPS * self._size):
            bucket = order[start : start + BUCKET_STEPS * self._size]
            bucket = bucket[np.argsort(self._lengths[bucket], kind="stable")]
            steps += list(bucket.reshape(-1, self._size))
        return np.stack(steps)[rng.permutation(len(steps))]

    def _choose(self, examples: list[Example], rng: np.random.Generator) -> list[Example]:
        """Some of a context's examples, each with a weight of 1 / √(examples of its task)."""
        if len(examples) <= self._tasks:
            return examples
        weights = np.array([self._rarity[example.request.task.name] for example in examples])
        chosen = rng.choice(len(examples), size=self._tasks, replace=False, p=weights / weights.sum())
        return [examples[place] for place in sorted(chosen)]

    def _blocks(self, examples: Sequence[Example], rng: np.random.Generator) -> list[Block]:
        with_text = self._with_text and rng.random() < TEXT_SHARE
        chosen = int(rng.integers(len(examples))) if with_text else None
        blocks = [
            self._builder.writer.block(
                example.request.task,
                example.request.query,
                example.categories if number == chosen and example.categories else None,
            )
            for number, example in enumerate(examples)
        ]
        if self._builder.meaning is None:
            return blocks
        return [replace(block, words_withheld=bool(block.query) and rng.random() < WITHHELD_SHARE) for block in blocks]


def _sample(targets: Ids, rng: np.random.Generator) -> Ids:
    return targets if len(targets) <= MAX_TARGETS else rng.choice(targets, size=MAX_TARGETS, replace=False)


def _place_targets(answers: Sequence[Ids], where: npt.NDArray[np.int64]) -> Targets:
    """Targets as places among the batch's items, padded."""
    width = max(len(answer) for answer in answers)
    targets = np.zeros((len(answers), width), dtype=np.int64)
    mask = np.zeros((len(answers), width), dtype=bool)
    start = 0
    for row, answer in enumerate(answers):
        targets[row, : len(answer)] = where[start : start + len(answer)]
        mask[row, : len(answer)] = True
        start += len(answer)
    return {"targets": torch.from_numpy(targets), "target_mask": torch.from_numpy(mask)}
