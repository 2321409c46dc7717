"""Results that travel: archives of a study's metrics and histories, and forgetting failed runs. No torch."""

import gzip
import hashlib
import io
import json
import re
import shutil
import struct
import tarfile
import tempfile
import zlib
from pathlib import Path, PurePosixPath

from convx import merge
from convx.config import ConfigError, nearest
from convx.manifest import atomic
from convx.records import read_record, weights_failure

LIST = "SHA256SUMS.json"
BUNDLE_SCHEMA_VERSION = 1
NAME = r"[a-z0-9_]+"  # of a study, as in its schema
PART = r"\w[\w.\-]{0,99}"  # of a path: no hidden file, no white space
MEMBER = re.compile(
    rf"study\.json|exact\.json|manifest\.json|tables/{PART}|metrics/({PART}/){{0,4}}{PART}\.json|histories/({PART}/){{0,4}}{PART}\.csv"
    rf"|runs/({PART}/){{0,4}}{PART}\.safetensors",
    re.ASCII,
)
MAX_LIST = 2**26  # bytes
DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, struct.error, UnicodeDecodeError, OverflowError)


def _study_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if not (folder / "metrics").is_dir():
        raise ConfigError(f"{folder}: not a results folder of a study (it has no metrics/)")
    return folder


def retry(folder: str | Path, variant: str | None = None) -> list[str]:
    """Remove the records of failed runs, so that the workflow makes them again; returns a line for each.

    A failed training takes its weights, history and everything measured on it along, and so do weights that were cut
    off; a failed evaluation or measurement goes alone. A record that cannot be read counts as failed.
    """
    folder = _study_folder(folder)
    if variant is not None and not (folder / "metrics" / variant).is_dir():
        known = [entry.name for entry in (folder / "metrics").iterdir()]
        raise ConfigError(f"{folder}: no metrics of variant {variant!r}{nearest(variant, known)}")
    lines = []
    for run in sorted((folder / "metrics").glob(f"{variant or '*'}/seed*")):
        records = sorted(file for file in run.glob("*.json") if not file.name.startswith("."))
        failed = {file.stem: why for file in records if (why := _failure(file))}
        name, seed = run.parent.name, run.name
        weights = folder / "runs" / name / seed / "model.safetensors"
        if weights.exists() and (why := weights_failure(weights)):
            failed.setdefault("training", why)
        gone = [run / f"{what}.json" for what in failed]
        if "training" in failed:
            gone = [*records, weights, folder / "histories" / name / f"{seed}.csv"]
        for path in gone:
            path.unlink(missing_ok=True)
        lines += [f"{name} {seed} {what}: forgotten ({why})" for what, why in sorted(failed.items())]
    return lines or [f"{folder}: no failed run" + (f" of {variant}" if variant else "")]


def _failure(file: Path) -> str | None:
    """Return why the step of a metrics file failed, or why the file is none; None where all is well."""
    try:
        record = read_record(file)
    except (ConfigError, OSError) as error:
        return f"{file.name} cannot be used: {str(error).removeprefix(f'{file}: ')}"
    return record["reason"] if record["status"] == "failed" else None


def pack(folder: str | Path, out: str | Path | None = None, weights: bool = False) -> str:
    """Write ``<study>.convx.tar.gz``: study.json, metrics, histories, tables, and the weights if wanted.

    The same content gives the same bytes. Returns one line for the user.
    """
    folder = _study_folder(folder).resolve()
    if not re.fullmatch(NAME, folder.name):
        raise ConfigError(f"{folder}: the folder of a study is named like it, in small letters, digits and underscores")
    wanted = ["metrics/**/*.json", "histories/**/*.csv", "study.json", "exact.json", "manifest.json", "tables/*"]
    if weights:
        wanted.append("runs/**/*.safetensors")
    found = {file for pattern in wanted for file in folder.glob(pattern) if file.is_file()}
    # Not what is being written just now, in a hidden folder.
    files = sorted(f for f in found if not any(part.startswith(".") for part in f.relative_to(folder).parts))
    out = Path(out or f"{folder.name}.convx.tar.gz")
    sums = {file.relative_to(folder).as_posix(): _sha256(file) for file in files}
    head = {"schema_version": BUNDLE_SCHEMA_VERSION, "study": folder.name, "files": sums}
    with (
        atomic(out) as temporary,
        open(temporary, "wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        content = json.dumps(head, indent=1).encode()
        _add(archive, LIST, len(content), io.BytesIO(content))
        for name in sums:
            with open(folder / name, "rb") as stream:
                _add(archive, f"{folder.name}/{name}", (folder / name).stat().st_size, stream)
    return f"{out}: {len(sums)} files of the study {folder.name}, {out.stat().st_size / 1e6:.2f} MB"


def _add(archive: tarfile.TarFile, name: str, size: int, stream) -> None:
    entry = tarfile.TarInfo(name)  # owner and times stay zero: they are not content
    entry.size, entry.mode = size, 0o644
    archive.addfile(entry, stream)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def unpack(bundle: str | Path, results: str | Path = "results") -> str:
    """Add the runs of a bundle to ``results/<study>``: every file is checked against the list before the first one is written.

    A study that is there already grows: runs of the same recipes are added, those that are there with the same numbers are
    kept. Other numbers or another recipe are an error that names the run (:mod:`convx.merge`); then nothing is written.
    Returns one line for the user.
    """
    bundle, results = Path(bundle), Path(results)
    if not bundle.is_file():
        raise ConfigError(f"{bundle}: there is no such file")
    try:
        study, expected = _list(bundle)
        _check(bundle, expected, min(_room(results), _room(Path(tempfile.gettempdir()))))
        with tempfile.TemporaryDirectory(prefix="convx-unpack-") as folder:
            incoming = Path(folder)
            with tarfile.open(bundle, "r:gz") as archive:
                for member in archive:
                    if member.name in expected:
                        (incoming / member.name).parent.mkdir(parents=True, exist_ok=True)
                        with open(incoming / member.name, "wb") as stream:
                            shutil.copyfileobj(archive.extractfile(member), stream)
            names = [name.removeprefix(f"{study}/") for name in expected]
            decided = merge.decide(incoming / study, results / study, names, str(bundle))
            merge.write(decided, incoming / study, results / study)
    except DAMAGE as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{bundle}: not a readable bundle ({words}); ask for it again") from None
    except OSError as error:
        raise ConfigError(f"{bundle}: not unpacked: {error.strerror or error} ({error.filename or results})") from None
    said = [f"{len(decided.added)} run{'' if len(decided.added) == 1 else 's'} added"]
    if decided.kept:
        said.append(f"{len(decided.kept)} there already with the same numbers and kept")
    return f"{results / study}: {len(expected)} files, all checksums matched; {', '.join(said)}"


def _room(results: Path) -> int:
    """Return the free bytes where the results go."""
    place = results.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _list(bundle: Path) -> tuple[str, dict[str, str]]:
    """Return the study and {path below the results folder: sha256} that a bundle promises, every path
    harmless."""
    with tarfile.open(bundle, "r:gz") as archive:
        first = archive.next()
        if first is None or first.name != LIST or not first.isfile() or first.size > MAX_LIST:
            raise ConfigError(f"{bundle}: not a bundle of convx (it does not begin with {LIST})")
        content = archive.extractfile(first).read()
    try:
        head = json.loads(content)
        version, study, files = head["schema_version"], head["study"], head["files"]
        if not (isinstance(files, dict) and all(isinstance(value, str) for value in files.values())):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(f"{bundle}: its {LIST} is not readable; it is damaged, ask for it again") from None
    if version != BUNDLE_SCHEMA_VERSION:
        raise ConfigError(
            f"{bundle}: a bundle of version {version!r}, this convx reads {BUNDLE_SCHEMA_VERSION}; update convx"
        )
    if not (isinstance(study, str) and re.fullmatch(NAME, study)):
        raise ConfigError(f"{bundle}: {study!r} is not the name of a study")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise ConfigError(f"{bundle}: {name} would leave the results folder")
        if not MEMBER.fullmatch(name) or str(path) != name:
            raise ConfigError(f"{bundle}: {name!r} is not a file that a bundle holds")
    return study, {f"{study}/{name}": value for name, value in files.items()}


def _check(bundle: Path, expected: dict[str, str], room: int) -> None:
    """Read the whole archive: the files of the list, each once and with its sha256, and nothing else."""
    seen, total = set(), 0
    with tarfile.open(bundle, "r:gz") as archive:
        for member in archive:
            if member.name == LIST and not seen:
                seen.add(LIST)
                continue
            if member.name not in expected or member.name in seen or not member.isfile():
                raise ConfigError(f"{bundle}: {member.name} is not a file of its list; it is damaged, ask for it again")
            seen.add(member.name)
            total += member.size
            if total > room:  # before it is read: a few bytes may stand for terabytes
                raise ConfigError(f"{bundle}: it unpacks to more than the {room / 1e9:.1f} GB that are free")
            if hashlib.file_digest(archive.extractfile(member), "sha256").hexdigest() != expected[member.name]:
                raise ConfigError(f"{bundle}: {member.name} does not match its sha256; it is damaged, ask for it again")
    if missing := sorted(set(expected) - seen):
        raise ConfigError(f"{bundle}: {missing[0]} is missing; it is damaged, ask for it again")
