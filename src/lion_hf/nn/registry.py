"""Variants of linear attention. Each is one class, which defines everything that depends on the variant.

A variant turns the inputs of a mixer into the arguments of an operator. `register_variant` adds a variant from any
module, without a change to this package::

    from lion_hf.nn import Recurrence, Variant, register_variant

    @register_variant("fixed")
    class FixedDecay(Variant):
        label = "fixed decay"
        decay = "head"

        def prepare(self, x, query, key, value, prefix_tokens):
            return Recurrence(query, key, value, log_decay=query.new_full((self.heads,), -0.1))

`LionConfig(mask_type="fixed")` and `lion_hf.nn.Mixer(dim, heads, variant="fixed")` then use it. Model cards, reports,
pictures and warm starts support it as well.
"""

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .names import FEATURE_MAPS, MIXER_OPTIONS, did_you_mean, require_mixer_option, require_name


try:  # configurations read names and defaults from here, and must not require torch
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
except ImportError:
    Tensor = Any


# Kinds of decay with the shapes of their log-decay.
DECAY_SHAPES = {
    "head": "(heads,)",
    "token": "(batch, heads, length)",
    "channel": "(heads, key_dim)",
    "token_channel": "(batch, heads, length, key_dim)",
}

# Every variant by its registered name.
VARIANTS: dict[str, type["Variant"]] = {}


class Recurrence(NamedTuple):
    """What a mixer computes for a variant: an operator and its arguments.

    Args:
        query: (batch, key_heads, length, key_dim).
        key: (batch, key_heads, length, key_dim).
        value: (batch, heads, length, value_dim).
        log_decay: natural logarithm of the decays, <= 0, in float32 or wider: None, (heads,), (batch, heads, length),
            or with a decay per channel (heads, key_dim) or (batch, heads, length, key_dim).
        operator: a name in `lion_hf.nn.operators.OPERATORS` that is also one of the variant's `operators`;
            "linear_attention" by default.
        arguments: further keyword arguments of that operator.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None = None
    operator: str = "linear_attention"
    arguments: dict[str, Any] = {}


class Variant:
    """Base class of all variants. By itself it is a variant without decay, parameters or changes of its inputs.

    Subclasses override the class attributes and methods below. An instance is a view of one scan of a mixer. It stores
    no state, because mixers create a new instance for each use. The weights belong to the mixer and are read as
    attributes of the instance. In state dicts their names are `mixer.NAME`, and `mixer.NAME_2` for a second scan.

    Attributes:
        name (str): the registered name, set by `register_variant`.
        label (str): class attribute, required: name for reports and model cards, such as "LION-S".
        spellings (tuple): class attribute: further accepted names, in lower case; none by default.
        description (str): class attribute: half a sentence for model cards.
        decay (str | None): class attribute: "head" if `log_decay` has one number per head, "token" if it has one per
            head and token, "channel" and "token_channel" if it has one per channel of the key as well, None (default)
            if there is none.
        feature_map (str): class attribute: default function of query and key of normalised mixers: "identity", "elu"
            or "unit_silu" (default).
        normalize (bool): class attribute: whether mixers divide outputs by their row sums by default; True.
        rope (bool): class attribute: whether queries and keys may be rotated by their positions (`rope_theta`); True by
            default. Set it to False if `prepare` reads one of them as something else than a direction, such as the
            logits of gates.
        signed (bool): class attribute: whether scores may be negative; False by default. Mixers then never divide
            outputs by their row sums, and image models normalise the output of each mixer (RMS norm) instead.
        text_normalize (bool): class attribute: whether text models divide outputs by their row sums by default; False,
            as in the paper.
        preset (dict): class attribute: options of `Mixer` that this variant turns on by default: `short_conv`,
            `token_shift`, `output_gate`, `output_norm`, `key_heads`, `key_dim`. Empty by default.
        short_conv_bias (bool): class attribute: whether short convolutions have a bias; True.
        gate_before_norm (bool): class attribute: whether the output gate comes before the output norm; False.
        norm_eps (float): class attribute: eps of the output norm; 1e-5.
        pos_emb (bool): class attribute: whether text models have a position table by default; False.
        norm (bool): class attribute: whether text models have a LayerNorm over all heads after mixing by default;
            False.
        operators (tuple): class attribute: names of the operators that `prepare` may request: "linear_attention" (by
            default, LION's own) or "two_sided" (`two_sided_attention` with any of its options).
        masks (tuple): class attribute: "key_mask" if padding can be masked, "cu_seqlens" if rows can be packed; both by
            default.
        scans (int): class attribute: maximum number of scans of a grid that can be averaged, 2 by default. Set it to 1
            if `prepare` changes query, key or value for the operator "linear_attention", whose scans share them.
            Variants without a decay always use one scan, because the order of the tokens does not matter to them.
        float32_weights (tuple): class attribute: names of weights that stay float32 when a model is loaded in half
            precision, and that quantisers skip; none by default. Use `GateLinear` for their linear layers, which
            accepts inputs of any dtype.
        weight_decay (bool): class attribute: whether optimizers may apply weight decay to the weights that the variant
            adds; False by default.
        mixer (torch.nn.Module): the mixer, with all its options.
        scan (int): index of the scan, counted from 0.
        dim (int): width of the tokens.
        heads (int): number of heads.
        head_dim (int): width of each head of the values.
        key_heads (int): number of heads of query and key, `heads` or a divisor of it.
        key_dim (int): width of each head of query and key.
    """

    name: str
    label: str
    spellings: tuple[str, ...] = ()
    description = "linear attention without decay; every token reads every other with weight 1."
    decay: str | None = None
    feature_map = "unit_silu"
    normalize = True
    rope = True
    signed = False
    text_normalize = False
    preset: Mapping[str, Any] = MappingProxyType({})
    short_conv_bias = True
    gate_before_norm = False
    norm_eps = 1e-5
    pos_emb = False
    norm = False
    operators: tuple[str, ...] = ("linear_attention",)
    masks: tuple[str, ...] = ("key_mask", "cu_seqlens")
    scans = 2
    float32_weights: tuple[str, ...] = ()
    weight_decay = False

    def __init__(self, mixer: "nn.Module", scan: int = 0):
        self.mixer, self.scan = mixer, scan
        self.dim, self.heads, self.head_dim = mixer.dim, mixer.num_heads, mixer.head_dim
        self.key_heads, self.key_dim = mixer.key_heads, mixer.key_dim

    # Properties, so that compiled graphs depend on them only if a variant reads them, and otherwise serve all layers.
    @property
    def layer_idx(self) -> int:
        """Index of the layer in the encoder, counted from 0."""
        return self.mixer.layer_idx

    @property
    def num_layers(self) -> int:
        """Number of layers of the encoder."""
        return self.mixer.num_layers

    def __getattr__(self, name: str):
        if name == "mixer":
            raise AttributeError(
                f"{type(self).__name__} has no mixer: its __init__ must call super().__init__(mixer, scan). A variant "
                "rarely needs an __init__, because `build` creates its weights."
            )
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.mixer, self.weight_name(name, self.scan))

    @classmethod
    def scans_taken(cls, asked: int) -> int:
        """Return how many scans a mixer averages if its argument `scans` is `asked`."""
        return min(asked, cls.scans) if cls.decay else 1

    @classmethod
    def option(cls, name: str) -> Any:
        """Return the default of an option in `MIXER_OPTIONS`: that of the preset, or the option turned off."""
        return cls.preset.get(name, MIXER_OPTIONS[name])

    @classmethod
    def normalizes(cls) -> bool:
        """Return whether mixers divide outputs by their row sums by default."""
        return cls.normalize and not cls.signed

    @classmethod
    def image_norm(cls) -> str:
        """Return the default `output_norm` of image models: an RMS norm where scores of either sign forbid division."""
        norm = cls.option("output_norm")
        return "rms" if cls.signed and norm == "none" else norm

    @staticmethod
    def weight_name(name: str, scan: int) -> str:
        """Return the name in the mixer of a weight of a scan: `name`, or `name_2` for the second scan (index 1)."""
        return name if scan == 0 else f"{name}_{scan + 1}"

    def add(self, name: str, weight: "nn.Parameter | nn.Module") -> None:
        """Add a parameter or a module to the mixer. The variant then reads it as an attribute. Call this in `build`.

        Args:
            name: name of the attribute.
            weight: the parameter or module.

        Raises:
            TypeError: if `weight` is neither a parameter nor a module.
            ValueError: if the mixer or the variant already has an attribute of this name.
        """
        if not isinstance(weight, (nn.Parameter, nn.Module)):
            raise TypeError(
                f"{type(self).__name__} adds {name!r}, which is {type(weight).__name__}; it must be an nn.Parameter or "
                "an nn.Module."
            )
        own = self.weight_name(name, self.scan)
        if hasattr(self.mixer, own) or hasattr(type(self), name) or name in vars(self):
            raise ValueError(
                f"{type(self).__name__} adds {own!r}, but the mixer or the variant already has an attribute of this "
                "name. Choose another name."
            )
        setattr(self.mixer, own, weight)
        self.mixer.variant_weights.append(own)

    def build(self) -> None:
        """Create the parameters and modules of the variant with `add`. `init_weights` initialises them."""

    def init_weights(self, init: Any) -> None:
        """Initialise what `build` added. Linear layers are already initialised like all linear layers of the model.

        Args:
            init: a module with the functions of `torch.nn.init`; in models that of Transformers, whose functions do not
                change weights that were loaded from a checkpoint.
        """

    def prepare(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, prefix_tokens: int) -> Recurrence:
        """Return what the mixer computes for these inputs.

        Args:
            x: (batch, length, dim), the input of the mixer, after its token shift. Tokens of different sequences of a
                packed row must not mix here: a variant that mixes neighbouring tokens leaves "cu_seqlens" out of
                `masks`.
            query: (batch, key_heads, length, key_dim), after the feature map.
            key: (batch, key_heads, length, key_dim), after the feature map.
            value: (batch, heads, length, head_dim), as projected.
            prefix_tokens: number of tokens at the beginning of each row that must not decay (the class token of an
                image).

        Returns:
            A `Recurrence`. Its `log_decay` must have the shape that `decay` declares.
        """
        return Recurrence(query, key, value)

    def shift(self, x: Tensor, shifted: Tensor) -> dict[str, Tensor]:
        """Return the inputs of the projections of a mixer with `token_shift`.

        By default input p is `x + mu_p * (shifted - x)` with the learned weights `mu_p` (dim,) of the mixer.

        Args:
            x: (batch, length, dim), the input of the mixer.
            shifted: (batch, length, dim), the neighbours of each token, see `lion_hf.nn.local.neighbours`.

        Returns:
            (batch, length, dim) for each of "q", "k", "v", "gate" and "decay" (the input of `prepare`) that the mixer
            has a weight for.
        """
        change = shifted - x
        return {name: torch.addcmul(x, getattr(self.mixer, f"mu_{name}"), change) for name in self.mixer.shifted_names}

    def set_windows(self, windows: Tensor) -> None:
        """Set the decays so that each head reads about `windows` tokens. Warm starts call this.

        Args:
            windows: (heads,), float64, numbers of tokens.
        """

    @classmethod
    def multiply_adds(cls, dim: int, heads: int) -> int:
        """Return the multiply-adds per token that the variant adds to those of the projections and the operator."""
        return 0


def register_variant(name: str) -> Callable[[type[Variant]], type[Variant]]:
    """Return a class decorator that registers a variant, for `Mixer`, `Encoder` and `mask_type` of configurations.

    Args:
        name: name of the variant, in lower case.

    Raises:
        TypeError: if `name` is not a string, or the class is not a subclass of `Variant`.
        ValueError: if another variant has this name or one of the spellings, a name is empty or not in lower case, the
            label is missing, or a class attribute has an invalid value or a misspelt name.
    """
    if not isinstance(name, str):
        raise TypeError(f"register_variant was given {name!r}; write @register_variant('name') above the class.")

    def register(cls: type[Variant]) -> type[Variant]:
        if not (isinstance(cls, type) and issubclass(cls, Variant)):
            raise TypeError(f"{cls!r} is not a subclass of lion_hf.nn.Variant; derive it from that class.")
        if not getattr(cls, "label", None):
            raise ValueError(f"{cls.__name__} has no label; set one for reports and cards, such as label = 'LION-S'.")
        _require_known_attributes(cls)
        for word in (name, *cls.spellings):
            if word != word.lower() or not word:
                raise ValueError(f"the variant's name is {word!r}; it must be in lower case and not empty.")
            other = _found(word)
            if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"{word!r} is already the variant {other.__module__}.{other.__qualname__}. Choose another name or "
                    "spelling. (A class that is derived from a variant inherits its spellings unless it sets its own.)"
                )
        cls.name = name
        VARIANTS[name] = cls
        return cls

    return register


def _require_known_attributes(cls: type[Variant]) -> None:
    require_name(f"{cls.__name__}.feature_map", cls.feature_map, FEATURE_MAPS)
    require_name(f"{cls.__name__}.decay", cls.decay, (None, *DECAY_SHAPES))
    for name in ("spellings", "operators", "masks", "float32_weights"):
        value = getattr(cls, name)
        if isinstance(value, str):
            raise ValueError(f"{cls.__name__}.{name} is {value!r}; it must be a tuple, ({value!r},) with a comma.")
    for option, value in cls.preset.items():
        require_name(f"{cls.__name__}.preset", option, tuple(MIXER_OPTIONS))
        require_mixer_option(option, value)
    for mask in cls.masks:
        require_name(f"{cls.__name__}.masks", mask, Variant.masks)
    for own, value in vars(cls).items():
        if own in MIXER_OPTIONS:
            raise ValueError(
                f"{cls.__name__} has the attribute {own!r}, which is an option of a mixer; set preset = "
                f"{{{own!r}: {value!r}}}."
            )
        known = own in _STATED or own.startswith("_") or callable(value)
        near = [] if known else difflib.get_close_matches(own, _STATED, 1, 0.75)
        if near:
            raise ValueError(f"{cls.__name__} has the attribute {own!r}; did you mean {near[0]!r}?")


# Attributes and methods that a variant can define.
_STATED = {name for name in (*Variant.__annotations__, *vars(Variant)) if not name.startswith("_")}


def _found(word: str) -> type[Variant] | None:
    return VARIANTS.get(word) or next((cls for cls in VARIANTS.values() if word in cls.spellings), None)


def variant_class(name: str) -> type[Variant]:
    """Return the registered variant of a name or spelling.

    Args:
        name: in any letter case, such as "selective" or "LION-S".

    Returns:
        A subclass of `Variant`.

    Raises:
        ValueError: if there is no such variant. The message lists the known names.
    """
    cls = _found(name.lower()) if isinstance(name, str) else None
    if cls is None:
        known = [word for name, cls in VARIANTS.items() for word in (name, *cls.spellings)]
        raise ValueError(
            f"{name!r} is not a variant; known are {', '.join(map(repr, known))}, in any case."
            f"{did_you_mean(name, known)} A custom variant must be registered before it is used: import the file with "
            "its class, decorated with lion_hf.nn.register_variant."
        )
    return cls


def at_least_float32(x: Tensor) -> Tensor:
    """Return x unchanged if it is float64, otherwise in float32."""
    return x if x.dtype == torch.float64 else x.float()


def log_sigmoid(logits: Tensor) -> Tensor:
    """Return log(sigmoid(logits)) for logits (batch, heads, length, ...), a view of (batch, length, heads, ...).

    `F.logsigmoid` of a view returns other strides than PyTorch's compilers assume. The gradients of graphs that are
    compiled without a code generator then fail. Here it reads the logits as they lie in memory.
    """
    return F.logsigmoid(logits.transpose(1, 2)).transpose(1, 2)


def without_prefix(log_decay: Tensor, prefix_tokens: int) -> Tensor:
    """Return the log-decay (batch, heads, length, ...) with 0, no decay, for the first `prefix_tokens` tokens."""
    if not prefix_tokens:
        return log_decay
    forced = torch.zeros_like(log_decay[:, :, :prefix_tokens])
    return torch.cat([forced, log_decay[:, :, prefix_tokens:]], 2)
