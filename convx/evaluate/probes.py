"""What frozen features know: a linear probe, fitted to the end by L-BFGS; its penalty is chosen on training features alone."""

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (
    1e-1,
    1e-2,
    1e-3,
    1e-4,
)  # of half the squared weights beside the mean cross-entropy, on standardised features
HELD_OUT = 10  # every tenth training feature chooses the penalty
ITERATIONS = 100


def linear_probe(train_ND: Tensor, labels_N: Tensor, test_MD: Tensor, classes: int) -> tuple[Tensor, float]:
    """Return (predictions [M], penalty) of a multinomial logistic regression on standardised features.

    The penalty is the one of ``PENALTIES`` with the most right answers on every tenth training feature (the larger one of
    equals), with the others trained on; then all are trained on. No augmentation, no test label. ValueError for fewer than
    ``2 HELD_OUT`` features.
    """
    if len(train_ND) < 2 * HELD_OUT:
        raise ValueError(f"a linear probe needs at least {2 * HELD_OUT} training features, not {len(train_ND)}")
    mean, deviation = train_ND.mean(0), train_ND.std(0).clamp(min=1e-6)
    train_ND, test_MD = (train_ND - mean) / deviation, (test_MD - mean) / deviation
    held = torch.arange(len(train_ND), device=train_ND.device) % HELD_OUT == HELD_OUT - 1
    best, right, weights = PENALTIES[0], -1, None
    for penalty in PENALTIES:
        weights = fit(train_ND[~held], labels_N[~held], classes, penalty, weights)
        found = int((predict(train_ND[held], weights) == labels_N[held]).sum())
        if found > right:
            best, right = penalty, found
    return predict(test_MD, fit(train_ND, labels_N, classes, best, weights)), best


def fit(x_ND: Tensor, labels_N: Tensor, classes: int, penalty: float, start: Tensor | None = None) -> Tensor:
    """Return weights [D + 1, classes], the last row the bias, which is not penalised."""
    with torch.enable_grad():
        first = x_ND.new_zeros(x_ND.shape[1] + 1, classes) if start is None else start.detach().clone()
        weights = first.requires_grad_()
        solver = torch.optim.LBFGS(
            [weights], max_iter=ITERATIONS, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
        )

        def objective() -> Tensor:
            solver.zero_grad()
            logits = torch.addmm(weights[-1], x_ND, weights[:-1])
            loss = F.cross_entropy(logits, labels_N) + penalty / 2 * weights[:-1].square().sum()
            loss.backward()
            return loss

        solver.step(objective)
        return weights.detach()


def predict(x_ND: Tensor, weights: Tensor) -> Tensor:
    """Return the most likely class of each feature."""
    return torch.addmm(weights[-1], x_ND, weights[:-1]).argmax(1)
