"""Prepare a data set once as uint8 arrays on disk, and open it memory-mapped.

A prepared folder holds ``train_images.npy`` and ``test_images.npy`` (uint8 [N, H, W, C]),
``train_labels.npy`` and ``test_labels.npy`` (int64 [N]), where they exist ``validation_indices.npy`` (int64,
into the training arrays) and ``test_boxes.npy``, and ``meta.json``, which is written last and makes the
folder valid. For image folders an index of files (``train_files.json``, ``test_files.json``) stands in place
of the images.

Every split and choice here is fixed: the same for each run seed, platform and library version.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convx.data.arrays import create, open_array
from convx.data.folder import DEFAULT_SIZE, ImageFiles, index_folder, resize_settings
from convx.data.pixels import pixel_statistics, resize_block
from convx.data.readers import READERS, RawSet
from convx.data.sets import SetFacts, facts_of, nearest
from convx.data.sources import Finder
from convx.data.splits import stratified_choice
from convx.locking import acquire

SCHEMA_VERSION = 1
META = "meta.json"
META_KEYS = ("kind", "sha256", "digest", "counts", "image_size", "channels", "num_classes", "mean", "std")
KEYS = {
    "name": None,
    "path": None,
    "image_size": None,
    "train_images": None,
    "test_images": None,
    "validation": 0,
    "resize": None,
    "classes": None,
    "lossy": False,
    "canvas": None,
    "workers": None,
    "normalise": None,
}
FOLDER_KEYS = ("path", "resize", "classes", "lossy")
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "test_boxes", "validation_indices")
OUR_FILES = (META, "train_files.json", "test_files.json", *(f"{a}.npy" for a in ARRAYS))


@dataclass(frozen=True)
class DataSet:
    """A prepared set: ``meta`` and its arrays, images memory-mapped (or decoded on access for image folders).

    ``train_images`` and ``test_images`` are uint8 [N, H, W, C], labels int64 [N], ``test_boxes`` float32 [N,
    4] (left, top, right, bottom in pixels of the prepared size, right and bottom exclusive) or None,
    ``validation_indices`` int64.
    """

    folder: Path
    meta: dict
    train_images: "np.ndarray | ImageFiles"
    train_labels: np.ndarray
    test_images: "np.ndarray | ImageFiles"
    test_labels: np.ndarray
    test_boxes: np.ndarray | None
    validation_indices: np.ndarray

    @property
    def digest(self) -> str:
        """Return the sha256 over the checksums of all arrays: equal digests mean equal images, labels and
        splits.
        """
        return self.meta["digest"]

    def indices(self, name: str) -> np.ndarray:
        """Return the rows of a split in its stored arrays (train and validation share one array)."""
        if name == "test":
            return np.arange(len(self.test_labels))
        if name == "validation":
            if not len(self.validation_indices):
                raise ValueError(f"{self.folder}: prepared without a validation split; set data.validation above 0")
            return self.validation_indices
        if name == "train":
            if not len(self.train_labels):
                raise ValueError(f"{self.folder}: prepared without training images, for evaluation only")
            return np.setdiff1d(np.arange(len(self.train_labels)), self.validation_indices)
        raise ValueError(f"split {name!r} is unknown; {nearest(name, ('train', 'validation', 'test'))}")

    def split(self, name: str):
        """Return (images, labels) of "train" (without the validation images), "validation" or "test".

        Whole arrays come as the memory map itself, parts of one as a copy in memory.
        """
        images = self.test_images if name == "test" else self.train_images
        labels = self.test_labels if name == "test" else self.train_labels
        rows = self.indices(name)
        if len(rows) == len(labels):
            return images, labels
        return (images.take(rows) if isinstance(images, ImageFiles) else images[rows]), labels[rows]


def open_set(folder: str | Path) -> DataSet:
    """Open a prepared folder; images stay on disk until they are read.

    Raises ValueError where the folder is not a prepared set, or its arrays do not have the shapes that
    ``meta.json`` names.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / META).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder}: not a prepared data set ({META} is missing); prepare it first") from None
    except ValueError as error:
        raise ValueError(f"{folder / META}: not valid JSON ({error}); prepare the set again") from None
    if not isinstance(meta, dict) or meta.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{folder / META}: not of schema version {SCHEMA_VERSION}; prepare the set again")
    if missing := [key for key in META_KEYS if key not in meta]:
        raise ValueError(f"{folder / META}: the key {missing[0]!r} is missing; prepare the set again")
    loaded = {}
    for array in ARRAYS:
        path = folder / f"{array}.npy"
        if path.name in meta["sha256"]:
            loaded[array] = open_array(path, array.endswith("images"), "prepare the set again")
    size, channels = meta["image_size"], meta["channels"]
    for split in ("train", "test"):
        n = meta["counts"][split]
        labels = loaded.setdefault(f"{split}_labels", np.zeros(0, np.int64))
        if meta["kind"] == "folder":
            loaded[f"{split}_images"] = ImageFiles.open(folder, split, meta)
        images = loaded.setdefault(f"{split}_images", np.zeros((0, size, size, channels), np.uint8))
        if images.shape != (n, size, size, channels) or labels.shape != (n,):
            raise ValueError(
                f"{folder}: {split} arrays have shapes {images.shape} and {labels.shape}, {META} says "
                f"{(n, size, size, channels)}; prepare the set again"
            )
        _in_range(labels, meta["num_classes"], f"{folder / split}_labels.npy")
    validation = loaded.pop("validation_indices", np.zeros(0, np.int64))
    _in_range(validation, meta["counts"]["train"], f"{folder}/validation_indices.npy")
    return DataSet(folder, meta, test_boxes=loaded.pop("test_boxes", None), validation_indices=validation, **loaded)


def _in_range(values: np.ndarray, end: int, where: str) -> None:
    """Check that an array holds whole numbers of 0..end - 1."""
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"{where}: {values.dtype} {values.shape} found, a list of whole numbers is needed")
    if len(values) and not (values.min() >= 0 and values.max() < end):
        raise ValueError(f"{where}: runs {values.min()}..{values.max()}, not 0..{end - 1}; prepare the set again")


def prepare(
    settings: dict,
    out: str | Path,
    mirrors: Sequence[str] = (),
    progress: bool = True,
    downloads: str | Path | None = None,
) -> dict:
    """Write the data set that ``settings`` (the ``data`` block of a study) names into ``out`` and return its
    meta data.

    ``mirrors`` (folders or URLs) are searched after those of the environment variable ``CONVX_MIRROR`` and
    before the official addresses. ``downloads`` keeps what was fetched, for a restart and for other sizes of
    the same set (default: the folder ``downloads`` beside ``out``). A run that is killed leaves what was
    there before, or, in the instant in which an earlier set is replaced, a folder without ``meta.json``.

    Raises ValueError with one line for a wrong key or value, and for a set that none of the sources could
    provide.
    """
    settings = check_settings(settings)
    facts, out = facts_of(settings["name"]), Path(out).expanduser().resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; name a folder for the prepared set")
    # One writer a target; the lock dies with its process, so that a killed run never blocks the next one.
    with acquire(out.parent / f".{out.name}.lock", f"waiting for another process that prepares {out}"):
        partial = out.parent / f".{out.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            if facts.name == "folder":
                meta = _write_folder(settings, facts, partial, mirrors)
            else:
                finder = Finder.from_environment(mirrors, Path(downloads or out.parent / "downloads"), progress)
                raw = READERS[facts.name](facts, finder, settings)
                meta = _write_arrays(settings, facts, raw, partial, progress)
            _write_meta(partial, meta)
            _publish(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return meta


def check_settings(settings: dict) -> dict:
    """Return the settings with their defaults; ValueError names the first wrong key and what is right."""
    for key in settings:
        if key not in KEYS:
            raise ValueError(f"data.{key}: unknown key; {nearest(key, KEYS)}")
    settings = KEYS | settings
    facts_of(settings["name"])
    for key, low in (("image_size", 4), ("train_images", 0), ("test_images", 1)):
        value = settings[key]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise ValueError(f"data.{key}: {value!r} is not a whole number of at least {low} (null for the default)")
    share = settings["validation"] = settings["validation"] or 0
    if (
        isinstance(share, bool)
        or not isinstance(share, (int, float))
        or share < 0
        or (share > 1 and share != int(share))
    ):
        raise ValueError(f"data.validation: {share!r} is neither a share below 1 nor a number of training images")
    if share and settings["train_images"] == 0 and settings["name"] != "folder":
        raise ValueError("data.validation: there is nothing to set aside with train_images: 0")
    if own := settings["normalise"]:
        channels = facts_of(settings["name"]).channels
        for key in ("mean", "std"):
            if len(own[key]) != channels:
                raise ValueError(
                    f"data.normalise.{key}: {len(own[key])} numbers, {settings['name']} has {channels} channels"
                )
    if settings["canvas"] and settings["name"] != "canvas":
        raise ValueError(f"data.canvas: only the set `canvas` takes it, not {settings['name']}")
    if settings["name"] == "folder":
        if not settings["path"]:
            raise ValueError("data.path: missing; the set `folder` needs the root of its images")
        settings["resize"] = resize_settings(settings["resize"], settings["image_size"] or DEFAULT_SIZE)
    else:
        for key in FOLDER_KEYS:
            if settings[key]:
                raise ValueError(f"data.{key}: only the set `folder` takes it, not {settings['name']}")
    return settings


def _choose(labels: np.ndarray, wanted: int | None, split: str, name: str) -> np.ndarray:
    """Return the chosen rows, ascending (the official order is kept): all, or a class-stratified choice of
    ``wanted``.
    """
    if wanted is None or wanted == len(labels):
        return np.arange(len(labels))
    if wanted > len(labels):
        raise ValueError(f"data.{split}_images: {wanted:,} wanted, {name} has {len(labels):,}")
    return stratified_choice(labels, wanted, f"{name}/{split}")


def _carve(labels: np.ndarray, share: float, name: str) -> np.ndarray:
    """Return the rows of the training arrays that are held out (``share`` or number), ascending."""
    count = round(share * len(labels)) if share < 1 else int(share)
    if count == 0 and share == 0:
        return np.zeros(0, np.int64)
    if not 0 < count < len(labels):
        raise ValueError(f"data.validation: {share} takes {count:,} of {len(labels):,} images; leave one each side")
    return stratified_choice(labels, count, f"{name}/validation")


def _write_arrays(settings: dict, facts: SetFacts, raw: RawSet, folder: Path, progress: bool) -> dict:
    """Write the arrays of a small set block by block (memory stays small whatever the set's size); return its
    meta data.
    """
    size = settings["image_size"] or facts.image_size
    counts = {}
    for split in ("train", "test"):
        rows = _choose(raw.labels[split], settings[f"{split}_images"], split, facts.name)
        counts[split] = len(rows)
        if not len(rows):
            continue
        np.save(folder / f"{split}_labels.npy", raw.labels[split][rows].astype(np.int64))
        images = create(folder / f"{split}_images.npy", (len(rows), size, size, facts.channels))
        with tqdm(total=len(rows), desc=f"{facts.name} {split}", unit=" images", disable=not progress) as bar:
            for places, block in raw.blocks(split, rows):
                images[places] = resize_block(block, size)
                bar.update(len(block))
        images.flush()
        del images
        if split == "train":
            _save_validation(folder, raw.labels["train"][rows], settings, facts.name)
        elif raw.test_boxes is not None:
            # Pixel edges scale with the image; the boxes are half-open, so no half pixel is lost.
            np.save(
                folder / "test_boxes.npy",
                (raw.test_boxes[rows] * (size / raw.native_size)).astype(np.float32),
            )
    mean, std = facts.mean, facts.std
    if mean is None:  # over the whole training split, so that a smaller choice is normalised the same way
        mean, std = pixel_statistics(
            resize_block(block, size) for _, block in raw.blocks("train", np.arange(len(raw.labels["train"])))
        )
    native = raw.native_size
    resized = "" if size == native else f"; resized from {native}x{native} to {size}x{size}, bilinear (Pillow)"
    return _meta(settings, facts, size, counts, raw.class_names, mean, std) | {
        "kind": "arrays",
        "source": raw.source,
        "lossy": False,
        "provenance": raw.provenance + resized,
        **raw.extra,
    }


def _found(path: str | None, mirrors: Sequence[str]) -> str | None:
    """Return a path as it is, or below the first mirror folder that has it where it is relative and not here."""
    if not path or Path(path).expanduser().exists():
        return path
    places = Finder.from_environment(mirrors, Path("unused")).mirror_folders()
    return next((str(place / path) for place in places if (place / path).exists()), path)


def _write_folder(settings: dict, facts: SetFacts, folder: Path, mirrors: Sequence[str] = ()) -> dict:
    """Write the index of an image folder, no pixel; return its meta data.

    Of a folder without training images, what is set aside comes from its other images, which then are no test images.
    """
    index = index_folder(Path(_found(settings["path"], mirrors)), _found(settings["classes"], mirrors))
    rows = {s: _choose(index.splits[s][1], settings[f"{s}_images"], s, "folder") for s in ("train", "test")}
    files = {s: np.array(index.splits[s][0], dtype=object)[rows[s]] for s in rows}
    labels = {s: index.splits[s][1][rows[s]] for s in rows}
    if settings["validation"] and not len(labels["train"]):
        aside = _carve(labels["test"], settings["validation"], "folder")
        files["train"], labels["train"] = files["test"][aside], labels["test"][aside]
        files["test"], labels["test"] = np.delete(files["test"], aside), np.delete(labels["test"], aside)
        np.save(folder / "validation_indices.npy", np.arange(len(aside)))
    elif len(labels["train"]):
        _save_validation(folder, labels["train"], settings, "folder")
    counts = {}
    for split in ("train", "test"):
        counts[split] = len(labels[split])
        if counts[split]:
            np.save(folder / f"{split}_labels.npy", labels[split])
            entries = [index.tree.entry(name) for name in files[split]]
            (folder / f"{split}_files.json").write_text(
                json.dumps({"resize": settings["resize"], "files": entries}, indent=0)
            )
    return _meta(settings, facts, settings["resize"]["size"], counts, index.class_names, facts.mean, facts.std) | {
        "kind": "folder",
        "root": str(index.root),
        "resize": settings["resize"],
        "class_ids": index.class_names,
        "source": {
            "kind": "folder",
            "files": [],
            "checksums": "none: names, sizes and labels are indexed, not contents",
        },
        "lossy": bool(settings["lossy"]),
        "provenance": f"image folder with splits {index.found}; decoded on access as RGB",
    }


def _save_validation(folder: Path, labels: np.ndarray, settings: dict, name: str) -> None:
    rows = _carve(labels, settings["validation"], name)
    if len(rows):
        np.save(folder / "validation_indices.npy", rows)


def _meta(settings: dict, facts: SetFacts, size: int, counts: dict, class_names, mean, std) -> dict:
    own = settings["normalise"] or {"mean": mean, "std": std}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": facts.name,
        "image_size": size,
        "channels": facts.channels,
        "num_classes": len(class_names),
        "class_names": list(class_names),
        "mean": [float(m) for m in own["mean"]],
        "std": [float(s) for s in own["std"]],
        "statistics_from": "the study" if settings["normalise"] else facts.statistics_from,
        "counts": counts,
        "licence": facts.licence,
        "settings": {k: settings[k] for k in ("train_images", "test_images", "validation")},
    }


def _write_meta(folder: Path, meta: dict) -> None:
    """Add the checksums of all written files and their digest, and write ``meta.json``."""
    sums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    meta["counts"]["validation"] = 0
    if "validation_indices.npy" in sums:
        meta["counts"]["validation"] = len(np.load(folder / "validation_indices.npy"))
    meta["sha256"] = sums
    meta["digest"] = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    (folder / META).write_text(json.dumps(meta, indent=1) + "\n")
    for path in folder.iterdir():  # on the disk before the folder has its name: a power cut leaves no empty array
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _publish(partial: Path, out: Path) -> None:
    """Move a finished folder to its place.

    Over an absent or empty target this is one rename. Over an earlier set our files are replaced one by one,
    ``meta.json`` taken away first and put back last: no reader meets a half-new set, and what else lives in
    the folder stays.
    """
    try:
        os.rename(partial, out)
        return
    except OSError:
        if not (out.is_dir() and any(out.iterdir())):
            raise
    (out / META).unlink(missing_ok=True)
    for name in OUR_FILES[1:]:
        if (partial / name).exists():
            os.replace(partial / name, out / name)
        else:
            (out / name).unlink(missing_ok=True)
    os.replace(partial / META, out / META)


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
