"""Quality of the text after [LM]: token-level loss, and F1 of the categories in it.

Two rules stand beside the text. They name the categories that the user has most often, and those that are most often
among the first items of the model's own list; how many of them, is chosen on other examples.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jinja2
import numpy as np
import torch

from components.device import to_device
from components.evaluation.metrics import Floats
from components.urm.data.examples import Example
from components.urm.inference import UrmRecaller
from components.urm.training.loss import text_loss

SEPARATOR = ","
MAX_TOKENS = 32  # of a generated text
EXAMPLES_PER_PASS = 8
LISTED_ITEMS = 20  # of a list, whose categories are counted
Progress = Callable[[int], None]
Names = Sequence[Sequence[str]]  # of categories, by example, the likeliest first


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


def score_texts(recaller: UrmRecaller, examples: Sequence[Example], progress: Progress) -> Floats:
    """F1 of the target categories in each example's generated text [E].

    `progress` is called with the number of examples done.
    """
    found = []
    for number, example in enumerate(examples):
        said = named(recaller.generate_text(example.request, MAX_TOKENS))
        found.append(f1(said, named(target_text(example))))
        progress(number + 1)
    return np.array(found)


def usual_names(examples: Sequence[Example]) -> Names:
    """The user's most frequent categories."""
    return [example.request.context.top_categories for example in examples]


def listed_names(recaller: UrmRecaller, examples: Sequence[Example], labels: Mapping[int, str]) -> Names:
    """The most frequent categories among the first items that the model recalls; `labels` are those of the items."""
    lists = recaller.recall([example.request for example in examples], LISTED_ITEMS)[0]
    counts = [Counter(labels[item] for item in items.tolist() if item in labels) for items in lists]
    return [[name for name, _ in of_list.most_common()] for of_list in counts]


def score_names(names: Names, examples: Sequence[Example], number: int) -> Floats:
    """F1 of the target categories in the first names of each example [E]."""
    pairs = zip(names, examples, strict=True)
    return np.array([f1(set(some[:number]), named(target_text(example))) for some, example in pairs])


def choose_number(names: Names, examples: Sequence[Example]) -> int:
    """How many names have the best mean F1; of equals the fewest, and one where there is no example to choose by."""
    most = max((len(some) for some in names), default=0)
    return max(range(1, 1 + max(1, most)), key=lambda number: score_names(names, examples, number).sum())


def target_text(example: Example) -> str:
    """The text that training targets after [LM]."""
    return str(jinja2.Template(example.request.task.text_target).render(categories=list(example.categories)))


def named(text: str) -> set[str]:
    """Comma-separated names in a text."""
    return {part.strip().lower() for part in text.split(SEPARATOR)} - {""}


def f1(said: set[str], wanted: set[str]) -> float:
    """Harmonic mean of precision and recall of exact names; zero without a common name."""
    return 2 * len(said & wanted) / (len(said) + len(wanted)) if said & wanted else 0.0
