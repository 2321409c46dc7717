"""Batches of a small set that lives on the device as uint8: gathering and augmentation are a few tensor operations.

Every random draw comes from CPU generators keyed by (seed, purpose, epoch), so the order of the images and their
augmentation are the same on any device and do not depend on the model. Images are x_NCHW, uint8 until they are normalised.
"""

import numpy as np
import torch
import torch.nn.functional as F

from convx.distributed import draw
from convx.seeds import generator

CHUNK = 10_000


def to_device(images_NHWC: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return a uint8 array [N, H, W, C] (memory-mapped or not) as a contiguous uint8 tensor [N, C, H, W] on the device."""
    n, height, width, channels = images_NHWC.shape
    out = torch.empty(n, channels, height, width, dtype=torch.uint8, device=device)
    for start in range(0, n, CHUNK):
        block = np.array(images_NHWC[start : start + CHUNK])
        out[start : start + CHUNK] = torch.from_numpy(block).permute(0, 3, 1, 2)
    return out


class Normalise:
    """uint8 [N, C, H, W] -> float with the data set's mean and standard deviation, in the wanted memory format."""

    def __init__(
        self, mean, std, device: torch.device, channels_last: bool = False, dtype: torch.dtype = torch.float32
    ):
        std = torch.tensor(std, dtype=torch.float64).view(1, -1, 1, 1)
        mean = torch.tensor(mean, dtype=torch.float64).view(1, -1, 1, 1)
        self.scale = (1 / (255 * std)).to(device, dtype)
        self.shift = (-mean / std).to(device, dtype)
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        x = images.to(dtype=self.dtype, memory_format=self.memory_format)
        return torch.addcmul(self.shift, x, self.scale)


def random_crop(images: torch.Tensor, padding: int, rng: torch.Generator) -> torch.Tensor:
    """Zero-pad by ``padding`` and crop back to the size at a random place, per image (He et al. 2016, section 4.2)."""
    n, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    offset_2N = draw(lambda n: torch.randint(0, 2 * padding + 1, (2, n), generator=rng), n, 1).to(images.device)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, 2p+1, 2p+1, H, W], a view
    return windows[torch.arange(n, device=images.device), :, offset_2N[0], offset_2N[1]]


def random_flip(images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Mirror each image left-right with probability one half."""
    flip_N = (draw(lambda n: torch.rand(n, generator=rng), len(images)) < 0.5).to(images.device)
    return torch.where(flip_N.view(-1, 1, 1, 1), images.flip(3), images)


def erase(x: torch.Tensor, share: float, rng: torch.Generator) -> torch.Tensor:
    """Fill a random rectangle of a ``share`` of the images with normal noise (Zhong et al. 2020, arXiv 1708.04896).

    Normalised images [N, C, H, W]. The rectangle has 2 to 33 % of the area and an aspect of 0.3 to 3.3, log-uniform; one
    that does not fit is cut at the border, not drawn again.
    """
    n, _, height, width = x.shape
    draw_5N = draw(lambda n: torch.rand(5, n, generator=rng), n, 1)
    area, ratio = (0.02 + (1 / 3 - 0.02) * draw_5N[1]) * height * width, (0.3 ** (1 - 2 * draw_5N[2]))
    tall, wide = (area * ratio).sqrt().clamp(1, height).round(), (area / ratio).sqrt().clamp(1, width).round()
    top, left = (draw_5N[3] * (height - tall + 1)).floor(), (draw_5N[4] * (width - wide + 1)).floor()
    y_H, x_W = torch.arange(height)[None], torch.arange(width)[None]
    rows_NH = (y_H >= top[:, None]) & (y_H < (top + tall)[:, None]) & (draw_5N[0] < share)[:, None]
    columns_NW = (x_W >= left[:, None]) & (x_W < (left + wide)[:, None])
    inside = (rows_NH[:, None, :, None] & columns_NW[:, None, None, :]).to(x.device)
    seed = int(draw(lambda n: torch.randint(2**62, (n,), generator=rng), n)[0])  # its own for each part of a batch
    noise = torch.Generator(x.device).manual_seed(seed)
    return torch.where(inside, torch.randn(x.shape, generator=noise, device=x.device, dtype=x.dtype), x)


class Augment:
    """The augmentation that a recipe names, on uint8 batches; with mixup or CutMix the labels become distributions."""

    def __init__(self, training: dict, num_classes: int):
        self.padding, self.flip, self.magnitude = (
            training["crop_padding"],
            training["flip"],
            training["randaugment"],
        )
        self.mixes, self.erased = [], training.get("erase", 0)
        if training["mixup"] or training["cutmix"] or self.magnitude is not None:
            from torchvision.transforms import v2

            if self.magnitude is not None:
                self.randaugment = v2.RandAugment(num_ops=2, magnitude=self.magnitude)
            if training["mixup"]:
                self.mixes.append(v2.MixUp(alpha=training["mixup"], num_classes=num_classes))
            if training["cutmix"]:
                self.mixes.append(v2.CutMix(alpha=training["cutmix"], num_classes=num_classes))

    def __call__(self, images: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Return augmented uint8 images."""
        if self.padding:
            images = random_crop(images, self.padding, rng)
        if self.flip:
            images = random_flip(images, rng)
        if self.magnitude is not None:
            # torchvision draws from the global stream, one image at a time: its operations differ from image to image.
            images = torch.stack([self.randaugment(image) for image in images])
        return images

    def mix(self, x: torch.Tensor, labels: torch.Tensor, rng: torch.Generator):
        """Return normalised images and labels after random erasing, and mixup or CutMix, where the recipe has them."""
        if self.erased:
            x = erase(x, self.erased, rng)
        if not self.mixes:
            return x, labels
        choice = int(torch.randint(len(self.mixes), (), generator=rng))
        return self.mixes[choice](x, labels)


class Batches:
    """The training images of a run on its device, in an order drawn anew for each epoch from (seed, "order", epoch).

    ``rows`` takes from a batch what this process has of it; all, unless several processes share the run.
    """

    rows = staticmethod(lambda index: index)

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, batch_size: int, drop_last: bool, seed: int):
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        n = len(images)
        self.steps = n // batch_size if drop_last else -(-n // batch_size)
        if self.steps == 0:
            raise ValueError(f"batch_size {batch_size} with drop_last leaves no batch of {n} training images")

    def epoch(self, epoch: int, first: int = 0):
        """Yield (step, uint8 images, labels, CPU generator of the batch's draws) from step ``first`` of an epoch."""
        order = torch.randperm(len(self.images), generator=generator(self.seed, "order", str(epoch)))
        order = order.to(self.images.device)
        for step in range(first, self.steps):
            index = self.rows(order[step * self.batch_size : (step + 1) * self.batch_size])
            rng = generator(self.seed, "augment", f"{epoch}.{step}")
            yield step, self.images.index_select(0, index), self.labels.index_select(0, index), rng
