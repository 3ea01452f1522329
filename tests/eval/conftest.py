"""Stand-ins for real models and data: a tiny random LLaVA on disk, and a small COCO folder."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nltk
import pytest

from eval.benchmarks import wordnet
from eval.pocket import world
from eval.runs.config import Config, from_settings
from eval.support import tiny
from tests.support.local_server import Chat, serving
from tests.support.shared_data import SHARED

Settings = Callable[..., Config]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.llava().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images with instances_test.json and captions_test.json."""
    folder = tmp_path_factory.mktemp("coco")
    world.write("test", 12, folder)
    return folder


@pytest.fixture(scope="session")
def nltk_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """NLTK's data as its downloader would leave it, where NLTK looks first."""
    folder = tmp_path_factory.mktemp("nltk_data")
    with zipfile.ZipFile(SHARED / "nltk_data.zip") as archive:
        archive.extractall(folder)
    nltk.data.path.insert(0, str(folder))
    wordnet.nltk_tools.cache_clear()
    yield folder
    nltk.data.path.remove(str(folder))
    wordnet.nltk_tools.cache_clear()


@pytest.fixture
def settings(checkpoint: Path, coco: Path) -> Settings:
    """Settings of a small run, with some of them changed."""

    def make(**changes: object) -> Config:
        small = {
            "model": str(checkpoint),
            "data": str(coco),
            "dtype": "float32",
            "device": "cpu",
            "batch_size": 4,
            "chair": {"max_new_tokens": 6, "images": 5},
            "pope": {"max_new_tokens": 2, "images": 3, "per_image": 1},
        }
        return from_settings(small | changes)

    return make


@pytest.fixture
def chat() -> Iterator[Chat]:
    """A chat endpoint on the loopback address."""
    judge = Chat()
    with serving(judge.respond) as url:
        judge.url = url + "/v1"
        yield judge
