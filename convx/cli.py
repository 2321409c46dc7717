"""The command line: one verb for each arrow from data to report, and a few for people. No torch until a verb needs it."""

import argparse
import json
import logging
import sys
from pathlib import Path

from convx import __version__

WORKFLOW = "steps of the workflow (called by the rules; usable by hand)"
PEOPLE = "for people"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="convx",
        description="Trains, tests, times and weighs ideas about convolutions side by side, and sets them against their papers. "
        "Run `snakemake --cores all` for a whole study; these verbs are its steps and a few tools.",
    )
    parser.add_argument("--version", action="version", version=f"convx {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", title="verbs")

    def verb(name: str, text: str, run, **arguments):
        sub = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        for flag, settings in arguments.items():
            sub.add_argument(*settings.pop("names", [flag]), **settings)
        sub.set_defaults(run=run)
        return sub

    study_file = {"names": ["--study"], "default": "config/config.yaml", "metavar": "FILE", "help": "study file (default: config/config.yaml)"}
    folder = {"names": ["folder"], "metavar": "results/STUDY", "help": "results folder of the study"}

    verb("list", "list variants, models, data sets, surgery verbs, study keys or claims", _list, what={
        "names": ["what"], "nargs": "?", "default": "variants", "choices": ["variants", "models", "data", "verbs", "keys", "claims"]})
    verb("explain", "print every number of a variant in a study with its origin", _explain,
         variant={"names": ["variant"]}, study=dict(study_file))
    verb("check", "check a study file: one line for the first mistake, nothing otherwise", _check,
         study={"names": ["study"], "nargs": "+", "metavar": "FILE"})
    verb("retry", "forget failed runs, so that the next snakemake trains them again", _retry,
         folder=dict(folder), variant={"names": ["variant"], "nargs": "?", "help": "one variant; all failed ones if left out"})
    verb("pack", "bundle metrics, histories and optionally weights of a study into one archive", _pack,
         folder=dict(folder), out={"names": ["--out"], "metavar": "FILE", "help": "archive to write (default: STUDY.convx.tar.gz)"},
         weights={"names": ["--weights"], "action": "store_true", "help": "include the weights"})
    verb("unpack", "unpack such an archive below results/, every file checked by its sha256", _unpack,
         bundle={"names": ["bundle"], "metavar": "FILE"}, results={"names": ["--results"], "default": "results", "metavar": "FOLDER"})

    settings = {"names": ["settings"], "metavar": "JSON", "help": "settings as JSON"}
    out = {"names": ["--out"], "required": True, "metavar": "FILE"}
    data = {"names": ["--data"], "required": True, "metavar": "FILE", "help": "meta.json of the prepared data set"}
    recipe = {"names": ["recipe"], "metavar": "FILE", "help": "frozen recipe of the run"}
    source = {"names": ["--source"], "default": "", "metavar": "DIGEST", "help": "digest of the source, written into the metrics"}
    model = {"names": ["--model"], "required": True, "metavar": "FILE", "help": "weights of the run"}

    verb("data", "prepare a data set as uint8 arrays", lambda a: _steps().data(a.settings, a.mirrors, a.out),
         settings=dict(settings), out=dict(out), mirrors={"names": ["--mirrors"], "default": "", "help": "folders or URLs, by white space"})
    verb("corrupt", "build the corrupted test images of a data set", lambda a: _steps().corrupt(a.settings, a.data, a.out, a.workers),
         settings=dict(settings), data=dict(data), out=dict(out), workers={"names": ["--workers"], "type": int, "default": 1})
    verb("recipe", "freeze the recipe of a run", lambda a: _steps().recipe(a.settings, a.out), settings=dict(settings), out=dict(out))
    verb("study", "freeze a checked study for its tables", lambda a: _steps().study(a.settings, a.out), settings=dict(settings), out=dict(out))
    verb("train", "train one run; continues where a killed one stopped", _train,
         recipe=dict(recipe), data=dict(data), source=dict(source), out=dict(out),
         start={"names": ["--start"], "nargs": "?", "default": "", "metavar": "FILE", "help": "weights that the run starts from"},
         carbon={"names": ["--carbon"], "default": "{}", "metavar": "JSON"},
         progress={"names": ["--progress"], "default": "resources/progress", "metavar": "FOLDER", "help": "where progress is kept until the run ends"})
    verb("evaluate", "evaluate one run under every condition",
         lambda a: _steps().evaluate(a.recipe, a.model, a.data, a.corrupted or None, a.settings, a.source, a.out),
         recipe=dict(recipe), model=dict(model), data=dict(data), source=dict(source), out=dict(out),
         corrupted={"names": ["--corrupted"], "nargs": "?", "default": "", "metavar": "FILE", "help": "meta.json of the corrupted images"},
         settings={"names": ["--settings"], "default": "{}", "metavar": "JSON"})
    verb("measure", "measure latency and inference energy of one run, paired with a reference",
         lambda a: _steps().measure(a.recipe, a.model, [r for r in a.reference if r], a.data, a.settings, a.source, a.out),
         recipe=dict(recipe), model=dict(model), data=dict(data), source=dict(source), out=dict(out),
         reference={"names": ["--reference"], "nargs": "*", "default": [], "metavar": "FILE", "help": "recipe and weights of the baseline"},
         settings={"names": ["--settings"], "default": "{}", "metavar": "JSON"})
    verb("tables", "write the tables of a study from its metrics", _tables, folder=dict(folder),
         partial={"names": ["--partial"], "action": "store_true", "help": "from the metrics that exist, whatever is missing"})
    verb("figures", "draw the figures of a study from its tables, metrics and histories", _figures, folder=dict(folder))
    verb("page", "write the front page of a study", _page, folder=dict(folder))
    return parser


def _steps():
    from convx import steps

    return steps


def _train(a) -> None:
    _steps().train(a.recipe, a.data, a.start or None, a.source, json.loads(a.carbon), a.out, a.progress)


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


def _retry(a) -> None:
    from convx import bundle

    for line in bundle.retry(a.folder, a.variant):
        print(line)


def _pack(a) -> None:
    from convx import bundle

    print(bundle.pack(a.folder, a.out, a.weights))


def _unpack(a) -> None:
    from convx import bundle

    print(bundle.unpack(a.bundle, a.results))


def _tables(a) -> None:
    from convx.report import tables

    tables.write(Path(a.folder))


def _figures(a) -> None:
    from convx.report import figures

    figures.draw(Path(a.folder))


def _page(a) -> None:
    from convx.report import page

    page.write(Path(a.folder))


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; a mistake of the user's is one line and exit code 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    a = build_parser().parse_args(arguments)
    try:
        a.run(a)
    except (ValueError, FileNotFoundError) as error:
        from convx.config import ConfigError

        if isinstance(error, ConfigError | FileNotFoundError) or a.verb in ("list", "explain", "check", "retry", "pack", "unpack", "data"):
            print(f"convx: {error}", file=sys.stderr)
            return 2
        raise
    return 0
