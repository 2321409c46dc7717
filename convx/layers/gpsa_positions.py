"""Positional attention of a recast convolution: where the queries stand and what each head looks at.

Quadratic relative encoding (Cordonnier et al. 2020, "On the Relationship between Self-Attention and
Convolutional Layers", Eq. 9; parameters as in ConViT, d'Ascoli et al. 2021a): head h gives key j the logit
``-alpha |delta - Delta_h|^2`` with ``delta = position(j) - position(i)``, up to a term that the softmax
cancels. The logit is a sum of a term in y and a term in x, so the attention map is the product of two
one-dimensional maps, the *profiles*: a map over 112 x 112 pixels costs two of 112 x 112 instead of one of
12544 x 12544. Nothing here depends on the batch. Imports torch only; ``gpsa.py`` beside it uses it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Padding = (
    int | str
)  # pixels on both sides, or "same": ceil(size / stride) outputs, the odd pixel of padding at the far side


def axis_geometry(size: int, k: int, s: int, p: Padding, d: int) -> tuple[int, int, int, int]:
    """Return (queries, position of query 0, padding before, padding after) of a convolution along one axis.

    Raises ``ValueError`` when the input is smaller than the kernel.
    """
    if p == "same":  # TensorFlow's rule; with stride 1 it is torch's padding="same"
        queries = -(-size // s)
        total = max((queries - 1) * s + d * (k - 1) + 1 - size, 0)
        before, after = total // 2, total - total // 2
    else:
        queries, before, after = (size + 2 * p - d * (k - 1) - 1) // s + 1, p, p
    if queries < 1:
        raise ValueError(f"an input of {size} pixels is smaller than the kernel of {k} (dilation {d}, padding {p})")
    return queries, reference_padding(k, p, d) - before, before, after


def reference_padding(k: int, p: Padding, d: int) -> int:
    """Return the padding that the centres count from: p, or for "same" half of the kernel's reach."""
    return d * (k - 1) // 2 if p == "same" else p


def tap_offsets(k: int, s: int, p: Padding, d: int) -> Tensor:
    """Return the offsets ``Delta = d * k - p`` of the taps from the query, in pixels along one axis: [k]."""
    return d * torch.arange(k) - reference_padding(k, p, d)


def local_positions(offsets_y: Tensor, offsets_x: Tensor, locality: float) -> Tensor:
    """Return parameters [K_y * K_x, 3] that centre head ``k_y * K_x + k_x`` on its tap with ``locality``.

    Columns as in ConViT: the factors of (delta_x, delta_y, |delta|^2), i.e. (2 a Delta_x, 2 a Delta_y, -a).
    """
    dy, dx = torch.meshgrid(offsets_y, offsets_x, indexing="ij")
    dy, dx = dy.flatten().double(), dx.flatten().double()
    return torch.stack([2 * locality * dx, 2 * locality * dy, torch.full_like(dx, -locality)], dim=1)


def centres_and_spans(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centres Delta [heads, 2], (y, x) in pixels, and the spans 1/alpha [heads] in pixels^2."""
    span = -1.0 / positions[:, 2]
    return positions[:, [1, 0]] * (span / 2)[:, None], span


def _softmax_over(delta: Tensor, positions: Tensor, axis: int) -> Tensor:
    """Softmax of ``w_2 delta^2 + w_axis delta`` over its last dimension: [heads, *delta.shape].

    In float32 at least and outside autocast: the logits reach -2 alpha H^2, beyond float16.
    """
    with torch.autocast(device_type=positions.device.type, enabled=False):
        w = positions if positions.dtype == torch.float64 else positions.float()
        shape = (-1, *[1] * delta.dim())
        delta = delta.to(w.dtype)
        return (w[:, 2].view(shape) * delta.square() + w[:, 1 - axis].view(shape) * delta).softmax(dim=-1)


def query_positions(size: int, k: int, s: int, p: Padding, d: int) -> Tensor:
    """Return the pixel that each query stands on: [queries], int64; it may lie in the padding."""
    queries, origin, _, _ = axis_geometry(size, k, s, p, d)
    return origin + s * torch.arange(queries)


def key_positions(size: int, k: int, s: int, p: Padding, d: int, halo: bool) -> Tensor:
    """Return the positions of the keys, pixels 0 ... size-1 and with ``halo`` the padding around: [keys]."""
    _, _, before, after = axis_geometry(size, k, s, p, d)
    return torch.arange(-before, size + after) if halo else torch.arange(size)


def profile(positions: Tensor, axis: int, query: Tensor, key: Tensor) -> Tensor:
    """Return the profile [heads, queries, keys] along ``axis`` (0 is y, 1 is x); every row sums to one."""
    return _softmax_over((key - query[:, None]).to(positions.device), positions, axis)


def onto_pixels(profile_HQK: Tensor, size: int, key: Tensor, padding_mode: str) -> Tensor:
    """Return the profile over the pixels alone [heads, queries, size], the halo's attention accounted for.

    Zero padding contributes nothing, so its columns are dropped after the softmax; a halo that copies pixels
    (reflect, circular, replicate) gives its attention to the pixels that it copies.
    """
    before, after = -int(key[0]), int(key[-1]) + 1 - size
    if before == after == 0:
        return profile_HQK
    if padding_mode == "zeros":
        return profile_HQK[..., before : before + size]
    pixel = torch.arange(size, dtype=torch.float32)[None, None]
    source = F.pad(pixel, (before, after), mode=padding_mode)[0, 0].long()
    onto = F.one_hot(source, size).to(profile_HQK)
    return profile_HQK @ onto


def tap_shares(positions: Tensor, axis: int, k: int, s: int, p: Padding, d: int) -> tuple[Tensor, Tensor]:
    """Return each head's attention on the k taps of an unbounded grid [heads, k] and off them [heads].

    The sum is over eight pixels beyond the taps on both sides; a head whose mass lies further out has lost it
    there too.
    """
    taps = tap_offsets(k, s, p, d).to(positions.device)
    grid = torch.arange(int(taps[0]) - 8, int(taps[-1]) + 9, device=positions.device)
    share = _softmax_over(grid, positions, axis)
    return share[:, taps - grid[0]], share[:, ~torch.isin(grid, taps)].sum(dim=1)
