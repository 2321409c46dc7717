"""Accuracy on corrupted images: every cell (corruption, severity) of an opened set in one process.

The images come ready-made (:mod:`convx.data.corruptions`), so that all models see the same bits.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from convx.data.corruptions import MAIN, mean_ce
from convx.data.corruptions.metrics import MCE_PROTOCOLS
from convx.evaluate import EvaluationData, Result, decision, evaluation_mode, row
from convx.manifest import Failure


def run(model: nn.Module, data: EvaluationData, settings: dict, corrupted: Mapping[str, np.ndarray]) -> Result:
    """Return the rows of a model on a corrupted set, in percent.

    ``corrupted``: corruption -> uint8 [severities, N, H, W, C] with ``protocol``, ``severities`` and perhaps
    ``label`` and ``labels_N``, as :func:`convx.data.corruptions.open_corrupted` and ``open_official`` return
    it; without labels of its own its images are the first N of ``data``, which also gives normalisation,
    device and batch size.

    ``settings``: ``split`` ("test"); ``imagenet`` (false unless the protocol is ImageNet-C's archives): the
    images are ImageNet's, so that on ImageNet-C constants ``mCE`` has a meaning; ``clean_top1`` in percent,
    which ``relative_mCE`` needs; ``corruptions``, a choice.

    Rows: ``corruption_accuracy`` of each cell; ``mean_corruption_accuracy`` and
    ``mean_corruption_accuracy_severity5`` over the main corruptions (extra ones count in their cells only;
    where only a part of the 15 or of the severities is there, conditions say which); ``corruption_cells``,
    the number of cells behind the mean; ``mCE`` and ``relative_mCE`` where they are defined. ``per_image``:
    ``corruption_correct_cells``, uint8 [N], the cells of that mean in which an image is classified right.
    """
    split, protocol = settings.get("split", "test"), corrupted.protocol
    severities = [int(s) for s in corrupted.severities]
    names = _choice(settings.get("corruptions"), corrupted)
    averaged = [name for name in names if name in MAIN] or names
    labels_N = _labels(data, corrupted, names[0])
    n, label = len(labels_N), getattr(corrupted, "label", protocol)
    assert len(averaged) * len(severities) < 256, "the count of cells is a uint8"

    cells, correct_cells_N = {}, torch.zeros(n, dtype=torch.uint8, device=data.device)
    infinite = torch.zeros((), dtype=torch.long, device=data.device)
    with evaluation_mode(model), torch.inference_mode():
        for name in names:
            array_SNHWC = corrupted[name]
            for place, severity in enumerate(severities):
                cell, right = data.replaced(_Cell(array_SNHWC, place), labels_N), []
                for x_BCHW, labels_B in cell.batches():
                    logits_BK = model(x_BCHW)
                    infinite += (~logits_BK.isfinite().all(1)).sum()
                    right.append(logits_BK.argmax(1) == labels_B)
                right_N = torch.cat(right)
                cells[name, severity] = right_N.sum()
                if name in averaged:
                    correct_cells_N += right_N
    if int(infinite):
        raise Failure(f"the model's logits are not finite on {int(infinite)} corrupted images")
    accuracy = dict(zip(cells, (100 * right / n for right in torch.stack(list(cells.values())).tolist())))

    method = f"{decision(model)}; {label}"
    rows = [
        row("corruption_accuracy", value, "%", n=n, split=split, method=method,
            protocol=protocol, corruption=name, severity=severity)
        for (name, severity), value in accuracy.items()
    ]  # fmt: skip
    where = {"protocol": protocol}
    if set(averaged) != set(MAIN):
        where["corruptions"] = ", ".join(averaged)
    method = f"plain mean over {len(averaged)} corruptions, severities {', '.join(map(str, severities))}; {label}"
    whole = where | ({} if severities == [1, 2, 3, 4, 5] else {"severities": ", ".join(map(str, severities))})
    mean = np.mean([accuracy[name, s] for name in averaged for s in severities])
    rows.append(row("mean_corruption_accuracy", mean, "%", n=n, split=split, method=method, **whole))
    cells_count = len(averaged) * len(severities)
    rows.append(row("corruption_cells", cells_count, "cells", n=n, split=split, method="count", **whole))
    if 5 in severities:
        method = f"plain mean over {len(averaged)} corruptions at severity 5; {label}"
        mean = np.mean([accuracy[name, 5] for name in averaged])
        rows.append(row("mean_corruption_accuracy_severity5", mean, "%", n=n, split=split, method=method, **where))
    if where.keys() == whole.keys() == {"protocol"} and _has_mce(protocol, settings):
        errors = {name: [100 - accuracy[name, s] for s in severities] for name in averaged}
        clean = settings.get("clean_top1")
        found = mean_ce(errors, None if clean is None else 100 - clean, protocol)
        method = f"against AlexNet's errors (Hendrycks & Dietterich 2019, section 4.1); {label}"
        rows += [row(k, v, "%", n=n, split=split, method=method, protocol=protocol) for k, v in found.items()]
    return Result(rows, {"corruption_correct_cells": correct_cells_N.cpu().numpy()})


class _Cell:
    """One severity of a corruption, read in slices: a folder of JPEG files is never decoded as a whole."""

    def __init__(self, array_SNHWC: np.ndarray, place: int):
        self.array_SNHWC, self.place = array_SNHWC, place

    def __len__(self) -> int:
        return self.array_SNHWC.shape[1]

    def __getitem__(self, images: slice) -> np.ndarray:
        return self.array_SNHWC[self.place, images]


def _choice(wanted: list[str] | None, corrupted: Mapping) -> list[str]:
    """Return the corruptions to evaluate, in the set's order; ValueError for one that the set lacks."""
    if missing := [name for name in wanted or () if name not in corrupted]:
        raise ValueError(
            f"corruptions: {', '.join(missing)} not in the corrupted set, which holds {', '.join(corrupted)}"
        )
    return [name for name in corrupted if not wanted or name in wanted]


def _labels(data: EvaluationData, corrupted: Mapping[str, np.ndarray], first: str) -> torch.Tensor:
    """Return the labels on the device: the set's own, else those of the first images of ``data``."""
    n, own = corrupted[first].shape[1], getattr(corrupted, "labels_N", None)
    labels = data.labels[:n] if own is None else torch.as_tensor(np.asarray(own), dtype=torch.long).to(data.device)
    if len(labels) != n:
        raise ValueError(f"the corrupted set holds {n} images, there are {len(labels)} labels for them")
    return labels


def _has_mce(protocol: str, settings: dict) -> bool:
    return protocol in MCE_PROTOCOLS and settings.get("imagenet", protocol == "official_imagenet_c")
