"""Code shared by the training scripts in examples/: arguments, data, models, the Trainer and reports.

Requires `pip install 'lion-hf[train]'`. `import lion_hf` does not import this package.
Each module imports only modules that stand above it in this list:

- `errors`: messages to the user, and one-line errors for wrong input
- `recipes`, `arguments`, `parsing`: argument files with presets, the arguments, and their command line
- `data`, `text`, `kornia_augmentation`, `augmentation`, `images`: data sets, their order, tokens and pixels
- `models`, `image_models`, `hidden_teacher`, `distillation`, `ema`: the model, its teachers, averaged weights
- `checkpoints`, `trainer`, `image_trainer`: training, and resuming it
- `reports`: metrics, curves and the model card of a run
- `glue`: tasks, data, metrics and runs of run_glue.py
"""

import importlib.util


# Packages of the extra, by the name of the imported module. kornia is checked where it is used: timm can replace it.
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
    raise ImportError(f"lion_hf.training requires {', '.join(_missing)}: pip install 'lion-hf[train]'")
