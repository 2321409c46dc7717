"""Tiny ImageNet: the official archive, or its folder layout in one or several folders, tars or zips.

No checksum of the loose layout is published, so it is verified by its counts (200 classes, 500 training and
50 validation images each) and by decoding. The validation images, which have labels and boxes, are the test
split here; the official test images have no labels.
"""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convx.data.pictures import read_rgb
from convx.data.readers import RawSet
from convx.data.sets import SetFacts
from convx.data.sources import SEARCH_DEPTH, Finder, archive_entries

SIZE, BLOCK = 64, 256
CONTAINER = re.compile(r"tiny[-_]?imagenet.*\.(zip|tar|tgz|tbz2|txz|tar\.(gz|bz2|xz))$", re.IGNORECASE)
TEXTS = ("wnids.txt", "words.txt", "val/val_annotations.txt")
MEMBER = re.compile(
    r"(?:^|/)(wnids\.txt|words\.txt|val/val_annotations\.txt|val/images/val_\d+\.JPEG"
    r"|train/(n\d{8})/images/\2_\d+\.JPEG)$"
)


class Layout:
    """What a list of containers (folders and archives) holds of the official layout: text files and places of
    images.
    """

    def __init__(self, containers: list[Path]):
        self.containers = containers
        self.texts: dict[str, str] = {}
        self.where: dict[str, Path] = {}  # member -> the first container that holds it
        for container in containers:
            for name, read in archive_entries(container, MEMBER.search):
                member = MEMBER.search(name)[1]
                if member in TEXTS and member not in self.texts:
                    self.texts[member] = read().decode("utf-8", "replace")
                self.where.setdefault(member, container)

    def images(self, split: str) -> list[str]:
        """Return the images of "train" or "val", by class and number."""
        found = [m for m in self.where if m.startswith(f"{split}/") and m not in TEXTS]
        return sorted(found, key=lambda m: (m.rpartition("/")[0], int(re.search(r"(\d+)\.JPEG$", m)[1])))

    def problem(self, facts: SetFacts, with_train: bool) -> str:
        """Return what keeps the layout from being complete, or nothing."""
        for text in TEXTS:
            if text not in self.texts:
                return f"{text} is missing"
        classes = len(self.texts["wnids.txt"].split())
        if classes != facts.classes:
            return f"wnids.txt names {classes} classes, not {facts.classes}"
        for split, expected in (("val", facts.test), ("train", facts.train if with_train else 0)):
            images = len(self.images(split))
            if expected and images != expected:
                return f"{images:,} of {expected:,} {split} images"
        return ""


def read_tiny_imagenet(facts: SetFacts, finder: Finder, settings: dict) -> RawSet:
    """Tiny ImageNet, 64x64, classes in the order of their WordNet ids.

    With ``train_images: 0`` the validation part alone is enough.
    """
    with_train = settings["train_images"] != 0
    layout, source = _find(facts, finder, with_train)
    wnids = sorted(layout.texts["wnids.txt"].split())
    words = dict(line.split("\t", 1) for line in layout.texts["words.txt"].splitlines() if "\t" in line)
    label = {wnid: i for i, wnid in enumerate(wnids)}
    annotations = {}
    for number, line in enumerate(layout.texts["val/val_annotations.txt"].splitlines(), 1):
        try:
            name, wnid, left, top, right, bottom = line.split("\t")
            annotations[f"val/images/{name}"] = label[wnid], [int(x) for x in (left, top, right, bottom)]
        except (ValueError, KeyError):
            raise ValueError(
                f"{facts.name}: val_annotations.txt, line {number}: not a file, a known class and a box"
            ) from None
    members = {"test": layout.images("val"), "train": layout.images("train") if with_train else []}
    if set(annotations) != set(members["test"]):
        raise ValueError(f"{facts.name}: val_annotations.txt and the validation images name different files")
    if unknown := sorted({m.split("/")[1] for m in members["train"]} - set(wnids)):
        raise ValueError(f"{facts.name}: class folder train/{unknown[0]} is not in wnids.txt")
    labels = {
        "train": np.array([label[m.split("/")[1]] for m in members["train"]], np.int64),
        "test": np.array([annotations[m][0] for m in members["test"]], np.int64),
    }
    for split, images in (("train", facts.train), ("test", facts.test)):
        each = images // facts.classes
        counts = np.bincount(labels[split], minlength=facts.classes)
        if len(labels[split]) and not (counts == each).all():
            worst = int(np.abs(counts - each).argmax())
            raise ValueError(f"{facts.name}: class {wnids[worst]} has {counts[worst]} {split} images, not {each}")
    boxes = np.array([annotations[m][1] for m in members["test"]], np.float64)
    boxes[:, 2:] += 1  # the file names the last pixel inside; ours end at the first one outside
    return RawSet(
        labels=labels,
        blocks=lambda split, rows: _decode(layout, [members[split][i] for i in rows]),
        native_size=SIZE,
        class_names=[words.get(wnid, wnid) for wnid in wnids],
        source=source,
        provenance="Tiny ImageNet; its validation images are the test split; grey images as RGB",
        test_boxes=boxes,
        extra={"class_ids": wnids},
    )


def _find(facts: SetFacts, finder: Finder, with_train: bool) -> tuple[Layout, dict]:
    """Return a complete layout and the record of its source: mirrors first, then the official archive."""
    if found := finder.official(facts, addresses=False):
        return Layout([found.archive]), found.source
    containers = [c for folder in finder.mirror_folders() for c in find_containers(folder, facts.folder)]
    hint = "Its folder layout in folders, tars or zips does as well. "
    if containers:
        layout = Layout(containers)
        if not (problem := layout.problem(facts, with_train)):
            used = sorted({path.name for path in layout.where.values()})
            checked = "none published for this layout: verified by counts and decoding"
            files = [{"name": name} for name in used]
            return layout, {"kind": "mirror folder", "files": files, "checksums": checked}
        finder.tried.append(f"{', '.join(map(str, containers))} ({problem})")
        if with_train and not layout.problem(facts, False):
            hint += "The validation part is there: train_images: 0 prepares it for evaluation only. "
    found = finder.official(facts, mirrors=False, hint=hint)
    return Layout([found.archive]), found.source


def find_containers(folder: Path, name: str) -> list[Path]:
    """Return the archives and folders below ``folder`` that may hold parts of the set, in sorted order."""
    found = [folder] if folder.name == name else []
    for here, folders, files in os.walk(folder):
        found += [Path(here) / f for f in sorted(files) if CONTAINER.search(f)]
        found += [Path(here) / f for f in sorted(folders) if f == name]
        deep = len(Path(here).relative_to(folder).parts) >= SEARCH_DEPTH
        folders[:] = [] if deep else sorted(f for f in folders if f != name and not f.startswith("."))
    return found


def _decode(layout: Layout, members: list[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (places, images [n, 64, 64, 3]) in the order of the containers, as a compressed tar dictates."""
    places = {member: place for place, member in enumerate(members)}
    where, pixels = [], []
    for container in dict.fromkeys(layout.where[m] for m in members):
        for name, read in archive_entries(container, MEMBER.search):
            member = MEMBER.search(name)[1]
            if member in places and layout.where[member] == container:
                where.append(places.pop(member))
                pixels.append(_pixels(read(), f"{container}: {member}"))
                if len(where) == BLOCK:
                    yield np.array(where), np.stack(pixels)
                    where, pixels = [], []
    if where:
        yield np.array(where), np.stack(pixels)


def _pixels(data: bytes, name: str) -> np.ndarray:
    image = np.asarray(read_rgb(io.BytesIO(data), name))
    if image.shape != (SIZE, SIZE, 3):
        raise ValueError(f"{name}: {image.shape[1]}x{image.shape[0]} pixels, not {SIZE}x{SIZE}")
    return image
