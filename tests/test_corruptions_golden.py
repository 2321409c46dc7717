"""Golden hashes: one sha256 per protocol, corruption and severity of a small block of digits and of
CIFAR-10's test split.

Some bits depend on libraries (JPEG on libjpeg, blurs on SciPy and OpenCV, draws on NumPy), so
`corruptions_golden.json` keeps one set of hashes per combination of versions; another combination is skipped,
naming itself. After a change on purpose, raise `constants.ALGORITHM` and write the hashes of the installed
versions with ``python tests/test_corruptions_golden.py``.
"""

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from convx.data.corruptions import PROTOCOLS, SEVERITIES, corrupt_batch
from convx.data.corruptions.store import library_versions

GOLDEN = Path(__file__).with_name("corruptions_golden.json")
SEED = 2026


def versions_key() -> str:
    """Return what the bits depend on: versions of the libraries, and whether they find AVX512, which rounds a frost picture's
    reduction another way."""
    versions = " ".join(f"{name}={version}" for name, version in sorted(library_versions().items()))
    wide = "avx512f" in Path("/proc/cpuinfo").read_text().split()
    return versions + (" avx512" if wide else "")


def digits():
    """The first 12 of scikit-learn's 8 x 8 digits, 0..16 times 15, every pixel repeated 4 x 4: uint8 [12, 32,
    32, 1]."""
    from sklearn.datasets import load_digits

    images = (load_digits().images[:12] * 15).astype(np.uint8)
    return images.repeat(4, axis=1).repeat(4, axis=2)[..., None]


def cifar10():
    """Every 400th image of the official test split, uint8 [25, 32, 32, 3]; None where no mirror holds it."""
    places = [Path(p) for p in os.environ.get("CONVX_MIRROR", "").split() if "://" not in p]
    places.append(Path(__file__).resolve().parents[2] / "shared" / "data")
    for place in places:
        for file in (
            place / "cifar-10-batches-py" / "test_batch",
            *place.glob("*/cifar-10-batches-py/test_batch"),
        ):
            if file.is_file():
                content = file.read_bytes()
                assert hashlib.md5(content).hexdigest() == "40351d587109b95175f43aff81a1287e", (
                    f"{file}: not the official file"
                )
                pixels = pickle.loads(content, encoding="latin1")["data"].reshape(-1, 3, 32, 32)
                return np.ascontiguousarray(pixels[::400].transpose(0, 2, 3, 1))
    return None


SETS = {"digits": (digits, 1, tuple(PROTOCOLS)), "cifar10": (cifar10, 400, ("cifar_c", "imagenet_c"))}


def hashes(name: str, protocol: str) -> dict[str, str] | None:
    load, stride, _ = SETS[name]
    images = load()
    if images is None:
        return None
    indices = range(0, stride * len(images), stride)
    found = {}
    for corruption in PROTOCOLS[protocol].corruptions:
        for severity in SEVERITIES:
            block = corrupt_batch(images, corruption, severity, protocol, indices, SEED)
            found[f"{corruption}/{severity}"] = hashlib.sha256(block.tobytes()).hexdigest()[:24]
    return found


@pytest.mark.parametrize("name, protocol", [(n, p) for n, (_, _, protocols) in SETS.items() for p in protocols])
def test_every_cell_has_its_golden_hash(name, protocol):
    stored = json.loads(GOLDEN.read_text()).get(versions_key())
    if stored is None:
        pytest.skip(f"no golden hashes for {versions_key()}")
    found = hashes(name, protocol)
    if found is None:
        pytest.skip("no cifar-10-batches-py/test_batch below the folders of CONVX_MIRROR")
    expected = stored[f"{name}/{protocol}"]
    differing = [cell for cell in expected if found[cell] != expected[cell]]
    assert list(found) == list(expected) and not differing, f"same library versions, other bits: {differing}"


def test_digits_are_defined_without_any_library_s_rounding():
    """Fixes the input of the golden hashes itself."""
    assert hashlib.sha256(digits().tobytes()).hexdigest().startswith("eee8635c6f092189677e257a")


def write() -> None:
    content = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    content[versions_key()] = {f"{n}/{p}": hashes(n, p) for n, (_, _, protocols) in SETS.items() for p in protocols}
    missing = [name for name, cells in content[versions_key()].items() if cells is None]
    if missing:
        raise SystemExit(f"not written: no images for {', '.join(missing)}; set CONVX_MIRROR")
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    write()
