"""Does it help to align item tokens with titles before SFT?

    python -m benchmarks.alignment --config amazon_beauty --set urm.num_layers=30 --output alignment.json

needs the stages up to encode. Two models are trained on the same batches as `urm sft` trains one: the second is aligned
first. Both are asked the same validation examples; test examples are never read. Intervals draw validation contexts,
which are users where each has one.

Aligned means: with the backbone frozen, the new modules learn from the items alone, of which a tenth is held out,

    item → title   [LM] writes the title of an item whose token is the whole history (mean negative log-likelihood)
    title → item   the user vectors of a prompt that is a title find the item among those of the batch and others drawn
                   at random (cross-entropy), by W h alone: nothing is copied, and popularity says nothing

The second is learned without `urm.copy_path` only: beside copies W h begins at zero, since its noise would drown them.

A model that is trained stays in a folder beside the output, so that a benchmark that was stopped goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import torch
from torch.nn.functional import cross_entropy

from benchmarks.bench import find_run, parse_run, report, write_figures
from benchmarks.tuning import name_data
from components.caches import CachePlace
from components.config import RunConfig, Task
from components.device import full_precision, prepare_device, to_device
from components.exceptions import DataError
from components.items.table import ItemTable
from components.memory import keep_freed_memory
from components.settings import get_settings
from components.studies.ablation.summary import compare_tasks
from components.studies.finished import FinishedRun, hide_progress_bars
from components.urm.data.batch import Batch
from components.urm.data.batches import BatchBuilder
from components.urm.data.examples import TRAINING_OUTPUTS, Groups, read_groups
from components.urm.data.request import Ids, UserContext
from components.urm.network.model import Urm, UrmOutput
from components.urm.retrieval.users import Combine, combine_scores
from components.urm.training.checkpoints import Checkpoints
from components.urm.training.loss import text_loss
from components.urm.training.schedule import Budget
from components.urm.training.session import Session, prepare
from components.urm.training.train import MAX_GRADIENT_NORM

ITEMS_PER_STEP = 32
NEGATIVES = 256  # further candidates of title → item
TITLE_WORDS = 12  # of long titles the first ones
HELD_OUT, MOST_HELD_OUT = 0.1, 500  # share of the items, and how many of these are asked at most
K = 10
RATE = 3e-3  # of AdamW in the alignment, at its peak
LEARNED = ("fusion.", "user_head.project.", "user_head.norm.")  # of the names of weights
NAMING = Task(name="item_to_title", description="", prompt="Its name:", text_target="{{ categories[0] }}")
FINDING = Task(name="title_to_item", description="", prompt="{{ query }}")
ALIGNED, PLAIN = "aligned", "plain"


@dataclass(frozen=True)
class Titles:
    """Items with their titles, in an order drawn at random: the held-out ones first."""

    item_ids: Ids  # [n]
    titles: Sequence[str]  # [n]
    num_held_out: int

    @classmethod
    def read(cls, items: Path, item_ids: Ids, seed: int) -> Titles:
        """Of these items, those that have a title."""
        table = pq.read_table(items, columns=["item_id", "title"]).to_pandas()
        table = table[table["item_id"].isin(item_ids) & (table["title"].fillna("") != "")].sort_values("item_id")
        order = np.random.default_rng(seed).permutation(len(table))
        titles = [" ".join(title.split()[:TITLE_WORDS]) for title in table["title"].iloc[order]]
        return cls(table["item_id"].to_numpy()[order], titles, round(HELD_OUT * len(table)))

    @property
    def asked(self) -> range:
        """Places of the held-out items that are asked."""
        return range(min(self.num_held_out, MOST_HELD_OUT))

    def steps(self, num_steps: int, seed: int) -> Iterator[Ids]:
        """Places of the other items, ITEMS_PER_STEP for each step; each item once before any comes again."""
        rng, left = np.random.default_rng(seed), np.empty(0, np.int64)
        num_others = len(self.item_ids) - self.num_held_out
        size = min(ITEMS_PER_STEP, num_others)
        for _ in range(num_steps):
            if len(left) < size:
                left = np.concatenate([left, self.num_held_out + rng.permutation(num_others)])
            yield left[:size]
            left = left[size:]


def context_of(items: Sequence[int], behavior: str) -> UserContext:
    """A user whose whole history are these items, all of today."""
    size = len(items)
    return UserContext(
        item_ids=np.array(items, dtype=np.int64),
        counts=np.ones(size, dtype=np.int64),
        days_since=np.ones(size, dtype=np.float32),
        behaviors=[behavior] * size,
        num_events=size,
        num_items=size,
        num_active_days=min(size, 1),
        days_since_last=1.0,
    )


@dataclass(frozen=True)
class Alignment:
    """A model with the titles that it learns."""

    model: Urm
    builder: BatchBuilder
    titles: Titles
    combine: Combine
    finds: bool  # whether it learns title → item, too

    def naming(self, places: Sequence[int], tokens_of: Sequence[int] | None = None) -> Batch:
        """Prompts of items with their titles; `tokens_of` are the places of the items whose tokens are shown."""
        behavior = next(iter(self.builder.behaviors))
        prompts = [
            (
                context_of([self.titles.item_ids[shown]], behavior),
                [self.builder.writer.block(NAMING, None, [self.titles.titles[place]])],
            )
            for place, shown in zip(places, tokens_of or places, strict=True)
        ]
        return self.builder.build(prompts)[0]

    def finding(self, places: Sequence[int], candidates: Ids) -> tuple[Batch, Ids]:
        """Prompts of titles, and the places of the candidates among the items of the batch."""
        nothing = context_of([], "")
        blocks = [self.builder.writer.block(FINDING, self.titles.titles[place]) for place in places]
        # Without its query nothing of the block is copied: the title acts through the backbone alone.
        return self.builder.build([(nothing, [replace(block, query="")]) for block in blocks], candidates)

    def scores(self, output: UrmOutput, candidates: torch.Tensor) -> torch.Tensor:
        """Scores [E, C] of candidate vectors [C, P + R] by the part of item space that is not popularity."""
        width = self.model.fusion.item_width
        with full_precision(candidates.device.type):
            products = torch.einsum("ehd,cd->ech", output.user_vectors[..., :width], candidates[:, :width])
            return combine_scores(products, self.combine)

    def learn(self, num_steps: int, seed: int) -> None:
        """Train the new modules for some steps, the backbone frozen."""
        device = self.model.user_head.log_scale.device
        learned = [weight for name, weight in self.model.named_parameters() if name.startswith(LEARNED)]
        before = {weight: weight.requires_grad for weight in self.model.parameters()}
        for weight in self.model.parameters():
            weight.requires_grad_(any(weight is one for one in learned))
        optimizer = torch.optim.AdamW(learned, lr=RATE)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Budget(num_steps, math.inf).rate)  # as of the training
        rng = np.random.default_rng([seed, num_steps])
        for step, places in enumerate(self.titles.steps(num_steps, seed), start=1):
            batch = to_device(self.naming(places.tolist()), device)
            naming = text_loss(self.model(batch).text_logits, batch["labels"])
            naming.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            losses = {"naming": float(naming.detach())}
            if self.finds:
                drawn = rng.choice(self.titles.item_ids[self.titles.num_held_out :], NEGATIVES)
                own = self.titles.item_ids[places]
                batch, where = self.finding(places.tolist(), np.concatenate([own, np.setdiff1d(drawn, own)]))
                output = self.model(to_device(batch, device))
                found = self.scores(output, output.item_vectors[torch.from_numpy(where).to(device)])
                finding = cross_entropy(found, torch.arange(len(places), device=device))
                finding.backward()  # type: ignore[no-untyped-call]  # as above
                losses["finding"] = float(finding.detach())
            torch.nn.utils.clip_grad_norm_(learned, MAX_GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if step % 10 == 0:
                report("aligning", step=step, **{name: round(loss, 3) for name, loss in losses.items()})
        for weight, trained in before.items():
            weight.requires_grad_(trained)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """What the model knows of held-out items.

        Returns:
            Nats per token of their titles with their own token and with that of another one, and Recall@10 of title →
            item among all items.
        """
        device = self.model.user_head.log_scale.device
        self.model.eval()
        asked = list(self.titles.asked)
        others = asked[1:] + asked[:1]
        sums, hits, tokens = np.zeros(2), 0, 0
        vectors = torch.cat([
            self.model.item_vectors(to_device(self.builder.reader.read(part), device))
            for part in np.array_split(self.titles.item_ids, max(1, len(self.titles.item_ids) // 1024))
        ])  # fmt: skip
        for start in range(0, len(asked), ITEMS_PER_STEP):
            places, shown = asked[start : start + ITEMS_PER_STEP], others[start : start + ITEMS_PER_STEP]
            for column, tokens_of in enumerate((places, shown)):
                batch = to_device(self.naming(places, tokens_of), device)
                sums[column] += float(text_loss(self.model(batch).text_logits, batch["labels"])) * len(batch["labels"])
            tokens += len(batch["labels"])
            output = self.model(to_device(self.finding(places, np.empty(0, np.int64))[0], device))
            best = self.scores(output, vectors).topk(min(K, len(vectors))).indices.cpu()
            hits += int((best == torch.tensor(places)[:, None]).sum())
        self.model.train()
        own, other = (sums / tokens).tolist()
        return {"own_token": own, "other_token": other, f"found_at_{K}": hits / len(asked)}


def align(session: Session, titles: Titles, num_steps: int) -> dict[str, dict[str, float]]:
    """Align a new model in place; what it knows of held-out items before and after."""
    config, new = session.config, session.new
    alignment = Alignment(new.model, new.builder, titles, config.urm.combine, finds=not config.urm.copy_path)
    before = alignment.measure()
    report("before", **{name: round(value, 4) for name, value in before.items()})
    alignment.learn(num_steps, config.seed)
    after = alignment.measure()
    report("after", **{name: round(value, 4) for name, value in after.items()})
    return {"before": before, "after": after}


@dataclass(frozen=True)
class Inputs:
    """What the models are trained on."""

    table: ItemTable
    training_table: ItemTable
    catalogue: Path
    items: Path
    training: Groups
    validation: Groups

    @classmethod
    def read(cls, config: RunConfig, run: FinishedRun, folder: Path) -> Inputs:
        """Outputs of a run; what is mapped lies in `folder`."""
        chosen = TRAINING_OUTPUTS[config.urm.train_cuts]
        contexts, trained, examples = (run.path("features", name) for name in ("contexts", chosen.examples, "examples"))
        folder.mkdir(parents=True, exist_ok=True)
        return cls(
            table=ItemTable.open(run.path("encode", "item_table")),
            training_table=ItemTable.open(run.path("encode", chosen.item_table)),
            catalogue=run.path("features", "catalogue"),
            items=run.path("validate", "items"),
            training=read_groups(contexts, trained, config, "train", folder),
            validation=read_groups(contexts, examples, config, "validation", folder),
        )


def train_one(
    config: RunConfig, run: FinishedRun, inputs: Inputs, folder: Path, num_steps: int
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A model trained as by `urm sft`, aligned for some steps first.

    Returns:
        Its recall on the validation examples of the sample that a training measures, columns seed, example_id, user_id
        (the number of the context), task, recall; and the figures of the alignment and the training.
    """
    device = prepare_device(run.settings)
    torch.manual_seed(config.seed)
    catalogue = pq.read_table(inputs.catalogue)
    session = prepare(
        config,
        inputs.table,
        inputs.training_table,
        catalogue,
        inputs.training,
        inputs.validation,
        cache=CachePlace.of(run.settings),
        device=device,
    )
    session.new.model.to(device)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints, held_out = Checkpoints(folder), folder / "held_out.json"
    if num_steps and checkpoints.restore() is None:  # a checkpoint is of a model that is aligned
        titles = Titles.read(inputs.items, catalogue["item_id"].to_numpy(), config.seed)
        write_figures(held_out, align(session, titles, num_steps))
    summary = session.train(
        checkpoints, lambda step, metrics: report("training", step=step, loss=round(metrics.get("loss", 0.0), 3))
    )
    validation = session.validation
    found, _ = validation.recall(session.new.model, validation.k)
    owners = {id(one.request.context): number for number, one in enumerate(validation.examples)}
    rows = [
        {
            "seed": config.seed,
            "example_id": number,
            "user_id": owners[id(example.request.context)],
            "task": example.request.task.name,
            "recall": _share(example.targets, items, validation.k),
        }
        for number, (example, items) in enumerate(zip(validation.examples, found, strict=True))
    ]
    figures: dict[str, Any] = {"steps": summary.steps, "seconds": summary.seconds}
    if num_steps:
        figures["held_out"] = json.loads(held_out.read_text())
    return pd.DataFrame(rows), figures


def _share(targets: Ids, items: Ids, k: int) -> float:
    return float(np.isin(targets, items).sum() / min(len(targets), k))


def require_same(folder: Path, about: dict[str, Any]) -> None:
    """Note what the models of a folder are trained by.

    Raises:
        DataError: They are others'.
    """
    note = folder / "about.json"
    if not note.exists():
        write_figures(note, about)
    elif json.loads(note.read_text()) != about:
        raise DataError(
            f"folder {folder}",
            expected="models of these settings and data",
            got="others",
            remedy="name another --output, or remove the folder",
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train both, print and write."""
    parser = parse_run(__doc__)
    parser.add_argument("--steps", type=int, default=340, help="Of the alignment, of 32 items each")
    options, settings = parser.parse_args(arguments), get_settings()
    keep_freed_memory()  # as the sft stage does
    hide_progress_bars()
    config, run = find_run(options, settings)
    folder = options.output.with_suffix("")
    about = {"steps": options.steps, "urm": config.urm.model_dump(mode="json"), **name_data(run, config)}
    require_same(folder, about)
    inputs = Inputs.read(config, run, folder)
    recalls: dict[str, pd.DataFrame] = {}
    figures: dict[str, Any] = {"config": config.name, "k": config.evaluation.k} | about
    for name, num_steps in ((PLAIN, 0), (ALIGNED, options.steps)):
        recalls[name], figures[name] = train_one(config, run, inputs, folder / name, num_steps)
        figures[name]["recall"] = compare_tasks(recalls[name], recalls[PLAIN], config.seed)
    for task, found in figures[ALIGNED]["recall"].items():
        before = figures[PLAIN]["recall"][task]["recall"]
        print(
            f"{task}: {before:.3f}, aligned {found['recall']:.3f},",
            f"{found['difference']:+.4f} ({found['low']:+.4f} … {found['high']:+.4f})",
            flush=True,
        )
    write_figures(options.output, figures)


if __name__ == "__main__":
    main()
