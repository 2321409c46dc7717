"""Finding, downloading and reading official files: mirrors, checksums, restarts, broken and hostile files.

A small HTTP server on this machine plays mirror and official address; the sets are tiny.
"""

import dataclasses
import gzip
import hashlib
import http.server
import io
import logging
import os
import pickle
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convx.data import SETS, open_set, prepare
from convx.data.readers import ArrayUnpickler, read_idx
from convx.data.sets import OfficialFile
from convx.data.sources import SourceError, WrongContent, download, find_files
from convx.data.tiny_imagenet import CONTAINER

NAMES = ["airplane", "cat", "ship"]


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` (path -> bytes); ``requests`` logs (path, range); ``break_after`` cuts bodies."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.break_after, self.ranges, self.busy = {}, [], [], True, 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append((self.path, wanted))
        body = server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        if server.busy:
            server.busy -= 1
            return self.send_error(503)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges else 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = start + server.break_after.pop(0) if server.break_after else len(body)
        self.wfile.write(body[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def no_mirror_from_outside(monkeypatch):
    monkeypatch.delenv("CONVX_MIRROR", raising=False)


def tar_of(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def cifar_files() -> dict[str, bytes]:
    random, files = np.random.RandomState(0), {}
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        content = {"data": random.randint(0, 256, (6, 3072)).astype(np.uint8), "labels": [0, 1, 2, 2, 1, 0]}
        files[name] = pickle.dumps(content, protocol=2)
    files["batches.meta"] = pickle.dumps({"label_names": NAMES}, protocol=2)
    return files


@pytest.fixture
def cifar(monkeypatch, server):
    """A set of 30 + 6 images in CIFAR-10's format: (files, archive); the official address is /official/."""
    files = cifar_files()
    return files, declare_cifar(monkeypatch, server.url, files)


def declare_cifar(monkeypatch, url: str, files: dict[str, bytes], extra: dict[str, bytes] | None = None) -> bytes:
    archive = tar_of({f"cifar-10-batches-py/{n}": d for n, d in files.items()} | (extra or {}))
    name = "cifar-10-python.tar.gz"
    facts = dataclasses.replace(
        SETS["cifar10"],
        train=30,
        test=6,
        classes=3,
        archive=OfficialFile(name, md5(archive), (f"{url}/official/{name}",)),
        files=tuple(OfficialFile(n, md5(d)) for n, d in files.items()),
    )
    monkeypatch.setitem(SETS, "cifar10", facts)
    return archive


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def get(tmp_path: Path, *mirrors, name: str = "cifar10", **settings) -> dict:
    return prepare({"name": name, **settings}, tmp_path / "out", [str(m) for m in mirrors], progress=False)


# ------------------------------------------------------------------------------------------------- where from


def test_archive_and_unpacked_files_give_the_same_set(tmp_path, cifar, server):
    files, archive = cifar
    server.files["/official/cifar-10-python.tar.gz"] = archive
    from_address = get(tmp_path)
    data = open_set(tmp_path / "out")
    assert from_address["source"]["kind"] == "official URL" and from_address["class_names"] == NAMES
    rows = pickle.loads(files["data_batch_1"])["data"]
    assert data.train_images[2, 5, 7].tolist() == [rows[2, c * 1024 + 5 * 32 + 7] for c in range(3)]
    assert data.train_labels.tolist() == [0, 1, 2, 2, 1, 0] * 5
    loose = write(tmp_path / "mirror" / "a" / "cifar-10-batches-py", files).parents[1]
    from_folder = get(tmp_path, loose)
    assert from_folder["digest"] == from_address["digest"] and from_folder["source"]["kind"] == "mirror folder"
    assert {f["name"] for f in from_folder["source"]["files"]} == set(files)
    packed = write(tmp_path / "packed", {"cifar-10-python.tar.gz": archive})
    assert get(tmp_path, packed)["digest"] == from_address["digest"]
    assert len(server.requests) == 1, "mirrors come before the official address"


@pytest.mark.parametrize("below", ["", "cifar10/", "cifar-10-batches-py/"])
def test_mirror_address_may_hold_the_archive_or_the_files(tmp_path, cifar, server, below):
    files, archive = cifar
    if below == "cifar-10-batches-py/":
        server.files = {f"/mirror/{below}{n}": d for n, d in files.items()}
    else:
        server.files = {f"/mirror/{below}cifar-10-python.tar.gz": archive}
    assert get(tmp_path, f"{server.url}/mirror")["source"]["kind"] == "mirror URL"


def test_files_may_come_from_several_mirrors(tmp_path, cifar):
    files, _ = cifar
    parts = [{n: d for n, d in files.items() if ("batch_1" in n) == first} for first in (True, False)]
    mirrors = [write(tmp_path / str(k), part) for k, part in enumerate(parts)]
    assert get(tmp_path, *mirrors)["counts"]["train"] == 30
    with pytest.raises(ValueError, match="no source provided it"):
        get(tmp_path, mirrors[1])


def test_environment_mirrors_come_first(tmp_path, cifar, server, monkeypatch):
    _, archive = cifar
    server.files["/first/cifar-10-python.tar.gz"] = server.files["/second/cifar-10-python.tar.gz"] = archive
    monkeypatch.setenv("CONVX_MIRROR", f"/nowhere  {server.url}/first\n")
    get(tmp_path, f"{server.url}/second")
    assert [path for path, _ in server.requests] == ["/first/cifar-10-python.tar.gz"]


def test_a_download_is_kept_and_checked_again(tmp_path, cifar, server):
    _, archive = cifar
    server.files["/official/cifar-10-python.tar.gz"] = archive
    first = get(tmp_path)
    assert get(tmp_path, image_size=16)["image_size"] == 16 and len(server.requests) == 1
    (tmp_path / "downloads" / "cifar10" / "cifar-10-python.tar.gz").write_bytes(archive[:-5])
    assert get(tmp_path)["digest"] == first["digest"] and len(server.requests) == 2


def test_search_is_limited_in_depth_and_skips_hidden_folders(tmp_path):
    for place in ("f", "a/b/c/d/f", "a/b/c/d/e/f", ".git/f"):
        write(tmp_path, {place: b""})
    (tmp_path / "g").mkdir()
    assert find_files(tmp_path, {"f", "g"}) == {"f": [tmp_path / "f", tmp_path / "a/b/c/d/f"]}


def test_nothing_found_is_one_line_that_says_what_to_do(tmp_path, cifar, server):
    write(tmp_path / "empty", {"notes.txt": b""})
    closed = "http://127.0.0.1:9"  # the discard port: nothing listens there
    with pytest.raises(ValueError) as caught:
        get(tmp_path, "/nowhere", tmp_path / "empty", closed)
    text = str(caught.value)
    assert "\n" not in text
    for words in (
        "cifar10: no source provided it; tried /nowhere (no such folder)",
        "empty (none of the official files)",
        f"{closed}/cifar-10-python.tar.gz (not reached: [Errno 111] Connection refused)",
        f"{server.url}/official/cifar-10-python.tar.gz (HTTP 404 Not Found)",
        "CONVX_MIRROR",
        "`mirror`",
        SETS["cifar10"].archive.md5,
    ):
        assert words in text
    assert text.count("not reached") == 1, "a host that is gone is asked once"
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------- downloads

BODY = np.random.RandomState(1).bytes(50_000)


def test_a_broken_transfer_continues_where_it_stopped(tmp_path, server):
    server.files["/f"], server.break_after = BODY, [20_000, 10_000]
    assert download(f"{server.url}/f", tmp_path / "f", md5(BODY), progress=False).read_bytes() == BODY
    assert [r for _, r in server.requests] == [None, "bytes=20000-", "bytes=30000-"]
    assert not (tmp_path / "f.part").exists()


def test_a_killed_download_continues_in_the_next_process(tmp_path, server):
    server.files["/f"] = BODY
    (tmp_path / "f.part").write_bytes(BODY[:12_345])
    download(f"{server.url}/f", tmp_path / "f", md5(BODY), progress=False)
    assert server.requests == [("/f", "bytes=12345-")] and (tmp_path / "f").read_bytes() == BODY
    (tmp_path / "f").rename(tmp_path / "f.part")  # killed between the last byte and the renaming
    download(f"{server.url}/f", tmp_path / "f", md5(BODY), progress=False)
    assert len(server.requests) == 1 and (tmp_path / "f").read_bytes() == BODY


def test_a_busy_server_is_asked_again(tmp_path, server):
    server.files["/f"], server.busy = BODY, 2
    assert download(f"{server.url}/f", tmp_path / "f", md5(BODY), progress=False).read_bytes() == BODY
    server.busy = 4
    with pytest.raises(SourceError, match="failed 4 times, last: HTTP 503"):
        download(f"{server.url}/f", tmp_path / "g", md5(BODY), progress=False)


def test_a_server_without_ranges_restarts_cleanly(tmp_path, server):
    server.files["/f"], server.break_after, server.ranges = BODY, [20_000], False
    assert download(f"{server.url}/f", tmp_path / "f", md5(BODY), progress=False).read_bytes() == BODY


@pytest.mark.parametrize("old", [b"x" * 700, b"x" * 50_000, b"x" * 60_000])
def test_the_part_of_another_file_does_no_harm(tmp_path, server, old):
    server.files["/f"] = BODY
    (tmp_path / "f.part").write_bytes(old)
    assert download(f"{server.url}/f", tmp_path / "f", md5(BODY), progress=False).read_bytes() == BODY


def test_a_transfer_that_never_ends_well_keeps_its_part(tmp_path, server):
    server.files["/f"], server.break_after = BODY, [1000] * 10
    with pytest.raises(SourceError, match=r"failed 4 times, last: 4,000 of 50,000 bytes"):
        download(f"{server.url}/f", tmp_path / "f", md5(BODY), progress=False)
    assert (tmp_path / "f.part").read_bytes() == BODY[:4000] and not (tmp_path / "f").exists()


def test_a_corrupt_download_is_deleted_and_named(tmp_path, server):
    server.files["/f"] = b"<html>please log in</html>"
    with pytest.raises(WrongContent) as caught:
        download(f"{server.url}/f", tmp_path / "f", md5(BODY), progress=False)
    assert md5(BODY) in str(caught.value) and md5(server.files["/f"]) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [".f.lock"]
    server.files["/f"] = BODY
    assert download(f"{server.url}/f", tmp_path / "f", md5(BODY), progress=False).read_bytes() == BODY


def test_a_corrupt_mirror_is_reported_and_passed_over(tmp_path, cifar, server, caplog):
    _, archive = cifar
    bad = write(tmp_path / "bad", {"cifar-10-python.tar.gz": archive[:-1] + b"?"})
    server.files["/mirror/cifar-10-python.tar.gz"] = b"junk"
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError) as caught:
        get(tmp_path, bad, f"{server.url}/mirror")
    for text in (str(caught.value), caplog.text):
        assert f"{bad}/cifar-10-python.tar.gz (MD5 " in text and md5(archive) in text
        assert f"{server.url}/mirror/cifar-10-python.tar.gz (the download had MD5 {md5(b'junk')}" in text
    server.files["/official/cifar-10-python.tar.gz"] = archive
    assert get(tmp_path, bad, f"{server.url}/mirror")["source"]["kind"] == "official URL"


# -------------------------------------------------------------------------------------- hostile and odd files


class Bomb:
    """A pickle that runs a command when it is opened without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_is_not_run_even_with_the_right_checksum(tmp_path, monkeypatch, server):
    mark = tmp_path / "ran"
    files = cifar_files() | {"data_batch_3": pickle.dumps({"data": Bomb(mark), "labels": []})}
    mirror = write(tmp_path / "mirror", files)
    declare_cifar(monkeypatch, server.url, files)
    with pytest.raises(ValueError, match=r"data_batch_3: not as published \(the pickle asks for (posix|nt).mkdir"):
        get(tmp_path, mirror)
    assert not mark.exists() and not (tmp_path / "out").exists()
    pickle.loads(files["data_batch_3"])
    assert mark.exists(), "the pickle does work where it is not refused"


def test_a_pickle_with_a_wrong_checksum_is_not_opened(tmp_path, cifar, monkeypatch):
    files, _ = cifar
    opened = []
    load = ArrayUnpickler.load
    monkeypatch.setattr(ArrayUnpickler, "load", lambda self: opened.append(1) or load(self))
    mirror = write(tmp_path / "mirror", files | {"test_batch": files["test_batch"] + b"."})
    with pytest.raises(ValueError, match=r"test_batch \(MD5"):
        get(tmp_path, mirror)
    assert opened == []
    write(mirror, files)
    get(tmp_path, mirror)
    assert len(opened) == 7, "the probe sees pickles that are opened"


def test_archive_members_never_become_paths(tmp_path, monkeypatch, server):
    evil = {"../evil": b"1", "/tmp/convx-evil": b"2", "cifar-10-batches-py/../../evil": b"3"}
    archive = declare_cifar(monkeypatch, server.url, cifar_files(), evil)
    mirror = write(tmp_path / "a" / "mirror", {"cifar-10-python.tar.gz": archive})
    get(tmp_path / "a", mirror)
    made = {p.name for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith(".npy")}
    assert made == {"cifar-10-python.tar.gz", "meta.json", ".out.lock"}
    assert not Path("/tmp/convx-evil").exists()


def test_an_archive_that_lacks_a_file_says_which(tmp_path, monkeypatch, server):
    files = cifar_files()
    declare_cifar(monkeypatch, server.url, files)
    short = tar_of({f"cifar-10-batches-py/{n}": d for n, d in files.items() if n != "test_batch"})
    facts = SETS["cifar10"]
    archive = dataclasses.replace(facts.archive, md5=md5(short))
    monkeypatch.setitem(SETS, "cifar10", dataclasses.replace(facts, archive=archive))
    with pytest.raises(ValueError, match="lacks cifar-10-batches-py/test_batch"):
        get(tmp_path, write(tmp_path / "m", {archive.name: short}))


def test_idx_files_are_checked():
    good = b"\0\0\x08\x02" + (2).to_bytes(4, "big") + (3).to_bytes(4, "big") + bytes(range(6))
    assert read_idx(good, "f").tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="f: 5 values where its header says 2 x 3"):
        read_idx(good[:-1], "f")
    with pytest.raises(ValueError, match="not an IDX file of unsigned bytes"):
        read_idx(b"\0\0\x0d\x01" + good[4:], "f")


def test_fashion_mnist_reads_its_four_files(tmp_path, monkeypatch):
    random, files, expected = np.random.RandomState(0), {}, {}
    for split, n in (("train", 20), ("t10k", 10)):
        for what, array in (
            ("images-idx3", random.randint(0, 256, (n, 28, 28))),
            ("labels-idx1", np.arange(n) % 10),
        ):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(a.to_bytes(4, "big") for a in array.shape)
            expected[split, what] = array
            files[f"{split}-{what}-ubyte.gz"] = gzip.compress(header + array.astype(np.uint8).tobytes())
    official = tuple(OfficialFile(f.name, md5(files[f.name])) for f in SETS["fashion_mnist"].files)
    facts = dataclasses.replace(SETS["fashion_mnist"], train=20, test=10, files=official)
    monkeypatch.setitem(SETS, "fashion_mnist", facts)
    get(tmp_path, write(tmp_path / "m", files), name="fashion_mnist")
    data = open_set(tmp_path / "out")
    assert np.array_equal(data.test_images[..., 0], expected["t10k", "images-idx3"])
    assert np.array_equal(data.train_labels, expected["train", "labels-idx1"])


def test_svhn_axes_and_the_digit_zero(tmp_path, monkeypatch):
    from scipy.io import savemat

    random, files, arrays = np.random.RandomState(0), {}, {}
    for split, n in (("train", 20), ("test", 10)):
        arrays[split] = random.randint(0, 256, (32, 32, 3, n)).astype(np.uint8)
        buffer = io.BytesIO()
        savemat(buffer, {"X": arrays[split], "y": (np.arange(n) % 10 + 1).astype(np.uint8)[:, None]})
        files[f"{split}_32x32.mat"] = buffer.getvalue()
    official = tuple(OfficialFile(n, md5(d)) for n, d in files.items())
    monkeypatch.setitem(SETS, "svhn", dataclasses.replace(SETS["svhn"], train=20, test=10, files=official))
    get(tmp_path, write(tmp_path / "m", files), name="svhn")
    data = open_set(tmp_path / "out")
    assert data.test_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert np.array_equal(data.train_images[7], arrays["train"][..., 7])


# ---------------------------------------------------------------------------------------------- Tiny ImageNet

WNIDS = ["n02000002", "n01000001"]


def tiny_files() -> dict[str, bytes]:
    """Two classes, three training and two validation images each, one of them grey."""
    files = {
        "wnids.txt": "\n".join(WNIDS).encode(),
        "words.txt": b"n01000001\tgoldfish, fish\nn02000002\tfrog\nn09999999\tnothing",
    }
    lines = []

    def jpeg(seed: int) -> bytes:
        image = Image.fromarray(np.random.RandomState(seed).randint(0, 256, (64, 64, 3)).astype(np.uint8))
        buffer = io.BytesIO()
        (image.convert("L") if seed == 12 else image).save(buffer, "JPEG")
        return buffer.getvalue()

    for c, wnid in enumerate(WNIDS):
        for k in range(3):
            files[f"train/{wnid}/images/{wnid}_{k}.JPEG"] = jpeg(3 * c + k)
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b""
    for k in range(4):
        files[f"val/images/val_{k}.JPEG"] = jpeg(10 + k)
        lines.append(f"val_{k}.JPEG\t{WNIDS[k % 2]}\t{4 * k}\t0\t31\t63")
    files["val/val_annotations.txt"] = "\n".join(lines).encode()
    files["test/images/test_0.JPEG"] = jpeg(20)
    return {f"tiny-imagenet-200/{name}": data for name, data in files.items()}


@pytest.fixture
def tiny(monkeypatch, server):
    files, buffer = tiny_files(), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    name = "tiny-imagenet-200.zip"
    official = OfficialFile(name, md5(buffer.getvalue()), (f"{server.url}/official/{name}",))
    facts = dataclasses.replace(SETS["tiny_imagenet"], train=6, test=4, classes=2, archive=official)
    monkeypatch.setitem(SETS, "tiny_imagenet", facts)
    return files, buffer.getvalue()


def test_tiny_imagenet_from_archive_folder_and_tars_is_the_same(tmp_path, tiny, server):
    files, archive = tiny
    server.files["/official/tiny-imagenet-200.zip"] = archive
    official = get(tmp_path, name="tiny_imagenet")
    assert official["source"]["checksums"] == "official MD5s matched"
    data = open_set(tmp_path / "out")
    assert data.meta["class_names"] == ["goldfish, fish", "frog"] and data.meta["class_ids"] == sorted(WNIDS)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1] and data.test_labels.tolist() == [1, 0, 1, 0]
    assert data.test_boxes.tolist() == [[4 * k, 0, 32, 64] for k in range(4)]
    grey = Image.open(io.BytesIO(files["tiny-imagenet-200/val/images/val_2.JPEG"]))
    assert grey.mode == "L" and np.array_equal(data.test_images[2], np.asarray(grey.convert("RGB")))
    first = Image.open(io.BytesIO(files[f"tiny-imagenet-200/train/{WNIDS[1]}/images/{WNIDS[1]}_0.JPEG"]))
    assert np.array_equal(data.train_images[0], np.asarray(first))
    folder = write(tmp_path / "folder", files)
    train = {n: d for n, d in reversed(files.items()) if "/train/" in n}
    rest = {f"./{n}": d for n, d in files.items() if n not in train}
    tars = write(tmp_path / "tars", {"tiny-imagenet-200-train.tar": tar_of(train, "w")})
    more = write(tmp_path / "more", {"x/tiny-imagenet-200-val.tar.xz": tar_of(rest, "w:xz")})
    for mirrors in ((folder,), (folder / "tiny-imagenet-200",), (tars, more)):
        meta = get(tmp_path, *mirrors, name="tiny_imagenet")
        assert meta["digest"] == official["digest"] and "verified by counts" in meta["source"]["checksums"]
    assert len(server.requests) == 1


def test_tiny_imagenet_boxes_scale_with_the_images(tmp_path, tiny):
    mirror = write(tmp_path / "m", tiny[0])
    get(tmp_path, mirror, name="tiny_imagenet", image_size=32, test_images=2)
    data = open_set(tmp_path / "out")
    assert data.test_images.shape == (2, 32, 32, 3) and sorted(data.test_labels) == [0, 1]
    assert (data.test_boxes[:, 2:] == [[16, 32]] * 2).all() and data.test_boxes.dtype == np.float32


def test_tiny_imagenet_validation_part_alone_is_for_evaluation(tmp_path, tiny):
    part = write(tmp_path / "m", {n: d for n, d in tiny[0].items() if "/train/" not in n})
    with pytest.raises(ValueError, match=r"0 of 6 train images.*train_images: 0 prepares it for evaluation"):
        get(tmp_path, part, name="tiny_imagenet")
    meta = get(tmp_path, part, name="tiny_imagenet", train_images=0)
    assert meta["counts"] == {"train": 0, "test": 4, "validation": 0}
    assert open_set(tmp_path / "out").test_boxes.shape == (4, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"val/images/val_1.JPEG": None}, "3 of 4 val images"),
        ({f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG": None}, "5 of 6 train images"),
        ({"words.txt": None}, "words.txt is missing"),
        ({"wnids.txt": b"n01000001"}, "wnids.txt names 1 classes, not 2"),
        ({"val/images/val_1.JPEG": b"no picture"}, "val/images/val_1.JPEG: cannot be read as an image"),
        ({"wnids.txt": b"n01000001 n03000003"}, "val_annotations.txt, line 1: not a file, a known class"),
        ({"val/val_annotations.txt": b"val_0.JPEG\tn01000001\t1"}, "val_annotations.txt, line 1"),
        ({"val/images/val_1.JPEG": None, "val/images/val_7.JPEG": b""}, "name different files"),
    ],
)
def test_tiny_imagenet_that_is_incomplete_is_refused(tmp_path, tiny, change, words):
    files = tiny[0] | {f"tiny-imagenet-200/{name}": data for name, data in change.items()}
    mirror = write(tmp_path / "m", {name: data for name, data in files.items() if data is not None})
    with pytest.raises(ValueError) as caught:
        get(tmp_path, mirror, name="tiny_imagenet")
    assert words in str(caught.value)


def test_tiny_imagenet_with_uneven_classes_or_sizes_is_refused(tmp_path, tiny):
    files = dict(tiny[0])
    moved = files.pop(f"tiny-imagenet-200/train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG")
    files[f"tiny-imagenet-200/train/{WNIDS[1]}/images/{WNIDS[1]}_9.JPEG"] = moved
    with pytest.raises(ValueError, match=r"class n0\d+ has [24] train images, not 3"):
        get(tmp_path, write(tmp_path / "m", files), name="tiny_imagenet")
    buffer = io.BytesIO()
    Image.new("RGB", (64, 60)).save(buffer, "JPEG")
    files = tiny[0] | {"tiny-imagenet-200/val/images/val_0.JPEG": buffer.getvalue()}
    with pytest.raises(ValueError, match="64x60 pixels, not 64x64"):
        get(tmp_path, write(tmp_path / "n", files), name="tiny_imagenet")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
def test_a_cut_off_tar_is_named(tmp_path, tiny, mode):
    whole = tar_of(tiny[0], mode)
    mirror = write(tmp_path / "m", {"tiny-imagenet-200.tar": whole})
    get(tmp_path, mirror, name="tiny_imagenet")
    write(mirror, {"tiny-imagenet-200.tar": whole[: len(whole) // 2]})
    with pytest.raises(ValueError, match=r"tiny-imagenet-200.tar: damaged archive .* fetch it again"):
        get(tmp_path, mirror, name="tiny_imagenet")


def test_names_of_tiny_imagenet_archives():
    for name in (
        "tiny-imagenet-200.zip",
        "Tiny_ImageNet-train.tar.gz",
        "tinyimagenet.tgz",
        "tiny-imagenet-val.tar.xz",
    ):
        assert CONTAINER.search(name)
    for name in ("tiny-imagenet-200.txt", "imagenet.tar", "tiny-imagenet-200"):
        assert not CONTAINER.search(name)
