"""A model from the hub: its revision, fetched from a stand-in of the hub on this machine."""

import hashlib
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants, file_download
from transformers.utils import hub

from eval.errors import EvalError
from eval.runs import generate
from tests.eval.conftest import Settings

COMMIT = hashlib.sha1(b"v1.2").hexdigest()


@pytest.fixture
def asked(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The tiny checkpoint served as org/tiny, revision v1.2, beside an empty main; yields the paths
    of the files that were there.
    """
    paths: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            _, revision, name = re.split(r"/org/tiny/(?:resolve|tree)/([^/?]+)/?", self.path)
            file = checkpoint / name
            error = None
            if revision not in ("v1.2", COMMIT, "main"):
                error = "RevisionNotFound"
            elif revision == "main" or not name or not file.is_file():
                error = "EntryNotFound"
            else:
                paths.append(self.path)
            body = b"" if error else file.read_bytes()
            self.send_response(404 if error else 200)
            if error:
                self.send_header("X-Error-Code", error)
            self.send_header("X-Repo-Commit", "0" * 40 if revision == "main" else COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", here)
    template = f"{here}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    for module in (constants, file_download):  # huggingface_hub before 1 reads the latter's
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    # where transformers before 5 keeps it
    monkeypatch.setattr(hub, "TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield paths
    server.shutdown()
    server.server_close()


def test_the_revision_is_the_one_that_is_fetched(asked: list[str], settings: Settings) -> None:
    model, processor = generate.load_model(settings(model="org/tiny", revision="v1.2"))
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert processor.tokenizer.padding_side == "left"
    files = [path for path in asked if "/resolve/" in path]
    assert any(path.endswith("/model.safetensors") for path in files)
    assert {path.split("/resolve/")[1].split("/")[0] for path in files} <= {"v1.2", COMMIT}


def test_a_revision_that_is_not_there_is_explained(asked: list[str], settings: Settings) -> None:
    with pytest.raises(EvalError, match=r"org/tiny cannot be loaded .*v9 is not a valid git"):
        generate.load_model(settings(model="org/tiny", revision="v9"))
