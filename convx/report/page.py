"""The front page: what was claimed, what was found, how sure that is, what could not be decided. One HTML
file, no scripts, figures inside, so that it can be sent as it is."""

import base64
import html
import re
from collections import Counter
from pathlib import Path

import pandas as pd

from convx import config
from convx.manifest import atomic
from convx.report import origins
from convx.report.comparison import comparison
from convx.report.findings import ABSENT, MEANINGS, SIGNS, found, how_sure, order, paper_says, reasons
from convx.report.look import STYLE
from convx.report.results import Results
from convx.report.tables import comparison_cells, comparison_notes, split
from convx.report.words import known, listed

KIND = {
    **dict.fromkeys(("replicated", "supported", "exact"), "good"),
    **dict.fromkeys(("contradicted", "differs", "failed"), "bad"),
    **dict.fromkeys(("higher", "lower", "no relevant difference"), "news"),
}
OPEN = ("inconclusive", "not comparable", "incomplete", "failed", "not run")
CAPTIONS = {
    "claims_forest": "Every claim with a number of ours: what was found with its 95 % interval (dot and "
    "bar), what the paper "
    "says (cross), and the margin inside which a difference does not matter (grey).",
    "accuracy": "Top-1 on the test images: mean over seeds with its 95 % interval; ticks are single runs.",
    "corruption_heatmap": "Top-1 under each corruption, averaged over severities and seeds.",
    "clean_against_corrupted": "Top-1 on corrupted images against top-1 on clean ones, with 95 % intervals.",
    "accuracy_latency": "Top-1 against latency relative to the baseline, measured by turns in one process.",
    "accuracy_energy": "Top-1 against the energy of inference.",
    "training_curves": "Accuracy and loss while training: mean and range over seeds.",
}


def write(folder: str | Path) -> Path:
    """Write ``results/<study>/report/index.html`` from the study's metrics and figures; returns its path."""
    results = Results(Path(folder))
    compared, replicated = comparison(results), results.replication
    primary, measured, computed, rest = split(replicated)
    reduced = results.study["reduced"]
    pictures = {file.stem: file for file in sorted((results.folder / "figures").glob("*.png"))}
    parts = [
        _head(results, replicated),
        "<main>",
        _answer(primary),
        _main_claims(primary, reduced),
        _figure("claims_forest", pictures.pop("claims_forest", None)),
        _undecided(replicated),
        _comparison(results, compared),
        _figures(pictures),
        _others(measured, computed, rest, reduced),
        _reading(replicated),
        "</main>",
        _provenance(results),
    ]
    title = html.escape(f"convx: {results.study['study']}")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n{chr(10).join(filter(None, parts))}\n</body></html>\n"
    )
    out = results.folder / "report" / "index.html"
    with atomic(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def _text(value) -> str:
    """Return text as HTML; what stands between backticks becomes code."""
    parts = html.escape(str(value), quote=True).split("`")
    if len(parts) % 2 == 0:
        return "`".join(parts)
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))


def verdict(word: str) -> str:
    """Return a verdict as sign, word and border; the sign is for the eye alone, a screen reader gets the
    word."""
    sign = f'<span aria-hidden="true">{SIGNS[word]} </span>'
    return f'<span class="verdict {KIND.get(word, "open")}">{sign}{_text(word)}</span>'


def _counted(words: pd.Series) -> str:
    """Return "2 supported, 1 inconclusive" as verdict marks."""
    counts = Counter(words)
    return ", ".join(f"{counts[word]} {verdict(word)}" for word in order(counts))


def _head(results: Results, frame: pd.DataFrame) -> str:
    study = results.study
    done = sum(len(results.values(v, "top1")) for v in results.variants)
    planned = sum(len(results.seeds(v)) for v in results.variants)
    warn = ""
    if study["reduced"]:
        warn = (
            f'<p class="warn"><strong>Reduced study</strong>: {_text(study["reduced"])}. Absolute values '
            f"are not comparable "
            "with the papers'; which variant is better is decided for this data only.</p>"
        )
    data = study["data"]
    facts = f"Data: {_text(data['name'])}. {len(results.variants)} variants, {done} of {planned} runs are in."
    return (
        f"<header><h1>{_text(study['study'])}: does it hold up?</h1><p "
        f"class='soft'>{_text(study['description'])} {facts} "
        f"{len(frame)} claims of {frame['paper_key'].nunique()} papers are on the books.</p>{warn}</header>"
    )


def _answer(primary: pd.DataFrame) -> str:
    """Return the page in one sentence: how many primary claims were decided, how, and how many were not."""
    settled = primary[~primary["verdict"].isin(OPEN)]
    left = primary[primary["verdict"].isin(OPEN)]
    parts = [f"Of {len(primary)} main claims, {len(settled)} could be decided here"]
    parts.append(f": {_counted(settled['verdict'])}. " if len(settled) else ". ")
    if len(left):
        parts.append(f"{'The other ' if len(settled) else ''}{len(left)} could not: {_counted(left['verdict'])}.")
    return f"<h2>What was claimed, what we found</h2><p class='answer'>{''.join(parts)}</p>"


def _main_claims(primary: pd.DataFrame, reduced: str) -> str:
    """Return the primary claims; those of which the study has no variant are folded."""
    caption = "The main claims of each paper, fixed before anything was run."
    absent = (primary["verdict"] == "not run") & primary["reason"].str.endswith(ABSENT)
    if absent.all() or not absent.any():
        return _claims(primary, caption, reduced)
    other, papers = primary[absent], listed(sorted(set(primary.loc[absent, "paper_key"])))
    summary = f"{len(other)} are about variants that this study does not have ({_text(papers)})"
    folded = _claims(other, "Main claims that are for another study.", reduced)
    return _claims(primary[~absent], caption, reduced) + f"<details><summary>{summary}</summary>{folded}</details>"


def _claims(frame: pd.DataFrame, caption: str, reduced: str) -> str:
    rows = []
    columns = ("the paper says", "we found [95 % interval]", "verdict", "how sure, or why not")
    for _, row in frame.iterrows():
        origin = f"{row['paper_key']}, {row['paper_location']}; <code>{_text(row['claim_id'])}</code>"
        cells = [
            _text(paper_says(row)),
            _text(found(row).replace(", ", ",\u00a0")),
            verdict(row["verdict"]),
            _text(how_sure(row, reduced)),
        ]
        kinds = (" class='n'", " class='n'", "", " class='why'")
        tds = "".join(
            f"<td role='cell'{kind} data-label='{label}'>{cell}</td>"
            for kind, label, cell in zip(kinds, columns, cells)
        )
        head = f"<th role='rowheader' scope='row'>{_text(row['statement'])} <small>{origin}</small></th>"
        rows.append(f"<tr role='row'>{head}{tds}</tr>")
    header = "".join(f"<th role='columnheader' scope='col'>{name}</th>" for name in ("what is claimed", *columns))
    return (
        f"<table class='claims' role='table'><caption>{caption}</caption><thead role='rowgroup'><tr "
        f"role='row'>{header}</tr>"
        f"</thead><tbody role='rowgroup'>{''.join(rows)}</tbody></table>"
    )


def _undecided(frame: pd.DataFrame) -> str:
    part = frame[frame["verdict"].isin(OPEN)]
    if part.empty:
        return ""
    measured = part[part["verdict"].isin(("inconclusive", "incomplete", "failed"))]
    items = []
    for _, row in measured.iterrows():
        items.append(
            f"<li>{verdict(row['verdict'])} <code>{_text(row['claim_id'])}</code>: {_text(row['reason'])}</li>"
        )
    most = 8
    more = ""
    if len(items) > most:
        more = f"<details><summary>{len(items) - most} more</summary><ul>{''.join(items[most:])}</ul></details>"
    for word in ("not comparable", "not run"):
        some = part[part["verdict"] == word]
        if len(some):
            papers = [
                f"{key} {count}" for key, count in some["paper_key"].value_counts(sort=False).sort_index().items()
            ]
            items.insert(0, f"<li>{verdict(word)} {len(some)} claims: {MEANINGS[word]} ({', '.join(papers)}).</li>")
            most += 1
    return f"<h2>What could not be decided</h2><ul>{''.join(items[:most])}</ul>{more}"


def _comparison(results: Results, frame: pd.DataFrame) -> str:
    header, rows = comparison_cells(results, frame)
    cells = "".join(
        f"<th scope='col'{' class=n' if place > 1 else ''}>{_text(name)}</th>" for place, name in enumerate(header)
    )
    body = []
    for row in rows:
        numbers = "".join(f"<td class='n'>{_text(cell)}</td>" for cell in row[2:])
        body.append(f"<tr><th scope='row'><code>{_text(row[0])}</code></th><td>{_text(row[1])}</td>{numbers}</tr>")
    notes = "".join(f"<li>{_text(note)}</li>" for note in comparison_notes(results, frame))
    return (
        "<h2>Side by side</h2><div class='wide' tabindex='0' role='region' aria-label='comparison of the "
        "variants'>"
        f"<table class='side'><caption>One row a variant; brackets are 95 % "
        f"intervals.</caption><thead><tr>{cells}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div><details><summary>How each number was "
        f"obtained</summary>"
        f"<ul class='soft'>{notes}</ul></details>"
    )


def _figure(name: str, file: Path | None) -> str:
    if file is None:
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    caption = _text(CAPTIONS.get(name) or _title(file))
    picture = f'<img alt="Figure: {caption.rstrip(".")}." src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def _title(file: Path) -> str:
    """Return the title that a figure carries in its SVG, or its name where it has none."""
    svg = file.with_suffix(".svg")
    found = re.search(r"<dc:title>(.*?)</dc:title>", svg.read_text(encoding="utf-8")) if svg.exists() else None
    return html.unescape(found[1]) if found else f"The figure {file.stem.replace('_', ' ')}"


def _figures(files: dict[str, Path]) -> str:
    names = [*[n for n in CAPTIONS if n in files], *[n for n in files if n not in CAPTIONS]]
    return "<h2>Figures</h2>" + "".join(_figure(name, files[name]) for name in names) if names else ""


def _others(measured: pd.DataFrame, computed: pd.DataFrame, rest: pd.DataFrame, reduced: str) -> str:
    """Return the exploratory claims: those with a number as tables, all others folded by paper and reason."""
    total = len(measured) + len(computed) + len(rest)
    parts = [
        f"<h2>All other claims</h2><p>{total} exploratory claims. Their verdicts are not corrected for "
        f"their number: take "
        "them as hints.</p>"
    ]
    for part, what, caption in (
        (measured, "measured", "Exploratory claims that rest on runs."),
        (computed, "computed", "Claims about numbers that follow from the architecture or the mathematics."),
    ):
        if len(part):
            table = _claims(part, caption, reduced)
            words = _counted(part["verdict"])
            parts.append(f"<details><summary>{len(part)} were {what}: {words}</summary>{table}</details>")
    for paper, part in rest.groupby("paper_key", sort=True):
        items = "".join(
            f"<li>{len(names)} × {verdict(word)} {_text(reason)} <small>({_text(listed(names, 3))})</small></li>"
            for word, reason, names in reasons(part, reduced)
        )
        words = _counted(part["verdict"])
        parts.append(
            f"<details><summary>{_text(paper)}: {len(part)} without a number: "
            f"{words}</summary><ul>{items}</ul></details>"
        )
    return "".join(parts)


def _reading(frame: pd.DataFrame) -> str:
    words = "".join(f"<dt>{verdict(word)}</dt><dd>{MEANINGS[word]}</dd>" for word in order(frame["verdict"]))
    return (
        "<h2>How to read this</h2><p>Whether a difference matters says the claim's margin, which was fixed "
        "before the runs. "
        "Brackets are 95 % intervals over seeds and, where results per image were kept, over test images "
        "too; one run decides "
        "nothing. Main claims must survive Holm's correction for their number. Differences of percentages "
        "are percentage points "
        f"(pp).</p><dl>{words}</dl>"
    )


def _provenance(results: Results) -> str:
    seen: Counter = Counter()
    for record in results.records:
        if not (facts := record["environment"]):  # a step that left no record
            continue
        torch = facts.get("packages", {}).get("torch", "")
        seen[facts.get("processor", ""), facts.get("device", ""), facts.get("device_name", ""), torch] += 1
    places = "".join(
        f"<li>{_text(processor)}, device {_text(f'{device} {name}'.strip())}, torch {_text(torch)}: {count} "
        f"records</li>"
        for (processor, device, name, torch), count in sorted(seen.items())
    )
    hours = sum(record["wall_seconds"] for record in results.records if known(record["wall_seconds"])) / 3600
    digest = config.digest(results.study)
    pooled = "".join(f"<li>{_text(line)}</li>" for line in origins.notes(results))
    made = f"<p>Made on:</p><ul>{places}</ul>" if places else "<p>No run is in yet.</p>"
    pooled = f"<p>Pooled:</p><ul>{pooled}</ul>" if pooled else ""
    where = f"results/{_text(results.study['study'])}/manifest.json"
    files = f"Each run's file, recipe, code version and command: <code>{where}</code>."
    return f"<footer>{made}{pooled}<p>{hours:.2f} machine-hours in all; study digest <code>{digest}</code>. {files}</p></footer>"
