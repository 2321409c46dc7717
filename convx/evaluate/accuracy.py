"""Accuracy and calibration on clean images: top-1, top-5, likelihood, calibration error, per class."""

import torch
from torch import nn

from convx.evaluate import EvaluationData, Result, decision, evaluation_mode, row
from convx.manifest import Failure

BINS = 15


def run(model: nn.Module, data: EvaluationData, settings: dict | None = None) -> Result:
    """Return the rows ``top1``, ``top5`` (above five classes), ``nll``, ``ece`` and ``per_class_top1`` (of classes with images).

    ``settings``: ``split`` ("test") names the images, ``class_names`` adds names to the classes.
    ``per_image``: ``correct``, bool [N]. ``details``: ``predictions``, int64 [N]. A logit that is not finite
    is a recorded failure; ValueError where a label exceeds the model's classes.
    """
    settings = settings or {}
    split, names = settings.get("split", "test"), settings.get("class_names")
    parts: list[tuple[torch.Tensor, ...]] = []
    with evaluation_mode(model), torch.inference_mode():
        for logits_BK, labels_B in data.outputs(model):
            logits_BK = logits_BK.to(torch.promote_types(logits_BK.dtype, torch.float32))
            classes = logits_BK.shape[1]
            parts.append(_per_image(logits_BK, labels_B))
    nll_N, confidence_N, prediction_N, top5_N, finite_N = (torch.cat(column).cpu() for column in zip(*parts))
    labels_N = data.labels.cpu()
    if not bool(finite_N.all()):
        raise Failure(f"the model's logits are not finite on {int((~finite_N).sum())} of {len(data)} {split} images")
    if int(labels_N.max()) >= classes:
        raise ValueError(f"labels: the largest is {int(labels_N.max())}, the model has {classes} classes")
    correct_N = prediction_N == labels_N

    n, rows = len(data), []
    plain = f"{decision(model)}, float32"
    rows.append(row("top1", _percent(correct_N), "%", n=n, split=split, method=plain))
    if classes > 5:
        method = "label among the five largest logits, float32"
        rows.append(row("top5", _percent(top5_N), "%", n=n, split=split, method=method))
    method = "mean of -log softmax of the label, no temperature"
    rows.append(row("nll", nll_N.double().mean().item(), "nat", n=n, split=split, method=method))
    method = f"{BINS} equal-width bins of the top confidence, no temperature (Guo et al. 2017, eq. 3)"
    ece = 100 * expected_calibration_error(confidence_N, correct_N)
    rows.append(row("ece", ece, "%", n=n, split=split, method=method))

    count_K = torch.bincount(labels_N, minlength=classes)
    right_K = torch.bincount(labels_N[correct_N], minlength=classes)
    for index, (count, right) in enumerate(zip(count_K.tolist(), right_K.tolist())):
        where = {"class": index} | ({"class_name": names[index]} if names else {})
        if count:  # a network of 1,000 outputs on pictures of 10 classes has 10 rows
            rows.append(row("per_class_top1", 100 * right / count, "%", n=count, split=split, method=plain, **where))
    per_image = {"correct": correct_N.numpy()}
    return Result(rows, per_image, {"predictions": prediction_N.numpy()})


def expected_calibration_error(confidence_N: torch.Tensor, correct_N: torch.Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error, a share of 1 (Guo et al. 2017, arXiv 1706.04599, equation 3).

    sum_m |B_m| / N |accuracy(B_m) - confidence(B_m)| over ``bins`` equal-width bins (lower, upper] of the
    confidence of the predicted class.
    """
    confidence_N, correct_N = confidence_N.double(), correct_N.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    bin_N = torch.bucketize(confidence_N, edges[1:-1])  # edges[i-1] < confidence <= edges[i]
    gap_M = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_N, correct_N - confidence_N)
    return float(gap_M.abs().sum() / len(confidence_N))


def _per_image(logits_BK: torch.Tensor, labels_B: torch.Tensor):
    """Return likelihood, confidence, prediction, top-5 membership, finiteness of each image; never waits."""
    log_p_BK = logits_BK.log_softmax(1)
    confidence_B, prediction_B = log_p_BK.max(1)
    safe_B = labels_B.clamp(max=logits_BK.shape[1] - 1)  # the caller reports a label beyond the classes
    nll_B = -log_p_BK.gather(1, safe_B[:, None])[:, 0]
    top5_B = (logits_BK.topk(min(5, logits_BK.shape[1]), dim=1).indices == labels_B[:, None]).any(1)
    return nll_B, confidence_B.exp(), prediction_B, top5_B, logits_BK.isfinite().all(1)


def _percent(flags_N: torch.Tensor) -> float:
    return 100 * int(flags_N.sum()) / len(flags_N)
