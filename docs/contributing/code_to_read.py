"""Count the files and lines to read for each part of the package; print them as a table and a list.

    python docs/contributing/code_to_read.py

A file is counted as a whole, or by the definitions named here, with their decorators, docstrings and comments inside.
"""

import ast
from pathlib import Path


ROOT = Path(__file__).parents[2]
SRC = "src/lion_hf/"
TRAINING = SRC + "training/"

# Files below src/lion_hf with the names of definitions in them; no names: the whole file.
PARTS = {
    "the operator: what it computes": {"ops/reference.py": ()},
    "the operator: checks and all forms": {
        f"ops/{name}.py": ()
        for name in (
            "api", "checks", "autograd", "tokens", "decays", "masks", "attention", "chunk", "recurrent", "global_state",
        )
    },
    "the general operator: all its options": {
        f"ops/{name}.py": () for name in ("general", "sides", "diagonal", "diagonal_walk", "halving", "dense")
    },
    "the masks": {
        "ops/reference.py": ("textbook_mask",),
        "ops/decays.py": (
            "FLOOR", "clamped_gates", "sum_dtype", "cumulative_sums", "pair_weights", "exp_", "differences",
        ),
        "ops/attention.py": ("attention_weights",),
    },
    "padding": {
        "models/lion_inputs.py": ("bool_key_mask",),
        "nn/encoder.py": ("run_blocks", "unpadded_row"),
        "ops/packing.py": ("LEAST_PADDING", "UnpaddedRow", "unpad", "map_sequences", "_split_row"),
        "ops/tokens.py": ("Tokens",),
        "nn/softmax.py": ("SoftmaxLayer._matrix", "SoftmaxMixer"),
    },
    "the snake scan": {
        "models/lion_layers.py": ("scans_of",),
        "models/modeling_lion_vision.py": ("LionVisionModel.forward",),
        "nn/mixer.py": ("Mixer._mixed", "Mixer._matrix", "Mixer._check_call"),
        "nn/operators.py": ("run_scans",),
        "ops/scans.py": (),
        "ops/attention.py": ("attention_weights", "_along", "_decay_masks"),
    },
    "the format switch": {
        "models/lion_layers.py": ("mixing_options",),
        "nn/mixer.py": ("Mixer.forward", "Mixer._mixed"),
        "nn/mixer_checks.py": ("require_matrix",),
        "nn/operators.py": ("run_scans",),
        "ops/api.py": ("CROSSOVER", "two_sided_attention", "_lion", "_run_form", "resolve_format"),
        "ops/backend.py": ("fused_kernels",),
        "ops/tokens.py": ("CPU_CACHE_ELEMENTS", "walks_chunks"),
    },
    "an option (norm_position)": {
        "nn/names.py": (),
        "nn/block.py": ("Block",),
        "nn/encoder.py": ("Encoder.__init__",),
        "models/lion_layers.py": ("LionLayer",),
        "models/lion_config_base.py": (
            "_SPELLINGS", "STRUCTURAL", "LionOptions.from_dict", "LionOptions.require_structure",
            "LionOptions.structure", "spellings", "normalised",
        ),
    },
}  # fmt: skip
# A head: its class, and the lines that name it or its Auto class elsewhere.
HEAD = ("models/modeling_lion.py", "LionForTokenClassification", "AutoModelForTokenClassification")
# A recipe: the file, its script, and all of lion_hf.training that the script imports, directly or not.
RECIPES = {"mlm": "run_mlm.py", "glue": "run_glue.py", "imagenet": "run_image_classification.py"}


def lines_of(file, names):
    """Line numbers of the named definitions in a file; of the whole file without names."""
    text = (ROOT / file).read_text(encoding="utf-8")
    if not names:
        return set(range(1, len(text.splitlines()) + 1))
    found = {}
    for node in ast.parse(text).body:
        found |= dict.fromkeys(defined(node), node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}": x for x in node.body for name in defined(x)}
    missing = set(names) - found.keys()
    if missing:
        raise SystemExit(f"{file} does not define {', '.join(sorted(missing))}; fix PARTS in {__file__}")
    return {line for name in names for line in span(found[name])}


def defined(node):
    """Names that a statement defines."""
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id]
    return [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []


def span(node):
    first = min([node.lineno, *(x.lineno for x in getattr(node, "decorator_list", []))])
    return range(first, node.end_lineno + 1)


def head():
    file, *names = HEAD
    lines = {SRC + file: lines_of(SRC + file, names[:1])}
    for other in ("__init__.py", "hub.py"):
        text = (ROOT / SRC / other).read_text(encoding="utf-8").splitlines()
        lines[SRC + other] = {i for i, line in enumerate(text, 1) if any(name in line for name in names)}
    return lines


def recipe(family, script):
    waiting, seen = [f"examples/{script}"], {f"examples/recipes/{family}/lion.yaml"}
    while waiting:
        file = waiting.pop()
        if file not in seen:
            seen.add(file)
            waiting += imported(file)
    return {file: lines_of(file, ()) for file in seen}


def imported(file):
    """Files of lion_hf.training that a file imports."""
    package = Path(file).parent
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            up = (package, *package.parents)[node.level - 1] if node.level else Path("src")
            place = up.joinpath(*(node.module or "").split("."))
            for found in (place, *(place / alias.name for alias in node.names)):
                if (ROOT / found).with_suffix(".py").is_file() and str(found).startswith(TRAINING):
                    yield str(found.with_suffix(".py"))


def main():
    parts = {
        name: {SRC + file: lines_of(SRC + file, names) for file, names in files.items()}
        for name, files in PARTS.items()
    }
    parts["a head (token classification)"] = head()
    parts |= {f"a recipe ({script})": recipe(family, script) for family, script in RECIPES.items()}
    print("| to understand | files | lines |\n|---|---|---|")
    for name, files in parts.items():
        print(f"| {name} | {len(files)} | {sum(map(len, files.values())):,} |")
    for name, files in parts.items():
        print(f"\n{name}:")
        for file, lines in sorted(files.items()):
            names = PARTS.get(name, {}).get(file.removeprefix(SRC), ())
            print(f"  {len(lines):4} {file}" + (f": {', '.join(names)}" if names else ""))


if __name__ == "__main__":
    main()
