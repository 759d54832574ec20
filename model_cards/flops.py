"""Floating-point operations of one forward pass of a LION model, for the cards."""

from lion_hf import LionConfig, LionVisionConfig
from lion_hf.nn import variant_class


# Up to this many chunks are linked by one product, more of them group by group (ops/chunk.py).
_SCAN_GROUP = 64


def forward_flops(config: LionConfig | LionVisionConfig, form: str, tokens: int | None = None) -> int:
    """Count the operations of one forward pass at batch size 1; a multiply-add counts as 2.

    Counts all matrix products of the model with its head (masked language modelling for every token, or the classifier
    of the pooled image). Elementwise operations are not counted, as is usual.

    With N tokens, width C, I features in the MLP and H heads, a layer costs N (4 C^2 + 2 C I) multiply-adds for its
    projections and MLP, N C H for the gate of LION-S, and `operator_multiply_adds` for each head. Snake order runs the
    gate twice, and the operator too in the chunk form. Short convolutions of width W add 3 N C W, output gates N C^2,
    and queries and keys of other widths than the values count as they are.

    Args:
        config: configuration of the model.
        form: "attention" or "chunk".
        tokens: length of a text. Images have one token per patch of the configured size, and the class token.

    Raises:
        ValueError: if the form is another one, or `tokens` is missing for a text model.
    """
    if form not in ("attention", "chunk"):
        raise ValueError(f"form is {form!r}; operations are counted for 'attention' and 'chunk'.")
    is_image = config.model_type == "lion_vision"
    if is_image:
        patches = config.grid_size[0] * config.grid_size[1]
        tokens = patches + 1
    elif tokens is None:
        raise ValueError("tokens is missing; the operations of a text model depend on the length of its input.")
    width, heads = config.hidden_size, config.num_attention_heads
    variant = variant_class(config.mask_type)
    scans = variant.scans_taken(2 if getattr(config, "order", "normal") == "s" else 1)
    head_dim, shape = width // heads, config.structure()
    keys = shape["key_heads"] * shape["key_dim"]
    # Chunks carry the denominator as one more feature of the value; attention adds up its scores.
    value_dim = head_dim + (config.normalize and form == "chunk")
    decays = variant.decay is not None
    operator = operator_multiply_adds(tokens, shape["key_dim"], value_dim, form, decays, config.chunk_size)
    walks = scans if form == "chunk" else 1
    layer = tokens * (2 * width * (width + keys) + 2 * width * config.intermediate_size)
    layer += tokens * (shape["short_conv"] * (width + 2 * keys) + width**2 * (shape["output_gate"] != "none"))
    layer += scans * tokens * variant.multiply_adds(width, heads) + heads * walks * operator
    if is_image:
        outside = patches * config.num_channels * config.patch_size**2 * width + width * config.num_labels
    else:
        outside = tokens * (width**2 + width * config.vocab_size)
    return 2 * (config.num_hidden_layers * layer + outside)


def operator_multiply_adds(length: int, d: int, e: int, form: str, decays: bool, chunk_size: int) -> int:
    """Count the multiply-adds of the operator for one head, with queries and keys of width `d` and values of width `e`
    (one more than the head's if there is a denominator).

    attention   L^2 (D + E)
    chunk       L (K (D + E) + 4 D E) for n chunks of K tokens, and 2 n^2 D E to link them, if K divides L
    no decay    2 L D E instead of chunks
    """
    if form == "attention":
        return length**2 * (d + e)
    if not decays:
        return 2 * length * d * e
    chunks = -(-length // chunk_size)
    size = -(-length // chunks)  # chunks are made equally long
    inside = chunks * size**2 * (d + e)
    if chunks == 1:
        return inside
    groups = -(-chunks // _SCAN_GROUP)
    group = -(-chunks // groups)
    links = groups * group**2 + (groups * group + groups**2) * (groups > 1)
    return inside + (4 * chunks * size + 2 * links) * d * e
