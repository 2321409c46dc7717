"""Image folders: `<root>/{train,val|validation|test}/<class>/*`, or a root of class folders (evaluation
only). The root may be an uncompressed tar archive of such a folder, which is read in place.

Kept as an index of files and labels; pixels are decoded when they are asked for.
"""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convx.data.pictures import read_rgb
from convx.data.sets import nearest

DEFAULT_SIZE = 224
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
TEST_FOLDERS = ("val", "validation", "test")
RESIZE = {"short_side": None, "crop": "center", "interpolation": "bilinear"}


@dataclass(frozen=True)
class FolderIndex:
    """Files (relative to ``root``) and int64 labels of the splits "train" and "test"; ``found`` says where
    they were.
    """

    root: Path
    class_names: list[str]
    splits: dict[str, tuple[list[str], np.ndarray]]
    found: str
    tree: "DiskTree | ArchiveTree"


def resize_settings(value: dict | None, size: int) -> dict:
    """Return the complete resize settings of an image folder: size, short_side, crop, interpolation.

    The short side is resized to ``short_side`` (default: size / 0.875, 256 for 224), then a square of
    ``size`` is cropped from the centre; with ``crop: none`` the whole image is squashed to the square.
    ValueError names a wrong key or value.
    """
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"data.resize: {value!r} is not a mapping of {', '.join(RESIZE)}")
    for key in value or {}:
        if key not in RESIZE:
            raise ValueError(f"data.resize.{key}: unknown key; {nearest(key, RESIZE)}")
    resize = RESIZE | (value or {}) | {"size": size}
    for key, words in (("crop", ("center", "none")), ("interpolation", ("bilinear", "bicubic"))):
        if resize[key] not in words:
            raise ValueError(f"data.resize.{key}: {resize[key]!r} is unknown; {nearest(resize[key], words)}")
    short = resize["short_side"] = resize["short_side"] or round(size / 0.875)
    if isinstance(short, bool) or not isinstance(short, int) or short < size:
        raise ValueError(f"data.resize.short_side: {short!r} is not a whole number of at least image_size ({size})")
    return resize


def index_folder(root: Path, classes: str | None = None) -> FolderIndex:
    """List the images of a folder by split and class, in sorted order.

    Labels follow the sorted names of the class folders, or the lines of the text file ``classes`` (one folder
    name a line, in the order of a model's outputs), which may name classes without a folder. ValueError says
    what is missing.
    """
    root = root.expanduser().absolute()
    tree = ArchiveTree(root) if root.is_file() else DiskTree(root)
    if root.is_file() and not tree.members:
        raise ValueError(f"data.path: {root} is neither a folder nor an uncompressed tar archive of images")
    if not root.exists():
        raise ValueError(f"data.path: {root} is not a folder")
    _classes, _images = tree.classes, tree.images
    train = root / "train"
    test = next((root / name for name in TEST_FOLDERS if _classes(root / name)), None)
    if _classes(train) and test is None:
        raise ValueError(f"data.path: {root} holds train/ but no class folders in {', '.join(TEST_FOLDERS)}")
    if test is None:
        test = root
    places = {"train": train, "test": test} if _classes(train) else {"test": test}
    if not _classes(test):
        raise ValueError(
            f"data.path: {root} holds no class folders; expected train/<class>/ and val/<class>/, or <class>/"
        )
    if classes:
        names = [line.strip() for line in _lines(Path(classes)) if line.strip()]
        if len(set(names)) != len(names):
            raise ValueError(f"data.classes: {classes} names a class twice")
    else:
        names = _classes(places.get("train", test))
    splits = {"train": ([], np.zeros(0, np.int64))}
    for split, place in places.items():
        unknown = sorted(set(_classes(place)) - set(names))
        if unknown:
            where = f"in {classes}" if classes else f"in {train}"
            raise ValueError(f"data.path: class {place / unknown[0]} is not {where}; {nearest(unknown[0], names[:50])}")
        files, labels = [], []
        for name in _classes(place):
            images = _images(place / name)
            if not images:
                raise ValueError(f"data.path: class folder {place / name} holds no image ({', '.join(SUFFIXES)})")
            files += [path.relative_to(root).as_posix() for path in images]
            labels += [names.index(name)] * len(images)
        splits[split] = (files, np.array(labels, np.int64))
    if len(names) < 2:
        where = classes or places.get("train", test)
        raise ValueError(f"data.path: {where} has one class ({names[0]}); a classifier needs two or more")
    found = ", ".join(f"{split}: {'.' if p == root else p.name}/" for split, p in places.items())
    return FolderIndex(root, names, splits, found, tree)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


class DiskTree:
    """The class folders and images below a folder."""

    def __init__(self, root: Path):
        self.root = root

    def classes(self, place: Path) -> list[str]:
        if not place.is_dir():
            return []
        return sorted(e.name for e in os.scandir(place) if e.is_dir() and not e.name.startswith("."))

    def images(self, place: Path) -> list[Path]:
        found = []
        for folder, _, files in os.walk(place):
            found += [Path(folder) / f for f in files if _is_image(f)]
        return sorted(found)

    def entry(self, name: str) -> list:
        """Return what the index keeps of a file: name and size."""
        return [name, (self.root / name).stat().st_size]


class ArchiveTree:
    """The same of an uncompressed tar archive: nothing is extracted, pictures are read where they lie."""

    def __init__(self, root: Path):
        self.root = root
        self.members: dict[str, tuple[int, int]] = {}  # name -> (offset, size)
        try:
            with tarfile.open(root, "r:") as archive:
                for member in archive:
                    name = os.path.normpath(member.name)
                    if member.isfile() and _is_image(os.path.basename(name)) and not name.startswith(("/", "..")):
                        self.members[name] = member.offset_data, member.size
        except tarfile.TarError:
            pass

    def _below(self, place: Path) -> list[tuple[str, ...]]:
        above = place.relative_to(self.root).parts
        parts = [Path(name).parts for name in self.members]
        return [p[len(above) :] for p in parts if p[: len(above)] == above]

    def classes(self, place: Path) -> list[str]:
        return sorted({parts[0] for parts in self._below(place) if len(parts) > 1 and not parts[0].startswith(".")})

    def images(self, place: Path) -> list[Path]:
        return sorted(place.joinpath(*parts) for parts in self._below(place))

    def entry(self, name: str) -> list:
        """Return what the index keeps of a file: name, size and offset in the archive."""
        offset, size = self.members[name]
        return [name, size, offset]


def _lines(path: Path) -> list[str]:
    try:
        return path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data.classes: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None


class ImageFiles:
    """Images of a folder that read like a uint8 array [N, S, S, 3]: ``len``, ``shape`` and indexing by row,
    slice or rows. Several rows are decoded by threads: Pillow lets go of Python's lock.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, root: Path, files: Sequence[str], resize: dict, places: Sequence[tuple[int, int]] | None = None):
        self.root, self.files, self.resize = root, list(files), resize
        self.places = places  # (offset, size) of each file where the root is an archive
        self.shape = (len(self.files), resize["size"], resize["size"], 3)

    @classmethod
    def open(cls, folder: Path, split: str, meta: dict) -> "ImageFiles":
        """Open the index of one split of a prepared folder (empty where the split has none)."""
        path = folder / f"{split}_files.json"
        entries = json.loads(path.read_text())["files"] if path.name in meta["sha256"] else []
        places = [(entry[2], entry[1]) for entry in entries if len(entry) > 2]
        return cls(Path(meta["root"]), [entry[0] for entry in entries], meta["resize"], places or None)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, rows) -> np.ndarray:
        if isinstance(rows, (int, np.integer)):
            return np.asarray(fit(self.picture(rows), self.resize))
        wanted = np.arange(len(self.files))[rows]
        out = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for place, image in enumerate(pool.map(self.__getitem__, wanted)):
                out[place] = image
        return out

    def take(self, rows) -> "ImageFiles":
        """Return the images of some rows, still undecoded."""
        places = [self.places[i] for i in rows] if self.places else None
        return ImageFiles(self.root, [self.files[i] for i in rows], self.resize, places)

    def picture(self, row: int):
        """Return one image as a Pillow RGB picture in its own size (for crops at random places)."""
        path = self.root / self.files[row]
        try:
            return read_rgb(self._bytes(row) if self.places else path, str(path))
        except ValueError as error:
            raise ValueError(f"{error}; mend or remove it and prepare again") from None

    def _bytes(self, row: int) -> io.BytesIO:
        offset, size = self.places[row]
        with open(self.root, "rb") as archive:
            archive.seek(offset)
            return io.BytesIO(archive.read(size))


def fit(picture, resize: dict):
    """Resize and crop a Pillow picture to the square that ``resize`` (see :func:`resize_settings`) describes.

    Sizes are rounded as torchvision's Resize and CenterCrop round them.
    """
    from PIL import Image

    size, short = resize["size"], resize["short_side"]
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[resize["interpolation"]]
    width, height = picture.size
    if resize["crop"] == "none":
        return picture if (width, height) == (size, size) else picture.resize((size, size), method)
    new = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    if new != (width, height):
        picture = picture.resize(new, method)
    left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
    return picture.crop((left, top, left + size, top + size))
