"""The layers that PEFT adapts in a LION model by default, without `target_modules`."""

import sys


# LION's names for layers of Llama. The other layers have the same names in both (q_proj, v_proj, down_proj, ...).
_NAMES = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"}


def register_adapters(model_type: str) -> None:
    """Add a model type to PEFT's tables of default layers, with the layers that each kind of adapter has in Llama.

    This does nothing until PEFT is imported, and does not import it. PEFT calls `to_dict` of a configuration before it
    reads its tables; `to_dict` calls this function."""
    constants = vars(sys.modules.get("peft.utils.constants", sys))
    for name, table in constants.items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in table:
            table.setdefault(model_type, [_NAMES.get(layer, layer) for layer in table["llama"]])
