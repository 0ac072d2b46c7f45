"""Other ways to write the shift, to compare this package's with.

Each takes one [s, b, ng, hn] tensor and its taps [window, ng], current token first, and returns the
shifted tensor in the same dtype. They compute in that dtype too, as a model in it would.
"""

import torch
from torch import Tensor
from torch.nn import functional


def unfolded(x: Tensor, taps: Tensor) -> Tensor:
    """Shift as the paper does (arXiv 2411.19574, Appendix F): pad, unfold, multiply, sum."""
    window = len(taps)
    padded = functional.pad(x, (0, 0, 0, 0, 0, 0, window - 1, 0))
    windows = padded.unfold(0, window, 1)  # [s, b, ng, hn, window], oldest token first
    return (windows * taps.flip(0).t().to(x.dtype)[:, None]).sum(dim=-1)


def padded_sum(x: Tensor, taps: Tensor) -> Tensor:
    """Pad and add: one copy of the tensor per tap, moved along by padding."""
    taps = taps.to(x.dtype)[..., None]
    out = taps[0] * x
    for j in range(1, len(taps)):
        out = out + taps[j] * functional.pad(x[:-j], (0, 0, 0, 0, 0, 0, j, 0))
    return out


def depthwise_convolution(x: Tensor, taps: Tensor) -> Tensor:
    """Apply torch.nn.functional.conv1d with one group per channel."""
    s, b, ng, hn = x.shape
    window = len(taps)
    channels = functional.pad(x.permute(1, 2, 3, 0).reshape(b, ng * hn, s), (window - 1, 0))
    kernel = taps.flip(0).t().to(x.dtype).repeat_interleave(hn, dim=0)[:, None]
    out = functional.conv1d(channels, kernel, groups=ng * hn)
    return out.view(b, ng, hn, s).permute(3, 0, 1, 2)


def naive(x: Tensor, taps: Tensor) -> Tensor:
    """Shift as one would write it first, and give it to torch.compile."""
    taps = taps.to(x.dtype)[..., None]
    previous = torch.cat((torch.zeros_like(x[:1]), x[:-1]))
    out = taps[0] * x + taps[1] * previous
    for j in range(2, len(taps)):
        previous = torch.cat((torch.zeros_like(x[:1]), previous[:-1]))
        out = out + taps[j] * previous
    return out


def naive_pair(key: Tensor, value: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Apply `naive` to keys and values, for one compiled graph."""
    return naive(key, alpha), naive(value, beta)
