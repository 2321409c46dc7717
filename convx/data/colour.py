"""Colour operations on batches x_NCHW in 0..1 with a strength for each image; torchvision's formulas, which take one for all."""

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHTS = (0.2989, 0.587, 0.114)  # of red, green and blue in the luminance


def luminance(x_NCHW: Tensor) -> Tensor:
    """Return the grey picture [N, 1, H, W]; one of one channel is grey already."""
    if x_NCHW.shape[1] == 1:
        return x_NCHW
    return (x_NCHW * x_NCHW.new_tensor(WEIGHTS)[:, None, None]).sum(1, keepdim=True)


def _blend(x_NCHW: Tensor, other: Tensor, factor_N: Tensor) -> Tensor:
    return torch.lerp(other.expand_as(x_NCHW), x_NCHW, factor_N[:, None, None, None]).clamp(0, 1)


def brightness(x_NCHW: Tensor, factor_N: Tensor) -> Tensor:
    """Return factor * x, clipped."""
    return (x_NCHW * factor_N[:, None, None, None]).clamp(0, 1)


def contrast(x_NCHW: Tensor, factor_N: Tensor) -> Tensor:
    """Blend with the mean luminance of each image."""
    return _blend(x_NCHW, luminance(x_NCHW).mean((1, 2, 3), keepdim=True), factor_N)


def saturation(x_NCHW: Tensor, factor_N: Tensor) -> Tensor:
    """Blend with the grey picture; nothing to do for one channel."""
    return x_NCHW if x_NCHW.shape[1] == 1 else _blend(x_NCHW, luminance(x_NCHW), factor_N)


def hue(x_NCHW: Tensor, turn_N: Tensor) -> Tensor:
    """Turn the hue by a share of the circle, -0.5..0.5, in hue, saturation and value; nothing to do for one channel.

    With hue h in sixths of the circle, channel n of (r, g, b), n = 5, 3, 1, is v - v s max(0, min(k, 4 - k, 1)) where
    k = (n + 6 h) mod 6.
    """
    if x_NCHW.shape[1] != 3:
        return x_NCHW
    red, green, blue = x_NCHW.unbind(1)
    value, least = x_NCHW.amax(1), x_NCHW.amin(1)
    chroma = value - least
    span = torch.where(chroma > 0, chroma, 1.0)
    sixths = torch.where(
        value == red,
        (green - blue) / span,
        torch.where(value == green, 2 + (blue - red) / span, 4 + (red - green) / span),
    )
    sixths = sixths + 6 * turn_N[:, None, None]
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(n + sixths, 6.0)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


def jitter(x_NCHW: Tensor, wanted_N: Tensor, strength: tuple, rng: torch.Generator) -> Tensor:
    """Change brightness, contrast, saturation and hue of the images that are ``wanted``, in a random order.

    ``strength``: factors are uniform in 1 -+ the first three, not below 0, and the hue turns by -+ the fourth.
    """
    count, device = len(x_NCHW), x_NCHW.device
    draws = []
    for place, (most, neutral) in enumerate(zip(strength, (1.0, 1.0, 1.0, 0.0), strict=True)):
        low, high = (max(0.0, 1 - most), 1 + most) if place < 3 else (-most, most)
        value = low + (high - low) * torch.rand(count, generator=rng)
        draws.append(torch.where(wanted_N, value, neutral).to(device))
    for place in torch.randperm(4, generator=rng).tolist():
        if strength[place]:
            x_NCHW = (brightness, contrast, saturation, hue)[place](x_NCHW, draws[place])
    return x_NCHW.clamp(0, 1)


def blur(x_NCHW: Tensor, sigma_N: Tensor, most: float) -> Tensor:
    """Gaussian blur by ``sigma`` pixels, 0 for none, of at most ``most``; the border is reflected."""
    channels, height, width = x_NCHW.shape[1:]
    radius = min(int(3 * most + 0.5), min(height, width) - 1)
    at = torch.arange(-radius, radius + 1, dtype=torch.float32)
    weights_NK = torch.exp(-0.5 * (at / sigma_N.clamp(min=1e-3)[:, None]) ** 2)  # a delta at sigma 0
    weights_NK = (weights_NK / weights_NK.sum(1, keepdim=True)).to(x_NCHW.device)
    kernel = weights_NK.repeat_interleave(channels, 0)[:, None]  # one a plane
    planes = x_NCHW.flatten(0, 1)[None]
    padded = F.pad(planes, (radius,) * 4, mode="reflect")
    groups = planes.shape[1]
    rows = F.conv2d(padded, kernel[:, :, None, :], groups=groups)
    return F.conv2d(rows, kernel[:, :, :, None], groups=groups)[0].unflatten(0, x_NCHW.shape[:2])
