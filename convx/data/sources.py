"""Find the official files of a data set: mirrors first (folders or URLs), then the official addresses;
checksums decide.

Downloads go to ``<name>.part``, continue where they broke off if the server allows it, and count only once
their published checksum matches. Archives are read member by member and never extracted, so no member name
becomes a path.
"""

import contextlib
import hashlib
import http.client
import logging
import lzma
import os
import struct
import tarfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from convx.data.sets import OfficialFile, SetFacts
from convx.locking import acquire

log = logging.getLogger("convx")

OFFICIAL = "official addresses"
SEARCH_DEPTH = 4
ATTEMPTS = 4
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20
MAX_MEMBER = 1 << 30  # bytes of one file of an archive; the largest official one has 182 million


class SourceError(Exception):
    """A source that did not provide a file; the text says why."""


class WrongContent(SourceError):
    """A source whose file does not have the published checksum."""


class PlaceGone(SourceError):
    """A source that cannot be reached: it need not be asked for another file."""


@dataclass(frozen=True)
class Found:
    """Official files whose checksums matched: one archive, or one path a file."""

    facts: SetFacts
    kinds: tuple[str, ...]
    archive: Path | None = None
    paths: dict[str, Path] | None = None

    @property
    def source(self) -> dict:
        """Return what is recorded of the origin: the kinds of places and the files with the MD5s that
        matched.
        """
        files = (self.facts.archive,) if self.archive else self.facts.files
        return {
            "kind": " and ".join(self.kinds),
            "files": [{"name": f.name, "md5": f.md5} for f in files],
            "checksums": "official MD5s matched",
        }

    def members(self) -> Iterator[tuple[str, bytes]]:
        """Yield (name, content) of every official file, from the archive or from the files themselves."""
        if self.archive is None:
            for name, path in self.paths.items():
                yield name, path.read_bytes()
            return
        wanted = {f"{self.facts.folder}/{file.name}": file.name for file in self.facts.files}
        for entry, data in archive_entries(self.archive, wanted.__contains__):
            yield wanted.pop(entry), data()
        if wanted:
            raise ValueError(f"{self.archive}: lacks {', '.join(wanted)}")


class Finder:
    """Looks for official files in an ordered list of places and keeps what it downloads in one folder.

    ``tried`` collects one phrase a place that failed, for the error at the end.
    """

    def __init__(self, mirrors: Sequence[str], downloads: Path, progress: bool = True):
        self.mirrors = [str(m) for m in mirrors]
        self.downloads = downloads
        self.progress = progress
        self.tried: list[str] = []

    @classmethod
    def from_environment(cls, mirrors: Sequence[str], downloads: Path, progress: bool = True) -> "Finder":
        """Return a finder over the places in ``CONVX_MIRROR`` (split at white space), then ``mirrors``."""
        return cls([*os.environ.get("CONVX_MIRROR", "").split(), *mirrors], downloads, progress)

    def mirror_folders(self) -> Iterator[Path]:
        """Yield the mirror folders that exist; note the others as tried."""
        for place in self.mirrors:
            if not is_url(place):
                if Path(place).expanduser().is_dir():
                    yield Path(place).expanduser()
                else:
                    self.tried.append(f"{place} (no such folder)")

    def official(self, facts: SetFacts, mirrors: bool = True, addresses: bool = True, hint: str = "") -> Found | None:
        """Return the archive, or every official file, from the first places that have them.

        Only what has its published checksum counts; files may come from different places. ``mirrors`` and
        ``addresses`` (the official ones) say where to look. Without the addresses None means that the
        mirrors lack the set; with them a ValueError names everything that was tried, after ``hint``.
        """
        paths: dict[str, Path] = {}
        kinds: list[str] = []
        for place in [*(self.mirrors if mirrors else []), *([OFFICIAL] if addresses else [])]:
            kind, search = self._search(facts, place)
            if facts.archive and (archive := search(facts.archive)):
                return Found(facts, (kind,), archive=archive)
            for file in facts.files:
                if file.name not in paths and (path := search(file)):
                    paths[file.name] = path
                    kinds += [] if kind in kinds else [kind]
            if facts.files and len(paths) == len(facts.files):
                return Found(facts, tuple(kinds), paths={file.name: paths[file.name] for file in facts.files})
        if not addresses:
            return None
        raise ValueError(self._failure(facts, hint))

    def _failure(self, facts: SetFacts, hint: str) -> str:
        """Return the one line that says what was tried for a set and how to provide it."""
        if facts.archive:
            wanted = f"{facts.archive.name} (MD5 {facts.archive.md5})"
            wanted += f" or the files that it unpacks to ({facts.folder}/)" if facts.files else ""
        else:
            wanted = ", ".join(f"{f.name} (MD5 {f.md5})" for f in facts.files)
        return (
            f"{facts.name}: no source provided it; tried {'; '.join(dict.fromkeys(self.tried))}. {hint}"
            f"Put {wanted} into a folder and name that folder in the variable CONVX_MIRROR or in the "
            "config key `mirror`"
        )

    def _search(self, facts: SetFacts, place: str):
        """Return the kind of a place and the function that finds one official file there (or None)."""
        if place == OFFICIAL:
            return "official URL", self._by_address(facts, lambda file: file.urls)
        if is_url(place):
            base = place.rstrip("/") + "/"
            folders = dict.fromkeys(("", f"{facts.folder}/" if facts.folder else "", f"{facts.name}/"))
            return "mirror URL", self._by_address(facts, lambda file: [f"{base}{f}{file.name}" for f in folders])
        folder = Path(place).expanduser()
        if not folder.is_dir():
            self.tried.append(f"{place} (no such folder)")
            return "mirror folder", lambda file: None
        names = {file.name for file in (facts.archive, *facts.files) if file}
        candidates = find_files(folder, names)
        if not candidates:
            self.tried.append(f"{place} (none of the official files)")

        def search(file: OfficialFile) -> Path | None:
            for path in candidates.get(file.name, []):
                if (found := md5_of(path)) == file.md5:
                    return path
                self._note(f"{path} (MD5 {found}, expected {file.md5}{looks_like_a_page(path)})")
            return None

        return "mirror folder", search

    def _by_address(self, facts: SetFacts, addresses):
        gone: set[str] = set()  # hosts that did not answer: no second wait for the next file

        def search(file: OfficialFile) -> Path | None:
            for url in addresses(file):
                host = urllib.parse.urlsplit(url).netloc
                if host in gone:
                    continue
                try:
                    return download(url, self.downloads / facts.name / file.name, file.md5, self.progress)
                except WrongContent as error:
                    self._note(f"{url} ({error})")
                except SourceError as error:
                    self.tried.append(f"{url} ({error})")
                    if isinstance(error, PlaceGone):
                        gone.add(host)
            return None

        return search

    def _note(self, text: str) -> None:
        """Record a source that is there but wrong, and say so at once: a later source may hide it."""
        self.tried.append(text)
        log.warning("ignored %s", text)


def is_url(place: str) -> bool:
    """Return whether a place is an http(s) address rather than a folder."""
    return place.startswith(("http://", "https://"))


def find_files(folder: Path, names: Iterable[str], depth: int = SEARCH_DEPTH) -> dict[str, list[Path]]:
    """Return the files below ``folder``, at most ``depth`` folders down, whose name is one of ``names``."""
    names, found = set(names), {}
    for here, folders, files in os.walk(folder):
        level = len(Path(here).relative_to(folder).parts)
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if level < depth else []
        for name in sorted(names.intersection(files)):
            found.setdefault(name, []).append(Path(here) / name)
    return found


def md5_of(path: Path) -> str:
    """Return the MD5 of a file: what the authors of these sets publish; it guards against damage, not against
    malice.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def looks_like_a_page(path: Path) -> str:
    """Return words for a web page that stands where an archive belongs (a login, an error), else nothing."""
    with open(path, "rb") as file:
        start = file.read(1024).lstrip().lower()
    return ", it is a web page" if start.startswith((b"<!doctype html", b"<html", b"<?xml")) else ""


def download(url: str, target: Path, md5: str, progress: bool = True) -> Path:
    """Fetch a file to ``target``, unless it is there with the right MD5, and return it.

    A broken transfer is continued from ``<target>.part`` up to four times, and by the next call. A file with
    a wrong MD5 is deleted; if it had been continued from an older part it is fetched once more from the
    start. Raises SourceError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    with acquire(target.with_name(f".{target.name}.lock"), f"waiting for another process that fetches {target.name}"):
        for path in (target, part):
            if path.is_file():
                if md5_of(path) == md5:
                    return path.rename(target)
                if path == target:
                    path.unlink()
        problem = ""
        for attempt in range(ATTEMPTS):
            time.sleep(0.2 * attempt)
            start = part.stat().st_size if part.is_file() else 0
            try:
                _transfer(url, part, start, progress)
            except urllib.error.HTTPError as error:
                if error.code == 416 and start:  # the part is longer than the file: it belongs to another one
                    part.unlink()
                    continue
                problem = f"HTTP {error.code} {error.reason}"
                if error.code < 500:
                    raise SourceError(problem) from None
                continue
            except (http.client.HTTPException, OSError) as error:
                problem = getattr(error, "reason", None) or error
                if isinstance(error, urllib.error.URLError):
                    raise PlaceGone(f"not reached: {problem}") from None
                continue
            if (found := md5_of(part)) == md5:
                return part.rename(target)
            page = looks_like_a_page(part)
            part.unlink()
            if not start:
                raise WrongContent(
                    f"the download had MD5 {found}, expected {md5}{page}; it was deleted, run again to repeat it"
                )
    raise PlaceGone(f"failed {ATTEMPTS} times, last: {problem}; run the same command again to continue")


def _transfer(url: str, part: Path, start: int, progress: bool) -> None:
    """Fetch the rest of a file from byte ``start`` on; raise if the connection ends before the announced
    length.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "convx", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        continued = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if response.status == 206 and not continued:
            part.unlink()  # the same question brings the same answer: ask for the whole file
            raise http.client.HTTPException("the server answered with another range")
        done = start if continued else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        name = part.name.removesuffix(".part")
        with (
            open(part, "ab" if continued else "wb") as file,
            tqdm(total=total, initial=done, desc=name, unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            while block := response.read(CHUNK):
                file.write(block)
                bar.update(len(block))
                done += len(block)
    if total is not None and done < total:
        raise http.client.HTTPException(f"{done:,} of {total:,} bytes")


def archive_entries(path: Path, wanted) -> Iterator[tuple[str, "object"]]:
    """Yield (name, function that reads the content) of the regular files of a tar, zip or folder that
    ``wanted(name)`` admits.

    Nothing is written to disk. Tars are read as a stream, in their order: read an entry before the next one
    is asked for.
    """
    if path.is_dir():
        for here, folders, files in os.walk(path):
            folders.sort()
            for file in sorted(files):
                name = (Path(here) / file).relative_to(path.parent).as_posix()
                if wanted(name):
                    yield name, (Path(here) / file).read_bytes
    elif zipfile.is_zipfile(path):
        with _readable(path), zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.is_dir() and wanted(entry.filename):
                    check_size(entry.filename, entry.file_size)
                    yield entry.filename, _reader(path, lambda entry=entry: archive.read(entry))
    else:
        with _readable(path), tarfile.open(path, mode="r|*") as archive:
            for entry in archive:
                name = entry.name.removeprefix("./")
                check_size(name, entry.size)  # of every entry: a stream decompresses what is passed over, too
                if entry.isfile() and wanted(name):
                    yield name, _reader(path, lambda entry=entry: archive.extractfile(entry).read())


DAMAGE = (  # RuntimeError: an encrypted zip; NotImplementedError: a way to compress that Python does not know
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, OSError, RuntimeError, NotImplementedError, UnicodeDecodeError, OverflowError),
)


def check_size(name: str, size: int) -> None:
    """Refuse a member of an archive that claims more bytes than any file of a data set has."""
    if size > MAX_MEMBER:
        raise tarfile.ReadError(f"{name} claims {size:,} bytes, no file of a data set here has that many")


@contextlib.contextmanager
def _readable(path: Path):
    """Turn the many ways in which a damaged archive fails into one line that names it."""
    try:
        yield
    except DAMAGE as error:
        page = looks_like_a_page(path) if path.is_file() else ""
        raise ValueError(f"{path}: damaged archive ({' '.join(str(error).split())}{page}); fetch it again") from None


def _reader(path: Path, read):
    def checked() -> bytes:
        with _readable(path):
            return read()

    return checked
