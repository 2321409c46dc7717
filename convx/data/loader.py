"""Images of a folder that are too many to live on the device: decoded when a batch needs them, by processes or threads.

Batches are the same uint8 tensors x_NCHW that small sets give, so objectives do not know the difference. A crop depends
on (seed, epoch, index of the image) alone: neither the number of processes nor a restart in mid-epoch changes a bit.
"""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from convx.data.folder import ImageFiles
from convx.seeds import derive, generator

ASPECT = (3 / 4, 4 / 3)  # of a random crop, the range of Szegedy et al. 2015 that everybody uses


class FolderImages:
    """A split of a folder that reads like a uint8 tensor [N, C, H, W] on the device: ``len``, ``shape`` and slices.

    Pictures are resized and cropped as in an evaluation.
    """

    dtype = torch.uint8
    ndim = 4

    def __init__(self, files: ImageFiles, device: torch.device):
        n, height, width, channels = files.shape
        self.files, self.device, self.shape = files, device, torch.Size((n, channels, height, width))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return torch.from_numpy(self.files[rows]).permute(0, 3, 1, 2).contiguous().to(self.device)


class Crops(Dataset):
    """The training crops of one epoch: ``crops[indices]`` is uint8 [B, C, H, W] for an array of row numbers.

    ``scale`` (smallest, largest) is the share of the picture's area that a crop covers; None takes the evaluation's crop.
    """

    def __init__(self, files: ImageFiles, scale: tuple[float, float] | None, seed: int, epoch: int):
        self.files, self.seed, self.epoch, self.crop = files, seed, epoch, None
        if scale is not None:
            from torchvision.transforms import InterpolationMode, v2

            size, method = files.resize["size"], InterpolationMode(files.resize["interpolation"])
            self.crop = v2.RandomResizedCrop(size, tuple(scale), ASPECT, method)

    def __getitem__(self, indices) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global stream
            images = np.stack([self.image(int(index)) for index in indices])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def image(self, index: int) -> np.ndarray:
        """Return one crop, uint8 [H, W, C]."""
        if self.crop is None:
            return self.files[index]
        torch.manual_seed(derive(self.seed, "crop", f"{self.epoch}.{index}"))
        return np.asarray(self.crop(self.files.picture(index)))


class FolderBatches:
    """The training images of a folder in an order drawn anew for each epoch: what ``Batches`` is for small sets.

    ``workers`` processes decode ahead (0: this one). Flips and what else a recipe names come later, on the device.
    """

    def __init__(
        self, files: ImageFiles, labels: torch.Tensor, training: dict, seed: int, device: torch.device, workers: int
    ):
        n, self.batch_size = len(files), training["batch_size"]
        self.images, self.labels, self.scale = files, labels, training["crop_scale"]
        self.seed, self.device, self.workers = seed, device, workers
        self.steps = n // self.batch_size if training["drop_last"] else -(-n // self.batch_size)
        if self.steps == 0:
            raise ValueError(f"batch_size {self.batch_size} with drop_last leaves no batch of {n} training images")

    def epoch(self, epoch: int, first: int = 0):
        """Yield (step, uint8 images, labels, CPU generator of the batch's draws) from step ``first`` of an epoch."""
        order = torch.randperm(len(self.images), generator=generator(self.seed, "order", str(epoch)))
        parts = [order[s * self.batch_size : (s + 1) * self.batch_size] for s in range(first, self.steps)]
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(
            Crops(self.images, self.scale, self.seed, epoch),
            sampler=parts,
            batch_size=None,  # the sampler gives whole batches
            num_workers=self.workers,
            pin_memory=on_gpu,
            generator=generator(self.seed, "loader", str(epoch)),  # else it would draw from the global stream
        )
        for step, (index, images) in enumerate(zip(parts, loader), first):
            images = images.to(self.device, non_blocking=on_gpu)
            labels = self.labels.index_select(0, index.to(self.device))
            yield step, images, labels, generator(self.seed, "augment", f"{epoch}.{step}")
