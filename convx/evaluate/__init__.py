"""Evaluators: accuracy, corruption, attacks, cost, kernels, latency, energy. One file each, and none of them trains.

Each has ``run(model, data, settings) -> Result`` (latency and energy, which need no images, take the shape of
one instead of ``data``). A row is a dict with the keys of :func:`row`; accuracies are in percent. The model
is put into evaluation mode and left in the mode it came in. Importing this module loads no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import torch
    from torch import nn


def row(
    metric: str,
    value: float | None,
    unit: str,
    *,
    method: str,
    n: int | None = None,
    split: str = "",
    **conditions,
) -> dict:
    """Return one metric row; None stands for a value that could not be measured (``method`` says why)."""
    assert all(isinstance(v, str | int | float) for v in conditions.values()), conditions
    value = None if value is None else float(value)
    return {
        "metric": metric,
        "value": value,
        "unit": unit,
        "n": n,
        "split": split,
        "conditions": conditions,
        "method": method,
    }


@dataclass(frozen=True)
class Result:
    """What an evaluator found.

    ``rows``: metric rows. ``per_image``: bool or uint8 vectors [N] for :func:`convx.evaluate.payload.encode`,
    from which intervals resample images. ``details``: anything else a caller may want (predictions, timing
    samples); not stored by itself. ``arrays``: small pictures for figures (heat maps, a few kernels), any shape, stored
    in half precision by :func:`convx.evaluate.payload.pack`.
    """

    rows: list[dict]
    per_image: dict[str, np.ndarray] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def __add__(self, other: Result) -> Result:
        """Return both results in one; rows keep their order."""
        return Result(
            self.rows + other.rows,
            self.per_image | other.per_image,
            self.details | other.details,
            self.arrays | other.arrays,
        )


@dataclass(frozen=True, eq=False)
class EvaluationData:
    """Images with labels, in batches on a device.

    ``images``: uint8 tensor [N, C, H, W] on the device, or uint8 array [N, H, W, C], which may be
    memory-mapped and is read one batch at a time. ``labels``: int64 tensor [N] on the device. ``normalise``:
    grey levels 0..255 [B, C, H, W], uint8 or float, to the model's input; it is differentiable in float
    input. ``boxes``: float [N, 4] (left, top, right, bottom in pixels, the last two exclusive) of the objects, if known.
    ``train``: training images without augmentation, where an evaluator may need them (probes, neighbours).
    """

    images: torch.Tensor | np.ndarray
    labels: torch.Tensor
    normalise: Callable[[torch.Tensor], torch.Tensor]
    device: torch.device
    batch_size: int = 500
    boxes: torch.Tensor | None = None
    train: EvaluationData | None = None

    def __post_init__(self):
        if len(self.images) != len(self.labels):
            raise ValueError(f"images and labels differ in number: {len(self.images)} and {len(self.labels)}")
        if not len(self.labels):
            raise ValueError("images: there is none to evaluate")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size} given, at least 1 needed")

    @classmethod
    def from_arrays(
        cls,
        images_NHWC: np.ndarray,
        labels,
        mean,
        std,
        device="cpu",
        batch_size: int = 500,
        channels_last: bool = False,
        dtype: torch.dtype | None = None,
        boxes=None,
    ) -> EvaluationData:
        """Return the data of uint8 images [N, H, W, C], which may be memory-mapped and are not copied.

        ``mean`` and ``std`` [C] are those of pixels in 0..1; ``channels_last`` and ``dtype`` (float32) are
        the model input's.
        """
        import torch

        from convx.data.batches import Normalise

        if images_NHWC.ndim != 4 or images_NHWC.dtype != "uint8":
            raise ValueError(f"images: {images_NHWC.dtype} {images_NHWC.shape} given, uint8 [N, H, W, C] needed")
        device = torch.device(device)
        normalise = Normalise(mean, std, device, channels_last, dtype or torch.float32)
        labels = torch.as_tensor(labels, dtype=torch.long).to(device)
        boxes = None if boxes is None else torch.as_tensor(boxes, dtype=torch.float32)
        return cls(images_NHWC, labels, normalise, device, batch_size, boxes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape_CHW(self) -> tuple[int, int, int]:
        """Return the shape of one image."""
        import torch

        if isinstance(self.images, torch.Tensor):
            return tuple(self.images.shape[1:])
        height, width, channels = self.images.shape[1:]
        return channels, height, width

    def replaced(self, images, labels=None, boxes=None) -> EvaluationData:
        """Return the same set-up with other images, and other labels where given; boxes are those given, if any."""
        return EvaluationData(
            images, self.labels if labels is None else labels, self.normalise, self.device, self.batch_size, boxes
        )

    def first(self, count: int | None) -> EvaluationData:
        """Return the first ``count`` images, or all of them for None or a larger count."""
        boxes = None if self.boxes is None else self.boxes[:count]
        return self if count is None else self.replaced(self.images[:count], self.labels[:count], boxes)

    def spread(self, count: int) -> EvaluationData:
        """Return ``count`` images, or all where there are fewer, evenly spaced: a folder is sorted by class."""
        import numpy as np
        import torch

        places = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))
        at = torch.as_tensor(places)
        images = self.images[at.to(self.device) if isinstance(self.images, torch.Tensor) else places]
        boxes = None if self.boxes is None else self.boxes[at]
        return self.replaced(images, self.labels[at.to(self.device)], boxes)

    def raw_batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (uint8 [B, C, H, W], labels [B]) on the device, in order."""
        import numpy as np
        import torch

        for start in range(0, len(self), self.batch_size):
            images = self.images[start : start + self.batch_size]
            if not isinstance(images, torch.Tensor):
                block = torch.from_numpy(np.array(images))
                if self.device.type == "cuda":  # pinned, so that the copy does not wait for the device
                    block = block.pin_memory().to(self.device, non_blocking=True)
                images = block.permute(0, 3, 1, 2)
            yield images, self.labels[start : start + self.batch_size]

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (model input [B, C, H, W], labels [B]) on the device, in order."""
        for images, labels in self.raw_batches():
            yield self.normalise(images), labels

    def outputs(self, model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (what the model returns, labels [B]) batch by batch; the caller says whether gradients are wanted."""
        done = 0
        for x_BCHW, labels_B in self.batches():
            boxes = None if self.boxes is None else self.boxes[done : done + len(labels_B)]
            yield output_of(model, x_BCHW, boxes), labels_B
            done += len(labels_B)


def output_of(model: nn.Module, x_BCHW: torch.Tensor, boxes_B4: torch.Tensor | None = None) -> torch.Tensor:
    """Return what a model makes of a batch; one with ``takes_boxes`` is given the boxes of its images."""
    if not getattr(model, "takes_boxes", False):
        return model(x_BCHW)
    if boxes_B4 is None:
        from convx.manifest import Failure

        raise Failure("boxes: this variant computes given regions, and these images come without boxes")
    return model(x_BCHW, boxes=boxes_B4)


def folded_form(model: nn.Module) -> nn.Module | None:
    """Return a copy of the model with every foldable operator folded, or None where there is none."""
    from convx.surgery import fold

    folded = fold(model)
    same = [type(module) for module in folded.modules()] == [type(module) for module in model.modules()]
    return None if same else folded


def decision(model: nn.Module) -> str:
    """Return in words how a model's output becomes a class; a classifier of features says it in its ``method``."""
    return getattr(model, "method", "argmax of the logits")


@contextlib.contextmanager
def evaluation_mode(*models) -> Iterator[None]:
    """Put models into evaluation mode and every module back into its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
