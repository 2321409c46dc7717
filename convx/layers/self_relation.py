"""Self-relation of a feature map: heads, relations between positions and between channels, alignment of two crops.

SERE (arXiv 2206.05184), section 3.2 and figure 3, from the mathematics. A map z [B, C, h, w] with N = h w positions has the
spatial relation A_p = z_H^T z_H / sqrt(C/H) of each of H groups of channels, and the channel relation A_c = z z^T / N; a row
of either, through a softmax, says what one position or channel is like. The teacher's relations come from a projection z, the
student's from a prediction p of it, and the loss is the cross-entropy of their rows.

Crops are rectangles (x, y, width, height) of the source image with a flip; two of them are compared where they overlap, on a
grid of points that is sampled from both maps. Sampling maps and then relating equals relating and then sampling both axes,
as sampling is linear: S A S^T = (S z)(S z)^T.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTSIDE = -2.0  # of grids without overlap, in the coordinates -1..1 of ``grid_sample``


class RelationHead(nn.Module):
    """Projection z = relu(bn(x)) and prediction p = relu(bn(conv1x1(z))) of a map [B, C, h, w]; neither changes the shape.

    The teacher relates z, the student p (the asymmetry of section 3.2). Batch normalisation is over images and positions.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.projection = nn.BatchNorm2d(channels)
        self.predictor = nn.Conv2d(channels, channels, 1, bias=False)
        self.predictor_norm = nn.BatchNorm2d(channels)

    def project(self, x_BCHW: Tensor) -> Tensor:
        """Return z, the teacher's side."""
        return F.relu(self.projection(x_BCHW))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return p, the student's side."""
        return F.relu(self.predictor_norm(self.predictor(self.project(x_BCHW))))


def spatial_relation(z: Tensor, heads: int) -> Tensor:
    """Return A_p [..., heads, N, N] of maps [..., C, h, w]: inner products of positions over sqrt(C / heads).

    Raises ``ValueError`` where the heads do not divide the channels.
    """
    channels = z.shape[-3]
    if channels % heads:
        raise ValueError(f"heads={heads} does not divide the {channels} channels")
    z_GN = z.flatten(-2).unflatten(-2, (heads, channels // heads))
    return z_GN.transpose(-1, -2) @ (z_GN * (channels // heads) ** -0.5)


def channel_relation(z: Tensor) -> Tensor:
    """Return A_c [..., C, C] of maps [..., C, h, w]: inner products of channels, averaged over positions."""
    z_CN = z.flatten(-2)
    return z_CN @ (z_CN.transpose(-1, -2) / z_CN.shape[-1])


def row_cross_entropy(target: Tensor, relation: Tensor, temperature: float = 1.0) -> Tensor:
    """Return -sum_j P_ij log softmax(A / temperature)_ij, one number a row; ``target`` P holds distributions.

    P may hold a sum of several distributions, of which each then counts; ``target.sum(-1)`` need not be one.
    """
    scaled = relation / temperature if temperature != 1.0 else relation
    return torch.logsumexp(scaled, -1) * target.sum(-1) - (target * scaled).sum(-1)


def row_entropy(target: Tensor) -> Tensor:
    """Return the entropy of each row of a matrix of distributions in nats: the least cross-entropy there is."""
    return torch.special.entr(target).sum(-1)


# ------------------------------------------------------------------------------------------------------------------ crops


def overlap_grids(
    rect_a: Tensor, rect_b: Tensor, flip_a: Tensor, flip_b: Tensor, size: int, points: str = "endpoints"
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grid in a [..., size, size, 2], the same points in b, whether there is an overlap [...]).

    ``rect`` [..., 4] is (x, y, width, height) in pixels of the source image, ``flip`` [...] whether the crop was mirrored
    left-right after it was cut. The grids are for ``grid_sample`` with ``align_corners=False``, the last axis (x, y).
    ``points``: "endpoints" puts the outer ones on the edges of the overlap, i/(size-1), as in the official code; "centres"
    puts them at (i+0.5)/size. Crops that only touch do not overlap; their grids are ``OUTSIDE``.
    """
    low = torch.maximum(rect_a[..., :2], rect_b[..., :2])
    high = torch.minimum(rect_a[..., :2] + rect_a[..., 2:], rect_b[..., :2] + rect_b[..., 2:])
    overlap = (high > low).all(-1)
    steps = torch.arange(size, dtype=rect_a.dtype, device=rect_a.device)
    if points == "centres" or size == 1:
        steps = (steps + 0.5) / size
    elif points == "endpoints":
        steps = steps / (size - 1)
    else:
        raise ValueError(f"points={points!r} is not valid; choose one of endpoints, centres")
    source = torch.lerp(low[..., None, :], high[..., None, :], steps[:, None])  # [..., size, 2], x and y by themselves
    grids = []
    for rect, flip in ((rect_a, flip_a), (rect_b, flip_b)):
        place = (source - rect[..., None, :2]) / rect[..., None, 2:]  # 0..1 within the crop
        x = torch.where(flip[..., None], 1 - place[..., 0], place[..., 0])
        grid = torch.stack(torch.broadcast_tensors(x[..., None, :], place[..., :, None, 1]), -1)
        grids.append(torch.where(overlap[..., None, None, None], 2 * grid - 1, OUTSIDE))
    return *grids, overlap


def sample_map(z_BCHW: Tensor, grid_BMSS2: Tensor, padding: str = "zeros") -> Tensor:
    """Return [B, M, C, s, s]: each map at M grids of its own, [B, M, s, s, 2], bilinear; the map is not copied M times.

    ``padding``: "zeros" or "border", what stands beyond the outermost feature centres.
    """
    count, size = grid_BMSS2.shape[1:3]
    grid = grid_BMSS2.flatten(1, 2).to(z_BCHW.dtype)
    sampled = F.grid_sample(z_BCHW, grid, mode="bilinear", padding_mode=padding, align_corners=False)
    return sampled.unflatten(2, (count, size)).transpose(1, 2)


def sample_relation(relation_BHNN: Tensor, grid_BSS2: Tensor, side: tuple[int, int], padding: str = "zeros") -> Tensor:
    """Return [B, H, s^2, s^2]: a spatial relation of maps of ``side`` (h, w), sampled on both axes, as the official code does.

    It needs s^2 N numbers an image and head where :func:`sample_map` needs s^2 C; the results agree.
    """
    grid = grid_BSS2.to(relation_BHNN.dtype)

    def keys(matrix_BHNM: Tensor) -> Tensor:
        """Sample the last axis."""
        maps = matrix_BHNM.flatten(1, 2).unflatten(-1, side)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode=padding, align_corners=False)
        return sampled.flatten(2).unflatten(1, matrix_BHNM.shape[1:3])

    return keys(keys(relation_BHNN).transpose(-1, -2)).transpose(-1, -2)
