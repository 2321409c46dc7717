"""The front page in a real browser: it opens without a complaint, shows what it promises, and fits a
phone."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_up import build

from convx import claims
from convx.report import findings, page, tables
from convx.report.results import Results

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = os.environ.get("CONVX_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser found: none of {', '.join(BROWSERS)} is on the PATH"
)

FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --v=0
--run-all-compositor-stages-before-draw --virtual-time-budget=8000""".split()  # noqa: SIM905
# The page has no scripts and headless windows have a least width, so a second page looks at it through frames
# of a given width.
PROBE = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
const widths = [400, 1280], found = {};
function measure(frame, width) {
  const d = frame.contentDocument, box = e => e.getBoundingClientRect();
  const shown = e => box(e).width > 0 && box(e).height > 0;
  const table = d.querySelector("table.claims");
  found[width] = {
    overflow: d.documentElement.scrollWidth - frame.clientWidth,
    outside: [...d.querySelectorAll("body *")].filter(e => box(e).right > width + 1 && !e.closest(".wide"))
      .map(e => e.outerHTML.slice(0, 80)),
    images: [...d.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, box(i).width]),
    claims: [...table.tBodies[0].rows].filter(shown).map(r => [...r.cells].map(c => c.innerText)),
    labels: frame.contentWindow.getComputedStyle(table.tBodies[0].rows[0].cells[1], "::before").content,
    header: box(table.tHead).height,
    text: d.body.innerText,
    background: frame.contentWindow.getComputedStyle(d.body).backgroundColor,
  };
  const fold = d.querySelector("table.claims + details");
  found[width].open = fold.open;
  fold.open = true;
  found[width].folded = [...fold.querySelectorAll("tbody tr")].filter(shown).map(r => [...r.cells].map(c => c.innerText));
  if (Object.keys(found).length === widths.length) {
    const out = document.createElement("pre");
    out.id = "found"; out.textContent = JSON.stringify(found); document.body.append(out);
  }
}
for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:900px;border:0`;
  frame.onload = () => measure(frame, width);
  frame.srcdoc = PAGE;
  document.body.append(frame);
}
</script>"""


def _browse(folder: Path, file: Path, *arguments: str) -> subprocess.CompletedProcess:
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [BROWSER, *FLAGS, profile, *arguments, file.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Return (folder, frame of claims) of a made-up study with two figures and its page."""
    from convx.report import figures

    folder = build(tmp_path_factory.mktemp("study"), failed=[("lc_frozen_x8", 1)])
    tables.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "paper_figures", lambda results, out: [])
        patch.setattr(figures, "FIGURES", (figures.claims_forest, figures.accuracy, figures.corruption_heatmap))
        figures.draw(folder)
    page.write(folder)
    return folder, Results(folder).replication


@pytest.fixture(scope="module")
def seen(study, tmp_path_factory):
    """Return what the browser sees of the page, by width in pixels."""
    folder, _ = study
    work = tmp_path_factory.mktemp("probe")
    text = (folder / "report" / "index.html").read_text(encoding="utf-8")
    probe = work / "probe.html"
    probe.write_text(PROBE.replace("PAGE", json.dumps(text).replace("</", "<\\/")), encoding="utf-8")
    result = _browse(work, probe, "--dump-dom", "--window-size=1400,1000")
    found = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, flags=re.DOTALL)
    assert found, result.stderr[-2000:]
    return {int(width): facts for width, facts in json.loads(html.unescape(found[1])).items()}


def test_the_page_opens_without_a_complaint(study, tmp_path):
    folder, _ = study
    result = _browse(tmp_path, folder / "report" / "index.html", "--dump-dom")
    assert result.returncode == 0 and "CONSOLE" not in result.stderr, result.stderr[-2000:]
    assert "does it hold up?" in result.stdout and result.stdout.count("<figure>") == 3


def test_a_complaint_would_be_seen(tmp_path):
    file = tmp_path / "bad.html"
    file.write_text("<!doctype html><title>x</title><script>nothing.there()</script>")
    assert "CONSOLE" in _browse(tmp_path, file, "--dump-dom").stderr


@pytest.mark.parametrize("width", [400, 1280])
def test_primary_claims_are_there_with_their_verdicts(study, seen, width):
    _, frame = study
    primary = frame[frame["role"] == "primary"]
    rows = seen[width]["claims"] + seen[width]["folded"]
    assert len(rows) == len(primary) == sum(c["role"] == "primary" for c in claims.load_ledgers())
    here = ~primary["reason"].fillna("").str.endswith("is not in the study")
    # What the study is about comes first, the rest is folded.
    assert len(seen[width]["claims"]) == here.sum() > 0 and not seen[width]["open"]
    shown = {row[0].splitlines()[-1].split("; ")[-1].strip(): row for row in rows}
    for _, row in primary.iterrows():
        cells = next(cells for name, cells in shown.items() if name.endswith(row["claim_id"]))
        assert cells[3].strip() == f"{findings.SIGNS[row['verdict']]} {row['verdict']}"
        assert row["statement"] in cells[0]
    assert f"Of {len(primary)} main claims" in seen[width]["text"]


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_runs_over_the_edge(seen, width):
    assert seen[width]["overflow"] <= 0 and seen[width]["outside"] == []


def test_figures_are_pictures(seen):
    for width in (400, 1280):
        assert len(seen[width]["images"]) == 3
        for complete, natural_width, natural_height, shown in seen[width]["images"]:
            assert complete and natural_width > 600 and natural_height > 100 and 250 < shown <= width


def test_a_phone_gets_labels_in_place_of_headers(seen):
    assert seen[400]["labels"] == '"the paper says: "' and seen[400]["header"] <= 1
    assert seen[1280]["labels"] in ("none", "normal") and seen[1280]["header"] > 20


def test_dark_mode_is_dark(study, tmp_path):
    from PIL import Image

    folder, _ = study
    corners = {}
    for name, scheme in (("light", 1), ("dark", 0)):
        shot = tmp_path / f"{name}.png"
        settings = f"--blink-settings=preferredColorScheme={scheme}"
        _browse(
            tmp_path,
            folder / "report" / "index.html",
            settings,
            f"--screenshot={shot}",
            "--window-size=800,600",
        )
        corners[name] = sum(Image.open(shot).convert("RGB").getpixel((3, 3)))
    assert corners["light"] > 700 and corners["dark"] < 120
