"""Gradient attacks in pixel space, within an l-infinity ball: FGSM and PGD.

FGSM: Goodfellow et al. 2015, arXiv 1412.6572, section 4.
PGD: Madry et al. 2018, arXiv 1706.06083, section 2.1.
Everything is in grey levels 0..255, which stand for pixels 0..1: an epsilon of 1 is 1/255. Normalisation is
part of the attacked model, so the ball is the same whatever the data set's mean and deviation.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from convx.evaluate import EvaluationData, Result, evaluation_mode, row
from convx.seeds import generator


def run(model: nn.Module, data: EvaluationData, settings: dict) -> Result:
    """Return ``fgsm_accuracy`` for each epsilon and, with steps, ``pgd_accuracy``, in percent.

    ``settings``: ``epsilons`` in units of 1/255; ``pgd_steps`` (0 leaves PGD out); ``pgd_step_size`` in units
    of 1/255 (2.5 epsilon / steps, Madry et al.); ``images``, the first ones (all); ``seed`` of the random
    start; ``split`` ("test"). The weights keep the gradients they had. ValueError for an epsilon outside
    (0, 255] or a negative number of steps.
    """
    split, epsilons = settings.get("split", "test"), list(settings["epsilons"])
    steps = settings.get("pgd_steps", 0)
    if not all(0 < e <= 255 for e in epsilons) or steps < 0:
        raise ValueError(f"attacks: epsilons {epsilons} in (0, 255] and pgd_steps {steps} >= 0 needed")
    data = data.first(settings.get("images"))
    seed, given = settings.get("seed", 0), settings.get("pgd_step_size")
    sizes = {e: given or 2.5 * e / steps for e in epsilons} if steps else {}
    streams = {e: generator(seed, "pgd", f"{e:g}") for e in sizes}

    right = torch.zeros(2, len(epsilons), dtype=torch.long, device=data.device)
    with evaluation_mode(model):
        for images_BCHW, labels_B in data.raw_batches():
            x_BCHW = images_BCHW.float()
            signs_BCHW = gradient(model, data.normalise, x_BCHW, labels_B).sign()  # one for all epsilons
            for place, epsilon in enumerate(epsilons):
                attacked = (x_BCHW + epsilon * signs_BCHW).clamp(0, 255)
                right[0, place] += _correct(model, data.normalise, attacked, labels_B)
                if steps:
                    noise = torch.rand(x_BCHW.shape, generator=streams[epsilon]).to(x_BCHW.device)
                    start = x_BCHW + epsilon * (2 * noise - 1)
                    attacked = pgd(model, data.normalise, x_BCHW, labels_B, epsilon, steps, sizes[epsilon], start)
                    right[1, place] += _correct(model, data.normalise, attacked, labels_B)
    n, rows = len(data), []
    fgsm_right, pgd_right = right.tolist()
    plain = "one signed gradient step of the cross-entropy in pixel space, clipped to [0, 1], evaluation mode"
    for epsilon, count in zip(epsilons, fgsm_right):
        where = {"epsilon": f"{epsilon:g}/255"}
        rows.append(row("fgsm_accuracy", 100 * count / n, "%", n=n, split=split, method=plain, **where))
    for epsilon, count in zip(epsilons, pgd_right) if steps else ():
        where = {"epsilon": f"{epsilon:g}/255", "steps": steps}
        method = f"projected signed steps of {sizes[epsilon]:g}/255, uniform start, clipped to [0, 1]"
        rows.append(row("pgd_accuracy", 100 * count / n, "%", n=n, split=split, method=method, **where))
    return Result(rows)


def gradient(model: nn.Module, normalise: Callable, x_BCHW: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the summed cross-entropy with respect to grey levels.

    The sum, not the mean: an image's gradient does not depend on the batch that it is in. No gradient
    reaches the weights.
    """
    with torch.enable_grad():
        x_BCHW = x_BCHW.detach().requires_grad_()
        logits_BK = model(normalise(x_BCHW))
        logits_BK = logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))
        loss = F.cross_entropy(logits_BK, labels_B, reduction="sum")
        return torch.autograd.grad(loss, x_BCHW)[0]


def fgsm(
    model: nn.Module, normalise: Callable, x_BCHW: torch.Tensor, labels_B: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Return x + epsilon sign(gradient), clipped; x and epsilon in grey levels 0..255."""
    return (x_BCHW + epsilon * gradient(model, normalise, x_BCHW, labels_B).sign()).clamp(0, 255)


def pgd(
    model: nn.Module,
    normalise: Callable,
    x_BCHW: torch.Tensor,
    labels_B: torch.Tensor,
    epsilon: float,
    steps: int,
    step_size: float,
    start_BCHW: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the last of ``steps`` signed gradient steps from the start (x), each projected on the ball.

    All is in grey levels and stays within 0..255; the start is projected too.
    """
    low, high = (x_BCHW - epsilon).clamp(min=0), (x_BCHW + epsilon).clamp(max=255)
    attacked = torch.clamp(x_BCHW if start_BCHW is None else start_BCHW, low, high)
    for _ in range(steps):
        step = step_size * gradient(model, normalise, attacked, labels_B).sign()
        attacked = torch.clamp(attacked + step, low, high)
    return attacked


@torch.no_grad()
def _correct(model: nn.Module, normalise: Callable, x_BCHW: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
    return (model(normalise(x_BCHW)).argmax(1) == labels_B).sum()
