"""What PEFT adapts in a LION where nobody names `target_modules`."""

import sys


# LION's layers by the names of a Llama's, whose other layers are named alike (q_proj, v_proj, down_proj, ...).
_NAMES = {"input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"}


def register_adapters(model_type: str) -> None:
    """Adds a kind of model to the tables in which PEFT names the layers that each kind of adapter takes by default:
    those it takes in a Llama. PEFT is not imported for it: it asks the configuration of a model for its dict before it
    looks into its tables, and that is when this is called."""
    constants = vars(sys.modules.get("peft.utils.constants", sys))
    for name, table in constants.items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in table:
            table.setdefault(model_type, [_NAMES.get(layer, layer) for layer in table["llama"]])
