"""The claims ledgers: what they must hold, the numbers as printed, and a mistake is one line."""

import re
import subprocess
import sys

import pytest
import yaml

from convx import config, ledger
from convx.claims import load_ledgers

PAPERS = ["bootstrap_vit", "dcls", "focused", "randconv", "sere", "tcnn"]
ALL = load_ledgers()
BY_ID = {claim["id"]: claim for claim in ALL}
TABLE1 = {  # Gavrikov & Keuper, arXiv 2301.11360 v2, Table 1: baseline, LC learned, LC frozen
    "cifar10": ((91.60, 0.23), (91.39, 0.29), (91.89, 0.10)),
    "cifar100": ((60.84, 0.52), (59.44, 0.55), (61.31, 0.74)),
    "fashion_mnist": ((93.65, 0.18), (93.44, 0.18), (93.65, 0.06)),
    "svhn": ((96.36, 0.04), (96.31, 0.08), (96.34, 0.11)),
}


def test_every_paper_has_a_ledger_with_one_or_two_primary_claims():
    assert ledger.papers() == PAPERS
    assert len(ALL) >= 60
    for paper in PAPERS:
        mine = [claim for claim in ALL if claim["paper"] == paper]
        assert 1 <= sum(claim["role"] == "primary" for claim in mine) <= 2
        assert len(mine) >= 10
    assert len(BY_ID) == len(ALL)


def test_no_number_without_place_evidence_and_margin():
    for claim in ALL:
        assert claim["location"] and claim["evidence"]["source"] and claim["margin_reason"], claim["id"]
        assert claim["margin"] > 0 or claim["kind"] == "exact", claim["id"]
        if claim["paper_value"] is None:
            assert claim["kind"] == "ordering", claim["id"]


def test_table_1_of_the_random_filter_paper_stands_as_printed():
    columns = {"baseline": "cnn", "lc_learned": "lc_learned_x128", "lc_frozen": "lc_frozen_x128"}
    for data, cells in TABLE1.items():
        for (column, variant), (value, spread) in zip(columns.items(), cells):
            claim = BY_ID[f"randconv.table1_{data}_{column}"]
            assert (claim["paper_value"], claim["paper_spread"], claim["paper_n"]) == (value, spread, 4)
            assert (claim["variant"], claim["data"], claim["unit"]) == (variant, data, "%")
            assert claim["spread_kind"] == "unstated" and claim["evidence"]["status"] == "verified"
            assert claim["protocol"]["epochs"] == 75 and claim["protocol"]["model"] == "resnet20_16"
            assert claim["protocol"]["flip"] == data.startswith("cifar")
            assert claim["margin"] == (1.5 if data == "cifar100" else 0.5)
        frozen_baseline = BY_ID[f"randconv.delta_{data}_frozen_baseline"]["paper_value"]
        assert frozen_baseline == pytest.approx(cells[2][0] - cells[0][0])


def test_printed_differences_agree_with_the_printed_cells():
    def value(name):
        return BY_ID[name]["paper_value"]

    for data in ("cifar10", "cifar100"):
        table = f"bootstrap_vit.table1_{data}_"
        for mode in ("joint", "shared"):
            for size in ("s", "b"):
                gain = value(f"{table}{mode}_vit_{size}") - value(f"{table}vit_{size}")
                name = f"gain_{data}_{mode}_{size}" if (data, size) != ("cifar100", "s") else f"{mode}_gain"
                assert gain == pytest.approx(value(f"bootstrap_vit.{name}"))
    for share in (5, 10, 50):
        table = f"bootstrap_vit.table3_{share}pct_"
        for mode in ("joint", "shared"):
            gain = value(f"{table}{mode}") - value(f"{table}vit_b")
            assert gain == pytest.approx(value(f"bootstrap_vit.gain_imagenet_{share}pct_{mode}"))
    for size in ("s", "b"):
        gain = value(f"dcls.top1_{size}_dcls") - value(f"dcls.top1_{size}_dense")
        assert gain == pytest.approx(value(f"dcls.top1_gain_{size}"))


def test_numbers_of_secondary_sources_are_marked():
    for name in ("sere.imagenet_s_vit_b_ft_test", "sere.ade20k", "dcls.latency_t"):
        assert BY_ID[name]["evidence"]["status"] == "unverified"
    assert (BY_ID["tcnn.top1_gain"]["paper_value"], BY_ID["tcnn.corruption_gain"]["paper_value"]) == (2.2, 11)
    assert (BY_ID["focused.latency"]["paper_value"], BY_ID["focused.energy"]["paper_value"]) == (0.75, 0.78)


def test_declared_variants_of_the_ledgers_keep_their_names():
    """A variant that is renamed must not silently turn all claims of its paper to `not run`."""
    used = {v for claim in ALL for v in (claim["variant"], claim["reference"]) if v}
    declared = set(config.declared_variants())
    for paper in {entry["paper"] for entry in config.declared_variants().values()} & set(PAPERS):
        own = {v for c in ALL if c["paper"] == paper for v in (c["variant"], c["reference"]) if v}
        assert own & declared, paper
    assert used & declared


@pytest.mark.parametrize("paper", [*PAPERS, "baseline"])
def test_readme_and_bibliography(paper):
    folder = ledger.PAPERS / paper
    numbers = re.findall(r"^- \*\*D(\d+)\*\*", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert [int(n) for n in numbers] == list(range(1, len(numbers) + 1))
    bibliography = (folder / "bibtex.bib").read_text(encoding="utf-8")
    assert bibliography.count("{") == bibliography.count("}") and re.search(r"^@\w+\{\w+,$", bibliography, re.MULTILINE)


def broken(tmp_path, **changes):
    """Load a ledger of one sound claim with changes; None removes a key."""
    claim = {
        "id": "toy.gain",
        "statement": "Toys gain a point.",
        "kind": "delta",
        "role": "primary",
        "paper_value": 1,
        "unit": "pp",
        "location": "Table 1",
        "evidence": {"status": "verified", "source": "read"},
        "metric": "top1",
        "variant": "toy",
        "reference": "cnn",
        "direction": "higher",
        "margin": 0.5,
        "margin_reason": "half of it",
        "data": "cifar10",
        "divergences": ["D1"],
    }
    claim = {k: v for k, v in (claim | changes).items() if v is not None}
    folder = tmp_path / "toy"
    folder.mkdir(exist_ok=True)
    (folder / "claims.yaml").write_text(yaml.safe_dump([claim]), encoding="utf-8")
    (folder / "README.md").write_text("- **D1** Something.\n", encoding="utf-8")
    return load_ledgers(["toy"], tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "detla"}, ["kind", "'detla'", "did you mean 'delta'?"]),
        ({"metric": "top_1"}, ["metric", "did you mean 'top1'?"]),
        ({"margn": 1}, ["unknown key 'margn'", "did you mean 'margin'?"]),
        ({"location": None}, ["the key 'location' is missing"]),
        ({"evidence": None}, ["the key 'evidence' is missing"]),
        ({"evidence": {"status": "seen", "source": "read"}}, ["evidence.status", "'seen'"]),
        ({"margin": -1}, ["margin", "must be >= 0"]),
        ({"margin": 0}, ["margin", "above 0"]),
        ({"paper_value": "one"}, ["paper_value", "number"]),
        ({"reference": None}, ["reference", "is missing"]),
        ({"direction": None}, ["direction", "is missing"]),
        ({"kind": "absolute"}, ["reference", "compares nothing"]),
        ({"kind": "cost"}, ["unit", "'ratio'"]),
        ({"id": "other.gain"}, ["id", "'toy'"]),
        ({"divergences": ["D2"]}, ["divergences", "'D2'"]),
        ({"paper_spread": 0.2}, ["spread_kind", "'none'"]),
        ({"role": "exploratory"}, ["0 claims are primary"]),
        ({"check": "convx.papers.toy.exact:f"}, ["check", "only exact"]),
    ],
)
def test_a_broken_ledger_is_one_line(tmp_path, changes, words):
    assert broken(tmp_path)[0]["spread_kind"] == "none"  # sound, and its defaults filled in
    with pytest.raises(config.ConfigError) as caught:
        broken(tmp_path, **changes)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("convx/papers/toy/claims.yaml: ")
    assert all(word in line for word in words), line


def test_other_mistakes_are_one_line(tmp_path):
    broken(tmp_path)
    file = tmp_path / "toy" / "claims.yaml"
    one = file.read_text(encoding="utf-8")
    for text, word in ((one + one, "twice"), ("a: [", "YAML"), ("a: 1", "list of claims")):
        file.write_text(text.replace("role: primary", "role: primary"), encoding="utf-8")
        with pytest.raises(config.ConfigError, match=word) as caught:
            load_ledgers(["toy"], tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(config.ConfigError, match="did you mean 'tcnn'"):
        load_ledgers(["tcn"])


def test_reading_ledgers_needs_no_torch():
    code = "import sys; from convx.claims import load_ledgers; load_ledgers(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
