"""The front page: what was claimed, what was found, how sure that is, what could not be decided. One HTML file, no scripts,
figures inside, so that it can be sent as it is."""

import base64
import html
from collections import Counter
from pathlib import Path

import pandas as pd

from convx import config
from convx.manifest import atomic
from convx.report.results import Results
from convx.report.tables import HUMAN, _with_interval, comparison, number, replication

# A sign and a word for each verdict: never colour alone.
SIGNS = {
    "replicated": "✓",
    "supported": "✓",
    "exact": "✓",
    "higher": "↑",
    "lower": "↓",
    "contradicted": "✗",
    "differs": "✗",
    "no relevant difference": "=",
    "inconclusive": "?",
    "not comparable": "≁",
    "incomplete": "…",
    "failed": "!",
    "not run": "–",
}
KIND = {
    **dict.fromkeys(("replicated", "supported", "exact"), "good"),
    **dict.fromkeys(("contradicted", "differs", "failed"), "bad"),
    **dict.fromkeys(("higher", "lower", "no relevant difference"), "news"),
}
CAPTIONS = {
    "claims_forest": "Every claim that this study could measure, in percentage points: our difference with its 95 % interval.",
    "accuracy": "Top-1 on the test images: mean over seeds with its 95 % interval.",
    "corruption_heatmap": "Accuracy under each corruption, averaged over severities and seeds.",
    "clean_against_corrupted": "Corrupted against clean accuracy.",
    "accuracy_latency": "Accuracy against latency, measured in pairs with the baseline.",
    "accuracy_energy": "Accuracy against the energy of inference, and how that was obtained.",
    "training_curves": "Accuracy and loss while training.",
}
STYLE = """
:root{color-scheme:light dark;--line:#ccc;--soft:#666;--back:#f6f6f4}
@media(prefers-color-scheme:dark){:root{--line:#444;--soft:#aaa;--back:#1e1e1c}}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1080px;padding:1.5rem}
h1{margin:0 0 .2rem;font-size:1.7rem}h2{margin:2.2rem 0 .6rem;font-size:1.25rem;border-bottom:1px solid var(--line)}
p.lead{color:var(--soft);margin:.2rem 0 1rem}.warn{border-left:4px solid #b36b00;padding:.4rem .8rem;background:var(--back)}
.counts{display:flex;flex-wrap:wrap;gap:.5rem;padding:0;list-style:none}.counts li{border:1px solid var(--line);border-radius:.4rem;padding:.25rem .7rem}
.verdict{font-weight:600;white-space:nowrap;border:1.5px solid var(--line);border-radius:.4rem;padding:.05rem .45rem}
.good{border-color:#00734f}.bad{border-color:#b3261e;border-style:dashed}.news{border-color:#0063a8;border-style:double;border-width:3px}
div.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;min-width:100%}
th,td{text-align:left;padding:.35rem .55rem;border-bottom:1px solid var(--line);vertical-align:top}th{background:var(--back)}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}td.why{color:var(--soft)}
figure{margin:1.2rem 0}figure img{max-width:100%;background:#fff}figcaption{color:var(--soft);font-size:.9rem}
code{font-size:.92em}footer{margin-top:3rem;color:var(--soft);font-size:.85rem}
"""


def write(folder: str | Path) -> Path:
    """Write ``results/<study>/report/index.html`` from the study's tables, metrics and figures."""
    results = Results(Path(folder))
    compared, replicated = comparison(results), replication(results)
    parts = [
        _head(results, replicated),
        _claims("What was claimed, what we found", replicated[replicated["role"] == "primary"], results),
        _undecided(replicated),
        _comparison(results, compared),
        _figures(results),
        _claims("All other claims", replicated[replicated["role"] != "primary"], results, fold=True),
        _provenance(results),
    ]
    title = html.escape(f"convx: {results.study['study']}")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    out = results.folder / "report" / "index.html"
    with atomic(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def _text(value) -> str:
    return html.escape(str(value))


def verdict(word: str) -> str:
    """Return a verdict as sign, word and border."""
    return f'<span class="verdict {KIND.get(word, "")}">{SIGNS.get(word, "?")} {_text(word)}</span>'


def _head(results: Results, frame: pd.DataFrame) -> str:
    study = results.study
    done = sum(len(results.values(v, "top1")) for v in results.variants)
    planned = sum(len(results.seeds(v)) for v in results.variants)
    counts = Counter(frame["verdict"])
    items = "".join(f"<li>{verdict(word)} {counts[word]}</li>" for word in SIGNS if counts[word])
    warn = ""
    if study["reduced"]:
        warn = (
            f'<p class="warn"><strong>Reduced study</strong>: {_text(study["reduced"])}. Absolute values are not comparable '
            "with the papers'; orderings are decided on these data only.</p>"
        )
    return (
        f"<h1>{_text(study['study'])}: does it hold up?</h1><p class='lead'>{_text(study['description'])} "
        f"{done} of {planned} runs are in; {len(frame)} claims of {frame['paper_key'].nunique()} papers.</p>{warn}"
        f"<ul class='counts' aria-label='verdicts'>{items}</ul>"
    )


def _claims(title: str, frame: pd.DataFrame, results: Results, fold: bool = False) -> str:
    rows = []
    for _, row in frame.iterrows():
        paper = "–" if pd.isna(row["paper_value"]) else f"{row['paper_value']:g} {row['unit'] or ''}"
        ours = "–"
        if not pd.isna(row["delta"]) and row["claim_kind"] != "absolute":
            ours = f"{row['delta']:+.2f} [{row['delta_ci_low']:.2f}, {row['delta_ci_high']:.2f}]"
        elif not pd.isna(row["ours_mean"]):
            ours = f"{row['ours_mean']:.2f} [{row['ours_ci_low']:.2f}, {row['ours_ci_high']:.2f}], n={int(row['ours_n'])}"
        rows.append(
            f"<tr><td>{_text(row['paper_key'])}</td><td>{_text(row['statement'])}</td><td class='n'>{_text(paper)}</td>"
            f"<td class='n'>{_text(ours)}</td><td>{verdict(row['verdict'])}</td><td class='why'>{_text(row['reason'] or '')}</td></tr>"
        )
    table = (
        "<div class='wide'><table><thead><tr><th>paper</th><th>what is claimed</th><th>paper says</th><th>we found [95 %]</th>"
        f"<th>verdict</th><th>why, or how sure</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    if fold:
        return f"<h2>{title}</h2><details><summary>{len(frame)} claims</summary>{table}</details>"
    return f"<h2>{title}</h2>{table}"


def _undecided(frame: pd.DataFrame) -> str:
    part = frame[~frame["verdict"].isin(["replicated", "supported", "exact", "contradicted", "differs", "higher", "lower", "no relevant difference"])]
    if part.empty:
        return ""
    groups = Counter((row["verdict"], row["reason"] or "") for _, row in part.iterrows())
    common = groups.most_common(12)
    items = "".join(f"<li>{verdict(word)} {count} × {_text(reason)}</li>" for (word, reason), count in common)
    rest = sum(groups.values()) - sum(count for _, count in common)
    more = f"<li>and {rest} more, each with its reason in the tables below</li>" if rest else ""
    return f"<h2>What could not be decided, and why</h2><ul>{items}{more}</ul>"


def _comparison(results: Results, frame: pd.DataFrame) -> str:
    header = "".join(f"<th>{_text(h)}</th>" for h in ["variant", "status", "seeds", *HUMAN.values()])
    rows = []
    for _, row in frame.iterrows():
        status = row["status"] + (f": {row['reason']}" if row["reason"] else "")
        cells = [number(row["parameters"]), number(row["macs"])]
        cells += [_with_interval(row, c) for c in ("top1", "corruption", "latency_ms", "latency_ratio")]
        cells += [number(row[c]) for c in ("inference_kwh", "inference_kgco2e", "training_kwh", "training_kgco2e")]
        numbers = "".join(f"<td class='n'>{_text(cell)}</td>" for cell in cells)
        seeds = f"{row['seeds_done']}/{row['seeds_planned']}"
        rows.append(f"<tr><td><code>{_text(row['variant'])}</code></td><td>{_text(status)}</td><td class='n'>{seeds}</td>{numbers}</tr>")
    methods = sorted({m for column in ("energy_method", "training_energy_method") for m in frame[column] if m})
    note = f"<p class='lead'>Energy: {_text('; '.join(methods))}. Estimates are never ranked.</p>" if methods else ""
    return (
        f"<h2>Side by side</h2><div class='wide'><table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"<p class='lead'>Brackets are 95 % intervals. Latency ratios are paired with <code>{_text(results.study['baseline'])}</code>.</p>{note}"
    )


def _figures(results: Results) -> str:
    parts = []
    files = {file.stem: file for file in sorted((results.folder / "figures").glob("*.png"))}
    for name in [*[n for n in CAPTIONS if n in files], *[n for n in files if n not in CAPTIONS]]:
        data = base64.b64encode(files[name].read_bytes()).decode()
        caption = _text(CAPTIONS.get(name, name.replace("_", " ")))
        parts.append(f"<figure><img alt='{caption}' src='data:image/png;base64,{data}'><figcaption>{caption}</figcaption></figure>")
    return "<h2>Figures</h2>" + "".join(parts) if parts else ""


def _provenance(results: Results) -> str:
    seen = {}
    for record in results.records:
        env = record["environment"]
        key = (env.get("processor", ""), env.get("device", ""), env.get("device_name", ""), env.get("packages", {}).get("torch", ""))
        seen[key] = seen.get(key, 0) + 1
    places = "".join(
        f"<li>{_text(processor)}, device {_text(device)} {_text(name)}, torch {_text(torch)}: {count} records</li>"
        for (processor, device, name, torch), count in sorted(seen.items())
    )
    seconds = sum(record["wall_seconds"] for record in results.records)
    digest = config.digest(results.study)
    return f"<footer><p>Made on:</p><ul>{places}</ul><p>{seconds / 3600:.2f} machine-hours in all; study digest <code>{digest}</code>.</p></footer>"
