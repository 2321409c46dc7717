"""Hostile and broken input: each is an error with a name or a conversion that is written down; nothing runs, nothing stays.

Mirrors, checksums and broken downloads are in test_data_sources.py, bundles in test_bundle.py.
"""

import dataclasses
import hashlib
import io
import json
import os
import pickle
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import build as made_up
from PIL import Image
from test_data_sources import get, md5, no_mirror_from_outside, server, tar_of, tiny, write  # noqa: F401

from convx import bundle, cli, devices
from convx.config import ConfigError
from convx.data import SETS, open_set, prepare, sources
from convx.data.corruptions import build, official, open_corrupted, open_official
from convx.data.pictures import MAX_PIXELS, read_rgb
from convx.data.sets import OfficialFile
from convx.manifest import Failure
from convx.report import page, tables
from convx.runs import load_weights


class Mine:
    """A pickle that makes a folder when it is believed."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() or p.is_symlink()}


# ------------------------------------------------------------------------------------------------------------ pictures


def png(array: np.ndarray, **more) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **more)
    return buffer


def read(buffer: io.BytesIO) -> np.ndarray:
    buffer.seek(0)
    return np.asarray(read_rgb(buffer, "p.png"))


def test_every_kind_of_pixel_becomes_what_is_written_down():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colour = np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)
    alpha = np.dstack([colour, np.full((8, 8), 3, np.uint8)])
    assert np.array_equal(read(png(grey)), np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(read(png(colour)), colour)
    assert np.array_equal(read(png(alpha)), colour), "alpha is dropped, the colours below it count"
    assert np.array_equal(read(png(np.dstack([grey, 255 - grey]))), np.repeat(grey[..., None], 3, 2))
    wide = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    assert read(png(wide))[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255, 255], "the range of 16 bits is that of 8"
    tiff = io.BytesIO()
    Image.fromarray(wide).save(tiff, "TIFF")
    assert read(tiff)[0, :, 1].tolist() == [0, 0, 1, 1, 128, 254, 255, 255]
    for mode in ("P", "1", "CMYK", "YCbCr", "PA", "LA", "RGBA"):
        picture, buffer = Image.fromarray(colour).convert("RGB" if mode == "PA" else mode), io.BytesIO()
        if mode == "PA":
            picture = picture.quantize(8).convert("PA")
        picture.save(buffer, "TIFF" if mode in ("CMYK", "YCbCr", "PA") else "PNG") if mode != "PA" else None
        if mode != "PA":
            assert np.array_equal(read(buffer), np.asarray(Image.open(buffer).convert("RGB"))), mode
    jpeg = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(jpeg, "JPEG", quality=95)
    assert read(jpeg)[4, 4].tolist() == pytest.approx([255, 0, 0], abs=6), "full magenta and yellow are red"


def claims(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "cannot identify image file"),
        (b"<html>log in</html>", "cannot identify image file"),
        (b"\x89PNG\r\n\x1a\n", "cannot be read as an image"),
        (png(np.zeros((40, 40, 3), np.uint8)).getvalue()[:60], "cannot be read as an image"),
        (claims(60_000, 60_000), "pixels are more than|exceeds limit of"),
        (claims(12_000, 12_000), f"12000x12000 pixels are more than the {MAX_PIXELS:,} that are read"),
        (claims(2**31 - 1, 2**31 - 1), "pixels are more than|cannot be read as an image"),
        (claims(30, 30), "cannot be read as an image"),
        (b"P6 9999999999 9999999999 255\n", "cannot be read as an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/tmp/x) (w) file\n", "cannot be read as an image"),
        (pickle.dumps([1]), "cannot identify image file"),
    ],
    ids=range(11),
)
def test_what_is_no_picture_is_one_line_with_its_name(content, words, tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_rgb(file, str(file))
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)


def test_pixels_of_no_known_range_are_refused():
    for array in (np.zeros((4, 4), np.float32), np.full((4, 4), 7, np.int32)):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "TIFF")
        with pytest.raises(ValueError, match="have no known range; store 8 or 16 bits"):
            read(buffer)


def test_a_folder_with_one_class_is_refused(tmp_path, capsys):
    for place in ("train/n01", "val/n01"):
        (tmp_path / "p" / place).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "p" / place / "0.png")
    settings = {"name": "folder", "path": str(tmp_path / "p"), "image_size": 32}
    with pytest.raises(ValueError, match=r"data\.path: .*train has one class \(n01\); a classifier needs two or more"):
        prepare(settings, tmp_path / "d", progress=False)
    assert files_below(tmp_path) == {"p/train/n01/0.png", "p/val/n01/0.png", ".d.lock"}
    assert cli.main(["data", json.dumps(settings), "--out", str(tmp_path / "d" / "meta.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("convx: data.path: ") and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ archives


def zipped(files: dict[str, bytes], **links: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        for name, target in links.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, target)
    return buffer.getvalue()


IMAGE = "tiny-imagenet-200/val/images/val_1.JPEG"


def _locked(files):  # the flag of an encrypted member, in both headers
    data = bytearray(zipped(files))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.find(mark)
        while place >= 0:
            data[place + offset] |= 1
            place = data.find(mark, place + 1)
    return bytes(data)


def _claims_much(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("tiny-imagenet-200/zeros")
        entry.size = 2**40
        archive.addfile(entry)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda files: b"<!DOCTYPE html><html>503</html>", r"damaged archive \(.*it is a web page\); fetch it again"),
        (lambda files: zipped(files)[:-400], "damaged archive"),
        (lambda files: zipped(files)[:3000] + bytes(400) + zipped(files)[3400:], "damaged archive|cannot be read"),
        (_locked, "damaged archive .*(encrypted|password)"),
        (_claims_much, r"zeros claims 1,099,511,627,776 bytes, no file of a data set here has that many"),
        (lambda files: b"", "damaged archive"),
    ],
    ids=["page", "cut", "overwritten", "encrypted", "claims much", "empty"],
)
def test_a_broken_archive_is_one_line_with_its_name(tmp_path, tiny, make, words):  # noqa: F811
    mirror = write(tmp_path / "m", {"tiny-imagenet-200.zip": make(tiny[0])})
    with pytest.raises(ValueError, match=words) as error:
        get(tmp_path, mirror, name="tiny_imagenet")
    assert "tiny-imagenet-200.zip: " in str(error.value) and "\n" not in str(error.value)
    assert files_below(tmp_path) == {"m/tiny-imagenet-200.zip", ".out.lock"}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_links_and_paths_in_an_archive_lead_nowhere(tmp_path, tiny, kind):  # noqa: F811
    """Members become bytes in memory, never paths: a link is no image, and a name that climbs out is not one of the set's."""
    (tmp_path / "secret").write_bytes(tiny[0][IMAGE])
    rest = {name: data for name, data in tiny[0].items() if name != IMAGE}
    evil = {"../../evil": b"1", "/tmp/convx-evil": b"2"}
    if kind == "zip":
        archive = zipped(rest | evil, **{IMAGE: str(tmp_path / "secret")})
    else:
        buffer = io.BytesIO(tar_of(rest | evil, "w"))
        with tarfile.open(fileobj=buffer, mode="a") as tar:
            for place, link in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)):
                entry = tarfile.TarInfo(IMAGE if place < 2 else f"tiny-imagenet-200/val/images/val_{place}.JPEG")
                entry.type, entry.linkname = link, str(tmp_path / "secret")
                tar.addfile(entry)
        archive = buffer.getvalue()
    mirror = write(tmp_path / "m", {f"tiny-imagenet-200.{kind}": archive})
    with pytest.raises(ValueError, match="cannot be read as an image" if kind == "zip" else "3 of 4 val images"):
        get(tmp_path, mirror, name="tiny_imagenet")
    made = {name for name in files_below(tmp_path) if not name.endswith(".lock")}
    assert made == {"secret", f"m/tiny-imagenet-200.{kind}"}
    assert not Path("/tmp/convx-evil").exists()


@pytest.mark.parametrize("kind", ["symlink", "hardlink", "absolute", "climbs", "device"])
def test_a_published_corrupted_set_unpacks_nothing_hostile(tmp_path, monkeypatch, kind):
    """Even with the right checksum: a link that leads out, a path that climbs, a device."""
    file = tmp_path / "noise.tar"
    with tarfile.open(file, "w") as tar:
        good = tarfile.TarInfo("gaussian_noise/1/n01/a.JPEG")
        good.size = 3
        tar.addfile(good, io.BytesIO(b"abc"))
        names = {"absolute": str(tmp_path / "evil"), "climbs": "../../evil"}
        entry = tarfile.TarInfo(names.get(kind, "gaussian_noise/1/n01/b.JPEG"))
        kinds = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
        entry.type = kinds.get(kind, tarfile.REGTYPE)
        entry.linkname = "../../../../../evil" if "link" in kind else ""
        tar.addfile(entry)
    known = dataclasses.replace(official.ARCHIVES["imagenet_c_noise"], md5=hashlib.md5(file.read_bytes()).hexdigest())
    monkeypatch.setitem(official.ARCHIVES, "imagenet_c_noise", known)
    if kind == "absolute":  # the leading slash is taken off: it lands inside
        official.verified_folder(file, tmp_path / "scratch")
        assert not (tmp_path / "evil").exists()
        return
    with pytest.raises(ValueError, match=r"noise\.tar: not unpacked: "):
        official.verified_folder(file, tmp_path / "scratch")
    assert files_below(tmp_path) == {"noise.tar"}


@pytest.mark.parametrize("kind", ["claims much", "damaged", "damaged head", "climbs"])
def test_a_tar_of_ones_own_images_unpacks_nothing_hostile(tmp_path, kind):
    from convx.evaluate import given

    file, buffer = tmp_path / "mine.tar", io.BytesIO()
    noise = np.random.RandomState(0).randint(0, 4, 200_000).astype(np.uint8).tobytes()  # packs to a quarter
    data = tar_of({"a/x.png": noise, "../b.png" if kind == "climbs" else "b/y.png": noise}, "w:gz")
    if kind == "claims much":
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            entry = tarfile.TarInfo("a/x.png")
            entry.size = 2**40
            tar.addfile(entry)
    file.write_bytes(buffer.getvalue() if kind == "claims much" else data)
    if kind == "damaged head":  # of the second member: tarfile alone would end there without a word
        plain = tar_of({"a/x.png": noise, "b/y.png": noise}, "w")
        place = plain.index(b"b/y.png")
        file.write_bytes(plain[:place] + b"?" * 300 + plain[place + 300 :])
    if kind == "damaged":
        file.write_bytes(data[:30_000] + b"\xff" * 2000 + data[32_000:])
    with pytest.raises(ValueError, match=r"--data: .*mine\.tar cannot be unpacked"), given.opened(str(file)) as root:
        list(root.iterdir())
    assert files_below(tmp_path) == {"mine.tar"}


def test_labels_of_svhn_out_of_range_are_not_wrapped_around(tmp_path, monkeypatch):
    from scipy.io import savemat

    files = {}
    for split, n, largest in (("train", 20, 10), ("test", 10, 13)):
        buffer, labels = io.BytesIO(), np.arange(n) % 10 + 1
        labels[-1] = largest
        savemat(buffer, {"X": np.zeros((32, 32, 3, n), np.uint8), "y": labels.astype(np.uint8)[:, None]})
        files[f"{split}_32x32.mat"] = buffer.getvalue()
    known = tuple(OfficialFile(n, md5(d)) for n, d in files.items())
    monkeypatch.setitem(SETS, "svhn", dataclasses.replace(SETS["svhn"], train=20, test=10, files=known))
    with pytest.raises(ValueError, match=r"test_32x32\.mat: labels run 1\.\.13, not 1\.\.10"):
        get(tmp_path, write(tmp_path / "m", files), name="svhn")


# ------------------------------------------------------------------------------------------------- arrays and weights


@pytest.fixture
def digits_set(tmp_path) -> Path:
    prepare({"name": "digits", "train_images": 40, "test_images": 20, "validation": 10}, tmp_path / "d", progress=False)
    return tmp_path / "d"


def objects(mark: Path) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Mine(mark)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def of(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("train_images", b"", "cannot be opened as an array"),
        ("train_images", of(np.zeros((40, 32, 32, 1), np.uint8))[:900], "cannot be opened as an array"),
        ("train_images", b"<html>", "cannot be opened as an array"),
        ("train_labels", zipped({"a.npy": of(np.zeros(3))}), "it is an archive of several"),
        ("train_labels", of(np.full(40, 10)), r"runs 10\.\.10, not 0\.\.9; prepare the set again"),
        ("test_labels", of(np.full(20, -1)), r"runs -1\.\.-1, not 0\.\.9"),
        ("test_labels", of(np.zeros(20)), "a list of whole numbers is needed"),
        ("validation_indices", of(np.full(10, 40)), r"runs 40\.\.40, not 0\.\.39"),
    ],
)
def test_a_damaged_prepared_set_is_named(digits_set, name, content, words):
    (digits_set / f"{name}.npy").write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        open_set(digits_set)
    assert f"{name}.npy: " in str(error.value) and "\n" not in str(error.value)


def test_arrays_of_objects_are_never_unpickled(digits_set, tmp_path):
    mark, images = tmp_path / "ran", np.zeros((4, 32, 32, 3), np.uint8)
    (digits_set / "train_labels.npy").write_bytes(objects(mark))
    with pytest.raises(ValueError, match=r"train_labels\.npy: cannot be opened as an array \(Object arrays"):
        open_set(digits_set)
    build(images, "cifar_c", ["fog"], [1], tmp_path / "c", 0, progress=False)
    (tmp_path / "c" / "fog.npy").write_bytes(objects(mark))
    with pytest.raises(ValueError, match=r"fog\.npy: cannot be opened as an array \(.*[Oo]bject"):
        open_corrupted(tmp_path / "c")
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "fog.npy").write_bytes(of(np.zeros((20, 32, 32, 3), np.uint8)))
    (tmp_path / "o" / "labels.npy").write_bytes(objects(mark))
    with pytest.raises(ValueError, match=r"labels\.npy: cannot be opened as an array \(Object arrays"):
        open_official(tmp_path / "o", images=4)
    assert not mark.exists()
    np.load(io.BytesIO(objects(mark)), allow_pickle=True)
    assert mark.exists(), "the pickle does work where it is believed"


def test_a_meta_file_that_is_none(digits_set):
    whole = json.loads((digits_set / "meta.json").read_text())
    for content, words in (
        (b"", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[]", "schema version"),
        (json.dumps({k: v for k, v in whole.items() if k != "counts"}).encode(), "the key 'counts' is missing"),
    ):
        (digits_set / "meta.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"meta\.json: .*{words}.*prepare the set again"):
            open_set(digits_set)


@pytest.mark.parametrize("kind", ["pickle", "page", "empty", "cut", "header"])
def test_weights_that_are_none_are_refused_and_nothing_runs(tmp_path, kind):
    from safetensors.torch import save_model

    model, file, mark = torch.nn.Linear(3, 2), tmp_path / "model.safetensors", tmp_path / "ran"
    save_model(model, str(file))
    whole = file.read_bytes()
    pickled = io.BytesIO()
    torch.save(Mine(mark), pickled)
    bad = {"pickle": pickled.getvalue(), "page": b"<html>", "empty": b"", "cut": whole[:-1]}
    file.write_bytes(bad.get(kind, struct.pack("<Q", 2**60) + whole[8:]))
    with pytest.raises(Failure, match=r"model\.safetensors: the weights cannot be read .*`convx retry` forgets them"):
        load_weights(model, file)
    assert not mark.exists()


# ------------------------------------------------------------------------------------------------------------- bundles


def forged(path: Path, files: dict[str, bytes], head: dict | None = None) -> Path:
    """Write a bundle whose list is right for whatever ``files`` (names below the study) it holds."""
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    listed = json.dumps({"schema_version": 1, "study": "made_up", "files": sums} | (head or {})).encode()
    path.write_bytes(tar_of({bundle.LIST: listed} | {f"made_up/{name}": data for name, data in files.items()}))
    return path


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "metrics//a.json", "./study.json", "x\0y",
     "report/index.html", "figures/a.svg", ".bashrc", "metrics/.hidden/a.json", "metrics/a.py", "runs/a/model.pt",
     "study.json/x", "metrics/" + "a" * 300 + ".json", "tables", "histories/a\n/b.csv"],
)  # fmt: skip
def test_a_bundle_holds_what_pack_puts_into_one_and_nothing_else(tmp_path, name):
    with pytest.raises(ConfigError) as error:
        bundle.unpack(forged(tmp_path / "b.tar.gz", {name: b"{}"}), tmp_path / "r")
    assert str(error.value).startswith(f"{tmp_path}/b.tar.gz: ") and len(str(error.value).splitlines()) == 1
    assert files_below(tmp_path) == {"b.tar.gz"} and not (tmp_path / "r").exists()


def test_a_bundle_that_stands_for_more_than_the_disk_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "_room", lambda results: 10_000)
    file = forged(tmp_path / "b.tar.gz", {"study.json": bytes(20_000)})
    assert file.stat().st_size < 2000
    with pytest.raises(ConfigError, match=r"it unpacks to more than the 0\.0 GB that are free"):
        bundle.unpack(file, tmp_path / "r")
    monkeypatch.setattr(bundle, "MAX_LIST", 100)
    with pytest.raises(ConfigError, match="not a bundle of convx"):
        bundle.unpack(file, tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("head", [{"files": [["a", "b"]]}, {"files": {"study.json": 3}}, {"files": None}, {"study": ["x"]},
                                  {"schema_version": "1"}])  # fmt: skip
def test_a_list_that_is_none(tmp_path, head):
    with pytest.raises(ConfigError):
        bundle.unpack(forged(tmp_path / "b.tar.gz", {"study.json": b"{}"}, head), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_bundle_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    file = forged(tmp_path / "b.tar.gz", {"study.json": b"{}", "exact.json": b"{}"})
    calls, copy = [], bundle.shutil.copyfileobj

    def full(source, target):
        if calls:
            raise OSError(28, "No space left on device", "somewhere")
        calls.append(1)
        copy(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(bundle.shutil, "copyfileobj", full)
        with pytest.raises(ConfigError, match=r"not unpacked: No space left on device \(somewhere\)"):
            bundle.unpack(file, tmp_path / "r")
    assert files_below(tmp_path) == {"b.tar.gz"}
    (tmp_path / "r" / "made_up" / "study.json").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"not unpacked: Is a directory \(.*study\.json\)"):
        bundle.unpack(file, tmp_path / "r")


# ------------------------------------------------------------------------------------------------------------- the rest


def test_words_of_a_record_are_text_on_the_page(tmp_path):
    folder = made_up(tmp_path, variants={"cnn": None, "cnn_frozen": None}, seeds=[0], images=20)
    file = folder / "metrics" / "cnn" / "seed0" / "evaluation.json"
    evil = "<script>alert(1)</script> | `x` $\\frac{1}$ <img src=x onerror=y>"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "failed", "reason": evil, "rows": []}))
    tables.write(folder)
    page.write(folder)
    text = (folder / "report" / "index.html").read_text()
    assert "&lt;script&gt;alert(1)" in text and "<script" not in text and "<img src=x" not in text
    lines = [line for line in (folder / "tables" / "comparison.md").read_text().splitlines() if line.startswith("| ")]
    row = next(line for line in lines if line.startswith("| `cnn` |"))
    assert "\\|" in row and row.replace("\\|", "").count("|") == lines[0].count("|"), "the cells stay apart"


def test_locks_are_not_taken_in_a_folder_of_somebody_else(tmp_path, monkeypatch):
    monkeypatch.delenv("CONVX_LOCKS", raising=False)
    monkeypatch.setattr(devices.tempfile, "gettempdir", lambda: str(tmp_path))
    assert devices.lock_folder().stat().st_mode & 0o777 == 0o700
    devices.lock_folder().rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"convx-locks-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="belongs to somebody else; name a folder of yours in CONVX_LOCKS"):
        devices.lock_folder()


def test_a_web_page_is_told_from_an_archive(tmp_path):
    for content, words in ((b" \n<!doctype HTML>", ", it is a web page"), (b"\x1f\x8b<html>", ""), (b"", "")):
        (tmp_path / "f").write_bytes(content)
        assert sources.looks_like_a_page(tmp_path / "f") == words
