"""h_UM: hidden states of the [UM] tokens become H user vectors, and how H inner products become one score.

    E examples · H user vectors · D hidden width · B contexts · L history items · U distinct items · R ramps
    vector of an item    v = [ item space p (P), one part per modality ; popularity f (R) ]
    user vector          u = [ W h + a ⊙ Σᵢ wᵢ pᵢ + b ⊙ (1 - r) ⊙ q + c ⊙ s + e ⊙ k + d ⊙ j ; weights of popularity ]
    score(user, item)    combine over H of  u_h · v,  plus for history item i the copy score, mean over H of  g·zᵢ

h is the hidden state of the user token, concatenated with the mean of those of the task text, each of length one: the
second half separates the tasks from the first step on, while the attention of new user tokens to the text has to be
learned. The common part of all tasks is subtracted from that mean first, since it dominates.

docs/model.md has each term and its reasons. Departures from the paper, which has W h of the user token alone: the
second half of h, and the copy path. With m the match of the user token and history item i, zᵢ = softplus(mᵢ) scores
that item itself, and w = softmax(m - decay · log place), newest place first, moves the user vector towards similar
items, with one gain per modality; the gains and the decay depend on h. q holds the words of the block's query, in the
parts of item space that consist of words. s is what the query means (data/meaning.py), and r the doubt about its words:
the share of them that a part of words lacks. All gains depend on r beside h, so that meaning and history count where
words fit badly. A model without an encoder of texts has neither s nor r. k is log(1 + history items of each kind): wᵢ
sum to one, so that from pᵢ a category that the user never had looks almost like one that he had once. j is 1 at the
kinds that the query names: q has their words, too, but with them those of kinds of similar names. f is popularity, each
count as ramps of its logarithm, so that its weights are the slopes of a piecewise linear function.
`urm.copy_path: false` leaves W h and popularity.

Training moves item space and weighs the history anew, so that what the frozen ID vectors alone say gets lost. The copy
path can add it again: o · Σᵢ ωᵢ hᵢ, with the frozen ID vectors h of the history and fixed weights ω
(items/id_scores.py). o is zero in training; after it each task gets one, set on validation.

In a low-rank item space (`urm.item_dimension`) W h has its d dimensions, and what is copied is summed side by side and
then mapped as items are: gains per modality and words of a query keep their meaning, up to the map's error.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from components.items.id_scores import history_weights
from components.items.id_vectors import URM_SCALE
from components.items.kinds import KINDS
from components.items.ramps import logarithm_slopes, num_ramps
from components.urm.data.batch import MEANING, WORDS

# Gains at the start, by modality; training moves all of them.
FIRST_SIMILARITY_GAINS = {"id": 1.0, "text": 0.5, **dict.fromkeys(KINDS, 0.0)}
OTHER_SIMILARITY_GAIN = 0.1
FIRST_COPY_GAIN, FIRST_DECAY, FIRST_QUERY_GAIN = 5.0, 1.0, 2.0
FIRST_MEANING_GAIN = 0.8
FIRST_NAME_GAIN = 2.0
DOUBT_SCALE = 10.0  # a step of Adam then moves a gain by hundredths
FIRST_POPULARITY_GAINS = (0.1, 0.1)  # of all baskets and of recent ones; zero for other counts
# A step of Adam would move each slope of popularity by a tenth, in which what a task had learned of it drowns.
POPULARITY_SCALE = 0.05
# Of the largest singular value of the tasks' states; the least of the configurations here is an eighth of the largest.
LEAST_APART = 0.05
POPULARITY_RAMPS = 4  # for each doubling, so that "at most 53" can be said


class Gains(NamedTuple):
    """How much of each source a user vector takes, each [E, H, K]; K is the number of gains of that source."""

    similarity: torch.Tensor  # one per modality
    copy: torch.Tensor  # of the history items themselves
    decay: torch.Tensor  # how fast older items matter less
    query: torch.Tensor  # one per modality of words
    popularity: torch.Tensor  # one per ramp
    meaning: torch.Tensor  # one per modality of meanings
    kinds: torch.Tensor  # one per level of the kinds
    named: torch.Tensor  # the same, of kinds that the query names


class HeadInputs(NamedTuple):
    """What the user head reads."""

    hidden: torch.Tensor  # hidden states of the user tokens [E, H, D]
    task: torch.Tensor  # mean hidden state of each block's task text [E, D]
    rows: torch.Tensor  # context of each example [E]
    tokens: torch.Tensor  # history item tokens [B, L, D]
    habit: torch.Tensor  # how much of a habit each of them is, a prior of the match [B, L]
    items: torch.Tensor  # their vectors side by side [B, L, P]
    ids: torch.Tensor  # their frozen ID vectors, zero where absent [B, L, width of "id"]
    kinds: torch.Tensor  # log(1 + history items of each kind) [B, sum of the widths of KINDS]
    known: torch.Tensor  # which history places hold an item, bool [B, L]
    queries: torch.Tensor  # words of query and guidance, zero without them [E, sum of the widths of WORDS]
    meanings: torch.Tensor  # what query and guidance mean, zero without them [E, sum of the widths of MEANING]
    doubts: torch.Tensor  # share of the query's words that each part of words lacks [E, len(WORDS)]
    named: torch.Tensor  # 1 at the kinds that the query names [E, sum of the widths of KINDS]
    place: Callable[[torch.Tensor], torch.Tensor]  # from vectors side by side to item space


class UserHead(nn.Module):
    """User vectors from hidden states, with the copy path."""

    parts: torch.Tensor
    scales: torch.Tensor
    id_weight: torch.Tensor
    id_bias: torch.Tensor
    kind_columns: torch.Tensor
    kind_levels: torch.Tensor

    def __init__(
        self,
        hidden_width: int,
        widths: Mapping[str, int],
        num_counts: int,
        pointer_width: int,
        *,
        item_width: int | None = None,
        copy_path: bool = True,
        meaning: bool = False,
        names: bool = False,
        id_scores: bool = False,
        popularity_scale: float = POPULARITY_SCALE,
        ramps: int = POPULARITY_RAMPS,
    ) -> None:
        """Start as a model of popularity and, with the copy path, of the user's habits and of similar items.

        `widths` are those of the parts of item space by modality; `pointer_width` is that of the queries and keys of
        the match; `item_width` is d of a low-rank item space. Without `copy_path`, history and query act through the
        backbone only. With `meaning`, it copies what queries mean, too, with `names` the kinds that they name; with
        `id_scores` it can add what ID vectors alone say.
        `popularity_scale` times what the layer of the gains gives are the weights of popularity, which has so many
        `ramps` for each doubling.
        """
        super().__init__()
        self.copy_path = copy_path
        item_width = item_width or sum(widths.values())
        part_of = [number for number, width in enumerate(widths.values()) for _ in range(width)]
        self.register_buffer("parts", torch.tensor(part_of), persistent=False)  # modality of each dimension
        starts = dict(zip(widths, itertools.accumulate(widths.values(), initial=0), strict=False))
        self.words = [slice(starts[name], starts[name] + widths[name]) for name in WORDS if name in widths]
        self.doubted = [place for place, name in enumerate(WORDS) if name in widths]  # column of each part's doubt
        of_meaning = [name for name in MEANING if name in widths] if meaning else []
        self.meanings = [slice(starts[name], starts[name] + widths[name]) for name in of_meaning]
        self.id_scores = id_scores
        self.id_padding = (0, 0)
        if id_scores:  # o as a function of the state of the task text; not trained
            self.id_padding = (starts["id"], sum(widths.values()) - starts["id"] - widths["id"])
            self.register_buffer("id_weight", torch.zeros(hidden_width))
            self.register_buffer("id_bias", torch.zeros(1))
        kinds = [name for name in KINDS if name in widths]
        columns = [column for name in kinds for column in range(starts[name], starts[name] + widths[name])]
        levels = [level for level, name in enumerate(kinds) for _ in range(widths[name])]
        self.register_buffer("kind_columns", torch.tensor(columns, dtype=torch.long), persistent=False)
        self.register_buffer("kind_levels", torch.tensor(levels, dtype=torch.long), persistent=False)
        self.norm = nn.LayerNorm(hidden_width)
        self.task_centre = nn.Parameter(torch.zeros(hidden_width))  # set from data, see Urm.centre_tasks
        self.task_norm = nn.LayerNorm(hidden_width)
        self.project = nn.Linear(2 * hidden_width, item_width)
        self.query = nn.Linear(2 * hidden_width, pointer_width)
        self.key_norm = nn.LayerNorm(hidden_width)
        self.key_hidden = nn.Linear(hidden_width, pointer_width)
        self.key = nn.Linear(pointer_width, pointer_width + 1)  # the last column does not depend on the user token
        # In the order of Gains.
        counts = num_ramps(num_counts, ramps)
        self.names = names
        num_named = len(kinds) if names else 0
        self.gain_groups = (len(widths), 1, 1, len(self.words), counts, len(self.meanings), len(kinds), num_named)
        scales = [popularity_scale if name == "popularity" else 1.0 for name in Gains._fields]
        self.register_buffer(
            "scales", torch.tensor(scales).repeat_interleave(torch.tensor(self.gain_groups)), persistent=False
        )
        self.gains = nn.Linear(2 * hidden_width, sum(self.gain_groups))
        self.doubt: nn.Linear | None = None
        if meaning:
            self.doubt = nn.Linear(len(WORDS), sum(self.gain_groups), bias=False)
            nn.init.zeros_(self.doubt.weight)
        self.log_scale = nn.Parameter(torch.tensor([math.log(URM_SCALE)]))
        # Frozen vectors have a length of about one, and a step of Adam moves W h by a tenth of that, whatever the
        # width. Beside copies W h starts at zero, since its noise would drown them. Alone it starts at a length of one
        # (its input has √2): from zero no gradient reaches the backbone, and the H vectors, all equal, share targets.
        self.project_scale = 1 / math.sqrt(item_width)
        if copy_path:
            nn.init.zeros_(self.project.weight)
        else:
            nn.init.normal_(self.project.weight, std=math.sqrt(0.5))
        nn.init.zeros_(self.project.bias)
        nn.init.normal_(self.query.weight, std=0.5)
        nn.init.normal_(self.key.weight, std=0.5)
        nn.init.zeros_(self.key.bias)
        nn.init.zeros_(self.gains.weight)
        with torch.no_grad():
            similar = [FIRST_SIMILARITY_GAINS.get(name, OTHER_SIMILARITY_GAIN) for name in widths]
            others = [FIRST_COPY_GAIN, FIRST_DECAY, *[FIRST_QUERY_GAIN] * len(self.words)]
            first = [*FIRST_POPULARITY_GAINS, *[0.0] * num_counts][:num_counts]
            popularity = (logarithm_slopes(first, ramps) / popularity_scale).tolist()
            meanings = [FIRST_MEANING_GAIN] * len(self.meanings)
            kind_gains = [0.0] * len(kinds) + [FIRST_NAME_GAIN] * num_named
            self.gains.bias.copy_(torch.tensor([*similar, *others, *popularity, *meanings, *kind_gains]))

    def gain_rows(self, name: str) -> slice:
        """Outputs of the layer of the gains that are those of a source."""
        place = Gains._fields.index(name)
        first = sum(self.gain_groups[:place])
        return slice(first, first + self.gain_groups[place])

    @torch.no_grad()
    def begin_with_popularity(self, states: torch.Tensor, tasks: torch.Tensor, weights: torch.Tensor) -> None:
        """Make the popularity weights those given wherever the task text is one of these, whatever the user tokens.

        Args: as of `shift_popularity`.
        """
        rows = self.gain_rows("popularity")
        self.gains.bias[rows] = 0
        self.gains.weight[rows, states.shape[-1] :] = 0
        self.shift_popularity(states, tasks, weights)

    @torch.no_grad()
    def shift_popularity(self, states: torch.Tensor, tasks: torch.Tensor, weights: torch.Tensor) -> None:
        """Add to the popularity weights wherever the task text is one of these, whatever the user tokens.

        Args:
            states: Mean hidden states of task texts [E, D].
            tasks: Number of the task of each [E].
            weights: Of the popularity features, by task [T, R].
        """
        rows = self.gain_rows("popularity")
        bias, by_state = self._spread(states, tasks, weights / self.scales[rows])
        self.gains.bias[rows] += bias
        self.gains.weight[rows, states.shape[-1] :] += by_state.T

    @torch.no_grad()
    def shift_id_scores(self, states: torch.Tensor, tasks: torch.Tensor, weights: torch.Tensor) -> None:
        """Add to o, the weight of what ID vectors alone say, by task [T]; arguments as above."""
        bias, by_state = self._spread(states, tasks, weights[:, None])
        self.id_bias += bias
        self.id_weight += by_state[:, 0]

    def _spread(
        self, states: torch.Tensor, tasks: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bias [K] and matrix [D, K] of what has these values [T, K] wherever the task text is one of these.

        What is linear in the state of the task text: the smallest matrix that leads from the mean state of each task to
        its values does it, and a text between two tasks gets values between theirs. Tasks whose texts hardly differ to
        the model get the mean of their values: what would tell them apart is noise.
        """
        asked = self._read_task(states)
        of_task = functional.one_hot(tasks, len(values)).float()
        means = of_task.T @ asked / of_task.sum(dim=0)[:, None]  # [T, D]
        mean = values.mean(dim=0)
        return mean, torch.linalg.pinv(means, rtol=LEAST_APART) @ (values - mean)

    def _read_task(self, states: torch.Tensor) -> torch.Tensor:
        """States of task texts [E, D] as the gains read them, of length one."""
        task: torch.Tensor = self.task_norm(states.float() - self.task_centre)
        return task / math.sqrt(states.shape[-1])

    def forward(self, inputs: HeadInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """User vectors [E, H, P + R], and the copy scores of the history items [E, L]."""
        rows, known = inputs.rows, inputs.known
        # Inputs of length one: a step of Adam then moves an output by hundredths, whatever the width.
        own, asked = self.norm(inputs.hidden.float()), self._read_task(inputs.task)
        unit = torch.cat([own / math.sqrt(own.shape[-1]), asked[:, None].expand_as(own)], dim=-1)
        weights = self.scales * self.gains(unit)
        if self.doubt is not None:
            weights = weights + self.doubt(DOUBT_SCALE * inputs.doubts)[:, None]
        gains = Gains(*weights.split(self.gain_groups, dim=-1))
        direction = self.project(unit) * self.project_scale
        copy_scores = unit.new_zeros(len(rows), known.shape[1])
        if self.copy_path:
            keys, base_match = self._keys(inputs.tokens.float())
            match = torch.einsum("ehk,elk->ehl", self.query(unit), keys[rows]) / math.sqrt(keys.shape[-1])
            match = match + (base_match + inputs.habit)[rows, None]
            masked = match.masked_fill(~known[rows, None], -1e4)
            copy_scores = (gains.copy * functional.softplus(masked)).mean(dim=1)
            copies = self._copies(gains, masked, inputs)
            if self.id_scores:
                copies = copies + self._copy_ids(asked, inputs)[:, None]
            direction = direction + inputs.place(copies)
        return torch.cat([self.log_scale.exp() * direction, gains.popularity], dim=-1), copy_scores

    def _copies(self, gains: Gains, match: torch.Tensor, inputs: HeadInputs) -> torch.Tensor:
        """Contribution of history and query to the user vectors, side by side [E, H, P]; match is [E, H, L]."""
        places = torch.arange(1, match.shape[-1] + 1, device=match.device).log()
        # The product only matters where no place is known: a softmax over padding alone would sum to one.
        attention = torch.softmax(match - gains.decay * places, dim=-1) * inputs.known[inputs.rows, None]
        copies = gains.similarity[..., self.parts] * _sum_history(attention, inputs.items, inputs.rows)
        query = gains.query
        if self.doubt is not None:
            query = query * (1 - inputs.doubts[:, None, self.doubted])
        copies = copies + _place_parts(query, inputs.queries, self.words, copies.shape[-1])
        copies = copies + _place_parts(gains.meaning, inputs.meanings, self.meanings, copies.shape[-1])
        of_kinds = gains.kinds[..., self.kind_levels] * inputs.kinds[inputs.rows, None]
        if self.names:
            of_kinds = of_kinds + gains.named[..., self.kind_levels] * inputs.named[:, None]
        return copies.index_add(-1, self.kind_columns, of_kinds)

    def _copy_ids(self, asked: torch.Tensor, inputs: HeadInputs) -> torch.Tensor:
        """What ID vectors alone say of users, side by side [E, P], for states of task texts as the gains read them."""
        of_user = torch.einsum("bl,bld->bd", history_weights(inputs.known), inputs.ids)
        weights = asked @ self.id_weight + self.id_bias
        return self.spread_ids(weights[:, None] * of_user[inputs.rows])

    def spread_ids(self, vectors: torch.Tensor) -> torch.Tensor:
        """ID vectors [n, width of "id"] at their place side by side [n, P]; only of a head with `id_scores`."""
        return functional.pad(vectors, self.id_padding)

    def _keys(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, L, pointer width] and weights [B, L] of history items."""
        hidden = functional.gelu(self.key_hidden(self.key_norm(tokens)))
        keys = self.key(hidden / math.sqrt(hidden.shape[-1]))
        return keys[..., :-1], keys[..., -1]


def _place_parts(gains: torch.Tensor, vectors: torch.Tensor, parts: Sequence[slice], width: int) -> torch.Tensor:
    """Parts of vectors [E, sum of their widths] by gains [E, H, number of parts], at their places [E, H, width]."""
    pieces = torch.split(vectors, [part.stop - part.start for part in parts], dim=-1)
    placed = gains.new_zeros(*gains.shape[:2], width)
    for number, (part, piece) in enumerate(zip(parts, pieces, strict=True)):
        placed = placed + functional.pad(gains[..., number, None] * piece[:, None], (part.start, width - part.stop))
    return placed


def _sum_history(weights: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Sums [E, H, d] of the values [B, L, d] of each example's context by weights [E, H, L].

    Groups the weights by context instead of copying the values of a context for each example.
    """
    mine = functional.one_hot(rows, len(values))  # [E, B]
    place = (mine.cumsum(dim=0) - 1).gather(1, rows[:, None])[:, 0]  # of the example among those of its context
    by_context = weights.new_zeros(len(values), int(mine.sum(dim=0).max()), *weights.shape[1:])
    by_context = by_context.index_put((rows, place), weights)  # [B, most examples, H, L]
    sums: torch.Tensor = torch.einsum("bmhl,bld->bmhd", by_context, values)
    return sums[rows, place]


def spread_copy_scores(copy_scores: torch.Tensor, places: torch.Tensor, num_items: int) -> torch.Tensor:
    """Copy scores by item [E, U], zero outside the history, from those by history place and the items there [E, L]."""
    return copy_scores.new_zeros(len(copy_scores), num_items).scatter_add(1, places, copy_scores)
