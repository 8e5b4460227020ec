"""What may depend on what: measured on a whole model by gradients, which are exactly zero where the mask is.

And what all tasks have in common is taken off the states of their texts, so that they differ from the first step on.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from components.urm.network.backbone import token_embeddings
from tests.worlds.urm import build_batch


@pytest.fixture
def batch(groups, new_model):
    """Two contexts with three blocks each, every block with a text."""
    return build_batch(new_model, groups[:2])


@pytest.fixture
def run(new_model, batch):
    """One pass in full precision; returns the output and the gradient [B * S] of a sum of it at every token."""
    seen = []
    embedding = token_embeddings(new_model.model.backbone)

    def keep(module, inputs, output):
        seen.append(output.requires_grad_())
        output.retain_grad()

    hook = embedding.register_forward_hook(keep)
    output = new_model.model._forward(batch)
    hook.remove()

    def influence(value):
        (gradient,) = torch.autograd.grad(value.sum(), seen, retain_graph=True)
        return gradient.abs().sum(dim=-1).flatten()

    return output, influence


def places(batch, block):
    """Flat places of the tokens of a block: its task text, its user tokens, and what follows them."""
    sequence = int(batch["block_rows"][block])
    number = int((batch["block_rows"][:block] == sequence).sum()) + 1
    length = batch["token_ids"].shape[1]
    own = torch.zeros_like(batch["segments"], dtype=torch.bool)
    own[sequence] = batch["segments"][sequence] == number
    flat = own.flatten().nonzero().flatten()
    users = batch["user_positions"][block]
    return sequence * length, flat[flat < users[0]], users, flat[flat > users[-1]]


@pytest.mark.parametrize("block", range(6))
def test_user_vectors_depend_on_prefix_and_task_text_of_their_block_alone(run, batch, block):
    output, influence = run
    start, task, users, after = places(batch, block)
    felt = influence(output.user_vectors[block]) + influence(output.copy_scores[block])
    sees = torch.zeros_like(felt, dtype=torch.bool)
    prefix = int((batch["segments"][batch["block_rows"][block]] == 0).sum())
    sees[start : start + prefix] = True
    sees[task] = sees[users] = True
    assert felt[~sees].sum() == 0  # [LM], texts, other blocks, other contexts, padding
    assert len(after) > 1
    profile = sees.clone()
    profile[batch["item_positions"][0] * batch["token_ids"].shape[1] + batch["item_positions"][1]] = False
    assert (felt[profile] > 0).all()  # [ITEM] alone carries no embedding of its own: the fused item stands there


@pytest.mark.parametrize("block", range(6))
def test_text_depends_on_its_own_block_and_no_other(run, batch, block):
    output, influence = run
    labels = [len(after) for _, _, _, after in (places(batch, number) for number in range(6))]
    first = sum(labels[:block])
    felt = influence(output.text_logits[first : first + labels[block]])
    for other in range(6):
        _, task, users, after = places(batch, other)
        inside = torch.cat([task, users, after])
        if other == block:
            assert (felt[inside] > 0).all()
        else:
            assert felt[inside].sum() == 0


def test_the_heads_are_independent(new_model, run):
    """Neither loss trains the other's head: user vectors cannot change the text, nor the text's head user vectors."""
    output, _ = run
    head = list(new_model.model.user_head.parameters())
    gradients = torch.autograd.grad(output.text_logits.sum(), head, retain_graph=True, allow_unused=True)
    assert gradients == (None,) * len(head)


def test_one_forward_pass_gives_all_user_vectors_of_all_blocks(new_model, batch):
    counts = {"layer": 0, "head": 0}

    def count(name):
        def hook(*_):
            counts[name] += 1

        return hook

    model = new_model.model
    model.backbone.base_model.layers[0].register_forward_hook(count("layer"))
    model.user_head.register_forward_hook(count("head"))
    vectors = model(batch).user_vectors
    assert vectors.shape == (6, 3, model.dimension)
    assert counts == {"layer": 1, "head": 1}


def test_centred_states_of_tasks_differ_and_others_would_not(new_model, steps):
    batch, seen = steps[0], []
    new_model.model.user_head.task_norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        new_model.model(batch)
        new_model.model.centre_tasks(batch)
        new_model.model(batch)
    before, after = seen
    torch.testing.assert_close(after.mean(dim=0), torch.zeros(after.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(before - after, new_model.model.user_head.task_centre.expand_as(before))

    def likeness(states: torch.Tensor) -> float:
        """Mean cosine of the states of three tasks, those of a context coming in their order."""
        means = normalize(states.unflatten(0, (-1, 3)).mean(dim=0), dim=-1)
        return float((means @ means.T)[torch.triu(torch.ones(3, 3), 1) > 0].mean())

    assert likeness(after) < likeness(before) - 0.3


def test_kinds_are_counted_over_the_items_of_each_history(groups, new_model):
    batch = build_batch(new_model, groups[:5])
    counted = new_model.model._count_kinds(batch)
    lengths = []
    for row, (context, _) in zip(counted, groups[:5], strict=True):
        items = new_model.builder.known_items(context)
        vectors, _ = new_model.builder.reader.table.gather("category_0", items)
        torch.testing.assert_close(row, torch.from_numpy(vectors).float().sum(dim=0).log1p())
        lengths.append(len(items))
    assert len(set(lengths)) > 1  # so that some are padded, and padding counts for nothing


def test_a_query_names_kinds_by_all_its_words_and_not_where_they_are_withheld(config, new_model):
    writer, reader = new_model.builder.writer, new_model.builder.reader
    task = config.task("text_query")
    asked = [writer.block(task, query) for query in ("Bread!", "bread milk", "breads", "?")]
    asked += [replace(asked[0], words_withheld=True), writer.block(config.task("next_purchase"), None)]
    assert new_model.model.user_head.names
    assert reader.read_named(asked).tolist() == [[0, 1, 0], *[[0, 0, 0]] * 5]
