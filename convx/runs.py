"""What a run consists of: its device, its data on that device, and its model built from the frozen recipe."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from convx import surgery
from convx.data import open_set
from convx.data.batches import Batches, Normalise, to_device
from convx.data.loader import FolderBatches, FolderImages
from convx.data.splits import training_rows
from convx.manifest import Failure
from convx.models import create_model
from convx.seeds import derive


def pick_device(wanted: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda"; a missing GPU is a recorded failure."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise Failure("device: the study asks for cuda and torch finds no GPU; set device: cpu or auto")
    return torch.device(wanted)


def set_numerics(training: dict) -> None:
    """Fix what decides bits besides the seed: thread count, TF32 and deterministic kernels."""
    torch.set_num_threads(training["threads"])
    tf32 = training["precision"] == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = False
    if training["compile"] == "none":
        torch.set_deterministic_debug_mode("warn")  # the same switch, without a second of importing the compiler
    else:
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and nothing here reads such memory


class NoBatches:
    """The batches of a run that trains nothing: it needs no training images."""

    images, steps, batch_size = (), 1, 1


@dataclass(frozen=True)
class RunData:
    """The data of a run: shape facts, normalisation, and access to its splits."""

    folder: Path
    meta: dict
    training: dict
    device: torch.device
    workers: int = 0

    @classmethod
    def open(cls, folder: str | Path, recipe: dict, device: torch.device) -> "RunData":
        workers = recipe["data"].get("workers", 0)
        return cls(Path(folder), open_set(folder).meta, recipe["training"], device, workers)

    @property
    def num_classes(self) -> int:
        return self.meta["num_classes"]

    @property
    def normalise(self) -> Normalise:
        return Normalise(self.meta["mean"], self.meta["std"], self.device, self.training["channels_last"])

    def train_batches(self, seed: int) -> "Batches | FolderBatches | NoBatches":
        """Return the training batches of one seed: the images on the device, or loaded from a folder by processes."""
        if self.training["epochs"] == 0:
            return NoBatches()
        images, labels = self.split("train")
        if (rows := training_rows(labels.cpu().numpy(), self.training["train_share"])) is not None:
            chosen = torch.as_tensor(rows, device=self.device)
            folder = isinstance(images, FolderImages)
            images = FolderImages(images.files.take(rows), self.device) if folder else images[chosen]
            labels = labels[chosen]
        if isinstance(images, FolderImages):
            return FolderBatches(images.files, labels, self.training, seed, self.device, self.workers)
        return Batches(images, labels, self.training["batch_size"], self.training["drop_last"], seed)

    def split(self, name: str) -> tuple[torch.Tensor | FolderImages, torch.Tensor]:
        """Return (uint8 images [N, C, H, W], labels [N]) of a split on the device; "validation" may be empty.

        The images of a folder stay there and come when they are sliced.
        """
        data = open_set(self.folder)
        if name == "validation" and not len(data.validation_indices):
            empty = torch.zeros(0, self.meta["channels"], 1, 1, dtype=torch.uint8, device=self.device)
            return empty, torch.zeros(0, dtype=torch.long, device=self.device)
        images, labels = data.split(name)
        labels = torch.as_tensor(labels, dtype=torch.long, device=self.device)
        if self.meta["kind"] == "folder":
            return FolderImages(images, self.device), labels
        return to_device(images, self.device), labels


def build_model(
    recipe: dict, meta: dict, start_weights: str | Path | None = None, pretrained: bool = True
) -> nn.Module:
    """Build the model of a run from its recipe, on the CPU.

    A run that starts from another one gets that run's model (with its surgery), then its weights if they are given, then
    its own surgery. Without ``start_weights`` the structure is right and the run's own weights can be loaded; with
    ``pretrained`` False so it is without the weights that the recipe's model starts from.
    """
    if start := recipe["start"]:
        model = build_model(start["recipe"], meta, pretrained=False)
        if start_weights is not None:
            load_weights(model, start_weights)
    else:
        torch.manual_seed(derive(recipe["seed"], "init"))
        facts = {"num_classes": meta["num_classes"], "in_channels": meta["channels"], "image_size": meta["image_size"]}
        facts |= recipe["model"]["settings"]
        if pretrained and recipe["model"].get("weights"):
            model = _pretrained(recipe["model"], meta, facts)
        else:
            model = create_model(recipe["model"]["name"], **facts)
    return surgery.apply(model, recipe["surgery"], recipe["seed"])


def _pretrained(wanted: dict, meta: dict, facts: dict) -> nn.Module:
    """Return a model with the weights of its recipe, which are those that the recipe was frozen with and fit the data set."""
    from convx.models.pretrained import load_pretrained, weights_digest

    if (found := weights_digest(wanted["weights"])) != wanted["weights_sha256"]:
        raise Failure(f"model.weights: {wanted['weights']} is another file than the recipe's (sha256 {found[:16]}...)")
    model, preprocessing = load_pretrained(wanted["name"], wanted["weights"], **facts)
    own = {key: preprocessing[key] for key in ("mean", "std") if key in preprocessing}
    ours = {key: meta[key] for key in own}
    if ours != own and meta["channels"] == len(own["mean"]) and meta["statistics_from"] != "the study":
        raise Failure(
            f"model.weights: they were trained with mean and std {own}, the data set has {ours}; set data.normalise"
        )
    return model


def build_teacher(recipe: dict, meta: dict, weights: str | Path | None = None) -> nn.Module | None:
    """Build the trained model that a run learns from, or None; without ``weights`` (for a timing) it is untrained."""
    if not (teacher := recipe.get("teacher")):
        return None
    with torch.random.fork_rng(devices=[]):
        model = build_model(teacher["recipe"], meta, pretrained=False)
    return model if weights is None else load_weights(model, weights)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a model's weights as safetensors, atomically; shared tensors are stored once."""
    from safetensors.torch import save_model

    from convx.manifest import atomic

    with atomic(path) as temporary:
        save_model(model, str(temporary))


def save_failed(path: str | Path, reason: str) -> None:
    """Write the placeholder that stands for the weights of a run that failed."""
    from safetensors.torch import save_file

    from convx.manifest import atomic

    with atomic(path) as temporary:
        save_file({}, str(temporary), metadata={"convx_failed": reason})


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Load weights strictly. The placeholder of a failed run is a recorded failure that carries its reason, and so are
    weights that were cut off."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_model

    try:
        with safe_open(str(path), framework="pt") as file:
            reason = (file.metadata() or {}).get("convx_failed")
    except SafetensorError as error:
        words = " ".join(str(error).split())
        raise Failure(f"{path}: the weights cannot be read ({words}); `convx retry` forgets them") from None
    if reason is not None:
        raise Failure(f"the training it needs failed: {reason}")
    load_model(model, str(path), strict=True)
    return model
