import os
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from components.config import CompleteJourneySource, TableSource
from components.exceptions import DataError
from components.ingestion.files import fingerprint_files


def test_a_changed_or_added_file_changes_the_fingerprint(tmp_path: Path) -> None:
    source = TableSource(events=str(tmp_path / "e*.csv"), items=str(tmp_path / "items.csv"))
    (tmp_path / "e1.csv").write_text("a")
    (tmp_path / "items.csv").write_text("a")
    first = fingerprint_files(source)
    assert fingerprint_files(source) == first
    (tmp_path / "e1.csv").write_text("b")
    os.utime(tmp_path / "e1.csv", (1, 1))
    second = fingerprint_files(source)
    (tmp_path / "e2.csv").write_text("b")
    assert len({first, second, fingerprint_files(source)}) == 3


def test_a_file_of_a_web_server_changes_the_fingerprint(tmp_path: Path) -> None:
    class Folder(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    class Mute(Folder):
        """Says when it answered, and nothing of the file."""

        def send_header(self, keyword: str, value: str) -> None:
            if keyword not in ("Last-Modified", "Content-Length"):
                super().send_header(keyword, value)

    for name in ("e.csv", "i.csv"):
        (tmp_path / name).write_text("a")
    for handler, tells in ((Folder, True), (Mute, False)):
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=tmp_path)) as server:
            Thread(target=server.serve_forever, daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}"
            source = TableSource(events=f"{url}/e.csv", items=f"{url}/i.csv")
            first = fingerprint_files(source)
            assert (fingerprint_files(source) == first) is tells
            (tmp_path / "e.csv").write_text(f"longer {tells}")
            assert fingerprint_files(source) != first
            server.shutdown()


def test_the_packaged_log_has_none() -> None:
    assert fingerprint_files(CompleteJourneySource()) == ""


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got none"):
        fingerprint_files(TableSource(events=str(tmp_path / "e.csv"), items="i.csv"))
