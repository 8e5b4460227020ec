"""What the model reads and is trained on: mappings of tensors, so that the Trainer can move them to a device.

    B contexts (sequences) · S tokens · E blocks (one per example) · H user tokens · T tokens of a block's task text ·
    I item tokens in all · M text labels · L history items · U distinct items · d_m width of modality m ·
    G counts of popularity · Q width of query words · M width of query meanings · A targets · N negatives

Numbers are int64 and vectors float32 unless noted. "Flat position" means an index into B·S.
"""

from typing import TypedDict

from torch import Tensor

WORDS = ("lexical", "category_words")  # the modalities that queries share with items
MEANING = ("text", "category_words", "category")  # those that hold what a query means, see meaning.py


class ItemInputs(TypedDict):
    """Frozen inputs of items."""

    vectors: dict[str, Tensor]  # by modality [U, d_m], zero where absent
    present: dict[str, Tensor]  # by modality, bool [U]
    popularity: Tensor  # log(1 + baskets) [U, G]


class PackedPrompts(TypedDict):
    """Token layout of B contexts and their E blocks; blocks are numbered sequence by sequence."""

    token_ids: Tensor  # [B, S]
    positions: Tensor  # [B, S]
    segments: Tensor  # PREFIX, PADDING or the number of the block plus one [B, S]
    item_positions: Tensor  # (sequence, token) of each item token [2, I]
    item_columns: Tensor  # history item of each item token [I]
    user_positions: Tensor  # flat positions of the user tokens [E, H]
    task_positions: Tensor  # flat positions of the task text, padded with -1 [E, T]
    lm_positions: Tensor  # flat positions of the tokens that predict text [M]
    labels: Tensor  # token that each of them predicts [M]
    block_rows: Tensor  # sequence of each block [E]


class History(TypedDict):
    """History items of each context, newest first."""

    history_items: Tensor  # places among the U items [B, L]
    history_counts: Tensor  # events of each item [B, L]
    history_days_since: Tensor  # days since its last event, float32 [B, L]
    history_behaviors: Tensor  # number of its last event's behaviour, 0 for an unknown one [B, L]
    history_known: Tensor  # false for padding, bool [B, L]


class Batch(PackedPrompts, History):
    """Input of the model."""

    queries: Tensor  # words of query and guidance [E, Q]
    meanings: Tensor  # what query and guidance mean [E, M]; M = 0 in a model without meanings
    doubts: Tensor  # share of the query's words that each part of words lacks, zero without a query [E, len(WORDS)]
    named: Tensor  # 1 at the kinds that the query names, zero without a query [E, sum of the widths of KINDS]
    items: ItemInputs


class Targets(TypedDict):
    """Items that answer the examples."""

    targets: Tensor  # places among the U items [E, A]
    target_mask: Tensor  # false for padding, bool [E, A]


class TrainingBatch(Batch, Targets):
    """Input of the model, and what its outputs are compared with."""

    negatives: Tensor  # places among the U items [N]
    log_expected: Tensor  # log of how often each negative is expected among the N [N]
    accidental: Tensor  # negatives that are targets of the example, bool [E, N]
    recall_share: Tensor  # weight of the recall loss: 1 for a whole batch, see training/shares.py []
    text_share: Tensor  # weight of the text loss, zero without text []
