import atexit
import gc
import os
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


if not torch.cuda.is_available():  # before anything imports Triton, which decides then how kernels run
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings


settings.register_profile("lion", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("lion")
atexit.register(gc.unfreeze)  # or libraries report at the end what nobody has released
gc.set_threshold(50_000, 20, 100)  # compilers make many objects, and none of these processes lives long
torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture(autouse=True, scope="module")
def frozen_imports():
    """What the libraries hold for good is not searched again: a Trainer that collects garbage takes .6 s otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def examples():
    """The example scripts can be imported."""
    folder = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, folder)
    yield folder
    sys.path.remove(folder)


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Code that comes with checkpoints is copied to, and imported from, a folder of this test alone."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    elsewhere = [folder for folder in sys.path if not Path(folder, "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", elsewhere)
    yield
    forget()
