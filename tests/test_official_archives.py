"""Published corrupted sets as archives: unpacked only after their checksums matched."""

import dataclasses
import hashlib
import io
import tarfile

import numpy as np
import pytest

from convx.data.corruptions import official
from convx.data.corruptions.constants import MAIN


def tar_of(files: dict[str, bytes], path):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.fixture
def cifar_c(tmp_path, monkeypatch):
    """Return a made-up CIFAR-10-C.tar of 4 images whose checksums are the published ones."""
    files = {f"CIFAR-10-C/{name}.npy": npy(np.full((20, 32, 32, 3), i, np.uint8)) for i, name in enumerate(MAIN)}
    files["CIFAR-10-C/labels.npy"] = npy(np.tile(np.arange(4, dtype=np.uint8), 5))
    file = tar_of(files, tmp_path / "CIFAR-10-C.tar")
    content = file.read_bytes()
    sums = {"md5": hashlib.md5(content).hexdigest(), "sha256": hashlib.sha256(content).hexdigest()}
    known = dataclasses.replace(official.ARCHIVES["cifar10_c"], **sums)
    monkeypatch.setitem(official.ARCHIVES, "cifar10_c", known)
    return file


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_verified_archive_is_unpacked_and_opened(cifar_c, tmp_path, as_folder):
    path = cifar_c.parent if as_folder else cifar_c
    folder = official.verified_folder(path, tmp_path / "scratch")
    opened = official.open_official(folder, clean_labels=np.arange(4), images=4)
    assert opened["fog"].shape == (5, 4, 32, 32, 3)
    assert int(opened["fog"][0, 0, 0, 0, 0]) == MAIN.index("fog")


def test_a_wrong_checksum_is_one_line_and_unpacks_nothing(cifar_c, tmp_path):
    cifar_c.write_bytes(cifar_c.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"CIFAR-10-C\.tar: its md5 is .* published is .*zenodo") as error:
        official.verified_folder(cifar_c, tmp_path / "scratch")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "scratch").exists()


def test_an_unknown_archive_is_refused(tmp_path):
    file = tar_of({"a": b"b"}, tmp_path / "corrupted.tar")
    with pytest.raises(ValueError, match="not the name of a published archive"):
        official.verified_folder(file, tmp_path / "scratch")


def test_a_member_that_leaves_the_folder_is_refused(tmp_path, monkeypatch):
    file = tar_of({"../escaped.npy": b"x"}, tmp_path / "noise.tar")
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setitem(
        official.ARCHIVES, "imagenet_c_noise", dataclasses.replace(official.ARCHIVES["imagenet_c_noise"], md5=md5)
    )
    with pytest.raises(ValueError, match=r"noise\.tar: not unpacked: .*outside the destination") as error:
        official.verified_folder(file, tmp_path / "scratch")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "escaped.npy").exists() and not (tmp_path / "scratch").exists()


def test_an_unpacked_folder_is_taken_as_it_is(tmp_path):
    assert official.verified_folder(tmp_path, tmp_path / "scratch") == tmp_path
