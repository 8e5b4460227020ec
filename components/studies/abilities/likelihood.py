"""Likelihood of plain text under a causal language model: perplexity, and multiple-choice questions."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from components.caches import CachePlace
from components.config import Model
from components.device import choose_device, has_bfloat16
from components.exceptions import DataError
from components.settings import Settings
from components.urm.network.backbone import count_layers, load_backbone

COMMENT = "#"
_TEXTS_PER_BATCH = 64


class Question(Model):
    """A question with its choices, the right one first."""

    question: str
    choices: tuple[str, ...] = Field(min_length=2)


class Questions(Model):
    """Content of configs/language/questions.yaml."""

    questions: tuple[Question, ...] = Field(min_length=1)


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @torch.inference_mode()
    def log_likelihoods(self, prompt: str, text: str) -> torch.Tensor:
        """Log-likelihood of each token of a text after a prompt [tokens of the text], natural logarithm.

        Without a prompt the first token of the text has no prediction and is left out.
        """
        self.model.train(False)
        head = self._ids(prompt)
        ids = torch.tensor([head + self._ids(text)], device=self.model.device)
        logits = self.model(input_ids=ids).logits[0, :-1].float()
        scores = -functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        return scores[max(len(head) - 1, 0) :]

    @torch.inference_mode()
    def continuations(self, prompt: str, texts: Sequence[str]) -> list[torch.Tensor]:
        """`log_likelihoods` of each of several texts after the same prompt, which is read once."""
        self.model.train(False)
        head = self.model(input_ids=torch.tensor([self._ids(prompt)], device=self.model.device), use_cache=True)
        first = head.logits[0, -1].float().log_softmax(dim=-1)
        rows = [torch.tensor(self._ids(text), device=self.model.device) for text in texts]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))  # next to nothing is padding
        found: dict[int, torch.Tensor] = {}
        for start in range(0, len(order), _TEXTS_PER_BATCH):
            places = order[start : start + _TEXTS_PER_BATCH]
            batch = pad_sequence([rows[place] for place in places], batch_first=True)
            scores = first[batch[:, :1]]
            if batch.shape[1] > 1:
                cache = copy.deepcopy(head.cache)
                cache.batch_repeat_interleave(len(places))
                logits = self.model(input_ids=batch[:, :-1], cache=cache).logits.float()
                rest = -functional.cross_entropy(logits.mT, batch[:, 1:], reduction="none")
                scores = torch.cat([scores, rest], dim=1)
            found |= {place: row[: len(rows[place])] for place, row in zip(places, scores, strict=True)}
        return [found[place] for place in range(len(rows))]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def open_language_model(settings: Settings, name: str, seed: int | None = None) -> LanguageModel:
    """A backbone at full depth: pretrained, or with random weights of a seed."""
    cache, device = CachePlace.of(settings), choose_device(settings)
    torch.manual_seed(seed or 0)
    model, tokenizer = load_backbone(name, num_layers=count_layers(name, cache), pretrained=seed is None, cache=cache)
    torch.nn.Module.to(model, device, torch.bfloat16 if has_bfloat16(device) else torch.float32)
    return LanguageModel(model, tokenizer)


def read_passages(path: Path) -> list[str]:
    """Passages of a text file, separated by blank lines; lines that begin with # are left out.

    Raises:
        DataError: There is no passage.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith(COMMENT)]
    passages = [" ".join(passage.split()) for passage in "\n".join(lines).split("\n\n")]
    passages = [passage for passage in passages if passage]
    if not passages:
        raise DataError(f"text {path}", expected="at least one passage", got="none", remedy="write some plain text")
    return passages


def perplexity(model: LanguageModel, passages: Sequence[str]) -> float:
    """Exp of the mean negative log-likelihood per token, each passage read on its own."""
    scores = torch.cat([model.log_likelihoods("", passage) for passage in passages])
    return math.exp(-float(scores.mean()))


def accuracy(model: LanguageModel, questions: Sequence[Question]) -> float:
    """Share of the questions whose first choice has the highest mean log-likelihood per token."""
    right = 0
    for question in questions:
        prompt = f"Question: {question.question}\nAnswer:" if question.question.endswith("?") else question.question
        scores = [float(model.log_likelihoods(prompt, f" {choice}").mean()) for choice in question.choices]
        right += all(scores[0] > other for other in scores[1:])
    return right / len(questions)


def chance(questions: Sequence[Question]) -> float:
    """Accuracy of guessing."""
    return sum(1 / len(question.choices) for question in questions) / len(questions)
