"""Bundles: results that travel and arrive whole or not at all; and forgetting failed runs."""

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from made_up import build

from convx import bundle, cli
from convx.config import ConfigError
from convx.report import figures, page, tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a study with its tables, and weights that a bundle may leave at home."""
    folder = build(tmp_path_factory.mktemp("results"), variants={"cnn": None, "cnn_frozen": None}, images=60)
    tables.write(folder)
    weights = folder / "runs" / "cnn" / "seed0" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(bytes(range(256)) * 400)
    return folder


@pytest.fixture
def packed(folder, tmp_path) -> Path:
    out = tmp_path / "made_up.convx.tar.gz"
    bundle.pack(folder, out)
    return out


def _content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_round_trip_without_weights(folder, packed, tmp_path):
    text = bundle.unpack(packed, tmp_path / "results")
    here, there = _content(folder), _content(tmp_path / "results" / "made_up")
    assert there == {name: data for name, data in here.items() if not name.startswith("runs/")}
    assert {"study.json", "tables/runs.csv", "metrics/cnn/seed0/cost.json", "histories/cnn/seed2.csv"} <= set(there)
    assert f"{len(there)} files, all checksums matched; 6 runs added" in text
    again = bundle.unpack(packed, tmp_path / "results")  # nothing differs, nothing is lost
    assert again.endswith("; 0 runs added, 6 there already with the same numbers and kept")
    assert _content(tmp_path / "results" / "made_up") == there


def test_weights_travel_when_asked(folder, tmp_path):
    out = tmp_path / "all.tar.gz"
    assert str(out) in bundle.pack(folder, out, weights=True)
    bundle.unpack(out, tmp_path / "results")
    assert _content(tmp_path / "results" / "made_up") == _content(folder)


def test_same_bytes_twice_whatever_the_times(folder, packed, tmp_path):
    for file in folder.rglob("*.json"):
        file.touch()
    (folder / "metrics" / ".evaluation.json.x1.json").write_text("being written")
    bundle.pack(folder, tmp_path / "second.tar.gz")
    (folder / "metrics" / ".evaluation.json.x1.json").unlink()
    assert (tmp_path / "second.tar.gz").read_bytes() == packed.read_bytes()


def test_everything_is_drawn_from_a_bundle_alone(folder, packed, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "paper_figures", lambda results, out: [])  # they have tests of their own
    monkeypatch.setattr(figures, "FIGURES", (figures.claims_forest, figures.accuracy, figures.accuracy_latency))
    made = {}
    bundle.unpack(packed, tmp_path / "results")
    for root in (folder, tmp_path / "results" / "made_up"):
        tables.write(root)
        assert "accuracy" in figures.draw(root)
        page.write(root)
        made[root] = {k: v for k, v in _content(root).items() if k.startswith(("tables/", "figures/", "report/"))}
    assert len(made[folder]) == 5 + 6 + 1 and made[folder] == made[tmp_path / "results" / "made_up"]


def test_results_of_ones_own_are_never_overwritten(packed, tmp_path):
    own = tmp_path / "results" / "made_up" / "study.json"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(ConfigError, match=r"study\.json: not a frozen study; move .*made_up away"):
        bundle.unpack(packed, tmp_path / "results")
    assert _content(tmp_path / "results") == {"made_up/study.json": b"mine"}


@pytest.mark.parametrize("cut", [0, 10, 200, 2000, -600])
def test_a_truncated_archive_writes_nothing(packed, tmp_path, cut):
    broken = tmp_path / "cut.tar.gz"
    broken.write_bytes(packed.read_bytes()[:cut])
    with pytest.raises(ConfigError, match=r"^.*cut\.tar\.gz: .*(bundle|damaged).*$"):
        bundle.unpack(broken, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_any_flipped_byte_is_noticed_or_harmless(packed, tmp_path):
    """Flip bytes all over the archive: either the bundle is refused, or what arrives is what was sent."""
    data, refused = packed.read_bytes(), 0
    bundle.unpack(packed, tmp_path / "good")
    good = _content(tmp_path / "good")
    for place in range(20, len(data), max(1, len(data) // 60)):
        broken = tmp_path / "flipped.tar.gz"
        broken.write_bytes(data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :])
        target = tmp_path / f"results{place}"
        try:
            bundle.unpack(broken, target)
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error) and not target.exists()
        else:
            assert _content(target) == good
    assert refused > 40


def _forge(path: Path, files: dict[str, bytes], head: dict | bytes | None = None, link: str | None = None) -> Path:
    """Write a bundle with right checksums by hand: names without the study's folder are taken as they are."""
    sums = {name.removeprefix("made_up/"): hashlib.sha256(data).hexdigest() for name, data in files.items()}
    head = {"schema_version": 1, "study": "made_up", "files": sums} | (head if isinstance(head, dict) else {})
    content = json.dumps(head).encode() if not isinstance(head, bytes) else head
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in {bundle.LIST: content, **files}.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            if name == link:
                entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, "/etc/passwd", 0
            archive.addfile(entry, io.BytesIO(data))
    path.write_bytes(gzip.compress(buffer.getvalue()))
    return path


@pytest.mark.parametrize(
    "name", ["../evil.json", "metrics/../../../evil.json", "/tmp/evil.json", "..\\evil.json", "C:evil.json"]
)
def test_no_path_leaves_the_results_folder(tmp_path, name):
    forged = _forge(tmp_path / "forged.tar.gz", {f"made_up/{name}": b"{}"})
    with pytest.raises(ConfigError, match="would leave the results folder"):
        bundle.unpack(forged, tmp_path / "deep" / "results")
    assert not list(tmp_path.rglob("evil*")) and not (tmp_path / "deep").exists()


@pytest.mark.parametrize("study", ["../up", "a/b", "", "Upper", None, "x\n"])
def test_a_study_has_a_plain_name(tmp_path, study):
    with pytest.raises(ConfigError, match="is not the name of a study"):
        bundle.unpack(_forge(tmp_path / "f.tar.gz", {"made_up/study.json": b"{}"}, {"study": study}), tmp_path / "r")


def test_links_and_strangers_are_refused(tmp_path):
    files = {"made_up/study.json": b"{}"}
    with pytest.raises(ConfigError, match=r"study\.json is not a file of its list"):
        bundle.unpack(_forge(tmp_path / "l.tar.gz", files, link="made_up/study.json"), tmp_path / "r")
    few = {"files": {}}
    with pytest.raises(ConfigError, match=r"study\.json is not a file of its list"):
        bundle.unpack(_forge(tmp_path / "s.tar.gz", files, few), tmp_path / "r")
    more = {"files": {"study.json": hashlib.sha256(b"{}").hexdigest(), "metrics/a.json": "0" * 64}}
    with pytest.raises(ConfigError, match=r"metrics/a\.json is missing"):
        bundle.unpack(_forge(tmp_path / "m.tar.gz", files, more), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_wrong_checksum_is_named(tmp_path):
    head = {"files": {"study.json": "0" * 64}}
    with pytest.raises(ConfigError, match=r"made_up/study\.json does not match its sha256"):
        bundle.unpack(_forge(tmp_path / "f.tar.gz", {"made_up/study.json": b"{}"}, head), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_what_is_no_bundle_is_told_in_one_line(tmp_path, folder):
    with pytest.raises(ConfigError, match="there is no such file"):
        bundle.unpack(tmp_path / "nothing.tar.gz", tmp_path / "r")
    (tmp_path / "text.tar.gz").write_text("hello")
    with pytest.raises(ConfigError, match="not a readable bundle"):
        bundle.unpack(tmp_path / "text.tar.gz", tmp_path / "r")
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as archive:
        archive.add(folder / "study.json", "study.json")
    with pytest.raises(ConfigError, match="not a bundle of convx"):
        bundle.unpack(tmp_path / "other.tar.gz", tmp_path / "r")
    with pytest.raises(ConfigError, match="a bundle of version 9"):
        bundle.unpack(_forge(tmp_path / "n.tar.gz", {}, {"schema_version": 9}), tmp_path / "r")
    with pytest.raises(ConfigError, match="not a results folder of a study"):
        bundle.pack(tmp_path)


def test_the_verbs_end_in_one_line(packed, tmp_path, capsys):
    (tmp_path / "text.tar.gz").write_text("hello")
    assert cli.main(["unpack", str(tmp_path / "text.tar.gz"), "--results", str(tmp_path / "r")]) == 2
    out = capsys.readouterr()
    assert out.err.startswith("convx: ") and out.err.count("\n") == 1 and not out.out
    assert cli.main(["unpack", str(packed), "--results", str(tmp_path / "r")]) == 0
    assert "all checksums matched" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ retry


def test_retry_forgets_a_failed_training_and_what_was_measured_on_it(tmp_path):
    folder = build(tmp_path, failed=[("tcnn", 1)], images=20)
    history = folder / "histories" / "tcnn" / "seed1.csv"
    weights = folder / "runs" / "tcnn" / "seed1" / "model.safetensors"
    for file in (history, weights):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("of the failed run")
    others = {k: v for k, v in _content(folder).items() if "tcnn/seed1" not in k}
    lines = bundle.retry(folder)
    assert lines == [
        "tcnn seed1 evaluation: forgotten (the training it needs failed: the loss is not finite in epoch 2)",
        "tcnn seed1 training: forgotten (the loss is not finite in epoch 2)",
    ]
    assert _content(folder) == others


def test_retry_of_a_failed_measurement_keeps_the_training(tmp_path):
    folder = build(tmp_path, images=20)
    file = folder / "metrics" / "cnn" / "seed0" / "cost.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "failed", "reason": "out of memory"}))
    before = _content(folder)
    assert bundle.retry(folder, "tcnn") == [f"{folder}: no failed run of tcnn"] and _content(folder) == before
    assert bundle.retry(folder, "cnn") == ["cnn seed0 cost: forgotten (out of memory)"]
    assert _content(folder) == {k: v for k, v in before.items() if k != "metrics/cnn/seed0/cost.json"}


def test_retry_names_the_nearest_variant(tmp_path):
    folder = build(tmp_path, images=20)
    with pytest.raises(ConfigError, match=r"no metrics of variant 'tcn'; did you mean 'tcnn'\?"):
        bundle.retry(folder, "tcn")
    with pytest.raises(ConfigError, match="not a results folder"):
        bundle.retry(tmp_path)
