import atexit
import gc
import os
import sys
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of scripts and kernels that tests start; this process: see below

import pytest
import torch


if not torch.cuda.is_available():  # must be set before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings


settings.register_profile("lion", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("lion")
atexit.register(gc.unfreeze)  # without this, libraries report leaks at exit
gc.set_threshold(50_000, 20, 100)  # compilers make many objects, and the processes are short
torch.set_num_threads(1)  # models are tiny: more threads are slower


@pytest.fixture(autouse=True, scope="module")
def frozen_imports():
    """Keep the objects of libraries out of garbage collection, which otherwise takes 0.6 s in each Trainer."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def examples():
    """Make the example scripts importable."""
    folder = str(Path(__file__).parents[1] / "examples")
    sys.path.insert(0, folder)
    yield folder
    sys.path.remove(folder)


@pytest.fixture
def modules_cache(tmp_path, monkeypatch):
    """Give each test its own folder for code that comes with checkpoints, which is copied there and imported."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    elsewhere = [folder for folder in sys.path if not Path(folder, "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", elsewhere)
    yield
    forget()
