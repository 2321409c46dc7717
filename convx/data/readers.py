"""Read the official files of the small data sets into uint8 blocks. One function a set; nothing is extracted
to disk.
"""

import contextlib
import gzip
import io
import pickle
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from convx.data.sets import SetFacts
from convx.data.sources import Finder
from convx.data.splits import stratified_choice

BLOCK = 1000
Blocks = Callable[[str, np.ndarray], Iterator[tuple[np.ndarray | slice, np.ndarray]]]


@dataclass(frozen=True)
class RawSet:
    """A set in its native size, not yet chosen from.

    ``labels`` has int64 [N] for "train" and "test". ``blocks(split, rows)`` yields (places, images): uint8
    images [n, h, w, C] that belong at ``places`` of the array that holds ``rows``. ``test_boxes`` is float64
    [N, 4] in native pixels, half-open.
    """

    labels: dict[str, np.ndarray]
    blocks: Blocks
    native_size: int
    class_names: list[str]
    source: dict
    provenance: str
    test_boxes: np.ndarray | None = None
    extra: dict = field(default_factory=dict)


def blocks_of(images: dict[str, np.ndarray]) -> Blocks:
    """Return the ``blocks`` function of arrays that are in memory."""

    def blocks(split: str, rows: np.ndarray):
        for start in range(0, len(rows), BLOCK):
            part = rows[start : start + BLOCK]
            yield slice(start, start + len(part)), images[split][part]

    return blocks


def read_digits(facts: SetFacts, finder: Finder, settings: dict) -> RawSet:
    """scikit-learn's 1,797 digits: 0..16 scaled to 0..255, a fixed stratified fifth (360 images) as the test
    split.
    """
    import sklearn
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = bundle.target.astype(np.int64)
    test = stratified_choice(labels, facts.test, "digits/test split")
    train = np.setdiff1d(np.arange(len(labels)), test)
    _expect(facts, images[train], labels[train], images[test], labels[test], size=8)
    return RawSet(
        labels={"train": labels[train], "test": labels[test]},
        blocks=blocks_of({"train": images[train], "test": images[test]}),
        native_size=8,
        class_names=list(facts.class_names),
        source={
            "kind": f"package scikit-learn {sklearn.__version__}",
            "files": [],
            "checksums": "none: ships with the package",
        },
        provenance="scikit-learn's digits, 0..16 scaled to 0..255; fixed stratified test split of 360",
    )


def read_fashion_mnist(facts: SetFacts, finder: Finder, settings: dict) -> RawSet:
    """Fashion-MNIST's four IDX files (Xiao et al. 2017)."""
    found = finder.official(facts)
    arrays = {}
    for name, data in found.members():
        with _named(name):
            arrays[name] = read_idx(gzip.decompress(data), name)
    images = {
        "train": arrays["train-images-idx3-ubyte.gz"][..., None],
        "test": arrays["t10k-images-idx3-ubyte.gz"][..., None],
    }
    labels = {
        "train": arrays["train-labels-idx1-ubyte.gz"].astype(np.int64),
        "test": arrays["t10k-labels-idx1-ubyte.gz"].astype(np.int64),
    }
    return _in_memory(facts, found, images, labels, list(facts.class_names))


@contextlib.contextmanager
def _named(name: str):
    """Turn what a parser raises about a file that is not what it should be into one line with the file's name."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(f"{name}: "):
            raise
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from None
    except (pickle.UnpicklingError, zlib.error, OSError, EOFError, LookupError, TypeError, AttributeError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: not as published ({words}); nothing in it was run") from None


def read_idx(data: bytes, name: str) -> np.ndarray:
    """Parse an IDX file of unsigned bytes: two zeros, type 8, the number of axes, big-endian lengths, then
    the values.
    """
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{name}: not an IDX file of unsigned bytes")
    axes = data[3]
    shape = tuple(np.frombuffer(data, ">u4", axes, 4).tolist())
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * axes)
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{name}: {values.size:,} values where its header says {' x '.join(map(str, shape))}")
    return values.reshape(shape)


class ArrayUnpickler(pickle.Unpickler):
    """An unpickler that admits NumPy arrays and plain values; any other class in the pickle is refused before
    it is made.
    """

    ADMITTED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which an image batch does not hold")
        if name == "_reconstruct":  # its home moved with NumPy 2
            return np._core.multiarray._reconstruct if hasattr(np, "_core") else np.core.multiarray._reconstruct
        return super().find_class(module, name)


def read_cifar(facts: SetFacts, finder: Finder, settings: dict) -> RawSet:
    """CIFAR-10 and CIFAR-100, "python version": rows of 3,072 bytes, red, green, blue planes of 32x32 (fine
    labels).
    """
    found = finder.official(facts)
    fine = facts.name == "cifar100"
    batches, names = {}, None
    for name, data in found.members():  # the checksum of the file, or of the archive around it, has matched
        with _named(name):
            content = ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
            if name in ("meta", "batches.meta"):
                names = [str(n) for n in content["fine_label_names" if fine else "label_names"]]
                continue
            pixels_NCHW = content["data"].reshape(-1, 3, 32, 32)
            images = np.ascontiguousarray(pixels_NCHW.transpose(0, 2, 3, 1))
            batches[name] = images, np.array(content["fine_labels" if fine else "labels"], np.int64)
    order = {"train": ["train"], "test": ["test"]}
    if not fine:
        order = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
    images = {split: np.concatenate([batches[b][0] for b in parts]) for split, parts in order.items()}
    labels = {split: np.concatenate([batches[b][1] for b in parts]) for split, parts in order.items()}
    return _in_memory(facts, found, images, labels, names)


def read_svhn(facts: SetFacts, finder: Finder, settings: dict) -> RawSet:
    """SVHN, cropped digits: X [32, 32, 3, N], y in 1..10 where 10 stands for the digit 0. The extra images
    are not used.
    """
    from scipy.io import loadmat

    found = finder.official(facts)
    images, labels = {}, {}
    for name, data in found.members():
        split = name.split("_")[0]
        with _named(name):
            content = loadmat(io.BytesIO(data), variable_names=("X", "y"))
            images[split] = content["X"].transpose(3, 0, 1, 2)  # a view: blocks are copied as they are written
            found_N = content["y"].reshape(-1).astype(np.int64)
            if found_N.min() < 1 or found_N.max() > 10:
                raise ValueError(f"labels run {found_N.min()}..{found_N.max()}, not 1..10")
            labels[split] = found_N % 10
    return _in_memory(facts, found, images, labels, list(facts.class_names))


def _in_memory(facts: SetFacts, found, images: dict, labels: dict, class_names: list[str]) -> RawSet:
    _expect(facts, images["train"], labels["train"], images["test"], labels["test"], facts.image_size)
    return RawSet(
        labels=labels,
        blocks=blocks_of(images),
        native_size=facts.image_size,
        class_names=class_names,
        source=found.source,
        provenance=f"official files of {facts.name}, checksums matched",
    )


def _expect(facts: SetFacts, train, train_labels, test, test_labels, size: int) -> None:
    """Check counts, shapes and label range of what was read against the published facts."""
    for split, images, labels, n in (
        ("train", train, train_labels, facts.train),
        ("test", test, test_labels, facts.test),
    ):
        shape = (n, size, size, facts.channels)
        if images.shape != shape or images.dtype != np.uint8 or labels.shape != (n,):
            raise ValueError(f"{facts.name}: {split} images are {images.shape}, labels {labels.shape}, not {shape}")
        if labels.min() < 0 or labels.max() >= facts.classes:
            raise ValueError(
                f"{facts.name}: {split} labels run {labels.min()}..{labels.max()}, not 0..{facts.classes - 1}"
            )


def _read_tiny_imagenet(facts: SetFacts, finder: Finder, settings: dict) -> RawSet:
    from convx.data.tiny_imagenet import read_tiny_imagenet

    return read_tiny_imagenet(facts, finder, settings)


def _read_canvas(facts: SetFacts, finder: Finder, settings: dict) -> RawSet:
    from convx.data.canvas import read_canvas

    return read_canvas(facts, finder, settings)


READERS: dict[str, Callable[[SetFacts, Finder, dict], RawSet]] = {
    "digits": read_digits,
    "fashion_mnist": read_fashion_mnist,
    "cifar10": read_cifar,
    "cifar100": read_cifar,
    "svhn": read_svhn,
    "tiny_imagenet": _read_tiny_imagenet,
    "canvas": _read_canvas,
}
