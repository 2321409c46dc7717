"""A classifier without training: votes of the nearest neighbours among labelled features (arXiv 1805.01978, section 3.4)."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 2**16  # features of the bank compared at one time
FLOOR = 1e-6  # share of the votes that every class has, so that a class without neighbours has a finite logit


class Neighbours(nn.Module):
    """Weighted k nearest neighbours over an encoder's features: images [B, C, H, W] -> logits [B, classes].

    Features are scaled to length one; each of the ``k`` most similar of the bank votes for its class with weight
    exp(similarity / temperature), k = 20 and 0.07 as in DINO. The logits are the logarithms of the shares of votes, so their
    softmax is those shares, and they have a gradient with respect to the images.
    """

    def __init__(
        self,
        encoder: nn.Module,
        bank_ND: Tensor,
        labels_N: Tensor,
        classes: int,
        k: int = 20,
        temperature: float = 0.07,
    ):
        super().__init__()
        if not 1 <= k <= len(bank_ND):
            raise ValueError(f"k={k} neighbours of a bank of {len(bank_ND)} features")
        self.encoder, self.classes, self.k, self.temperature = encoder, classes, k, temperature
        self.method = (
            f"weighted votes of the {k} nearest training images (T = {temperature:g}) in the frozen encoder's features"
        )
        self.register_buffer("bank", F.normalize(bank_ND.float(), dim=1), persistent=False)
        self.register_buffer("labels", labels_N, persistent=False)

    def votes(self, features_BD: Tensor) -> Tensor:
        """Return the share of votes of each class, [B, classes]; a row sums to one."""
        x_BD = F.normalize(features_BD.float(), dim=1)
        nearest_BK = places_BK = None
        for start in range(0, len(self.bank), CHUNK):
            similar_BN = x_BD @ self.bank[start : start + CHUNK].T
            found_BK, at_BK = similar_BN.topk(min(self.k, similar_BN.shape[1]), dim=1)
            at_BK = at_BK + start
            if nearest_BK is not None:
                found_BK, at_BK = torch.cat([nearest_BK, found_BK], 1), torch.cat([places_BK, at_BK], 1)
                found_BK, best_BK = found_BK.topk(self.k, dim=1)
                at_BK = at_BK.gather(1, best_BK)
            nearest_BK, places_BK = found_BK, at_BK
        weight_BK = torch.softmax(nearest_BK / self.temperature, 1)  # exp(similarity / T), to a common factor
        return (F.one_hot(self.labels[places_BK], self.classes) * weight_BK[..., None]).sum(1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.log(self.votes(self.encoder(x_BCHW)) * (1 - self.classes * FLOOR) + FLOOR)


@torch.no_grad()  # not inference mode: an attack differentiates through the neighbours
def encoded(encoder: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return the features [N, D] of batches of model inputs in evaluation mode; the mode is restored."""
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        return torch.cat([encoder(x_BCHW).float() for x_BCHW in batches])
    finally:
        for module, mode in modes:
            module.training = mode
