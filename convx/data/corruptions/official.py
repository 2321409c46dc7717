"""The published corrupted sets: CIFAR-10-C, CIFAR-100-C (arrays) and ImageNet-C (folders of JPEG files).

`ARCHIVES` holds the checksums of the published files for whoever downloads them; `open_official` reads the
unpacked folders, with the mapping interface of the regenerated sets: corruption -> uint8 [5, N, H, W, C].
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convx.data.arrays import open_array
from convx.data.corruptions.constants import EXTRA, MAIN, SEVERITIES
from convx.data.pictures import read_rgb


@dataclass(frozen=True)
class Archive:
    """A published tar: Zenodo record, file name, size in bytes, checksums; None where unpublished."""

    name: str
    record: int
    file: str
    size: int | None
    md5: str | None
    sha256: str | None = None

    @property
    def url(self) -> str:
        return f"https://zenodo.org/records/{self.record}/files/{self.file}"


ARCHIVES: dict[str, Archive] = {
    a.name: a
    for a in (
        Archive(
            "cifar10_c",
            2535967,
            "CIFAR-10-C.tar",
            2_918_471_680,
            "56bf5dcef84df0e2308c6dcbcbbd8499",
            "c72763e101c723b7c507b96205f7e938912a5d587376173b825850cf3cb876a7",
        ),
        Archive("cifar100_c", 3555552, "CIFAR-100-C.tar", 2_918_473_216, "11f0ed0f1191edbf9fa23466ae6021d3"),
        Archive("imagenet_c_noise", 2235448, "noise.tar", 22_565_673_785, "e80562d7f6c3f8834afb1ecf27252745"),
        Archive("imagenet_c_blur", 2235448, "blur.tar", 7_112_704_951, "2d8e81fdd8e07fef67b9334fa635e45c"),
        Archive("imagenet_c_weather", 2235448, "weather.tar", 12_797_438_995, "33ffea4db4d93fe4a428c40a6ce0c25d"),
        Archive("imagenet_c_digital", 2235448, "digital.tar", 7_757_510_705, "89157860d7b10d5797849337ca2e5c03"),
        Archive("imagenet_c_extra", 2235448, "extra.tar", 15_789_490_144, "d492dfba5fc162d8ec2c3cd8ee672984"),
    )
}
"""Checksums as published on Zenodo. The MD5s and sizes of ImageNet-C and the sha256 of CIFAR-10-C are quoted
from repositories that use them; a download that contradicts one is an error to look into, not to silence."""

CIFAR_IMAGES = 10_000


class OfficialCifar(Mapping[str, np.ndarray]):
    """CIFAR-10-C or CIFAR-100-C: corruption -> read-only memory map [5, N, 32, 32, 3]; labels in
    ``labels_N``."""

    protocol, label = "official_cifar_c", "CIFAR-C, published arrays"
    severities = SEVERITIES

    def __init__(self, folder: Path, images: int, clean_labels_N: np.ndarray | None):
        self.folder, self.images = folder, images
        self.corruptions = tuple(c for c in (*MAIN, *EXTRA) if (folder / f"{c}.npy").is_file())
        if not self.corruptions:
            raise ValueError(
                f"{folder}: no <corruption>.npy of CIFAR-C there; unpack CIFAR-10-C.tar or CIFAR-100-C.tar"
            )
        for corruption in self.corruptions:
            self._array(corruption)
        path = folder / "labels.npy"
        if not path.is_file():
            raise ValueError(f"{path}: missing; it holds the labels of all five severities")
        labels = open_array(path)
        if labels.shape != (5 * images,):
            raise ValueError(f"{path}: shape {labels.shape}, ({5 * images},) expected")
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{path}: {labels.dtype} found, whole numbers expected")
        labels_5N = labels.reshape(5, images).astype(np.int64)
        if not (labels_5N == labels_5N[0]).all():
            raise ValueError(
                f"{path}: the labels of the five severities differ; each fifth must repeat the test labels"
            )
        if clean_labels_N is not None and not np.array_equal(labels_5N[0], clean_labels_N):
            raise ValueError(
                f"{path}: differs from the labels of the clean test split; is this the set of the same data?"
            )
        self.labels_N = labels_5N[0]

    def _array(self, corruption: str) -> np.ndarray:
        path, expected = self.folder / f"{corruption}.npy", (5 * self.images, 32, 32, 3)
        array = open_array(path, mapped=True)
        if array.shape != expected or array.dtype != np.uint8:
            raise ValueError(f"{path}: {array.dtype} {array.shape} found, uint8 {expected} expected")
        return array

    def __getitem__(self, corruption: str) -> np.ndarray:
        if corruption not in self.corruptions:
            raise KeyError(corruption)
        return self._array(corruption).reshape(5, self.images, 32, 32, 3)  # severity k: rows (k - 1) N .. k N

    def __iter__(self) -> Iterator[str]:
        return iter(self.corruptions)

    def __len__(self) -> int:
        return len(self.corruptions)

    def cell(self, corruption: str, severity: int) -> np.ndarray:
        """Memory map [N, 32, 32, 3] of one corruption at one severity (1..5)."""
        return self[corruption][_row(severity)]


class JpegFolder:
    """Array-like uint8 [5, N, H, W, 3] whose images are decoded on access: ``folder[severity - 1, a:b]``.

    The first index is a whole number (the row of the severity), the second a whole number, a slice or a list
    of them.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, root: Path, files: tuple[str, ...], height: int, width: int):
        self.root, self.files = root, files
        self.shape = (5, len(files), height, width, 3)

    def __len__(self) -> int:
        return 5

    def __getitem__(self, key):
        row, which = key if isinstance(key, tuple) else (key, slice(None))
        severity = range(1, 6)[row]
        if isinstance(which, (int, np.integer)):
            return self._decode(severity, self.files[which])
        if not isinstance(which, slice):
            chosen = [self.files[int(i)] for i in which]
        else:
            chosen = self.files[which]
        out = np.empty((len(chosen), *self.shape[2:]), np.uint8)
        for image, file in zip(out, chosen, strict=True):
            image[:] = self._decode(severity, file)
        return out

    def _decode(self, severity: int, file: str) -> np.ndarray:
        path = self.root / str(severity) / file
        image = np.asarray(read_rgb(path, str(path)))
        if image.shape != self.shape[2:]:
            raise ValueError(f"{path}: {image.shape[:2]} px, {self.shape[2:4]} expected as in the rest of the set")
        return image


class OfficialImageNet(Mapping[str, JpegFolder]):
    """ImageNet-C, ``<corruption>/<severity>/<wnid>/*.JPEG``: corruption -> `JpegFolder`; labels in
    ``labels_N``.

    Images are sorted by class folder, then file name; labels count the sorted class folders or, with
    ``wnids`` given, are positions in that list. The archives ``noise``, ``blur``, ... may lie side by side as
    sub-folders of that name.
    """

    protocol, label = "official_imagenet_c", "ImageNet-C, published JPEG files"
    severities = SEVERITIES

    def __init__(self, folder: Path, wnids: list[str] | None):
        self.folder, self.roots, self.files = folder, {}, ()
        for corruption in (*MAIN, *EXTRA):
            places = [
                folder / corruption,
                *(folder / g / corruption for g in ("noise", "blur", "weather", "digital", "extra")),
            ]
            place = next((p for p in places if p.is_dir()), None)
            if place is not None:
                self.roots[corruption] = place
        if not self.roots:
            raise ValueError(f"{folder}: no <corruption>/<severity>/<wnid>/ folder of ImageNet-C there; unpack it")
        for root in self.roots.values():
            for severity in SEVERITIES:
                files = _image_files(root / str(severity))
                self.files = self.files or files
                if files != self.files:
                    odd = sorted(set(files) ^ set(self.files))[0]
                    raise ValueError(
                        f"{root / str(severity)}: not the images of the other folders ({odd} is in one only)"
                    )
        names = [file.split("/")[0] for file in self.files]
        classes = sorted(set(names)) if wnids is None else list(wnids)
        position = {name: i for i, name in enumerate(classes)}
        unknown = sorted(set(names) - set(position))
        if unknown:
            raise ValueError(f"{folder}: class folder {unknown[0]} is not among the {len(classes)} classes given")
        self.classes = tuple(classes)
        self.labels_N = np.array([position[name] for name in names], np.int64)
        first = next(iter(self.roots.values())) / "1" / self.files[0]
        self.width, self.height = read_rgb(first, str(first)).size

    def __getitem__(self, corruption: str) -> JpegFolder:
        return JpegFolder(self.roots[corruption], self.files, self.height, self.width)

    def __iter__(self) -> Iterator[str]:
        return iter(self.roots)

    def __len__(self) -> int:
        return len(self.roots)

    def cell(self, corruption: str, severity: int) -> np.ndarray:
        """uint8 [N, H, W, 3] of one corruption at one severity, decoded into memory: index the `JpegFolder`
        for parts of it."""
        return self[corruption][_row(severity)]


def _row(severity: int) -> int:
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity!r}: must be one of 1, 2, 3, 4, 5")
    return SEVERITIES.index(severity)


def _image_files(root: Path) -> tuple[str, ...]:
    """``<class>/<file>`` of all JPEG files below ``root``, sorted."""
    if not root.is_dir():
        raise ValueError(f"{root}: missing; ImageNet-C has the severities 1 to 5 of each corruption")
    found = (
        p for kind in root.iterdir() if kind.is_dir() for p in kind.iterdir() if p.suffix.lower() in (".jpeg", ".jpg")
    )
    files = tuple(sorted(f"{p.parent.name}/{p.name}" for p in found))
    if not files:
        raise ValueError(f"{root}: no <wnid>/*.JPEG in it")
    return files


def open_official(
    folder: str | Path,
    *,
    clean_labels: np.ndarray | None = None,
    wnids: list[str] | None = None,
    images: int = CIFAR_IMAGES,
) -> OfficialCifar | OfficialImageNet:
    """Opens a published corrupted set that has been unpacked: CIFAR-10-C, CIFAR-100-C or ImageNet-C, told
    apart by their layout.

    folder: with ``<corruption>.npy`` and ``labels.npy`` (CIFAR) or ``<corruption>/<severity>/<wnid>/*.JPEG``.
    clean_labels: [N] of the clean test split; must equal those of the set (CIFAR). wnids: class folders in
    label order (ImageNet).
    images: N of the CIFAR test split. Shapes, types and the agreement of labels and file lists are checked at
    once; ValueError says in one line what does not fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if any(folder.glob("*.npy")):
        return OfficialCifar(folder, images, None if clean_labels is None else np.asarray(clean_labels, np.int64))
    return OfficialImageNet(folder, wnids)


def verified_folder(path: str | Path, scratch: str | Path) -> Path:
    """Return the folder of a published set: ``path`` itself, or what its published archives unpack to below ``scratch``.

    ``path``: an unpacked folder, one of the archives in ``ARCHIVES``, or a folder that holds some of them. An
    archive is told by its file name and unpacked only after its published MD5 (and sha256, where there is
    one) matched; ValueError otherwise. Members that would leave ``scratch`` are refused.
    """
    path, scratch = Path(path), Path(scratch)
    known = {archive.file: archive for archive in ARCHIVES.values()}
    found = [path] if path.is_file() else [path / name for name in known if (path / name).is_file()]
    if not found:
        return path
    for file in found:
        if (archive := known.get(file.name)) is None:
            raise ValueError(f"{file}: not the name of a published archive; they are {', '.join(known)}")
        for algorithm in ("md5", "sha256"):
            expected = getattr(archive, algorithm)
            if expected is None:
                continue
            with file.open("rb") as stream:
                digest = hashlib.file_digest(
                    stream, lambda a=algorithm: hashlib.new(a, usedforsecurity=False)
                ).hexdigest()
            if digest != expected:
                raise ValueError(
                    f"{file}: its {algorithm} is {digest}, published is {expected}; download {archive.url} again"
                )
    target, partial = scratch / "unpacked", scratch / ".unpacked.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
    try:
        for file in found:
            with tarfile.open(file) as tar:
                tar.extractall(partial, filter="data")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except tarfile.TarError as error:  # a member that leaves the folder, or links out of it, is one too
        raise ValueError(f"{file}: not unpacked: {' '.join(str(error).split())}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    inner = [entry for entry in target.iterdir() if entry.is_dir()]
    return inner[0] if len(inner) == 1 and any(inner[0].glob("*.npy")) else target
