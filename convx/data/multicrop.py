"""Random views of a batch, made on its device: crops with their exact rectangles, then colour. No loop over images.

The views of DINO (arXiv 2104.14294, appendix A): two global crops and some local ones, random resized crop, flip, colour jitter,
grey, blur, and solarisation of the second global one. A crop is an affine grid, so its rectangle is not rounded to pixels and
what is returned is exact. Every draw comes from the batch's CPU generator: the same views on any device.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convx.data import colour

TRIES = 10  # draws of a rectangle before the whole image is taken, as in torchvision's RandomResizedCrop
ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Views:
    """Views of a batch of B images: V = 2 + local ones, the global ones first.

    ``global_crops`` [2, B, C, s, s] and ``local_crops`` [L, B, C, s', s'] in 0..1; ``rectangles`` [V, B, 4] as (x, y, width,
    height) in pixels of the source image; ``flips`` [V, B], true where the crop was mirrored left-right.
    """

    global_crops: Tensor
    local_crops: Tensor
    rectangles: Tensor
    flips: Tensor


def random_rectangles(
    views: int, images: int, size: tuple[int, int], scale: tuple[float, float], rng: torch.Generator
) -> Tensor:
    """Return rectangles [views, images, 4]: a share of the area, uniform in ``scale``, and a log-uniform aspect in 3/4..4/3.

    ``size`` is (height, width) of the source. Of ten draws the first that fits is taken; where none does, the whole image, cut to
    the nearest aspect allowed.
    """
    height, width = size
    area_T = height * width * (scale[0] + (scale[1] - scale[0]) * torch.rand(TRIES, views, images, generator=rng))
    low, high = (math.log(end) for end in ASPECT)
    aspect_T = torch.exp(low + (high - low) * torch.rand(TRIES, views, images, generator=rng))
    w_T, h_T = torch.sqrt(area_T * aspect_T), torch.sqrt(area_T / aspect_T)
    fits_T = (w_T <= width) & (h_T <= height)
    first = fits_T.to(torch.uint8).argmax(0, keepdim=True)
    w, h = (torch.gather(sides, 0, first)[0] for sides in (w_T, h_T))
    none = ~fits_T.any(0)
    w = torch.where(none, min(width, height * ASPECT[1]), w)
    h = torch.where(none, min(height, width / ASPECT[0]), h)
    x = torch.rand(views, images, generator=rng) * (width - w)
    y = torch.rand(views, images, generator=rng) * (height - h)
    return torch.stack([x, y, w, h], -1)


def crop(images_BCHW: Tensor, rectangles_VB4: Tensor, flips_VB: Tensor, size: int, mode: str = "bicubic") -> Tensor:
    """Return [V, B, C, size, size]: each rectangle resized to ``size`` pixels and mirrored where the flip says so.

    One ``grid_sample`` of all views of an image, so the images are not copied. A pixel of the crop is the source at its centre;
    nothing is averaged, so a crop should not be much larger than ``size``.
    """
    views, _ = flips_VB.shape
    height, width = images_BCHW.shape[2:]
    centres = (torch.arange(size, dtype=torch.float32, device=images_BCHW.device) + 0.5) / size
    across_VBS = torch.where(flips_VB[..., None], 1 - centres, centres)
    x_VBS = (rectangles_VB4[..., 0, None] + rectangles_VB4[..., 2, None] * across_VBS) * (2 / width) - 1
    y_VBS = (rectangles_VB4[..., 1, None] + rectangles_VB4[..., 3, None] * centres) * (2 / height) - 1
    grid = torch.stack(torch.broadcast_tensors(x_VBS[..., None, :], y_VBS[..., :, None]), -1)  # [V, B, S, S, 2]
    grid = grid.transpose(0, 1).flatten(1, 2)
    crops = F.grid_sample(images_BCHW, grid, mode=mode, padding_mode="border", align_corners=False)
    return crops.unflatten(2, (views, size)).permute(2, 0, 1, 3, 4).clamp(0, 1).contiguous()


@dataclass(frozen=True)
class MultiCrop:
    """The views of an objective; probabilities are those of one image and view. ``blur``: first, second global, local ones.

    Jitter changes brightness, contrast, saturation and hue in an order drawn once for each batch and kind of view (per image in
    torchvision). ``blur_sigma`` is in pixels of the view.
    """

    global_size: int
    local_size: int
    local_crops: int
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    flip: float = 0.5
    jitter: float = 0.8
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grey: float = 0.2
    blur: tuple[float, float, float] = (1.0, 0.1, 0.5)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarise: float = 0.2
    interpolation: str = "bicubic"

    def __call__(self, images: Tensor, rng: torch.Generator) -> Views:
        """Return the views of uint8 images [B, C, H, W]."""
        count, size, device = len(images), tuple(images.shape[2:]), images.device
        rectangles = [random_rectangles(2, count, size, self.global_scale, rng)]
        if self.local_crops:
            rectangles.append(random_rectangles(self.local_crops, count, size, self.local_scale, rng))
        rectangles = torch.cat(rectangles)
        flips = torch.rand(2 + self.local_crops, count, generator=rng) < self.flip
        rectangles, flips = rectangles.to(device), flips.to(device)
        x_BCHW = images.float() / 255
        first = crop(x_BCHW, rectangles[:2], flips[:2], self.global_size, self.interpolation)
        globals_ = torch.stack([
            self._coloured(first[0], self.blur[0], 0.0, rng),
            self._coloured(first[1], self.blur[1], self.solarise, rng),
        ])  # fmt: skip
        if not self.local_crops:
            nothing = globals_.new_zeros(0, count, images.shape[1], self.local_size, self.local_size)
            return Views(globals_, nothing, rectangles, flips)
        local = crop(x_BCHW, rectangles[2:], flips[2:], self.local_size, self.interpolation)
        local = self._coloured(local.flatten(0, 1), self.blur[2], 0.0, rng).unflatten(0, (self.local_crops, count))
        return Views(globals_, local, rectangles, flips)

    def _coloured(self, x_NCHW: Tensor, blur: float, solarise: float, rng: torch.Generator) -> Tensor:
        count = len(x_NCHW)

        def drawn(probability: float) -> Tensor:
            return torch.rand(count, generator=rng) < probability

        if self.jitter:
            x_NCHW = colour.jitter(x_NCHW, drawn(self.jitter), self.jitter_strength, rng)
        if self.grey and x_NCHW.shape[1] == 3:
            grey = drawn(self.grey).to(x_NCHW.device)
            x_NCHW = torch.where(grey[:, None, None, None], colour.luminance(x_NCHW), x_NCHW)
        if blur:
            low, high = self.blur_sigma
            sigma = low + (high - low) * torch.rand(count, generator=rng)
            x_NCHW = colour.blur(x_NCHW, sigma * drawn(blur), high)
        if solarise:
            wanted = drawn(solarise).to(x_NCHW.device)
            x_NCHW = torch.where(wanted[:, None, None, None] & (x_NCHW >= 0.5), 1 - x_NCHW, x_NCHW)
        return x_NCHW
