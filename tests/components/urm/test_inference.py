import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from components.exceptions import DataError, MissingInputError
from components.urm.data.request import RecallRequest, UserContext, read_contexts
from components.urm.inference import UrmRecaller
from components.urm.network.files import save_model
from tests.worlds import DEVICE
from tests.worlds.mapped import mapped_file


def assert_alike(some, others, tolerance):
    """User vectors that are equal but for rounding."""
    np.testing.assert_allclose(some.vectors, others.vectors, rtol=0, atol=tolerance)
    assert [items.tolist() for items in some.copy_items] == [items.tolist() for items in others.copy_items]
    for mine, theirs in zip(some.copy_scores, others.copy_scores, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)


@pytest.fixture
def saved(new_model, tables, tmp_path):
    model_dir, candidates = tmp_path / "model", tmp_path / "candidates"
    save_model(model_dir, new_model.model, new_model.builder.writer, new_model.description)
    candidates.mkdir()
    recaller = UrmRecaller(new_model.model, new_model.builder, "max")
    np.save(candidates / "keys.npy", tables.item_ids)
    np.save(candidates / "vectors.npy", recaller.encode_items(tables.item_ids))
    return model_dir, candidates


@pytest.fixture
def recaller(saved, table_dir):
    return UrmRecaller.load(saved[0], table_dir, saved[1], DEVICE)


@pytest.fixture
def requests(tables, config):
    contexts = list(read_contexts(tables.contexts).values())[:6]
    return [RecallRequest(c, t, "milk" if t.needs_query else None) for c in contexts for t in config.tasks]


def test_a_loaded_model_gives_the_vectors_of_the_saved_one(new_model, recaller, requests):
    original = UrmRecaller(new_model.model, new_model.builder, "max")
    tolerance = 1e-5 if DEVICE == "cpu" else 0.02  # a GPU has bfloat16, the CPU may not
    assert_alike(recaller.encode_users(requests), original.encode_users(requests), tolerance)
    assert recaller.num_user_vectors == 3
    assert recaller.num_candidates == 60


def test_no_file_of_a_model_is_pickle(saved):
    suffixes = {path.suffix for path in saved[0].rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja"}


def test_order_and_company_of_requests_do_not_matter(recaller, requests, tables):
    users = recaller.encode_users(requests)
    assert users.vectors.shape == (18, 3, recaller.dimension)
    assert {part.dtype for part in (users.vectors, *users.copy_scores)} == {np.dtype(np.float32)}
    assert [len(items) for items in users.copy_items] == [len(scores) for scores in users.copy_scores]
    known = [items.tolist() for items in users.copy_items]
    assert known == [[item for item in r.context.item_ids.tolist() if item in tables.item_ids][:8] for r in requests]
    assert sum(map(len, known)) > 18
    shuffled = np.random.default_rng(0).permutation(len(requests))
    again = recaller.encode_users([requests[i] for i in shuffled])
    assert_alike(again, users.select(shuffled), 0.02)
    assert_alike(recaller.encode_users([requests[7]]), users.select([7]), 0.02)


@pytest.fixture
def varied(tables, config):
    """Contexts of many history lengths, an empty one among them, each asked all tasks, two of them with queries."""
    contexts = [*read_contexts(tables.contexts).values()][:6]
    first, history = contexts[0], ("item_ids", "counts", "days_since", "behaviors")
    shortened = [dataclasses.replace(first, **{name: getattr(first, name)[:n] for name in history}) for n in (0, 1, 2)]
    queries = {"text_query": ("milk", "fresh bread of the day")}
    return [
        RecallRequest(context, task, query)
        for context in [*shortened, *contexts]
        for task in config.tasks
        for query in queries.get(task.name, (None,))
    ]


@pytest.mark.parametrize(("precise", "tolerance"), [(True, 2e-5), (False, 0.02)])
def test_tasks_that_share_a_prefix_get_what_each_gets_alone(recaller, varied, monkeypatch, precise, tolerance):
    if precise:
        monkeypatch.setattr("components.device.has_bfloat16", lambda _: False)
    together = recaller.encode_users(varied)
    assert np.abs(together.vectors).max() > 50 * tolerance
    for row, request in enumerate(varied):
        assert_alike(together.select([row]), recaller.encode_users([request]), tolerance)


def test_a_prefix_runs_once_for_all_of_its_tasks(recaller, varied):
    shapes = []
    layer = recaller.model.backbone.base_model.layers[0]
    hook = layer.register_forward_hook(lambda _, inputs, __: shapes.append(tuple(inputs[0].shape[:2])))
    requests = varied[-4:]
    recaller.encode_users(requests)
    for request in requests:
        recaller.encode_users([request])
    hook.remove()
    writer, context = recaller.builder.writer, requests[0].context
    prefix = len(writer.prefix(context, range(len(context.item_ids))).token_ids)
    blocks = [len(writer.block(r.task, r.query).prompt) + len(writer.user_ids) + 1 for r in requests]
    assert shapes == [(1, prefix + sum(blocks)), *((1, prefix + block) for block in blocks)]


def test_weights_stay_in_their_files_and_training_does_not_reach_them(saved, table_dir):
    files = {path: path.read_bytes() for path in saved[0].rglob("*.safetensors")}
    model = UrmRecaller.load(saved[0], table_dir).model
    for parameter in model.parameters():
        assert mapped_file(parameter.data_ptr()) in map(str, files)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert all(path.read_bytes() == content for path, content in files.items())


def test_scores_are_the_best_inner_products_over_the_catalogue(recaller, requests, saved):
    users = recaller.encode_users(requests[:4])
    items, scores = recaller.top_k(users, 5)
    keys, candidates = np.load(saved[1] / "keys.npy"), np.load(saved[1] / "vectors.npy")
    products = np.einsum("nhd,md->nmh", users.vectors.astype(np.float64), candidates).max(axis=-1)
    for row in range(4):
        products[row, np.searchsorted(keys, users.copy_items[row])] += users.copy_scores[row]
    for row in range(4):
        assert set(items[row]) == set(keys[np.argsort(-products[row])[:5]])
        np.testing.assert_allclose(scores[row], np.sort(products[row])[::-1][:5], rtol=1e-5)


def test_exclude_bought_leaves_out_the_history(recaller, requests):
    items, _ = recaller.recall(requests, 60)
    for request, found in zip(requests, items, strict=True):
        bought = set(request.context.item_ids.tolist())
        assert (not bought & set(found.tolist())) == request.task.exclude_bought
        assert len(found) == (60 - len(bought) if request.task.exclude_bought else 60)


def test_a_user_without_history_and_one_of_unknown_items_get_the_same_answer(recaller, config):
    empty = UserContext(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32), [], 0, 0, 0, 0.0)
    unknown = dataclasses.replace(
        empty, item_ids=np.array([5]), counts=np.array([1]), days_since=np.array([1.0], np.float32), behaviors=["click"]
    )
    users = recaller.encode_users([RecallRequest(empty, config.tasks[0]), RecallRequest(unknown, config.tasks[0])])
    assert users.finite.all()
    np.testing.assert_allclose(users.vectors[0], users.vectors[1], atol=1e-4)
    assert [len(items) for items in users.copy_items] == [0, 0]


def test_no_requests_give_no_vectors(recaller):
    assert recaller.encode_users([]).vectors.shape == (0, 3, recaller.dimension)


def test_threads_share_a_recaller(recaller, requests):
    expected = recaller.encode_users(requests)
    with ThreadPoolExecutor(4) as pool:
        for users in pool.map(lambda _: recaller.encode_users(requests), range(8)):
            np.testing.assert_array_equal(users.vectors, expected.vectors)
            np.testing.assert_array_equal(np.concatenate(users.copy_scores), np.concatenate(expected.copy_scores))


def test_generated_text_is_greedy_and_bounded(recaller, requests):
    text = recaller.generate_text(requests[0], max_tokens=5)
    assert text == recaller.generate_text(requests[0], max_tokens=5)
    assert len(text) <= 5


def test_a_query_task_without_query_is_refused(requests, config):
    with pytest.raises(DataError, match="task 'text_query': expected a query text, got None"):
        RecallRequest(requests[0].context, config.task("text_query"))


def test_recall_without_candidates_says_what_to_pass(saved, table_dir, requests):
    with pytest.raises(MissingInputError, match="pass `candidates`"):
        UrmRecaller.load(saved[0], table_dir).recall(requests[:1], 3)


def test_missing_and_damaged_files_are_named(saved, table_dir, tmp_path):
    with pytest.raises(MissingInputError, match=r"expected file urm\.json"):
        UrmRecaller.load(tmp_path / "nowhere", table_dir)
    broken = tmp_path / "broken"
    shutil.copytree(saved[0], broken)
    (broken / "backbone" / "config.json").unlink()
    with pytest.raises(MissingInputError, match=r"expected file backbone/config\.json"):
        UrmRecaller.load(broken, table_dir)
    shutil.copytree(saved[0], broken, dirs_exist_ok=True)
    (broken / "urm.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(DataError, match="files of one training"):
        UrmRecaller.load(broken, table_dir)


def test_the_item_table_of_another_run_is_refused(saved, tables, tmp_path):
    from components.items.table import write_item_table

    write_item_table(tmp_path / "other", tables.item_ids, {"text": (np.ones((60, 3)), np.ones(60, bool))})
    with pytest.raises(DataError, match="use the model and the item table of one run"):
        UrmRecaller.load(saved[0], tmp_path / "other")
