"""For every test: one thread, no network, the guard for the name `kernels`, and a tiny model with random weights."""

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(
    prefix="ppo-tests-"
)  # before anybody imports `datasets`
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ppo  # noqa: E402, F401  before any other import of transformers: see the guard at its top

import fixtures  # noqa: E402
import hypothesis  # noqa: E402
import pytest  # noqa: E402
import tiny as tiny_folder  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from verify import pool  # noqa: E402

torch.set_num_threads(1)
# vLLM compiles one small function at its first answer: 2 s of every run
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
hypothesis.settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, max_examples=100
)
hypothesis.settings.load_profile("tests")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also the tests that are marked `full`")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: takes long; only with tests/run.sh --all")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def random_folder(path: Path, tie: bool) -> str:
    """Every parameter is moved, norms and biases too: with fresh ones many faults leave the numbers as they are."""
    tiny_folder.make(path, seed=0, steps=0, tie=tie)
    model = AutoModelForCausalLM.from_pretrained(path)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=noise))
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    return random_folder(tmp_path_factory.mktemp("tiny"), tie=True)


@pytest.fixture(scope="session")
def tiny_untied(tmp_path_factory) -> str:
    return random_folder(tmp_path_factory.mktemp("tiny_untied"), tie=False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Of a tokenizer without merges that can encode any text, with the chat template of Qwen."""
    path = tmp_path_factory.mktemp("tokenizer")
    fixtures.tokenizer(path)
    return path


@pytest.fixture(scope="session")
def tok(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def workers(monkeypatch):
    """workers(n): from here on at most n sandboxes of a kind run at the same time."""

    def restart(count: int) -> None:
        pool.this_pool().close()
        pool.this_pool.cache_clear()
        monkeypatch.setattr(pool, "default_workers", lambda: count)

    yield restart
    pool.this_pool().close()
    pool.this_pool.cache_clear()
