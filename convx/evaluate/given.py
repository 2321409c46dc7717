"""Any model with weights from anywhere, on any folder of images: what `convx evaluate --model NAME` measures.

Pictures are brought to size as the weights want it (timm's ``pretrained_cfg``) unless the caller says otherwise. Nothing is
trained and nothing is kept.
"""

import contextlib
import math
import tarfile
import tempfile
from pathlib import Path

from convx.data.folder import SUFFIXES, ImageFiles, index_folder, resize_settings
from convx.data.sources import DAMAGE, check_size

INTERPOLATIONS = ("bicubic", "bilinear")
PREPROCESSING = ("size", "crop_fraction", "interpolation", "mean", "std")  # what a caller may set


def run(
    model: str,
    weights: str,
    data: str,
    classes: str | None = None,
    images: int | None = None,
    batch_size: int = 100,
    device: str = "auto",
    **wanted,
) -> dict:
    """Return {"model", "weights", "weights_sha256", "data", "images", "preprocessing", "rows"}.

    ``model``: a name of :func:`convx.models.create_model`, timm's with or without ``timm/``. ``weights`` as for
    :func:`convx.models.pretrained.weights_file`. ``data``: a folder of class folders (or with ``val/``), or a tar of one.
    ``classes``: a file with the names of the class folders in the order of the model's outputs; by default that of
    ImageNet-1k where all folders carry its identifiers, else the folders in order, which must then be as many as the model's
    outputs. Pictures that all have the size of the model already are taken as they are, as ImageNet-C's are, unless a
    ``crop_fraction`` is given. ``images``: only so many, evenly spaced. ``wanted``: what replaces the preprocessing of the
    weights, None nothing: ``size`` in pixels, ``crop_fraction``, ``interpolation``, ``mean`` and ``std`` of pixels in 0..1.

    Raises ValueError with one line for anything that does not fit.
    """
    import numpy as np
    import torch

    from convx.evaluate import EvaluationData, accuracy, cost
    from convx.models.pretrained import load_pretrained, weights_digest

    name, device = full_name(model), _device(device)
    with opened(data) as root, tempfile.TemporaryDirectory(prefix="convx-") as scratch:
        network, found = load_pretrained(name, weights)
        settings = preprocessing(found, wanted)
        index = index_folder(root, classes or imagenet_classes(root, Path(scratch)))
        files, labels = index.splits["test"]
        rows = (
            np.arange(len(files))
            if images is None
            else np.unique(np.linspace(0, len(files) - 1, images).round().astype(int))
        )
        chosen = [files[i] for i in rows]
        if wanted.get("crop_fraction") is None and _of_size(index.root, chosen, settings["size"]):
            settings |= {"crop_fraction": 1.0, "crop": "none"}
        pictures = ImageFiles(index.root, chosen, resize_of(settings))
        network = network.to(device).eval()
        with torch.inference_mode():
            outputs = network(torch.zeros(1, 3, settings["size"], settings["size"], device=device)).shape[-1]
        if len(index.class_names) != outputs:
            raise ValueError(
                f"--data: {len(index.class_names)} classes, {name} has {outputs} outputs; name the classes of all outputs in "
                "order, one a line, with --classes FILE"
            )
        test = EvaluationData.from_arrays(pictures, labels[rows], settings["mean"], settings["std"], device, batch_size)
        result = accuracy.run(network, test) + cost.run(network, test)
    kept = ("top1", "top5", "nll", "ece", "parameters", "macs")
    return {
        "model": name,
        "weights": str(weights),
        "weights_sha256": weights_digest(weights),
        "data": str(data),
        "images": len(rows),
        "preprocessing": settings,
        "rows": [row for row in result.rows if row["metric"] in kept],
    }


def full_name(model: str) -> str:
    """Return the name of a model with ``timm/`` before it where timm alone knows it; ValueError for an unknown one."""
    from convx.models import check_name, timm_names

    name = f"timm/{model}" if "/" not in model and model.split(".")[0] in timm_names() else model
    check_name(name)
    return name


def preprocessing(found: dict, wanted: dict) -> dict:
    """Return size, crop_fraction, interpolation, mean and std: the caller's where given, else those of the weights."""
    settings = {key: found.get(key) if wanted.get(key) is None else wanted[key] for key in PREPROCESSING}
    missing = [key for key, value in settings.items() if value is None]
    if missing:
        options = ", ".join("--" + key.replace("_", "-") for key in missing)
        raise ValueError(f"the weights say nothing of their images; give {options}")
    if found.get("crop_mode", "center") != "center" and settings["crop_fraction"] != 1:
        raise ValueError(
            f"crop mode {found['crop_mode']} of the weights is not offered; give --crop-fraction 1 to squash whole images"
        )
    if settings["interpolation"] not in INTERPOLATIONS:
        raise ValueError(
            f"interpolation {settings['interpolation']!r} is not offered; give --interpolation {' or '.join(INTERPOLATIONS)}"
        )
    if not 0 < settings["crop_fraction"] <= 1:
        raise ValueError(f"--crop-fraction: {settings['crop_fraction']} should be above 0 and at most 1")
    squash = settings["crop_fraction"] == 1 and found.get("crop_mode") == "squash"
    return settings | {"crop": "none" if squash else "center"}


def resize_of(settings: dict) -> dict:
    """Return the resize settings; the short side is rounded down, as timm does."""
    size, short = settings["size"], math.floor(settings["size"] / settings["crop_fraction"])
    value = {"short_side": short, "crop": settings["crop"], "interpolation": settings["interpolation"]}
    return resize_settings(value, size)


def _of_size(root: Path, files: list[str], size: int) -> bool:
    """Return whether every picture is a square of ``size`` pixels; only their heads are read."""
    from PIL import Image

    def sides(file: str) -> tuple[int, int]:
        try:
            with Image.open(root / file) as picture:
                return picture.size
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return 0, 0  # whoever decodes it says what is wrong

    return all(sides(file) == (size, size) for file in files)


def imagenet_classes(root: Path, scratch: Path) -> str | None:
    """Return a file with the identifiers of ImageNet-1k's classes, where all class folders are of them, else None."""
    from timm.data import ImageNetInfo

    known = ImageNetInfo("imagenet-1k").label_names()
    place = next((root / name for name in ("val", "validation", "test") if (root / name).is_dir()), root)
    names = {entry.name for entry in place.iterdir() if entry.is_dir()}
    if not names or not names <= set(known):
        return None
    file = scratch / "imagenet-1k"
    file.write_text("\n".join(known))
    return str(file)


def _device(wanted: str):
    from convx.manifest import Failure
    from convx.runs import pick_device

    try:
        return pick_device(wanted)
    except Failure as error:
        raise ValueError(str(error)) from None


@contextlib.contextmanager
def opened(data: str):
    """Yield the folder of class folders that ``data`` is, or that a tar holds; of a tar only images are unpacked.

    Where a folder holds nothing but one other folder, that one is taken.
    """
    place = Path(data).expanduser()
    if place.is_dir():
        yield place.absolute()
        return
    if not place.is_file() or not tarfile.is_tarfile(place):
        raise ValueError(f"--data: {place} is neither a folder nor a tar archive")
    with tempfile.TemporaryDirectory(prefix="convx-") as root:
        try:
            with tarfile.open(place) as archive:
                for member in archive:
                    if member.isfile() and member.name.lower().endswith(SUFFIXES):
                        check_size(member.name, member.size)
                        archive.extract(member, root, filter="data")
                # To the end of the file: a checksum stands there, and tarfile takes a broken member for the end.
                while rest := archive.fileobj.read(2**20):
                    if rest.strip(b"\0"):
                        raise tarfile.ReadError("a member in the midst of it is damaged")
        except DAMAGE as error:
            raise ValueError(f"--data: {place} cannot be unpacked ({type(error).__name__}: {error})") from None
        found = Path(root)
        while (
            len(inside := list(found.iterdir())) == 1
            and inside[0].is_dir()
            and any(e.is_dir() for e in inside[0].iterdir())
        ):
            found = inside[0]
        yield found
