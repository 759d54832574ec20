"""Variants of linear attention: one class each, which states all that depends on it.

A variant turns the inputs of a mixer into what an operator takes. `register_variant` adds one from anywhere, without a
change to this package:

    from lion_hf.nn import Recurrence, Variant, register_variant

    @register_variant("fixed")
    class FixedDecay(Variant):
        label = "fixed decay"
        decay = "head"

        def prepare(self, x, query, key, value, prefix_tokens):
            return Recurrence(query, key, value, log_decay=query.new_full((self.heads,), -0.1))

`LionConfig(mask_type="fixed")`, `lion_hf.nn.Mixer(dim, heads, variant="fixed")`, cards, reports, pictures and warm
starts then know it.
"""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

from .names import FEATURE_MAPS, require_name


try:  # configurations read names and defaults here, for which they need no torch
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F

    from .gates import GateLinear
except ImportError:
    Tensor = Any


# Every variant by the name under which `register_variant` entered it.
VARIANTS: dict[str, type["Variant"]] = {}


class Recurrence(NamedTuple):
    """What a variant asks a mixer to compute: an operator, and the arguments it takes.

    Args:
        query: (batch, heads, length, head_dim), and so key.
        value: (batch, heads, length, value_dim).
        log_decay: None, (heads,) or (batch, heads, length), <= 0, in float32 or wider.
        operator: name of an operator in `lion_hf.nn.mixer.OPERATORS`, one of those that the variant states.
        arguments: further keyword arguments of that operator.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor | None = None
    operator: str = "linear_attention"
    arguments: dict[str, Any] = {}


class Variant:
    """Base class of all variants, and the variant without any decay, parameters or changes.

    An instance is a view on one scan of a mixer. Mixers make it anew for every use, so it holds no state: weights
    belong to the mixer (their names in state dicts are `mixer.NAME`, and `mixer.NAME_2` for a second scan), and are
    read here as attributes.

    Class attributes, which a variant overrides:
        label: name for people, as in reports and cards.
        spellings: further names, in lower case, that stand for the registered one.
        description: half a sentence for model cards.
        decay: None, "head" where `log_decay` has one number for each head, "token" where it has one for each token too.
        feature_map: name of the function of query and key where a mixer is not told another; see names.py.
        normalize: whether outputs are divided by their row sums where a mixer is not told otherwise.
        pos_emb: whether text models have a position table by default.
        norm: whether text models have a LayerNorm over all heads after mixing by default.
        operators: names of the operators that `prepare` may ask for.
        masks: "key_mask" where padding may be masked, "cu_seqlens" where rows may be packed.
        scans: scans of a grid that can be averaged, at most. 1 where `prepare` changes query, key or value, which
            several scans share. Without a decay the order of the tokens changes nothing, and there is one scan.
        float32_weights: names of weights that stay float32 when a model is loaded in half precision, and that
            quantisers leave alone. Their linear layers are [`GateLinear`], which takes inputs of any dtype.
        weight_decay: whether optimizers may shrink the variant's own weights.

    Attributes: dim, heads, head_dim; layer_idx, counted from 0, and num_layers of the encoder; scan, counted from 0;
    mixer, with all options that it was given.
    """

    name: str
    label: str
    spellings: tuple[str, ...] = ()
    description = "linear attention without decay; every token reads every other with weight 1."
    decay: str | None = None
    feature_map = "unit_silu"
    normalize = True
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

    # Read where they are used: a graph that does not need them serves the layers that follow too.
    @property
    def layer_idx(self) -> int:
        return self.mixer.layer_idx

    @property
    def num_layers(self) -> int:
        return self.mixer.num_layers

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "mixer":
            raise AttributeError(name)
        return getattr(self.mixer, self.weight_name(name, self.scan))

    @classmethod
    def scans_taken(cls, asked: int) -> int:
        """How many scans a mixer averages that is asked for so many."""
        return min(asked, cls.scans) if cls.decay else 1

    @staticmethod
    def weight_name(name: str, scan: int) -> str:
        """The name that the mixer gives to a weight of a scan."""
        return name if scan == 0 else f"{name}_{scan + 1}"

    def add(self, name: str, weight: "nn.Parameter | nn.Module") -> None:
        """Gives the mixer a parameter or a module, which `self.name` then reads. To be called in `build`.

        Raises:
            ValueError: for a name that the mixer has already.
        """
        own = self.weight_name(name, self.scan)
        if hasattr(self.mixer, own) or hasattr(type(self), name) or name in vars(self):
            raise ValueError(
                f"{type(self).__name__} adds {own!r}, which a mixer or a variant has already; choose another name."
            )
        setattr(self.mixer, own, weight)
        self.mixer.variant_weights.append(own)

    def build(self) -> None:
        """Adds the variant's parameters and modules, uninitialised where `init_weights` fills them."""

    def init_weights(self, init: Any) -> None:
        """Fills what `build` added, with the functions of `init`: torch.nn.init, or Transformers' own, which leave
        loaded values alone. Linear layers have been filled already, as every linear layer of the model."""

    def prepare(self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, prefix_tokens: int) -> Recurrence:
        """What the mixer computes for these inputs.

        Args:
            x: (batch, length, dim), the mixer's input. A packed row holds several sequences, whose tokens must not mix
                here: a variant that mixes neighbours leaves "cu_seqlens" out of `masks`.
            query: (batch, heads, length, head_dim), after the feature map, and so `key`; `value` as projected.
            prefix_tokens: first tokens of a row that shall not decay (the class token of an image).
        """
        return Recurrence(query, key, value)

    def set_windows(self, windows: Tensor) -> None:
        """Lets each head read about so many tokens, (heads,) in float64: the start of decays in warm starts."""

    @classmethod
    def multiply_adds(cls, dim: int, heads: int) -> int:
        """Multiply-adds for each token that the variant spends beside the projections and the operator."""
        return 0


def register_variant(name: str) -> Callable[[type[Variant]], type[Variant]]:
    """Class decorator that makes a variant known under a name, in lower case, to mixers and as `mask_type`.

    Raises:
        TypeError: for a class that is not a `Variant`, and for the decorator without a name.
        ValueError: for a name or spelling that another variant has, a missing label, values that attributes cannot
            have, and names that are close to those of attributes.
    """
    if not isinstance(name, str):
        raise TypeError(f"register_variant was given {name!r}; write @register_variant('name') above the class.")

    def register(cls: type[Variant]) -> type[Variant]:
        if not (isinstance(cls, type) and issubclass(cls, Variant)):
            raise TypeError(f"{cls!r} is not a subclass of lion_hf.nn.Variant; derive the variant from it.")
        for word in (name, *cls.spellings):
            if word != word.lower() or not word:
                raise ValueError(f"the variant's name is {word!r}; it must be in lower case, and not empty.")
            other = _found(word)
            if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(
                    f"{word!r} is the variant {other.__module__}.{other.__qualname__} already; choose another name or "
                    f"spelling (a class derived from another variant has its spellings, unless it states its own)."
                )
        if not getattr(cls, "label", None):
            raise ValueError(
                f"{cls.__name__} has no label; give it one, such as label = 'LION-S', for reports and cards."
            )
        _require_known_attributes(cls)
        cls.name = name
        VARIANTS[name] = cls
        return cls

    return register


def _require_known_attributes(cls: type[Variant]) -> None:
    require_name(f"{cls.__name__}.feature_map", cls.feature_map, FEATURE_MAPS)
    require_name(f"{cls.__name__}.decay", cls.decay, (None, "head", "token"))
    for mask in cls.masks:
        require_name(f"{cls.__name__}.masks", mask, Variant.masks)
    for own, value in vars(cls).items():
        known = own in _STATED or own.startswith("_") or callable(value)
        near = [] if known else difflib.get_close_matches(own, _STATED, 1, 0.75)
        if near:
            raise ValueError(f"{cls.__name__} has the attribute {own!r}; did you mean {near[0]!r}?")


# What a variant can state or define.
_STATED = {name for name in (*Variant.__annotations__, *vars(Variant)) if not name.startswith("_")}


def _found(word: str) -> type[Variant] | None:
    return VARIANTS.get(word) or next((cls for cls in VARIANTS.values() if word in cls.spellings), None)


def variant_class(name: str) -> type[Variant]:
    """The variant of a name or spelling, in any case.

    Raises:
        ValueError: for an unknown one. It lists those that are known, and says how to add one.
    """
    cls = _found(name.lower()) if isinstance(name, str) else None
    if cls is None:
        known = ", ".join(repr(word) for name, cls in VARIANTS.items() for word in (name, *cls.spellings))
        raise ValueError(
            f"{name!r} is not a variant; known are {known}, in any case. A variant of your own must be registered "
            "before it is used: import the file with its class, decorated with lion_hf.nn.register_variant."
        )
    return cls


def at_least_float32(x: Tensor) -> Tensor:
    """float64 as it is, anything else in float32."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------------------------------------- the paper's variants


@register_variant("lit")
class Lit(Variant):
    """No decay. It knows no order: text needs a position table."""

    label = "LION-LIT"
    spellings = ("lion-lit",)
    feature_map = "elu"
    pos_emb = True
    norm = True
    scans = 1


@register_variant("decay")
class HeadDecay(Variant):
    """A learned decay per head, the logistic function of `decay_logit` (heads,)."""

    label = "LION-D"
    spellings = ("lion-d",)
    description = "linear attention whose weights fall with the distance, by one learned decay per head."
    decay = "head"
    float32_weights = ("decay_logit",)

    def build(self) -> None:
        self.add("decay_logit", nn.Parameter(torch.empty(self.heads)))

    def init_weights(self, init: Any) -> None:
        init.normal_(self.decay_logit, mean=0.0, std=1.0)

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        return Recurrence(query, key, value, F.logsigmoid(at_least_float32(self.decay_logit)))

    def set_windows(self, windows: Tensor) -> None:
        self.decay_logit.copy_(torch.log((windows - 1) / 2))


@register_variant("selective")
class TokenDecay(Variant):
    """A decay per token and head, 1 - sigmoid(decay_proj(x)), `decay_proj` a linear layer from dim to heads.

    The mixer's `gate_eps` is added before the logarithm: 1e-7 in the authors' text models, 0 in their image models."""

    label = "LION-S"
    spellings = ("lion-s",)
    description = (
        "linear attention whose weights fall with the distance, by a decay that each token sets for each head."
    )
    decay = "token"
    float32_weights = ("decay_proj",)

    def build(self) -> None:
        self.add("decay_proj", GateLinear(self.dim, self.heads))

    def prepare(self, x, query, key, value, prefix_tokens) -> Recurrence:
        gated = x[:, prefix_tokens:] if prefix_tokens else x
        logits = at_least_float32(self.decay_proj(gated))
        eps = self.mixer.gate_eps
        # The sum can exceed 1 by as much as is added.
        log_decay = (torch.sigmoid(-logits) + eps).log().clamp(max=0) if eps else F.logsigmoid(-logits)
        log_decay = log_decay.transpose(1, 2)
        return Recurrence(query, key, value, F.pad(log_decay, (prefix_tokens, 0)) if prefix_tokens else log_decay)

    def set_windows(self, windows: Tensor) -> None:
        self.decay_proj.weight.zero_()
        self.decay_proj.bias.copy_(-torch.log((windows - 1) / 2))  # its sigmoid is what the decay takes away

    @classmethod
    def multiply_adds(cls, dim: int, heads: int) -> int:
        return dim * heads
