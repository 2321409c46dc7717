"""How well relations agree between aligned views, and composites whose tokens have labels. Of any timm ViT, without heads."""

import torch
from torch import Tensor, nn

from convx.layers.self_relation import channel_relation, overlap_grids, row_entropy, sample_map, spatial_relation
from convx.layers.vit_tokens import tokens

CHUNK = 32  # images whose channel relations are held at one time


def standard_map(maps_BCHW: Tensor) -> Tensor:
    """Return relu of each channel at mean 0 and deviation 1 over images and positions: a relation head before it learns.

    The heads are thrown away with the training, so encoders of all arms, and untrained ones, are compared through this.
    """
    mean = maps_BCHW.mean((0, 2, 3), keepdim=True)
    deviation = maps_BCHW.std((0, 2, 3), keepdim=True, correction=0)
    return torch.relu((maps_BCHW - mean) / deviation.clamp(min=1e-5))


def divergence(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Return the mean of KL(P|Q) and KL(Q|P) of each row, in nats; P and Q are softmax(relation / temperature)."""
    log_p, log_q = (torch.log_softmax(each / temperature, -1) for each in (a, b))
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1) / 2


def strongest(relation: Tensor) -> Tensor:
    """Return which other position each one is most like: the largest entry of a row beside the diagonal."""
    diagonal = torch.eye(relation.shape[-1], dtype=torch.bool, device=relation.device)
    return relation.masked_fill(diagonal, float("-inf")).argmax(-1)


@torch.no_grad()
def agreement(
    first_BCHW: Tensor, second_BCHW: Tensor, rectangles_2B4: Tensor, flips_2B: Tensor, heads: int, size: int,
    temperatures: tuple[float, float],
) -> dict[tuple[str, str], float]:  # fmt: skip
    """Return {(quantity, pair): mean} of the patch tokens of two views of the same images, in evaluation mode.

    Quantities: ``spatial`` and ``channel``, symmetric divergences of the relations' rows in nats; ``agreement``, the share in
    percent of points whose strongest relation is to the same other point in both views. Pairs: ``matched``, two views of an
    image at the same points of it; ``unmatched``, the same grids with the second view of the next image: what chance and
    relations that are the same for all images give. Grids are at cell centres with border padding; images whose views do not
    overlap are left out of the spatial ones.
    """
    count = len(first_BCHW)
    first, second = standard_map(torch.cat([first_BCHW, second_BCHW])).split(count)
    grid_0, grid_1, overlap = overlap_grids(*rectangles_2B4, *flips_2B, size, "centres")
    a, b = (
        spatial_relation(sample_map(z, grid[:, None], "border")[:, 0], heads)
        for z, grid in ((first, grid_0), (second, grid_1))
    )
    found = {}
    for pair, shift in (("matched", 0), ("unmatched", 1)):
        other, both = b.roll(shift, 0), overlap & overlap.roll(shift, 0)
        found["spatial", pair] = float(divergence(a, other, temperatures[0])[both].mean())
        found["agreement", pair] = float(100 * (strongest(a) == strongest(other))[both].float().mean())
        rows, shifted = 0.0, second.roll(shift, 0)
        for part, also in zip(first.split(CHUNK), shifted.split(CHUNK)):
            rows += float(divergence(channel_relation(part), channel_relation(also), temperatures[1]).mean(1).sum())
        found["channel", pair] = rows / count
    return found


def mean_row_entropy(maps_BCHW: Tensor, heads: int, temperature: float) -> float:
    """Return the entropy of a row of the spatial relations in nats: what divergences are to be read beside."""
    relation = spatial_relation(standard_map(maps_BCHW), heads)
    return float(row_entropy(torch.softmax(relation / temperature, -1)).mean())


def composites(images_NCHW: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return (pictures [N // 4, C, 2H, 2W] of four images each, the labels [N // 4, 2, 2] of their quarters)."""
    count = len(images_NCHW) // 4
    quarters = images_NCHW[: 4 * count].unflatten(0, (count, 2, 2))  # [M, 2, 2, C, H, W]
    pictures = quarters.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return pictures, labels_N[: 4 * count].view(count, 2, 2)


def token_labels(quarters_M22: Tensor, side: tuple[int, int]) -> Tensor:
    """Return the label of each token [M, h, w] of a composite; sides are even, so no token lies in two quarters."""
    return quarters_M22.repeat_interleave(side[0] // 2, 1).repeat_interleave(side[1] // 2, 2)


@torch.no_grad()
def token_features(encoder: nn.Module, pictures_MCHW: Tensor) -> Tensor:
    """Return the patch tokens [M, h, w, C] behind the encoder's last norm, at the pictures' size."""
    _, maps_MCHW = tokens(encoder, pictures_MCHW)
    return encoder.norm(maps_MCHW.permute(0, 2, 3, 1))
