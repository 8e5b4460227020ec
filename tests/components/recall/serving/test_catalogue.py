import gc
import weakref

from components.recall.serving.catalogue import load_catalogue
from components.release.publication import Publication
from tests.worlds.recall import Release


def test_a_catalogue_is_freed_with_its_release_although_collections_are_rare(
    releases: tuple[Release, Release],
) -> None:
    """An API process would keep one for each promotion."""
    publication = Publication(release=releases[0].name, bundle=str(releases[0].bundle), order=1)
    catalogue = load_catalogue(publication, releases[0].settings)
    assert catalogue.describe(1001) == catalogue.describe(1001)
    assert catalogue.describe(1001).title == "item 1001"
    assert catalogue.describe(1) == (None, [], None)
    seen = weakref.ref(catalogue)
    gc.disable()
    try:
        del catalogue
        assert seen() is None
    finally:
        gc.enable()
