"""The libraries of the example scripts, which the server of forks.py imports before the first script."""

import atexit
import gc

import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import PIL.Image  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch.distributed.run  # noqa: F401
import transformers.models.auto.modeling_auto
import transformers.models.bert.modeling_bert
import transformers.trainer  # noqa: F401

import lion_hf  # noqa: F401


atexit.register(gc.unfreeze)
gc.freeze()  # forks do not search the imported objects for garbage
