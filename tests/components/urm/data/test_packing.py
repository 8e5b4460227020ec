import dataclasses

import numpy as np
import torch

from components.urm.data.packing import PREFIX, PromptParts, attention_mask, pack
from components.urm.data.prompt import Prefix
from components.urm.network.model import mean_of
from components.urm.training.loss import text_loss


def test_mask_is_causal_and_blocks_see_the_prefix_and_themselves_only():
    mask = attention_mask(torch.tensor([[PREFIX, PREFIX, 1, 1, 2, -1]]))[0, 0]
    expected = ["100000", "110000", "111000", "111100", "110010", "110001"]
    assert ["".join(map(str, row)) for row in mask.int().tolist()] == expected


def test_layout_of_one_sequence(new_model, config):
    writer = new_model.builder.writer
    block = writer.block(config.tasks[0], None, ["milk"])
    prefix = Prefix((*writer._tokenise("ab"), writer.item_id, writer.item_id), ((2, 0), (3, 1)))
    packed = pack([PromptParts(prefix, [block, block])], writer)
    size = len(block.prompt) + len(writer.user_ids) + 1 + len(block.text) - 1
    assert packed["token_ids"].shape == (1, 4 + 2 * size)
    assert packed["token_ids"][0, 2:4].tolist() == [writer.item_id] * 2
    assert packed["positions"][0].tolist() == [0, 1, 2, 3, *range(4, 4 + size), *range(4, 4 + size)]
    assert packed["token_ids"].flatten()[packed["user_positions"]].tolist() == [list(writer.user_ids)] * 2
    assert packed["labels"].tolist() == list(block.text) * 2
    assert packed["token_ids"].flatten()[packed["lm_positions"][0]] == writer.lm_id
    assert packed["labels"][len(block.text) - 1] == writer.end_id


def test_packed_blocks_equal_one_block_at_a_time(new_model, groups):
    writer, builder = new_model.builder.writer, new_model.builder
    prompts = [
        (context, [writer.block(e.request.task, e.request.query, e.categories) for e in examples])
        for context, examples in groups[:3]
    ]
    together = new_model.model._forward(builder.build(prompts)[0])
    alone = [new_model.model._forward(builder.build([(c, [b])])[0]) for c, blocks in prompts for b in blocks]
    torch.testing.assert_close(together.user_vectors, torch.cat([o.user_vectors for o in alone]), atol=1e-4, rtol=1e-4)
    labels = builder.build(prompts)[0]["labels"]
    one_by_one = torch.cat([o.text_logits for o in alone])
    torch.testing.assert_close(
        text_loss(together.text_logits, labels), text_loss(one_by_one, labels), atol=1e-4, rtol=1e-4
    )


def test_text_after_lm_cannot_change_user_vectors(new_model, groups):
    writer, builder = new_model.builder.writer, new_model.builder
    context, examples = groups[0]
    request = examples[0].request

    def vectors(categories):
        block = writer.block(request.task, request.query, categories)
        return new_model.model._forward(builder.build([(context, [block])])[0]).user_vectors

    silent = vectors(None)
    torch.testing.assert_close(vectors(["milk"]), silent, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vectors(["bread", "something else entirely"]), silent, atol=1e-5, rtol=1e-5)


def test_history_and_task_do_change_user_vectors(new_model, groups):
    writer, builder = new_model.builder.writer, new_model.builder
    context, examples = groups[0]
    block = writer.block(examples[0].request.task, None)
    other_block = writer.block(examples[1].request.task, None)
    newest = {"item_ids": [1059], "counts": [1], "days_since": np.array([0.1], np.float32)}
    longer = {name: np.r_[first, getattr(context, name)] for name, first in newest.items()}
    more = dataclasses.replace(context, **longer, behaviors=["purchase", *context.behaviors])

    def vectors(context, block):
        return new_model.model._forward(builder.build([(context, [block])])[0]).user_vectors

    base = vectors(context, block)
    assert not torch.allclose(vectors(more, block), base, atol=1e-4)
    assert not torch.allclose(vectors(context, other_block), base, atol=1e-4)


def test_the_user_vectors_of_a_block_differ_from_one_another(new_model, groups):
    block = new_model.builder.writer.block(groups[0][1][0].request.task, None)
    vectors = new_model.model._forward(new_model.builder.build([(groups[0][0], [block])])[0]).user_vectors[0]
    assert torch.pdist(vectors.detach()).min() > 1e-3


def test_mean_of_takes_the_named_rows_only():
    hidden = torch.arange(12.0).reshape(4, 3)
    positions = torch.tensor([[0, 2], [3, -1], [-1, -1]])
    expected = [[3.0, 4.0, 5.0], [9.0, 10.0, 11.0], [0.0, 0.0, 0.0]]
    assert mean_of(hidden, positions).tolist() == expected
