"""kv_shift: checks the arguments and shifts keys and values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvshift_megatron.ops.autograd import shift

Taps = Tensor | Sequence[Tensor]


def kv_shift(
    key: Tensor,
    value: Tensor,
    alpha: Taps | None,
    beta: Taps | None,
    position: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Shift keys with alpha and values with beta.

    K^_i = alpha_1 K_i + alpha_2 K_{i-1} + ..., V^_i = beta_1 V_i + beta_2 V_{i-1} + ...
    (arXiv 2411.19574, Eq. 5), zero before the first token.

    Args:
        key: [s, b, ng, hn] (sbhd) or [t, ng, hn] (thd).
        value: the same layout; its head size may differ from the key's.
        alpha: [window, ng], or ``window`` tensors [ng], current token first, on any floating
            dtype. None leaves the keys as they are.
        beta: likewise for the values.
        position: int [s] or [t]: tokens of the same document before each token, for packed
            documents; None: one document.

    Returns:
        (key, value): new tensors of the inputs' shapes and dtypes, computed in fp32 (float64 for
        float64 inputs); an input whose taps are None is returned as it came.

    Raises:
        ValueError: shapes or devices that do not fit each other; the message names the argument.

    Parallelism: local to the rank; taps are those of this rank's query groups.
    """
    check("key", key, "alpha", alpha)
    check("value", value, "beta", beta)
    position = check_places("position", position, key)
    if can_go_together(key, value, alpha, beta):
        return tuple(_shift([key, value], [alpha, beta], position))  # in one launch
    return (
        key if alpha is None else _shift([key], [alpha], position)[0],
        value if beta is None else _shift([value], [beta], position)[0],
    )


def _shift(inputs: list[Tensor], taps: list[Taps], position: Tensor | None) -> list[Tensor]:
    wide = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    taps = [(tap if isinstance(tap, Tensor) else torch.stack(list(tap))).to(wide) for tap in taps]
    is_thd = inputs[0].dim() == 3
    if is_thd:
        inputs = [x.unsqueeze(1) for x in inputs]
    outputs = shift(inputs, taps, position)
    return [x.squeeze(1) for x in outputs] if is_thd else outputs


def can_go_together(key: Tensor, value: Tensor, alpha: Taps | None, beta: Taps | None) -> bool:
    """Whether one launch can take both: tensors alike and windows equal."""
    alike = (key.shape, key.dtype, key.device) == (value.shape, value.dtype, value.device)
    return alike and alpha is not None and beta is not None and len(alpha) == len(beta)


def check_places(name: str, places: Tensor | None, x: Tensor) -> Tensor | None:
    """`places` as int64; refused, by its name, where it is not one for each token of x."""
    if places is None or (places.shape == x.shape[:1] and places.device == x.device):
        return places if places is None else places.long()
    raise ValueError(
        f"{name} must be of shape [{x.size(0)}] (one a token) on {x.device}, not "
        f"{list(places.shape)} on {places.device}"
    )


def check(x_name: str, x: Tensor, taps_name: str, taps: Taps | None) -> None:
    """Refuse, by its name, a tensor or taps that do not fit; as `kv_shift` says."""
    if x.dim() not in (3, 4):
        raise ValueError(
            f"{x_name} must be [s, b, ng, hn] or [t, ng, hn], not of shape {list(x.shape)}"
        )
    if not x.is_floating_point():
        raise ValueError(f"{x_name} must be of a floating dtype, not {x.dtype}")
    if taps is None:
        return
    if len(taps) < 2:
        raise ValueError(f"{taps_name} has {len(taps)} tap(s): a shift needs at least 2")
    groups = x.shape[-2]
    if any(tap.device != x.device for tap in ([taps] if isinstance(taps, Tensor) else taps)):
        raise ValueError(f"{taps_name} must be on {x.device}, where {x_name} is")
    # Taking a tensor apart costs the host as much as the shift itself.
    if isinstance(taps, Tensor) and taps.shape[1:] == (groups,):
        return
    for j, tap in enumerate(taps, start=1):
        if tap.shape != torch.Size([groups]):
            raise ValueError(
                f"{taps_name}_{j} must be of shape [{groups}] (one scalar per query group of "
                f"{x_name}), not {list(tap.shape)}"
            )
