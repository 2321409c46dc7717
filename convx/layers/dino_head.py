"""The head of DINO and its loss: a small MLP, a normalised bottleneck, prototypes (arXiv 2104.14294, section 3.1, appendix C)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """A linear layer without bias whose rows have length one, or a learned length: logits [B, K] of features [B, D].

    Weight normalisation g v / |v| (arXiv 1602.07868) with g = 1 where ``learn_length`` is false.
    """

    def __init__(self, features: int, count: int, learn_length: bool = False):
        super().__init__()
        self.direction = nn.Parameter(torch.empty(count, features))
        nn.init.kaiming_uniform_(self.direction, a=5**0.5)
        self.length = nn.Parameter(torch.ones(count, 1)) if learn_length else None

    def forward(self, x_BD: Tensor) -> Tensor:
        weight_KD = F.normalize(self.direction, dim=1)
        return F.linear(x_BD, weight_KD if self.length is None else weight_KD * self.length)


class DinoHead(nn.Module):
    """MLP of three layers with GELU, then length one, then prototypes: [B, C] -> logits [B, K].

    ``batch_norm`` puts a batch normalisation behind each hidden layer; small runs collapse without it.
    """

    def __init__(
        self,
        features: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        batch_norm: bool = False,
        learn_length: bool = False,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for width_in, width_out in ((features, hidden), (hidden, hidden)):
            layers.append(nn.Linear(width_in, width_out))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width_out))
            layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.prototypes = Prototypes(bottleneck, prototypes, learn_length)

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.prototypes(F.normalize(self.mlp(x_BC), dim=-1, eps=1e-6))


def teacher_distribution(logits: Tensor, centre_K: Tensor, temperature: float) -> Tensor:
    """Return softmax((t - c) / temperature) over the last axis: centred and sharpened."""
    return torch.softmax((logits - centre_K) / temperature, -1)


def instance_loss(student_VBK: Tensor, teacher_GBK: Tensor, temperature: float = 0.1) -> Tensor:
    """Return the mean cross-entropy over all pairs of a teacher's view and another one of the student's.

    ``student``: logits of V views; ``teacher``: distributions of the first G of them. There are G (V - 1) pairs: a view is
    never compared with itself. All teachers that a view is compared with are summed first, so each view is read once.
    """
    views, globals_ = len(student_VBK), len(teacher_GBK)
    scaled = student_VBK / temperature
    normaliser_VB = torch.logsumexp(scaled, -1)
    everyone_BK = teacher_GBK.sum(0)
    total = 0.0
    for view in range(views):
        target_BK = everyone_BK - teacher_GBK[view] if view < globals_ else everyone_BK
        count = globals_ - (view < globals_)
        total = total + (count * normaliser_VB[view] - (target_BK * scaled[view]).sum(-1)).mean()
    return total / (globals_ * (views - 1))
