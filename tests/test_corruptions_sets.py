"""Building and opening corrupted sets, the published sets' readers, mean corruption errors."""

import hashlib
import json
import multiprocessing
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from convx.data.corruptions import (
    ALEXNET_CLEAN_ERROR,
    ALEXNET_ERROR,
    ARCHIVES,
    EXTRA,
    MAIN,
    PROTOCOLS,
    build,
    corrupt,
    mean_ce,
    open_corrupted,
    open_official,
    store,
)
from convx.data.corruptions.constants import Protocol


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (70, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


def sums(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.npy"))}


SOME = ["gaussian_noise", "glass_blur", "frost", "fog", "jpeg_compression"]


# ------------------------------------------------------------------------------------------------------ build
def test_one_and_two_workers_and_any_chunk_write_the_same_bits(images, tmp_path, monkeypatch):
    one = build(images, "cifar_c", SOME, [1, 5], tmp_path / "one", 4, workers=1, progress=False)
    two = build(images, "cifar_c", SOME, [1, 5], tmp_path / "two", 4, workers=2, progress=False)
    monkeypatch.setattr(store, "CHUNK_BYTES", 7 * images[0].size)
    small = build(images, "cifar_c", list(reversed(SOME)), [1, 5], tmp_path / "small", 4, workers=1, progress=False)
    assert sums(tmp_path / "one") == sums(tmp_path / "two") == sums(tmp_path / "small")
    assert one.meta == two.meta == small.meta  # in the protocol's order whatever order was asked for
    for corruption in SOME:
        assert one[corruption].shape == (2, 70, 32, 32, 3) and isinstance(one[corruption], np.memmap)
        assert not one[corruption].flags.writeable
        single = corrupt(images[31], corruption, 5, "cifar_c", 4, index=31)
        assert np.array_equal(one.cell(corruption, 5)[31], single)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(
        [".lock", "built.json", "meta.json", *(f"{c}.npy" for c in SOME)]
    )


def test_meta_says_what_it_is(images, tmp_path):
    built = build(images[:3], "imagenet_c", None, None, tmp_path, 1, progress=False)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert list(built) == list(MAIN) and len(built) == 15 and built.severities == (1, 2, 3, 4, 5)
    assert "regenerated" in meta["label"] and meta["protocol"] == built.protocol == "imagenet_c"
    assert meta["constants_digest"] == PROTOCOLS["imagenet_c"].digest and meta["seed"] == 1
    assert meta["sha256"] == {c: hashlib.sha256((tmp_path / f"{c}.npy").read_bytes()).hexdigest() for c in MAIN}
    assert {"numpy", "scipy", "opencv", "pillow", "libjpeg", "machine"} <= set(meta["libraries"])
    built.verify()
    assert all("regenerated" in p.label for p in PROTOCOLS.values())


def test_memory_maps_and_their_views_are_read_as_given(images, tmp_path):
    """A mapped file is handed to the workers as it is; views of one (other order, a part) are copied
    first."""
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    for name, view in (("whole", mapped), ("reversed", mapped[::-1]), ("part", mapped[5:20])):
        found = build(view, "cifar_c", ["contrast"], [3], tmp_path / name, 0, progress=False)
        expected = build(np.array(view), "cifar_c", ["contrast"], [3], tmp_path / f"{name}_copy", 0, progress=False)
        assert np.array_equal(found["contrast"], expected["contrast"]) and found.meta == expected.meta
        assert not list((tmp_path / name).glob(".source-*"))


def test_grey_sets(images, tmp_path):
    grey = images[:5, ..., :1]
    built = build(grey, "cifar_c", ["fog", "frost"], [2], tmp_path, 0, progress=False)
    assert built["fog"].shape == (1, 5, 32, 32, 1)
    assert np.array_equal(built["frost"][0, 4], corrupt(grey[4], "frost", 2, "cifar_c", 0, index=4))


class Interrupted(Exception):
    pass


def test_an_interrupted_build_goes_on_where_it_stopped(images, tmp_path, monkeypatch):
    whole = build(images, "cifar_c", SOME, [1, 3], tmp_path / "whole", 0, progress=False)
    work, calls = store._work, []

    def counting(job):
        calls.append(job[2])
        return work(job)

    def breaking(job):
        if job[2] == "frost":
            raise Interrupted
        return counting(job)

    monkeypatch.setattr(store, "_work", breaking)
    with pytest.raises(Interrupted):
        build(images, "cifar_c", SOME, [1, 3], tmp_path / "broken", 0, progress=False)
    with pytest.raises(ValueError, match="an unfinished set"):
        open_corrupted(tmp_path / "broken")
    assert (tmp_path / "broken" / "frost.npy.part").exists() and not (tmp_path / "broken" / "frost.npy").exists()

    calls.clear()
    monkeypatch.setattr(store, "_work", counting)
    again = build(images, "cifar_c", SOME, [1, 3], tmp_path / "broken", 0, progress=False)
    assert set(calls) == {"frost", "fog", "jpeg_compression"}  # the first two were finished
    assert again.meta == whole.meta and sums(tmp_path / "broken") == sums(tmp_path / "whole")
    calls.clear()
    build(images, "cifar_c", SOME, [1, 3], tmp_path / "broken", 0, progress=False)
    assert not calls  # complete: nothing to do
    (tmp_path / "broken" / "meta.json").unlink()  # as a workflow does that takes the job for unfinished
    assert build(images, "cifar_c", SOME, [1, 3], tmp_path / "broken", 0, progress=False).meta == whole.meta
    assert not calls
    build(images, "cifar_c", [*SOME, "snow"], [1, 3], tmp_path / "broken", 0, progress=False)
    assert set(calls) == {"snow"}  # one more is added to what is there
    assert list(open_corrupted(tmp_path / "broken")) == [c for c in MAIN if c in (*SOME, "snow")]


@pytest.mark.parametrize("change", ["seed", "images", "severities", "protocol", "constants", "libraries", "damaged"])
def test_what_differs_is_built_anew(change, images, tmp_path, monkeypatch):
    arguments = {"protocol": "cifar_c", "corruptions": ["fog"], "severities": [1], "seed": 0}
    arguments["images_NHWC"] = images[:4]
    before = build(folder=tmp_path, progress=False, **arguments).meta
    if change == "seed":
        arguments["seed"] = 1
    elif change == "images":
        arguments["images_NHWC"] = images[1:5]
    elif change == "severities":
        arguments["severities"] = [2]
    elif change == "protocol":
        arguments["protocol"] = "imagenet_c"
    elif change == "constants":
        old = PROTOCOLS["cifar_c"]
        table = old.table | {"fog": ((0.3, 3), *old.table["fog"][1:])}
        arguments["protocol"] = Protocol(**{**old.__dict__, "table": table})
    elif change == "libraries":
        monkeypatch.setattr(store, "library_versions", lambda: {"numpy": "0"})
    else:
        with (tmp_path / "fog.npy").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")
        with pytest.raises(ValueError, match="sha256"):
            open_corrupted(tmp_path).verify()
    calls, work = [], store._work
    monkeypatch.setattr(store, "_work", lambda job: calls.append(job) or work(job))
    after = build(folder=tmp_path, progress=False, **arguments)
    assert calls
    after.verify()
    if change == "damaged":
        assert after.meta == before
    elif change == "libraries":
        assert after.meta["sha256"] == before["sha256"]
    else:
        assert after.meta["sha256"] != before["sha256"]


def test_arrays_of_others_are_never_removed(images, tmp_path):
    np.save(tmp_path / "fog.npy", np.zeros(3, np.uint8))  # say, of an unpacked CIFAR-10-C
    with pytest.raises(ValueError, match=r"holds fog.npy but no meta.json"):
        build(images[:2], "cifar_c", ["fog"], [1], tmp_path, 0, progress=False)
    assert np.load(tmp_path / "fog.npy").shape == (3,)


def test_a_disk_that_is_too_small_is_an_error_before_any_work(images, tmp_path, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"0.0 GB needed .* 0.0 GB free"):
        build(images[:2], "cifar_c", ["fog"], [1], tmp_path, 0, progress=False)


def _hold(folder, ready, stop):
    with store._locked(folder):
        ready.set()
        stop.wait(30)


def test_a_second_builder_waits_for_the_first(images, tmp_path, capfd):
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, stop))
    other.start()
    try:
        assert ready.wait(30)
        arguments = (images[:2], "cifar_c", ["fog"], [1], tmp_path, 0)
        second = threading.Thread(target=build, args=arguments, kwargs={"progress": False})
        second.start()
        second.join(0.5)
        assert second.is_alive() and not (tmp_path / "meta.json").exists()
    finally:
        stop.set()
        other.join()
    second.join(60)
    assert "waiting for another process that builds corruptions" in capfd.readouterr().out
    open_corrupted(tmp_path).verify()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"severities": [3, 1]}, "ascending"),
        ({"severities": [1, 1]}, "ascending"),
        ({"severities": [7]}, "severity 7"),
        ({"corruptions": ["contrasst"]}, "did you mean 'contrast'"),
        ({"workers": 0}, "workers: 0"),
        ({"images_NHWC": np.zeros((2, 28, 28, 1), np.uint8)}, "28 x 28 px"),
        ({"images_NHWC": np.zeros((0, 32, 32, 3), np.uint8)}, "none given"),
    ],
)
def test_build_refuses_in_one_line(change, message, images, tmp_path):
    arguments = {"protocol": "cifar_c", "corruptions": ["fog"], "severities": [1], "seed": 0, "workers": 1}
    arguments["images_NHWC"] = images[:2]
    with pytest.raises(ValueError, match=message) as caught:
        build(folder=tmp_path / "out", progress=False, **(arguments | change))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_opening_refuses_what_is_not_a_set(images, tmp_path):
    with pytest.raises(ValueError, match="no corrupted set"):
        open_corrupted(tmp_path)
    built = build(images[:2], "cifar_c", ["fog", "snow"], [1], tmp_path, 0, progress=False)
    with pytest.raises(ValueError, match="no severity 2"):
        built.cell("fog", 2)
    with pytest.raises(KeyError):
        built["frost"]
    np.save(tmp_path / "snow.npy", np.zeros((1, 3, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"snow.npy: uint8 \(1, 3, 32, 32, 3\) found"):
        open_corrupted(tmp_path)
    (tmp_path / "snow.npy").unlink()
    with pytest.raises(ValueError, match=r"snow.npy: missing; build the set again"):
        open_corrupted(tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        open_corrupted(tmp_path)


def test_the_package_is_light_to_import():
    heavy = "print(sorted({'torch', 'numba', 'skimage', 'imagecorruptions', *FURTHER} & set(sys.modules)))"
    first = "import sys, convx.data.corruptions as c; c.PROTOCOLS; FURTHER = {'cv2', 'scipy'}"
    then = "import sys, numpy as n, convx.data.corruptions as c; FURTHER = set()"
    then += "; c.corrupt(n.zeros((32, 32, 3), 'u1'), 'frost', 1, 'cifar_c', 0)"
    for code in (first, then):
        done = subprocess.run([sys.executable, "-c", f"{code}; {heavy}"], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"


# -------------------------------------------------------------------------------------------------- constants
def test_tables_are_complete():
    for protocol in PROTOCOLS.values():
        assert protocol.corruptions == (*MAIN, *EXTRA)
        assert all(len(values) == 5 for values in protocol.table.values())
    assert len({p.digest for p in PROTOCOLS.values()}) == 3


def test_digest_covers_every_constant():
    old = PROTOCOLS["cifar_c"]
    for corruption, values in old.table.items():
        other = Protocol(**{**old.__dict__, "table": old.table | {corruption: (*values[:4], 0.123)}})
        assert other.digest != old.digest, corruption
    assert Protocol(**{**old.__dict__, "trim": "corner"}).digest != old.digest


def test_imagenet_constants_equal_those_in_the_installed_package():
    """Read out of the package's source: the list literal that each of its functions begins with."""
    import ast
    import inspect

    module = pytest.importorskip("imagecorruptions.corruptions")
    for corruption in MAIN + EXTRA:
        tree = ast.parse(inspect.getsource(getattr(module, corruption)))
        literal = next(n for n in ast.walk(tree) if isinstance(n, ast.List) and len(n.elts) == 5)
        ours = PROTOCOLS["imagenet_c"].table[corruption]
        if corruption == "zoom_blur":
            theirs = [tuple(ast.literal_eval(a) for a in call.args[1:]) for call in literal.elts]
        else:
            theirs = eval(
                compile(ast.Expression(literal), "constants", "eval"), {"__builtins__": {}}
            )  # holds 250 * 0.05
        assert np.allclose(np.array(ours, float), np.array(theirs, float), rtol=1e-12), corruption


# --------------------------------------------------------------------------------------------- published sets
@pytest.fixture
def cifar_folder(tmp_path):
    rng = np.random.default_rng(0)
    for corruption in ("fog", "gaussian_noise"):
        np.save(tmp_path / f"{corruption}.npy", rng.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.tile(np.array([3, 8, 8, 0], np.uint8), 5))
    return tmp_path


def test_official_cifar_layout(cifar_folder):
    found = open_official(cifar_folder, images=4, clean_labels=np.array([3, 8, 8, 0]))
    assert list(found) == ["gaussian_noise", "fog"] and found.severities == (1, 2, 3, 4, 5)
    assert found["fog"].shape == (5, 4, 32, 32, 3) and isinstance(found["fog"], np.memmap)
    raw = np.load(cifar_folder / "fog.npy")
    for severity in found.severities:
        assert np.array_equal(found.cell("fog", severity), raw[(severity - 1) * 4 : severity * 4])
    assert found.labels_N.tolist() == [3, 8, 8, 0] and "regenerated" not in found.label
    with pytest.raises(ValueError, match="severity 0"):
        found.cell("fog", 0)


def test_official_cifar_inconsistencies(cifar_folder):
    with pytest.raises(
        ValueError, match=r"fog.npy|gaussian_noise.npy: uint8 \(20, .* uint8 \(50000, 32, 32, 3\) expected"
    ):
        open_official(cifar_folder)  # N of the real set
    with pytest.raises(ValueError, match="differs from the labels of the clean test split"):
        open_official(cifar_folder, images=4, clean_labels=np.array([3, 8, 8, 1]))
    labels = np.load(cifar_folder / "labels.npy")
    labels[-1] = 7
    np.save(cifar_folder / "labels.npy", labels)
    with pytest.raises(ValueError, match="five severities differ"):
        open_official(cifar_folder, images=4)
    np.save(cifar_folder / "labels.npy", labels[:-1])
    with pytest.raises(ValueError, match=r"shape \(19,\), \(20,\) expected"):
        open_official(cifar_folder, images=4)
    (cifar_folder / "labels.npy").unlink()
    with pytest.raises(ValueError, match=r"labels.npy: missing"):
        open_official(cifar_folder, images=4)
    (cifar_folder / "fog.npy").write_bytes(b"half a download")
    with pytest.raises(ValueError, match=r"fog.npy: cannot be opened"):
        open_official(cifar_folder, images=4)


@pytest.fixture
def imagenet_folder(tmp_path):
    for place in ("blur/glass_blur", "fog"):
        for severity in range(1, 6):
            for wnid, name in (("n02", "b"), ("n01", "z"), ("n01", "a")):
                folder = tmp_path / place / str(severity) / wnid
                folder.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 36), (severity * 40, 100, 200)).save(folder / f"{name}.JPEG", quality=95)
    return tmp_path


def test_official_imagenet_layout(imagenet_folder):
    found = open_official(imagenet_folder, wnids=["n00", "n01", "n02"])
    assert list(found) == ["glass_blur", "fog"] and found.labels_N.tolist() == [1, 1, 2]
    assert found.files == ("n01/a.JPEG", "n01/z.JPEG", "n02/b.JPEG")
    fog = found["fog"]
    assert fog.shape == (5, 3, 36, 40, 3) and len(fog) == 5
    assert fog[4, 0:2].shape == (2, 36, 40, 3) and fog[0, 2].shape == (36, 40, 3) and fog[1, [2, 0]].shape[0] == 2
    assert abs(int(fog[2, 1][..., 0].mean()) - 120) <= 2 and found.cell("glass_blur", 5).shape == (
        3,
        36,
        40,
        3,
    )
    assert open_official(imagenet_folder).labels_N.tolist() == [0, 0, 1]
    with pytest.raises(IndexError):
        fog[5, 0]


def test_official_imagenet_inconsistencies(imagenet_folder):
    with pytest.raises(ValueError, match="class folder n02 is not among the 1 classes"):
        open_official(imagenet_folder, wnids=["n01"])
    Image.new("RGB", (32, 32)).save(imagenet_folder / "fog" / "2" / "n01" / "a.JPEG")
    with pytest.raises(ValueError, match=r"a.JPEG: .* expected as in the rest"):
        open_official(imagenet_folder)["fog"][1, 0]
    (imagenet_folder / "fog" / "3" / "n01" / "a.JPEG").unlink()
    with pytest.raises(ValueError, match=r"not the images of the other folders .n01/a.JPEG"):
        open_official(imagenet_folder)
    with pytest.raises(ValueError, match="no such folder"):
        open_official(imagenet_folder / "nowhere")
    with pytest.raises(ValueError, match="of ImageNet-C there"):
        open_official(imagenet_folder / "fog")


def test_archives_have_well_formed_checksums():
    assert {a.file for a in ARCHIVES.values()} >= {
        "CIFAR-10-C.tar",
        "CIFAR-100-C.tar",
        "noise.tar",
        "extra.tar",
    }
    for archive in ARCHIVES.values():
        assert len(archive.md5) == 32 and int(archive.md5, 16) and archive.size > 1e9
        assert archive.url.startswith(f"https://zenodo.org/records/{archive.record}/files/")


# ---------------------------------------------------------------------------------------------------- metrics
def test_alexnet_has_an_mce_of_one_hundred():
    errors = {c: [a] * 5 for c, a in ALEXNET_ERROR.items()}
    result = mean_ce(errors, clean_error=ALEXNET_CLEAN_ERROR)
    assert result["mCE"] == pytest.approx(100) and result["relative_mCE"] == pytest.approx(100)
    assert sum(ALEXNET_ERROR.values()) / 15 == pytest.approx(78.8993, abs=1e-4)  # the mean quoted with the table


def test_mce_is_the_mean_of_ratios_of_sums():
    rng = np.random.default_rng(0)
    errors = {c: list(rng.uniform(30, 90, 5)) for c in (*MAIN, *EXTRA)}
    result = mean_ce(errors, clean_error=25.0)
    ces = [sum(errors[c]) / (5 * ALEXNET_ERROR[c]) for c in MAIN]
    relative = [(sum(errors[c]) - 5 * 25) / (5 * ALEXNET_ERROR[c] - 5 * 43.5) for c in MAIN]
    assert result["mCE"] == pytest.approx(100 * np.mean(ces))
    assert result["relative_mCE"] == pytest.approx(100 * np.mean(relative))
    assert "relative_mCE" not in mean_ce(errors)


def test_mce_is_refused_where_it_means_nothing():
    errors = {c: [50.0] * 5 for c in MAIN}
    for protocol in ("cifar_c", "tiny_imagenet_c", "official_cifar_c"):
        with pytest.raises(ValueError, match=f"ImageNet-C only, not on '{protocol}'") as caught:
            mean_ce(errors, protocol=protocol)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="missing: fog"):
        mean_ce({c: v for c, v in errors.items() if c != "fog"})
    with pytest.raises(ValueError, match="snow"):
        mean_ce(errors | {"snow": [50.0] * 4})
    with pytest.raises(ValueError, match="snow"):
        mean_ce(errors | {"snow": [50.0, 60.0, 70.0, float("nan"), 80.0]})
    with pytest.raises(ValueError, match="clean_error"):
        mean_ce(errors, clean_error=120)
