"""What all tasks have in common is taken off the states of their texts, so that tasks differ from the first step on."""

import torch
from torch.nn.functional import normalize

from components.urm.data.examples import read_examples
from components.urm.training.steps import NegativeSampler, TrainingSteps


def test_centred_states_of_tasks_differ_and_others_would_not(new_model, tables, config):
    tasks = {task.name: task for task in config.tasks}
    groups = read_examples(tables.contexts, tables.examples, tasks, "train")
    sampler = NegativeSampler(tables.catalogue, config.urm.num_negatives, config.urm.negative_power)
    batch = TrainingSteps(groups, new_model.builder, sampler, config)[0]
    seen = []
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
