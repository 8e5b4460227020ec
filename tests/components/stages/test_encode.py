import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs

from components.cli.stages import encode as encode_command
from components.config import RunConfig, load_config
from components.exceptions import ConfigError, DataError
from components.items.image_files import Unreadable, read_image_file
from components.items.table import POPULARITY, ItemTable
from components.schemas.events import ITEMS
from components.settings import Settings
from components.stages.encode import run
from components.storage import StageReport, StageResult, StageRun, require_result, run_stage
from tests.worlds import CONFIGS, make_settings
from tests.worlds.items import *  # noqa: F403  # fixtures
from tests.worlds.tables import Row, event_row, item_row, write, write_days

CONFIG = CONFIGS / "complete_journey.yaml"


def item(
    item_id: int, title: str, image_uri: str | None = None, available: bool = True, category: str = "grocery"
) -> Row:
    return item_row(item_id, title=title, category=[category], image_uri=image_uri, available=available)


def event(number: int, item_id: int, day: int) -> Row:
    return event_row(number, item_id, datetime(2017, 1, day, tzinfo=UTC))


def accept(run_dir: Path, settings: Settings, config: RunConfig, events: list[Row], items: list[Row]) -> None:
    """Put accepted tables where the stage looks for them, through the stage contract itself."""

    def write_tables(stage: StageRun) -> StageReport:
        write_days(stage.output / "events", events)
        write(stage.output / "items.parquet", ITEMS, items)
        others = dict.fromkeys(stage.spec.outputs.keys() - {"events", "items"}, "items.parquet")  # encode reads none
        return StageReport(outputs={"events": "events", "items": "items.parquet"} | others)

    for stage in ("ingest", "validate"):
        run_stage(stage, write_tables, config=config, run_dir=str(run_dir), settings=settings, force=True)


def encode(run_dir: Path, settings: Settings, config: RunConfig, *, force: bool = False) -> StageResult:
    return run_stage("encode", run, config=config, run_dir=str(run_dir), settings=settings, force=force)


def test_items_with_events_are_encoded_and_others_counted(tmp_path: Path, settings: Settings) -> None:
    config = load_config(CONFIG)
    breads = {"category": "bakery"}
    items = [item(30, "cola", available=False), item(-5, "rye bread", **breads), item(7, "cola"), item(8, "unwanted")]
    events = [event(1, 7, 1), event(2, 30, 2), event(3, -5, 2), event(4, 7, 3)]
    accept(tmp_path / "run", settings, config, events, items)

    result = encode(tmp_path / "run", settings, config)

    counts = {"items": 3, "items_without_events": 1, "distinct_texts": 2, "cached_texts": 0}
    assert result.counts == counts | {"items_with_id_vector": 3}  # all have a text
    assert result.metrics["texts_per_second"] > 0
    table = ItemTable.open(result.outputs["item_table"])
    assert table.keys.tolist() == [-5, 7, 30]
    computed = {"id", "id_history", "popularity", "lexical", "category_words", "brand", "category", "category_0"}
    assert set(table.modalities) == computed | {"text"}
    assert set(table.words) == {"lexical", "category_words"}
    assert ItemTable.open(result.outputs["item_table_past"]).keys.tolist() == [-5, 7, 30]
    assert table.gather("category_0", [7, 30, -5])[0].tolist() == [[1, 0], [1, 0], [0, 1]]
    vectors, present = table.gather("text", [7, 30, -5, 8])
    assert present.tolist() == [True, True, True, False]
    np.testing.assert_array_equal(vectors[0], vectors[1])
    progress = json.loads((tmp_path / "run" / "encode" / "progress.json").read_text())
    assert progress["message"] == "learning ID vectors"


def test_the_table_for_training_knows_what_came_before_its_newest_cuts(tmp_path: Path, settings: Settings) -> None:
    config = load_config(CONFIG)
    split = config.features.split
    week = timedelta(days=7)
    instants = [split.recent_start - week, split.validation_start - week, split.validation_start + week]
    # Item 1 is had once in each of the three times; item 2 in the last only, when neither table may know it.
    events = [event(n, 1, 1) | {"ts": ts} for n, ts in enumerate(instants)] + [event(9, 2, 1) | {"ts": instants[2]}]
    accept(tmp_path / "run", settings, config, events, [item(1, "cola"), item(2, "rye bread")])

    result = encode(tmp_path / "run", settings, config)

    def baskets(name: str) -> list[float]:
        vectors, _ = ItemTable.open(result.outputs[name]).gather(POPULARITY, [1, 2])
        return [round(float(count)) for count in np.expm1(vectors[:, 0].astype(np.float64))]

    assert split.recent_start < split.validation_start - week
    assert (baskets("item_table_past"), baskets("item_table")) == ([1, 0], [2, 0])


@pytest.mark.parametrize("recent_cuts", [1, 100])
def test_a_log_that_the_newest_cuts_take_whole_is_told_of(recent_cuts: int, tmp_path: Path, settings: Settings) -> None:
    config = load_config(CONFIG, {"features.split.recent_cuts": recent_cuts})
    start = config.features.split.train_start
    events = [event(day, 1, 1) | {"ts": start + timedelta(days=day)} for day in range(1, 8)]
    accept(tmp_path / "run", settings, config, events, [item(1, "cola")])
    with capture_logs() as logs:
        encode(tmp_path / "run", settings, config)
    warnings = [log["remedy"] for log in logs if log["log_level"] == "warning"]
    remedy = "lower features.split.recent_cuts, move train_start, or set urm.train_cuts to all"
    assert warnings == ([remedy] if recent_cuts == 100 else [])


def test_texts_of_an_earlier_run_come_from_the_cache(tmp_path: Path, settings: Settings) -> None:
    config = load_config(CONFIG)
    accept(tmp_path / "a", settings, config, [event(1, 1, 1)], [item(1, "cola")])
    encode(tmp_path / "a", settings, config)
    other = load_config(CONFIG, {"source.max_users": 5})  # other input, so that the stage itself is not reused
    accept(tmp_path / "b", settings, other, [event(1, 1, 1), event(2, 2, 1)], [item(1, "cola"), item(2, "rye bread")])
    result = encode(tmp_path / "b", settings, other)
    assert result.reused_from is None
    assert (result.counts["distinct_texts"], result.counts["cached_texts"]) == (2, 1)


def test_images_where_the_run_has_an_encoder(tmp_path: Path, settings: Settings) -> None:
    config = load_config(CONFIG, {"items.image_encoder": "efficientnet-lite0"})
    picture = tmp_path / "cola.png"
    Image.new("RGB", (30, 30), "red").save(picture)
    items = [item(1, "cola", str(picture)), item(2, "bread"), item(3, "milk", str(tmp_path / "gone.png"))]
    accept(tmp_path / "run", settings, config, [event(number, number, 1) for number in (1, 2, 3)], items)

    result = encode(tmp_path / "run", settings, config)

    assert result.counts["items_with_image"] == 1
    assert result.counts["unreadable_images"] == 1
    table = ItemTable.open(result.outputs["item_table"])
    vectors, present = table.gather("image", [1, 2, 3])
    assert present.tolist() == [True, False, False]
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 0, 0], abs=2e-3)


def test_a_picture_that_is_replaced_or_comes_later_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(tmp_path / "home")
    monkeypatch.setattr("components.cli.stages.get_settings", lambda: settings)
    override = {"items.image_encoder": "efficientnet-lite0"}
    pictures = [tmp_path / f"{number}.png" for number in (1, 2)]
    Image.new("RGB", (30, 30), "red").save(pictures[0])
    items = [item(number, "cola", str(picture)) for number, picture in enumerate(pictures, 1)]
    events = [event(number, number, 1) for number in (1, 2)]
    accept(tmp_path / "run", settings, load_config(CONFIG, override), events, items)

    def call() -> tuple[datetime, list[bool], list[float]]:
        set_ = [f"{key}={value}" for key, value in override.items()]
        encode_command(str(CONFIG), str(tmp_path / "run"), set_)
        result = require_result(str(tmp_path / "run"), "encode")
        vectors, present = ItemTable.open(Path(result.outputs["item_table"])).gather("image", [1, 2])
        return result.finished_at, present.tolist(), vectors[0].tolist()

    first, present, red = call()
    assert (call()[0], present) == (first, [True, False])
    Image.new("RGB", (30, 31), "blue").save(pictures[0])
    second, present, blue = call()
    assert (second > first, blue != red, present) == (True, True, [True, False])
    Image.new("RGB", (30, 30), "blue").save(pictures[1])
    third, present, _ = call()
    assert (third > second, present) == (True, [True, True])
    assert call()[0] == third


def test_images_whose_store_gave_no_answer_are_told_of_and_read_by_force(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(CONFIG, {"items.image_encoder": "efficientnet-lite0"})
    pictures = [str(tmp_path / f"{number}.png") for number in (1, 2)]
    for picture in pictures:
        Image.new("RGB", (30, 30), "red").save(picture)
    items = [item(number, "cola", picture) for number, picture in enumerate(pictures, 1)]
    accept(tmp_path / "run", settings, config, [event(number, number, 1) for number in (1, 2)], items)
    silent = Unreadable("TimeoutError", is_answer=False)
    with monkeypatch.context() as patch:
        patch.setattr(
            "components.items.image.read_image_file",
            lambda uri: silent if uri == pictures[1] else read_image_file(uri),
        )
        with capture_logs() as logs:
            first = encode(tmp_path / "run", settings, config)
    warnings = [log for log in logs if log["event"].startswith("the store of some images gave no answer")]
    assert [warning["images"] for warning in warnings] == [1]
    assert encode(tmp_path / "run", settings, config) == first  # what follows need not train again
    second = encode(tmp_path / "run", settings, config, force=True)
    assert [result.counts["unreadable_images"] for result in (first, second)] == [1, 0]


def test_an_image_encoder_without_images_is_told_of(tmp_path: Path, settings: Settings) -> None:
    config = load_config(CONFIG, {"items.image_encoder": "efficientnet-lite0"})
    accept(tmp_path / "run", settings, config, [event(1, 1, 1)], [item(1, "cola")])
    with capture_logs() as logs:
        encode(tmp_path / "run", settings, config)
    warnings = [log["event"] for log in logs if log["log_level"] == "warning"]
    assert warnings == ["no item has an image, though the configuration has an encoder of images"]


def test_an_event_of_an_unknown_item_is_refused(tmp_path: Path, settings: Settings) -> None:
    config = load_config(CONFIG)
    accept(tmp_path / "run", settings, config, [event(1, 1, 1), event(2, 99, 1)], [item(1, "cola")])
    with pytest.raises(DataError, match=r"expected items of the items table only, got item 99 \(1 unknown in all\)"):
        encode(tmp_path / "run", settings, config)
    assert not (tmp_path / "run" / "encode" / "result.json").exists()


def test_an_empty_log_is_refused(tmp_path: Path, settings: Settings) -> None:
    config = load_config(CONFIG)
    accept(tmp_path / "run", settings, config, [], [item(1, "cola")])
    with pytest.raises(DataError, match="accepted events: expected at least one, got none"):
        encode(tmp_path / "run", settings, config)


def test_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings = Settings(home=tmp_path / "home", device="cuda")
    config = load_config(CONFIG)
    accept(tmp_path / "run", settings, config, [event(1, 1, 1)], [item(1, "cola")])
    with pytest.raises(ConfigError, match=r"URM_DEVICE: expected a CUDA device, got none"):
        encode(tmp_path / "run", settings, config)
