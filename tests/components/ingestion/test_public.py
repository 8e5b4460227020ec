"""Public files from a real HTTP server that knows ranges and can hang up half-way."""

import gzip
import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from components.exceptions import DataError, UnavailableError
from components.ingestion.public import PublicFile, fetch, read_registry
from tests.worlds import REPOSITORY

SHARED = REPOSITORY.parent / "shared" / "data"
ORIGINS = os.environ.get("URM_PUBLIC_FILES", "")
SEQUENCES = b"1 1 2 3\n2 2 3 1\n" * 20_000
BEAUTY = {
    "sequences.txt": SEQUENCES,
    "attributes.json": json.dumps({1: [1, 2], 2: [1, 2], 3: [2]}).encode(),
    "names.json": json.dumps(
        {
            "id2item": {1: "A", 2: "B", 3: "C"},
            "id2attribute": {1: "Rare", 2: "Pond&#39;s", 3: "Hair"},
            "attributeid2num": {1: 1, 2: 2, 3: 3},
        }
    ).encode(),
    "phrases.txt": b"A a cream\nB b cream\nC comb\n",
}


class Origin:
    """What a server publishes, how many bytes it sends before it hangs up, and the ranges it was asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.limit, self.ranges = files, None, []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                content = self.files[handler.path[1:]][start:]
                self.ranges.append((handler.path[1:], start))
                handler.send_response(206)
                handler.send_header("Content-Length", str(len(content)))
                handler.end_headers()
                handler.wfile.write(content[: self.limit])

            def log_message(handler, format: str, *args: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}).start()

    def registry(self, name: str) -> dict[str, dict[str, PublicFile]]:
        return {
            name: {
                key: PublicFile(f"{self.address}/{key}", hashlib.sha256(content).hexdigest(), len(content))
                for key, content in self.files.items()
            }
        }

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def origin():
    served = Origin(dict(BEAUTY))
    yield served
    served.close()


def test_files_become_the_two_tables(origin, tmp_path):
    folder = fetch("amazon_sports", tmp_path / "data", tmp_path / "cache", origin.registry("amazon_sports"))
    assert gzip.decompress((folder / "sequences.txt.gz").read_bytes()) == SEQUENCES
    rows = pq.read_table(folder / "items.parquet").to_pylist()
    assert rows[0] == {"item_id": 1, "asin": "A", "brand": "Pond's", "categories": ["Hair"], "phrase": "a cream"}
    assert rows[2] == {"item_id": 3, "asin": "C", "brand": None, "categories": ["Hair"], "phrase": "comb"}
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["amazon_sports"]


def test_an_interrupted_download_goes_on_where_it_stopped(origin, tmp_path):
    registry, origin.limit = origin.registry("amazon_sports"), 100_000
    with pytest.raises(UnavailableError, match="goes on where it stopped"):
        fetch("amazon_sports", tmp_path / "data", tmp_path / "cache", registry)
    assert not (tmp_path / "data").exists()
    origin.limit = None
    fetch("amazon_sports", tmp_path / "data", tmp_path / "cache", registry)
    (first, start), (second, again) = origin.ranges[:2]
    assert (first, start, second) == ("sequences.txt", 0, "sequences.txt")
    assert 0 < again <= 100_000


def test_other_bytes_are_refused_and_deleted(origin, tmp_path):
    registry = origin.registry("amazon_sports")
    origin.files["sequences.txt"] = SEQUENCES.replace(b"1", b"9")
    with pytest.raises(DataError, match=r"sequences\.txt: expected SHA-256"):
        fetch("amazon_sports", tmp_path / "data", tmp_path / "cache", registry)
    assert list((tmp_path / "cache" / "amazon_sports").iterdir()) == []
    assert not (tmp_path / "data").exists()


def test_no_network_is_one_sentence(origin, tmp_path):
    registry = origin.registry("amazon_sports")
    origin.close()
    with pytest.raises(UnavailableError, match="check the network"):
        fetch("amazon_sports", tmp_path / "data", tmp_path / "cache", registry)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_one_sentence(origin, tmp_path):
    (tmp_path / "cache" / "amazon_sports").mkdir(parents=True)
    (tmp_path / "cache" / "amazon_sports" / "sequences.txt.part").symlink_to("/dev/full")
    with pytest.raises(UnavailableError, match="room for the data set, got a full disk"):
        fetch("amazon_sports", tmp_path / "data", tmp_path / "cache", origin.registry("amazon_sports"))
    assert not (tmp_path / "data").exists()


@pytest.mark.skipif(not SHARED.exists(), reason=f"needs the converted public data in {SHARED}")
@pytest.mark.skipif(not ORIGINS, reason="needs URM_PUBLIC_FILES, a folder with the files of each data set")
@pytest.mark.parametrize("name", ["amazon_beauty", "amazon_sports", "amazon_toys"])
def test_the_tables_are_those_of_the_measurements(name, tmp_path):
    entries = read_registry()[name]
    origin = Origin({key: (Path(ORIGINS) / name / key).read_bytes() for key in entries})
    try:
        local = {
            key: PublicFile(f"{origin.address}/{key}", entry.sha256, entry.bytes) for key, entry in entries.items()
        }
        folder = fetch(name, tmp_path, tmp_path / "cache", {name: local})
    finally:
        origin.close()
    for file in ("sequences.txt.gz", "items.parquet"):
        assert (folder / file).read_bytes() == (SHARED / name / file).read_bytes()
