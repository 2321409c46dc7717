"""What convx stands on: pinned versions with hashes, their licences, and no network when it is imported."""

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest
from house import REPOSITORY

LOCKS = sorted((REPOSITORY / "envs").glob("*.lock"))
spec = importlib.util.spec_from_file_location("licences", REPOSITORY / "envs" / "licences.py")
licences = importlib.util.module_from_spec(spec)
spec.loader.exec_module(licences)


def entries(lock) -> list[list[str]]:
    """Return the requirements of a lock, each as its words: what is pinned, then its hashes."""
    text = re.sub(r"#.*", "", lock.read_text()).replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.strip() and not line.startswith("-r ")]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.name)
def test_every_requirement_is_one_version_with_its_hashes(lock):
    found = entries(lock)
    assert len(found) >= 3
    for pinned, *hashes in found:
        assert re.fullmatch(r"[a-z0-9._-]+==[\w.+!]+", pinned), pinned
        assert hashes, f"{pinned} has no hash"
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", h) for h in hashes), pinned
        assert len(set(hashes)) == len(hashes)


def test_the_locks_hold_what_pyproject_asks_for():
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["build"]]
    locked = {name for name, (_, purpose) in licences.pinned().items() if purpose == "a run"}
    names = {re.match(r"[\w.-]+", word)[0].lower() for word in asked}
    assert names <= locked, names - locked
    tests = {re.match(r"[\w.-]+", word)[0].lower() for word in project["optional-dependencies"]["test"]}
    assert tests <= set(licences.pinned()), tests - set(licences.pinned())


def test_the_build_of_convx_itself_is_pinned():
    """`pip install --no-build-isolation` takes what is installed, so the build needs nothing that no lock names."""
    import tomllib

    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["build-system"]["requires"]
    assert {re.match(r"[\w.-]+", word)[0] for word in build} <= set(licences.pinned())
    commands = re.findall(r"pip install [^\n&]*-e \.", (REPOSITORY / "README.md").read_text())
    assert len(commands) >= 2
    assert all("--no-build-isolation --no-deps" in command for command in commands)


@pytest.mark.slow
@pytest.mark.parametrize("lock", LOCKS, ids=lambda p: p.name)
def test_a_lock_installs(lock):
    """pip resolves the lock with every hash demanded; what is not installed yet is fetched and compared with its hash."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--require-hashes", "--no-deps", "-r", str(lock)]
    result = subprocess.run([*command, "--disable-pip-version-check"], capture_output=True, text=True, timeout=600)
    if re.search("Temporary failure in name resolution|Network is unreachable|No route to host", result.stderr):
        pytest.skip("no package index can be reached")
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
def test_a_wrong_hash_is_refused(tmp_path):
    """The test above can fail: one digit of a hash, and pip installs nothing."""
    name, found = next((e[0], e[1:]) for e in entries(LOCKS[-1]) if e[0].startswith("throttler=="))
    wrong = [h[:-1] + ("0" if h[-1] != "0" else "1") for h in found]
    (tmp_path / "wrong.lock").write_text(" ".join([name, *wrong]) + "\n")
    command = [sys.executable, "-m", "pip", "install", "--require-hashes", "--no-deps", "--target", str(tmp_path / "t")]
    command += ["-r", str(tmp_path / "wrong.lock"), "--disable-pip-version-check"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    if "DO NOT MATCH" not in result.stderr:
        assert re.search("name resolution|unreachable|No route|Could not find|No matching", result.stderr), (
            result.stderr
        )
        pytest.skip("no package index can be reached")
    assert not (tmp_path / "t").exists()


def test_every_licence_is_listed_as_the_package_states_it():
    text = licences.OUT.read_text(encoding="utf-8")
    assert text.startswith(licences.HEAD)
    lines = dict(zip((line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()), text.splitlines()))
    compared = 0
    for package, (pinned, purpose) in licences.pinned().items():
        assert f"| {package} | {pinned} | " in text, f"{package} {pinned}: run envs/licences.py"
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if installed == pinned:
            assert lines[package] == licences.row(package, pinned, purpose)
            compared += 1
    assert compared > 50
    assert len([line for line in text.splitlines() if line.startswith("| ")]) == len(licences.pinned()) + 2


QUIET = """
import sys, pkgutil, importlib
asked = []
def look(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "socket.sendto"):
        asked.append((event, str(arguments)))
        raise PermissionError("no network here")
sys.addaudithook(look)
import convx, convx.cli
names = [m.name for m in pkgutil.walk_packages(convx.__path__, "convx.")]
for name in names:
    if name != "convx.__main__":
        importlib.import_module(name)
for name in convx.VERBS:
    getattr(convx, name)
print(len(names), asked)
import socket
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except PermissionError:
    print("watched")
"""


@pytest.mark.slow
def test_importing_everything_asks_no_network():
    result = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    modules, asked = result.stdout.splitlines()[0].split(" ", 1)
    assert int(modules) > 80
    assert asked == "[]"
    assert result.stdout.splitlines()[1] == "watched", "the hook sees what is asked"
