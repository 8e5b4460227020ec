"""Quality of the text after [LM]: token-level loss, and F1 of the categories in it."""

from collections.abc import Callable, Sequence

import jinja2
import numpy as np
import torch

from components.device import to_device
from components.urm.data.examples import Example
from components.urm.inference import UrmRecaller
from components.urm.training.loss import text_loss

SEPARATOR = ","
MAX_TOKENS = 32  # of a generated text
EXAMPLES_PER_PASS = 8
Progress = Callable[[int], None]


def measure_loss(recaller: UrmRecaller, examples: Sequence[Example]) -> float:
    """Mean negative log-likelihood per token of the target texts, with teacher forcing."""
    total, tokens = 0.0, 0
    writer = recaller.builder.writer
    device = recaller.model.user_head.log_scale.device
    with torch.inference_mode():
        for start in range(0, len(examples), EXAMPLES_PER_PASS):
            prompts = [
                (
                    example.request.context,
                    [writer.block(example.request.task, example.request.query, example.categories)],
                )
                for example in examples[start : start + EXAMPLES_PER_PASS]
            ]
            batch = to_device(recaller.builder.build(prompts)[0], device)
            labels = batch["labels"]
            total += float(text_loss(recaller.model(batch).text_logits, labels)) * len(labels)
            tokens += len(labels)
    return total / tokens


def measure_f1(recaller: UrmRecaller, examples: Sequence[Example], progress: Progress) -> tuple[float, float]:
    """Mean F1 of the examples' target categories in the generated text, and in the user's most frequent categories.

    `progress` is called with the number of examples done.
    """
    said, rule = [], []
    for number, example in enumerate(examples):
        wanted = named(target_text(example))
        said.append(f1(named(recaller.generate_text(example.request, MAX_TOKENS)), wanted))
        rule.append(f1(set(example.request.context.top_categories), wanted))
        progress(number + 1)
    return float(np.mean(said)), float(np.mean(rule))


def target_text(example: Example) -> str:
    """The text that training targets after [LM]."""
    return str(jinja2.Template(example.request.task.text_target).render(categories=list(example.categories)))


def named(text: str) -> set[str]:
    """Comma-separated names in a text."""
    return {part.strip().lower() for part in text.split(SEPARATOR)} - {""}


def f1(said: set[str], wanted: set[str]) -> float:
    """Harmonic mean of precision and recall of exact names; zero without a common name."""
    return 2 * len(said & wanted) / (len(said) + len(wanted)) if said & wanted else 0.0
