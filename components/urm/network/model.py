"""URM: sequence in, set out. Backbone, fusion and heads as one module.

Tensor letters: B contexts · S tokens · E examples · H user vectors · L history items · U distinct items of the batch ·
D hidden width · P width of item space (d where it is low-rank) · G counts of popularity · R ramps of them.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from components.config import UrmConfig
from components.device import full_precision, mixed_precision
from components.exceptions import ConfigError
from components.items.kinds import KINDS
from components.items.ramps import num_ramps, ramp_features
from components.items.table import HISTORY_ROLE
from components.urm.data.batch import Batch, ItemInputs
from components.urm.data.packing import attention_mask
from components.urm.network.backbone import TaskLookup, language_head, token_embeddings
from components.urm.network.fusion import HistoryEmbedding, ItemFusion
from components.urm.network.heads import POPULARITY_RAMPS, POPULARITY_SCALE, HeadInputs, UserHead


@dataclass(frozen=True)
class UrmOutput:
    """Output of one pass."""

    user_vectors: torch.Tensor  # [E, H, P + R], float32
    copy_scores: torch.Tensor  # copy score of each history item [E, L]
    item_vectors: torch.Tensor  # vectors of the batch's items as candidates [U, P + R], float32
    text_logits: torch.Tensor  # at the positions that predict text [M, V]


class PromptStates(NamedTuple):
    """What the backbone makes of the prompts."""

    user: torch.Tensor  # states of the user tokens [E, H, D]
    task: torch.Tensor  # mean state of each block's task text [E, D]
    text: torch.Tensor  # states that predict text [M, D]


class Urm(nn.Module):
    """The universal recommendation model."""

    # The Trainer's name for weights that a checkpoint may lack: the tied output embedding, see state_dict.
    _keys_to_ignore_on_save = ("backbone.lm_head.weight",)

    def __init__(
        self,
        backbone: PreTrainedModel | TaskLookup,
        config: UrmConfig,
        widths: dict[str, int],
        num_counts: int,
        num_behaviors: int,
        *,
        meaning: bool = False,
        names: bool = False,
        id_scores: bool = False,
        popularity_scale: float = POPULARITY_SCALE,
        ramps: int = POPULARITY_RAMPS,
        open_ramps: bool = True,
    ) -> None:
        """Put new modules around a backbone whose vocabulary already has the special tokens, or around a lookup.

        `widths` are those of the frozen modalities by name; `num_counts` is G, the counts of popularity;
        `num_behaviors` counts the behaviours in the training data. With `meaning`, it reads what queries mean,
        with `names` which kinds they name; with `id_scores` it can add what ID vectors alone say.
        `popularity_scale` and `ramps` are those of the user head; with `open_ramps` the last one goes on.
        """
        super().__init__()
        self.backbone: PreTrainedModel | None = None
        self.lookup: TaskLookup | None = None
        if isinstance(backbone, TaskLookup):
            self.lookup = backbone
            hidden_width, scale = backbone.width, 1.0
        else:
            self.backbone = backbone
            embeddings = token_embeddings(backbone).weight.detach()
            hidden_width, scale = embeddings.shape[1], float(embeddings.float().square().mean().sqrt())
        self.fusion = ItemFusion(
            widths,
            fusion_width=config.fusion_dimension,
            token_width=hidden_width,
            item_dimension=config.item_dimension,
        )
        self.fusion.match_scale(scale)
        self.history = HistoryEmbedding(num_behaviors, hidden_width, scale)
        self.user_head = UserHead(
            hidden_width,
            self.fusion.space,
            num_counts,
            config.fusion_dimension,
            item_width=self.fusion.item_width,
            copy_path=config.copy_path,
            meaning=meaning,
            names=names,
            id_scores=id_scores,
            popularity_scale=popularity_scale,
            ramps=ramps,
        )
        self.ramps = ramps
        self.open_ramps = open_ramps
        self.dimension = self.fusion.item_width + num_ramps(num_counts, ramps)

    @property
    def language_model(self) -> PreTrainedModel:
        """The backbone, which texts need.

        Raises:
            ConfigError: The model has none.
        """
        if self.backbone is None:
            raise ConfigError(
                "text",
                expected="a model with a language model",
                got="one trained with `urm.backbone: none`",
                remedy="train with another `urm.backbone`",
            )
        return self.backbone

    def forward(self, batch: Batch) -> UrmOutput:
        """User vectors, item vectors and text logits of a batch (see batches.py).

        Runs in bfloat16 where the device has it, except for item space and the heads, whose inner products rank items.
        """
        with mixed_precision(batch["token_ids"].device.type):
            return self._forward(batch)

    def _forward(self, batch: Batch) -> UrmOutput:
        items = batch["items"]
        fused = self.fusion(items["vectors"], items["present"])  # [U, F]
        with full_precision(fused.device.type):
            candidates, as_history = self.fusion.items(fused, items["vectors"], items["present"])  # [U, P]
        tokens = self._tokens(batch, fused)  # [B, L, D]
        states = self._read_prompts(batch, tokens)
        with full_precision(fused.device.type):
            inputs = HeadInputs(
                hidden=states.user,
                task=states.task,
                rows=batch["block_rows"],
                tokens=tokens,
                habit=self.history.habit(batch["history_counts"], batch["history_days_since"]),
                items=as_history[batch["history_items"]],
                ids=self._frozen_ids(items)[batch["history_items"]],
                kinds=self._count_kinds(batch),
                known=batch["history_known"],
                queries=batch["queries"],
                meanings=batch["meanings"],
                doubts=batch["doubts"],
                named=batch["named"],
                place=self.fusion.place,
            )
            user_vectors, copy_scores = self.user_head(inputs)
        logits = states.text if self.backbone is None else language_head(self.backbone)(states.text)  # [M, V]
        return UrmOutput(user_vectors, copy_scores, self._candidates(candidates, items), logits)

    @torch.no_grad()
    def centre_tasks(self, batch: Batch) -> None:
        """Make the mean state of a batch's task texts the origin of such states; once, before training."""
        self.user_head.task_centre.copy_(self._read_tasks(batch).mean(dim=0))

    @torch.no_grad()
    def begin_with_popularity(self, batch: Batch, tasks: torch.Tensor, weights: torch.Tensor) -> None:
        """Let the user head weigh popularity as each task asks, see training/popularity.py; once, after `centre_tasks`.

        Args:
            batch: Blocks of the tasks.
            tasks: Number of each block's task [E].
            weights: Of the popularity features, by task [T, R].
        """
        self.user_head.begin_with_popularity(self._read_tasks(batch), tasks, weights)

    @torch.no_grad()
    def shift_popularity(self, batch: Batch, tasks: torch.Tensor, weights: torch.Tensor) -> None:
        """Add to what popularity weighs in each task, see training/calibration.py; arguments as above."""
        self.user_head.shift_popularity(self._read_tasks(batch), tasks, weights)

    @torch.no_grad()
    def shift_id_scores(self, batch: Batch, tasks: torch.Tensor, weights: torch.Tensor) -> None:
        """Add to how much ID vectors alone count in each task [T], see training/calibration.py; arguments as above."""
        self.user_head.shift_id_scores(self._read_tasks(batch), tasks, weights)

    def _read_tasks(self, batch: Batch) -> torch.Tensor:
        """Mean state of each block's task text [E, D]."""
        with mixed_precision(batch["token_ids"].device.type):
            fused = self.fusion(batch["items"]["vectors"], batch["items"]["present"])
            return self._read_prompts(batch, self._tokens(batch, fused)).task

    def item_vectors(self, items: ItemInputs) -> torch.Tensor:
        """Candidate vectors [U, P + R] of items alone, in float32."""
        fused = self.fusion(items["vectors"], items["present"])
        return self._candidates(self.fusion.items(fused, items["vectors"], items["present"])[0], items)

    @torch.no_grad()
    def place_ids(self, vectors: torch.Tensor) -> torch.Tensor:
        """Frozen ID vectors of users [n, width of "id"] as parts of user vectors [n, P], see `shift_id_scores`."""
        return self.user_head.log_scale.exp() * self.fusion.place(self.user_head.spread_ids(vectors))

    def _candidates(self, item_space: torch.Tensor, items: ItemInputs) -> torch.Tensor:
        popularity = ramp_features(items["popularity"], self.ramps, bounded=not self.open_ramps)
        return torch.cat([item_space, popularity], dim=-1)

    @staticmethod
    def _frozen_ids(items: ItemInputs) -> torch.Tensor:
        """ID vectors of items in a history [U, width of "id"], zero where absent; of width zero without any."""
        vectors, present = items["vectors"], items["present"]
        name = next((name for name in ("id" + HISTORY_ROLE, "id") if name in vectors), None)
        if name is None:
            return items["popularity"].new_zeros(len(items["popularity"]), 0)
        return vectors[name].float() * present[name][:, None]

    def _tokens(self, batch: Batch, fused: torch.Tensor) -> torch.Tensor:
        """Tokens of the history's items [B, L, D]."""
        tokens: torch.Tensor = self.fusion.tokens(fused)[batch["history_items"]] + self.history(
            batch["history_counts"], batch["history_days_since"], batch["history_behaviors"]
        )
        return tokens

    def _count_kinds(self, batch: Batch) -> torch.Tensor:
        """log(1 + history items of each kind) [B, sum of the widths of KINDS]."""
        vectors, known = batch["items"]["vectors"], batch["history_known"][..., None]
        counts = [
            (vectors[name].float()[batch["history_items"]] * known).sum(dim=1) for name in KINDS if name in vectors
        ]
        return torch.cat([known.new_zeros(len(known), 0, dtype=torch.float32), *counts], dim=-1).log1p()

    def _read_prompts(self, batch: Batch, tokens: torch.Tensor) -> PromptStates:
        if self.lookup is not None:
            prompts = batch["token_ids"].flatten()[batch["task_positions"][:, 0]]
            user, task = self.lookup(prompts)
            return PromptStates(user, task, text=tokens.new_zeros(0, self.lookup.width))
        hidden = self._run_backbone(self.language_model, batch, tokens)  # [B * S, D]
        return PromptStates(
            hidden[batch["user_positions"]], mean_of(hidden, batch["task_positions"]), hidden[batch["lm_positions"]]
        )

    @staticmethod
    def _run_backbone(backbone: PreTrainedModel, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
        embeddings = token_embeddings(backbone)(batch["token_ids"])  # [B, S, D]
        sequence, place = batch["item_positions"]
        embeddings = embeddings.index_put(
            (sequence, place), tokens[sequence, batch["item_columns"]].to(embeddings.dtype)
        )
        output = backbone.base_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask(batch["segments"]),
            position_ids=batch["positions"],
            use_cache=False,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden.flatten(0, 1)

    def tie_weights(self) -> None:
        """Share the embedding with the language head again where the backbone does; the Trainer asks for it."""
        if self.backbone is not None:
            self.backbone.tie_weights()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]  # torch has overloads
        """Weights by name, without a tied output embedding: safetensors refuses shared memory."""
        state: dict[str, torch.Tensor] = super().state_dict(*args, **kwargs)
        if self.backbone is not None and self.backbone.config.tie_word_embeddings:
            head = language_head(self.backbone)
            shared = {name for name, module in self.named_modules() if module is head}
            for name in shared:
                state.pop(f"{name}.weight", None)
        return state


def mean_of(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Mean [E, D] of the rows of hidden [n, D] at positions [E, T]; -1 is padding, and only padding gives zero."""
    valid = positions >= 0
    chosen = hidden[positions.clamp(min=0)].float() * valid[..., None]
    return chosen.sum(dim=1) / valid.sum(dim=1, keepdim=True).clamp(min=1)
