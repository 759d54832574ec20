"""What the training scripts in examples/ share: arguments, data, models, the Trainer, reports.

Needs `pip install 'lion-hf[train]'`; `import lion_hf` does not load it.
Read it in this order, in which one module may import those before it:

- `errors`: what scripts say to their user, and one line for what a user got wrong
- `recipes`, `arguments`, `parsing`: files of arguments and their presets, the arguments, and both with flags
- `data`, `text`, `kornia_augmentation`, `augmentation`, `images`: rows of tokens and pixels, and their order
- `models`, `image_models`, `hidden_teacher`, `distillation`, `ema`: the model that is trained, and what it learns from
- `checkpoints`, `trainer`, `image_trainer`: training, and going on after it was stopped
- `reports`: metrics, curves and the model card that a run leaves
- `glue`: tasks, data, metrics and runs of run_glue.py
"""

import importlib.util


# Packages of the extra by the module that is imported. kornia is looked for where it is used, since timm can stand in.
_PACKAGES = {
    "accelerate": "accelerate",
    "datasets": "datasets",
    "evaluate": "evaluate",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tokenizers": "tokenizers",
    "yaml": "pyyaml",
}
_missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
if _missing:
    raise ImportError(f"lion_hf.training needs {', '.join(_missing)}: pip install 'lion-hf[train]'")
