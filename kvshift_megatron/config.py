"""KVShiftConfig: the taps of a KV-shifting attention layer and their initial values."""

from dataclasses import dataclass
from typing import Literal, get_args

Variant = Literal["free", "gate", "clamp"]
Init = Literal["uniform", "identity"]


@dataclass(frozen=True)
class KVShiftConfig:
    """The taps of one KV-shifting attention layer.

    K^_i = sum_j alpha_j K_{i-j+1} and V^_i = sum_j beta_j V_{i-j+1}, j = 1..window, with
    zeros before the first token (arXiv 2411.19574, Eq. 5; windows above 2: Fig. 8c).

    Args:
        variant: What the parameters mean. ``free``: Each parameter is a tap. ``gate``: One
            parameter a per query group, with alpha_1 = sigmoid(a) and alpha_2 = 1 - alpha_1
            (window 2 only). ``clamp``: Each tap is its parameter clamped to [0, 1]. No parameter
            is ever without a gradient, however far it is from 0 and 1.
        window: Taps per key or value: 2, 3 or 4 (the token itself and those before it).
        shift_keys: Whether to shift keys; if not, they have no taps.
        shift_values: Whether to shift values; if not, they have no taps.
        init: ``uniform``: All taps but the last are drawn from U(0, 1), and the last is 1 minus
            their sum, as in the paper. ``identity``: Taps (1, 0, ...), exactly vanilla attention.
        seed: A layer's taps are drawn from (seed, layer number) alone, so every parallel layout
            gets the same. None takes Megatron's ``--seed`` if its training arguments are set, and
            that flag's default (1234) otherwise.

    Raises:
        ValueError: The combination is impossible; the message names the field.
    """

    variant: Variant = "free"
    window: int = 2
    shift_keys: bool = True
    shift_values: bool = True
    init: Init = "uniform"
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(
                f"variant={self.variant!r} is unknown: choose one of {', '.join(get_args(Variant))}"
            )
        if self.init not in get_args(Init):
            raise ValueError(
                f"init={self.init!r} is unknown: choose one of {', '.join(get_args(Init))}"
            )
        if isinstance(self.window, bool) or not isinstance(self.window, int):
            raise ValueError(f"window={self.window!r} must be a whole number of tokens: 2, 3 or 4")
        if not 2 <= self.window <= 4:
            raise ValueError(
                f"window={self.window} is out of range: 2, 3 or 4 tokens "
                "(1 would be vanilla attention: leave KV shifting off for that)"
            )
        if self.variant == "gate" and self.window != 2:
            raise ValueError(
                f"variant='gate' is defined for window=2 only, not window={self.window}: "
                "use variant='free' for a longer window"
            )
        if self.variant == "gate" and self.init == "identity":
            raise ValueError(
                "init='identity' cannot be reached with variant='gate' (a sigmoid is never 1): "
                "use variant='free' or init='uniform'"
            )
        if self.variant == "clamp" and self.init == "uniform" and self.window > 2:
            raise ValueError(
                f"init='uniform' with variant='clamp' and window={self.window} would start most of "
                "the last taps below 0, and the applied taps would not sum to 1: use "
                "init='identity', window=2 or variant='free'"
            )
        if not (self.shift_keys or self.shift_values):
            raise ValueError(
                "shift_keys and shift_values are both off, which is vanilla attention: "
                "turn one of them on, or leave KV shifting off altogether"
            )
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int)
        ):
            raise ValueError(f"seed={self.seed!r} must be a whole number or None")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative")

    @property
    def parameters_per_group(self) -> int:
        """Learned scalars per query group (4 for the paper's definition)."""
        per_tensor = 1 if self.variant == "gate" else self.window
        return per_tensor * (self.shift_keys + self.shift_values)

    def describe(self) -> str:
        """Return a phrase for logs: variant, window and what is shifted."""
        shifted = [n for n, on in (("keys", self.shift_keys), ("values", self.shift_values)) if on]
        return f"{self.variant}, window {self.window}, {' and '.join(shifted)}"
