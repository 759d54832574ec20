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
torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture(autouse=True, scope="module")
def frozen_imports():
    """Freezes the objects of imported libraries: every Trainer collects garbage, which takes 0.6 s otherwise."""
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
