"""Twenty random kills, forty broken studies, and the memory of every job: what an accident costs.

    python benchmarks/survival.py kills --seed 0 --count 20     # each: SIGKILL somewhere, the same command, the same bits?
    python benchmarks/survival.py configs                       # each: one line, no job, how many seconds?
    python benchmarks/survival.py memory results/quick          # peak memory of each job, from Snakemake's benchmark files

Writes a table in Markdown to standard output. Each kill runs a study of two small networks twice, a minute or so in all.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

import yaml  # noqa: E402


def kills(count: int, seed: int, keep: bool) -> int:
    """Kill ``count`` fresh studies, stage by stage; returns how many did not end in the bits of an undisturbed one."""
    import accidents

    rng = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="convx-survival-"))
    undisturbed = accidents.house_of(root / "undisturbed")
    accidents.finish(undisturbed)
    expected = accidents.fingerprint(undisturbed)
    print(f"undisturbed: {len(expected)} files compared, left over: {accidents.left_over(undisturbed) or 'nothing'}\n")
    print("| kill | what was killed | bits | left over | seconds |\n| --- | --- | --- | --- | --- |", flush=True)
    stages, bad = list(accidents.STAGES), 0
    for place in range(count):
        kill = accidents.draw(rng, stages[place % len(stages)])
        house, began = accidents.house_of(root / f"kill{place}"), time.perf_counter()
        killed = accidents.strike(house, kill)
        try:
            accidents.finish(house)
            accidents.wait_until_quiet(house)
            found = accidents.fingerprint(house)
            differs = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        except AssertionError as error:
            differs = [" ".join(str(error).split())[-300:]]
        left = accidents.left_over(house)
        bad += bool(differs or left)
        words = [str(place + 1), killed, "same" if not differs else f"DIFFERS: {differs}", ", ".join(left) or "nothing"]
        print("| " + " | ".join([*words, f"{time.perf_counter() - began:.0f}"]) + " |", flush=True)
        if not (differs or left or keep):
            shutil.rmtree(house.root)
    print(f"\n{count - bad} of {count} kills ended in identical weights, metrics and figures")
    if not (bad or keep):
        shutil.rmtree(root)
    return bad


def configs() -> int:
    """Give every broken study of tests/test_config.py to Snakemake; returns how many did not end as they should."""
    from test_config import BROKEN, study

    bad, slowest = 0, 0.0
    print("| mistake | exit code | seconds | line |\n| --- | --- | --- | --- |")
    for changes, place, near in BROKEN:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "broken.yaml"
            file.write_text(yaml.safe_dump(study(**changes)))
            command = [sys.executable, "-m", "snakemake", "--cores", "1", "--snakefile", str(REPOSITORY / "Snakefile")]
            began = time.perf_counter()
            done = subprocess.run(
                [*command, "--configfile", str(file)], cwd=folder, capture_output=True, text=True, timeout=120
            )
            seconds = time.perf_counter() - began
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("convx:")]
            made = [entry.name for entry in Path(folder).iterdir() if entry.name not in ("broken.yaml", ".snakemake")]
            fine = len(lines) == 1 and place in lines[0] and near in lines[0] and str(file) in lines[0]
            fine = fine and done.returncode != 0 and not made and "Traceback" not in done.stderr and seconds < 5
        bad, slowest = bad + (not fine), max(slowest, seconds)
        line = lines[0].replace(folder, "").replace("|", "/") if lines else done.stderr.strip()[-200:]
        print(
            f"| {'' if fine else 'WRONG '}{next(iter(changes))} | {done.returncode} | {seconds:.1f} | {line} |",
            flush=True,
        )
    print(f"\n{len(BROKEN) - bad} of {len(BROKEN)} broken studies: one line, no job; the slowest took {slowest:.1f} s")
    return bad


def memory(results: Path) -> int:
    """Print the peak memory of each job of a study that has run here; returns how many were above 3 GB."""
    import csv

    found = []
    for file in sorted(Path("logs", results.name).rglob("*.benchmark.tsv")):
        for row in csv.DictReader(file.open(), delimiter="\t"):
            found.append((float(row["max_rss"]), float(row["s"]), file.relative_to(Path("logs", results.name))))
    print("| job | peak memory, MB | seconds |\n| --- | --- | --- |")
    for peak, seconds, job in sorted(found, reverse=True):
        print(f"| {str(job).removesuffix('.benchmark.tsv')} | {peak:.0f} | {seconds:.0f} |")
    return sum(peak > 3000 for peak, _, _ in found)


def main() -> int:
    """Run one of the three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    sub = verbs.add_parser("kills")
    sub.add_argument("--count", type=int, default=20)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--keep", action="store_true", help="keep every house, to look into")
    verbs.add_parser("configs")
    verbs.add_parser("memory").add_argument("results", type=Path)
    a = parser.parse_args()
    if a.verb == "kills":
        return min(1, kills(a.count, a.seed, a.keep))
    return min(1, configs() if a.verb == "configs" else memory(a.results))


if __name__ == "__main__":
    sys.exit(main())
