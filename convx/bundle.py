"""Results that travel: archives of a study's metrics and histories, and forgetting failed runs. No torch."""

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path, PurePosixPath

from convx.config import ConfigError
from convx.manifest import atomic, read_json

LIST = "SHA256SUMS.json"
BUNDLE_SCHEMA_VERSION = 1


def _study_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / "metrics").is_dir():
        raise ConfigError(f"{folder}: not a results folder of a study (it has no metrics/)")
    return folder


def retry(folder: str | Path, variant: str | None = None) -> list[str]:
    """Remove the records of failed runs, so that the workflow makes them again; returns a line for each.

    A failed training takes its weights, history and everything measured on it along; a failed evaluation or measurement
    goes alone.
    """
    folder = _study_folder(folder)
    if variant is not None and not (folder / "metrics" / variant).is_dir():
        from convx.config import nearest

        known = [entry.name for entry in (folder / "metrics").iterdir()]
        raise ConfigError(f"{folder}: no metrics of variant {variant!r}{nearest(variant, known)}")
    lines = []
    for file in sorted((folder / "metrics").glob(f"{variant or '*'}/seed*/*.json")):
        if not file.exists():
            continue
        record = read_json(file)
        if record["status"] != "failed":
            continue
        name, seed = file.parent.parent.name, file.parent.name
        gone = [file]
        if file.name == "training.json":
            gone = [*file.parent.glob("*.json"), folder / "runs" / name / seed / "model.safetensors"]
            gone.append(folder / "histories" / name / f"{seed}.csv")
        for path in gone:
            path.unlink(missing_ok=True)
        lines.append(f"{name} {seed} {file.stem}: forgotten ({record['reason']})")
    return lines or [f"{folder}: no failed run" + (f" of {variant}" if variant else "")]


def pack(folder: str | Path, out: str | Path | None = None, weights: bool = False) -> str:
    """Write ``<study>.convx.tar.gz``: study.json, metrics, histories, tables, and the weights if wanted.

    The same content gives the same bytes. Returns one line for the user.
    """
    folder = _study_folder(folder)
    wanted = ["metrics/**/*.json", "histories/**/*.csv", "study.json", "exact.json", "tables/*"]
    if weights:
        wanted.append("runs/**/*.safetensors")
    files = sorted({file for pattern in wanted for file in folder.glob(pattern) if file.is_file()})
    out = Path(out or f"{folder.name}.convx.tar.gz")
    sums = {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    head = {"schema_version": BUNDLE_SCHEMA_VERSION, "study": folder.name, "files": sums}
    import gzip

    with (
        atomic(out) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        _add(archive, LIST, json.dumps(head, indent=1).encode())
        for name in sums:
            _add(archive, f"{folder.name}/{name}", (folder / name).read_bytes())
    return f"{out}: {len(sums)} files of the study {folder.name}, {out.stat().st_size / 1e6:.2f} MB"


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    archive.addfile(entry, io.BytesIO(content))


def unpack(bundle: str | Path, results: str | Path = "results") -> str:
    """Unpack a bundle below ``results``: every file is checked against the list before the first one is written."""
    bundle = Path(bundle)
    try:
        with tarfile.open(bundle, "r:gz") as archive:
            content = {m.name: archive.extractfile(m).read() for m in archive.getmembers() if m.isfile()}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ConfigError(f"{bundle}: not a readable bundle ({error}); ask for it again") from None
    if LIST not in content:
        raise ConfigError(f"{bundle}: not a bundle of convx (it has no {LIST})")
    head = json.loads(content.pop(LIST))
    study = head["study"]
    expected = {f"{study}/{name}": value for name, value in head["files"].items()}
    if not re.fullmatch(r"[a-z0-9_]+", study) or set(expected) != set(content):
        raise ConfigError(f"{bundle}: its files are not those of its list; it is damaged, ask for it again")
    for name, value in expected.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ConfigError(f"{bundle}: {name} would leave the results folder")
        if hashlib.sha256(content[name]).hexdigest() != value:
            raise ConfigError(f"{bundle}: {name} does not match its sha256; it is damaged, ask for it again")
    for name, data in content.items():
        with atomic(Path(results) / name) as temporary:
            temporary.write_bytes(data)
    return f"{Path(results) / study}: {len(content)} files, all checksums matched"
