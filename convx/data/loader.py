"""Images of a folder that are too many to live on the device: decoded when a batch needs them, by processes or threads.

Batches are the same uint8 tensors x_NCHW that small sets give, so objectives do not know the difference. A crop depends
on (seed, epoch, index of the image) alone: neither the number of processes nor a restart in mid-epoch changes a bit.
"""

import contextlib
import multiprocessing
import random
import time

import numpy as np
import torch
from PIL import Image
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

    Of the recipe: ``crop_scale`` (smallest, largest) is the share of the picture's area that a crop covers, None takes the
    evaluation's crop; then ``color_jitter`` and timm's ``auto_augment``.
    """

    def __init__(self, files: ImageFiles, training: dict, seed: int, epoch: int):
        self.files, self.seed, self.epoch, self.crops, self.changes = files, seed, epoch, [], []
        size, own = files.resize["size"], files.resize["interpolation"]
        if training["crop_scale"] is not None:
            from torchvision.transforms import InterpolationMode, v2

            names = training["crop_interpolation"] or own
            methods = ("bilinear", "bicubic") if names == "random" else (names,)
            scale = tuple(training["crop_scale"])
            self.crops = [v2.RandomResizedCrop(size, scale, ASPECT, InterpolationMode(m)) for m in methods]
        if jitter := training["color_jitter"]:
            from torchvision.transforms import v2

            self.changes.append(v2.ColorJitter(jitter, jitter, jitter))
        if policy := training["auto_augment"]:
            self.changes.append(timm_policy(policy, size, own))

    def __getitem__(self, indices) -> torch.Tensor:
        states = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(
            devices=[]
        ):  # torchvision draws from the global stream, timm from Python's and NumPy's
            images = np.stack([self.image(int(index)) for index in indices])
        random.setstate(states[0])
        np.random.set_state(states[1])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    def image(self, index: int) -> np.ndarray:
        """Return one crop, uint8 [H, W, C]."""
        if self.crops:
            torch.manual_seed(derive(self.seed, "crop", f"{self.epoch}.{index}"))
            choice = derive(self.seed, "interpolation", f"{self.epoch}.{index}") % len(self.crops)
            picture = self.crops[choice](self.files.picture(index))
        else:
            picture = Image.fromarray(self.files[index])
        if self.changes:
            number = derive(self.seed, "change", f"{self.epoch}.{index}")
            torch.manual_seed(number)
            random.seed(number)
            np.random.seed(number % 2**32)
        for change in self.changes:
            picture = change(picture)
        return np.asarray(picture)


def timm_policy(name: str, size: int, interpolation: str):
    """Return timm's augmentation of a Pillow picture by its name, e.g. rand-m9-mstd0.5-inc1."""
    from timm.data import auto_augment

    made = {"rand": auto_augment.rand_augment_transform, "augmix": auto_augment.augment_and_mix_transform}
    make = made.get(name.split("-")[0], auto_augment.auto_augment_transform)
    grey = (124, 116, 104)  # ImageNet's mean, which fills what a shift or a rotation uncovers
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    return make(name, {"translate_const": int(size * 0.45), "img_mean": grey, "interpolation": method})


def _watched(loader: DataLoader):
    """Yield the batches of a loader; a process of it that dies while it hands one over is told as any other that dies."""
    batches = iter(loader)
    processes = multiprocessing.active_children()
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:
        if not loader.num_workers:
            raise
        # torch tells of a dead process by a signal of its own, which may come now or at any later line, the reporting of this
        # very error included: so let it come here, or be without a subject once the process has been waited for.
        with contextlib.suppress(RuntimeError):
            until = time.monotonic() + 5
            while all(process.is_alive() for process in processes) and time.monotonic() < until:
                time.sleep(0.01)
        raise RuntimeError("DataLoader worker exited unexpectedly") from error


class FolderBatches:
    """The training images of a folder in an order drawn anew for each epoch: what ``Batches`` is for small sets.

    ``workers`` processes decode ahead (0: this one). Flips and what else a recipe names come later, on the device.
    ``rows`` takes from a batch what this process has of it; all, unless several processes share the run.
    """

    rows = staticmethod(lambda index: index)

    def __init__(
        self, files: ImageFiles, labels: torch.Tensor, training: dict, seed: int, device: torch.device, workers: int
    ):
        n, self.batch_size = len(files), training["batch_size"]
        self.images, self.labels, self.training = files, labels, training
        self.seed, self.device, self.workers = seed, device, workers
        self.steps = n // self.batch_size if training["drop_last"] else -(-n // self.batch_size)
        if self.steps == 0:
            raise ValueError(f"batch_size {self.batch_size} with drop_last leaves no batch of {n} training images")

    def epoch(self, epoch: int, first: int = 0):
        """Yield (step, uint8 images, labels, CPU generator of the batch's draws) from step ``first`` of an epoch."""
        order = torch.randperm(len(self.images), generator=generator(self.seed, "order", str(epoch)))
        size = self.batch_size
        parts = [self.rows(order[step * size : (step + 1) * size]) for step in range(first, self.steps)]
        on_gpu = self.device.type == "cuda"
        loader = DataLoader(
            Crops(self.images, self.training, self.seed, epoch),
            sampler=parts,
            batch_size=None,  # the sampler gives whole batches
            num_workers=self.workers,
            pin_memory=on_gpu,
            generator=generator(self.seed, "loader", str(epoch)),  # else it would draw from the global stream
        )
        for step, (index, images) in enumerate(zip(parts, _watched(loader)), first):
            images = images.to(self.device, non_blocking=on_gpu)
            labels = self.labels.index_select(0, index.to(self.device))
            yield step, images, labels, generator(self.seed, "augment", f"{epoch}.{step}")
