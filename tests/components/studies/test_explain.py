import io

import numpy as np
import pytest
from rich.console import Console

from components.exceptions import ConfigError, DataError, MissingInputError
from components.studies.explain import explain_user, pick_task
from components.studies.finished import FinishedRun
from tests.worlds.tables import put
from tests.worlds.tiny import known_items, make_feature_store


@pytest.fixture
def run(finished, settings, tmp_path):
    run_dir, _ = finished
    if not (run_dir / "feature_store").exists():
        make_feature_store(run_dir / "feature_store", settings)
    folder = run_dir.parent.parent / "files"
    files = {name: folder / f"{name}.parquet" for name in ("catalogue", "contexts", "examples")}
    put(run_dir, "features", files | {"feature_store": run_dir / "feature_store"})
    return FinishedRun(str(run_dir), settings)


def show(run, config, user, task, **options):
    given = {"query": None, "guidance": None, "k": 5} | options
    output = io.StringIO()
    Console(file=output, width=160).print(explain_user(run, config, user, config.task(task), **given))
    return output.getvalue()


def test_history_text_and_every_user_vector_are_shown(run, finished):
    text = show(run, finished[1], "3", "next_purchase")
    assert "User 3 of complete_journey" in text
    for item in known_items(3):
        assert f"Item {item}" in text
    assert "What the model says after [LM]:" in text
    for number in range(3):
        assert f"UM {number}" in text
    assert "UM 3" not in text
    assert "shop > [fruit]" in text  # signs of rich's markup are printed as they are


def test_the_recall_shown_is_that_of_the_recaller(run, finished):
    from components.urm.data.request import RecallRequest

    request = RecallRequest(run.newest_context("3"), finished[1].task("new_item"))
    best = run.recaller().recall([request], 1)[0][0][0]
    recall = show(run, finished[1], "3", "new_item", k=1).split("Recall, best 1")[1].split("Nearest items")[0]
    assert f"Item {best}" in recall
    assert "*" not in recall  # new_item leaves out what the user had


def test_guidance_reaches_the_model(run, finished):
    plain, guided = (show(run, finished[1], "3", "next_purchase", guidance=text, k=20) for text in (None, "For a pet."))
    assert 'Guidance: "For a pet."' in guided
    assert plain.split("Recall, best")[1] != guided.split("Recall, best")[1]


def test_ages_count_to_the_newest_event(run):
    context = run.newest_context("3")
    np.testing.assert_allclose(context.days_since, np.arange(5) / 24, atol=1e-3)
    assert context.days_since_last == 0


def test_an_unknown_user_is_told_from_known_ones(run, finished):
    with pytest.raises(DataError, match=r"user 'nobody': expected a user with events, e\.g\. u0, .*check the id"):
        show(run, finished[1], "nobody", "next_purchase")


def test_a_query_task_without_words(run, finished):
    with pytest.raises(DataError, match="expected a query text"):
        show(run, finished[1], "3", "text_query")


def test_a_run_without_sft(finished, settings, tmp_path):
    with pytest.raises(MissingInputError, match=r"run .*: expected the result of stage 'sft', got none; run `urm sft`"):
        FinishedRun(str(tmp_path / "empty"), settings).recaller()


def test_the_first_task_without_a_query_is_the_default(finished):
    config = finished[1]
    assert pick_task(config, None).name == "next_purchase"
    assert pick_task(config, "new_item").name == "new_item"
    with pytest.raises(ConfigError, match="expected one of text_query, next_purchase, new_item"):
        pick_task(config, "none")
    only = config.model_copy(update={"tasks": config.tasks[:1]})
    with pytest.raises(ConfigError, match="name a task and its --query"):
        pick_task(only, None)
