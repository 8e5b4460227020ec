import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from components.items.image_files import Unreadable, fingerprint_images, read_image_file
from tests.worlds.servers import free_port


def write_items(tmp_path: Path, uris: list[str | None]) -> Path:
    path = tmp_path / "items.parquet"
    pq.write_table(pa.table({"image_uri": pa.array(uris, pa.string())}), path)
    return path


@pytest.mark.parametrize("number", [2, 30])  # each asked for, and their folder listed
def test_a_picture_that_is_replaced_added_or_removed_changes_the_fingerprint(tmp_path: Path, number: int) -> None:
    pictures = [tmp_path / f"{name}.png" for name in range(number)]
    for picture in pictures:
        picture.write_bytes(b"a")
    items = write_items(tmp_path, [*map(str, pictures), str(tmp_path / "later.png"), None, "", str(pictures[0])])
    prints = [fingerprint_images(items)]
    (tmp_path / "no_item.png").write_bytes(b"a")
    assert fingerprint_images(items) == prints[0]
    os.utime(pictures[0], (1, 1))
    prints.append(fingerprint_images(items))
    pictures[1].write_bytes(b"longer")
    prints.append(fingerprint_images(items))
    (tmp_path / "later.png").write_bytes(b"a")
    prints.append(fingerprint_images(items))
    pictures[0].unlink()
    prints.append(fingerprint_images(items))
    assert len(set(prints)) == 5
    assert fingerprint_images(items) == prints[-1]


def test_pictures_of_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    items = write_items(tmp_path, [f"memory://pictures/{number}.png" for number in range(30)])
    try:
        absent = fingerprint_images(items)
        store.pipe_file("/pictures/1.png", b"a")
        first = fingerprint_images(items)
        assert fingerprint_images(items) == first != absent
        store.pipe_file("/pictures/1.png", b"b")
        second = fingerprint_images(items)
        assert second != first

        def be_away(*_: object, **__: object) -> None:
            raise ConnectionError

        monkeypatch.setattr(MemoryFileSystem, "ls", be_away)
        away = fingerprint_images(items)
        assert fingerprint_images(items) == away != second
    finally:
        store.rm("/pictures", recursive=True)


def test_addresses_that_nobody_lists_count_as_they_are(tmp_path: Path) -> None:
    uris = ["https://localhost:1/a.png", "nosuch://x/y.png", "data:image/png;base64,AAAA"]
    first = fingerprint_images(write_items(tmp_path, uris))
    assert fingerprint_images(write_items(tmp_path, uris)) == first
    assert fingerprint_images(write_items(tmp_path, uris[:2])) != first


def test_a_store_that_is_away_when_its_driver_connects(tmp_path: Path) -> None:
    items = write_items(tmp_path, [f"ftp://127.0.0.1:{free_port()}/a.png"])
    assert fingerprint_images(items) == fingerprint_images(items)


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """Address of a server that answers with the status that its path names."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(self.path[1:]))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "is_answer"), [(403, True), (404, True), (410, True), (408, False), (429, False), (503, False)]
)
def test_what_a_web_server_says_is_an_answer_or_none(web: str, status: int, is_answer: bool) -> None:
    image = read_image_file(f"{web}/{status}")
    assert isinstance(image, Unreadable) and image.is_answer == is_answer
    assert str(status) in image.reason


def test_a_web_server_that_is_away_gives_no_answer() -> None:
    image = read_image_file(f"http://127.0.0.1:{free_port()}/a.png")
    assert isinstance(image, Unreadable) and not image.is_answer
    assert "Cannot connect" in image.reason
