from datetime import UTC, datetime

import pytest

from components.config import load_named_config
from components.exceptions import ConfigError
from components.studies.ablation.grid import REFERENCE, load_grid, variant_dir
from tests.worlds import CONFIGS

TEXT = """
description: Tiny.
seeds: [0, 7]
overrides: {urm.max_steps: 4}
groups:
  vectors:
    title: Number of vectors
    variants: {h_1: {urm.num_user_vectors: 1}, h_2: {urm.num_user_vectors: 2, urm.max_steps: 8}}
  modalities:
    title: Modalities
    variants: {id_text: {urm.modalities: [id, text], urm.pretrained: false}}
"""


@pytest.fixture
def grid_file(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(TEXT)
    return path


def test_the_reference_comes_first(grid_file, tmp_path):
    grid = load_grid(str(grid_file), tmp_path)
    assert list(grid.variants) == [REFERENCE, "h_1", "h_2", "id_text"]


def test_a_variant_goes_before_the_grid_and_the_seed_before_all(grid_file, tmp_path):
    grid = load_grid(str(grid_file), tmp_path)
    assert grid.settings_of("h_2", 7) == ["urm.max_steps=8", "urm.num_user_vectors=2", "seed=7"]
    assert grid.settings_of(REFERENCE, 0) == ["urm.max_steps=4", "seed=0"]


def test_settings_are_read_back_as_they_were_written(grid_file, tmp_path):
    settings = load_grid(str(grid_file), tmp_path).settings_of("id_text", 7)
    config = load_named_config("complete_journey", CONFIGS, settings)
    assert (config.urm.modalities, config.urm.pretrained, config.seed) == (("id", "text"), False, 7)


def test_a_setting_may_be_a_template_or_nothing_or_a_time(grid_file, tmp_path):
    """The first two are no YAML as they stand: `{{ … }} …` is a fault in it, and `None` a word."""
    profile = "{{ num_events }} events: 'all' of them, \"newest\" first{{ items() }}"
    more = """overrides:
      urm.item_dimension: null
      features.split.validation_start: 2017-11-20T05:00:00Z
      urm.profile: >-
        """
    grid_file.write_text(TEXT.replace("overrides: {urm.max_steps: 4}", more + profile))
    grid = load_grid(str(grid_file), tmp_path)
    config = load_named_config("complete_journey", CONFIGS, grid.settings_of(REFERENCE, 0))
    assert (config.urm.profile, config.urm.item_dimension) == (profile, None)
    assert config.features.split.validation_start == datetime(2017, 11, 20, 5, tzinfo=UTC)


def test_an_unknown_variant_is_told_from_the_known_ones(grid_file, tmp_path):
    with pytest.raises(ConfigError, match="option --variant: expected one of main, h_1, h_2, id_text, got 'h_3'"):
        load_grid(str(grid_file), tmp_path).settings_of("h_3", 0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("id_text: {", "h_1: {", "every variant once .* not 'h_1'"),
        ("id_text: {", "main: {", "none called 'main', not 'main'"),
        ("seeds: [0, 7]", "seeds: []", r"field 'seeds'"),
        ("title: Modalities", "titel: Modalities", r"field 'groups\.modalities\.title': expected a value"),
    ],
)
def test_mistakes_are_named(grid_file, tmp_path, old, new, message):
    grid_file.write_text(TEXT.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_grid(str(grid_file), tmp_path)


def test_axis_is_one_key_with_numbers(grid_file, tmp_path):
    groups = load_grid(str(grid_file), tmp_path).groups
    assert groups["modalities"].axis is None
    assert groups["vectors"].axis is None  # h_2 varies another key, too
    grid_file.write_text(TEXT.replace(", urm.max_steps: 8", ""))
    vectors = load_grid(str(grid_file), tmp_path).groups["vectors"]
    assert vectors.axis == "urm.num_user_vectors"
    assert vectors.places({"urm": {"num_user_vectors": 8}}) == {"h_1": 1.0, "h_2": 2.0, REFERENCE: 8.0}


def test_a_curve_may_share_other_settings_and_has_no_place_for_the_reference_then(grid_file, tmp_path):
    same = ", urm.item_dimension: 64, urm.copy_path: false}"
    text = TEXT.replace(", urm.max_steps: 8", "")
    for number in (1, 2):
        text = text.replace(f"vectors: {number}}}", f"vectors: {number}{same}")
    grid_file.write_text(text)
    vectors = load_grid(str(grid_file), tmp_path).groups["vectors"]
    assert vectors.axis == "urm.num_user_vectors"
    assert vectors.places({"urm": {"num_user_vectors": 8}}) == {"h_1": 1.0, "h_2": 2.0}
    grid_file.write_text(text.replace("64", "32", 1))
    assert load_grid(str(grid_file), tmp_path).groups["vectors"].axis is None


def test_contrasts_of_unknown_variants_are_refused_and_go_with_their_variants(grid_file, tmp_path):
    grid_file.write_text(TEXT + "contrasts: {more: [h_2, h_1], against: [id_text, main]}\n")
    grid = load_grid(str(grid_file), tmp_path)
    assert grid.only(["main", "h_2", "id_text"]).contrasts == {"against": ("id_text", "main")}
    grid_file.write_text(TEXT + "contrasts: {more: [h_2, h_3]}\n")
    with pytest.raises(ConfigError, match="contrasts of variants of the grid, not of 'h_3'"):
        load_grid(str(grid_file), tmp_path)


def test_run_directories_are_neighbours_so_that_stages_are_shared():
    assert variant_dir("s3://runs/study/", "h_1", 0) == "s3://runs/study.h_1.seed0"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("urm", "complete_journey"),
        ("urm", "amazon_beauty"),
        ("packing", "amazon_beauty"),
        ("backbone", "complete_journey"),
        ("backbone", "amazon_beauty"),
    ],
)
def test_variants_of_shipped_grids_are_valid_configurations_of_their_own(name, config):
    """But for those that equal the reference: they cost nothing."""
    grid = load_grid(name, CONFIGS)
    assert len(grid.seeds) >= 2
    resolved: dict[str, str] = {}
    for variant in grid.variants:
        urm = load_named_config(config, CONFIGS, grid.settings_of(variant, 0)).urm.model_dump_json()
        assert resolved.setdefault(urm, variant) in (variant, REFERENCE)
    assert len(resolved) > len(grid.variants) - len(grid.groups)


def test_the_shipped_grid_draws_recall_against_the_number_of_user_vectors():
    assert load_grid("urm", CONFIGS).groups["user_vectors"].axis == "urm.num_user_vectors"


def test_unpacked_training_has_as_many_examples_a_step():
    grid = load_grid("packing", CONFIGS)
    packed, unpacked = (
        load_named_config("amazon_beauty", CONFIGS, grid.settings_of(variant, 0)).urm
        for variant in (REFERENCE, "unpacked")
    )
    assert unpacked.tasks_per_context == 1 < packed.tasks_per_context
    assert unpacked.contexts_per_batch == packed.contexts_per_batch * packed.tasks_per_context
