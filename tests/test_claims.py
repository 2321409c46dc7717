"""The verdicts: every word by a constructed table; false verdicts among primary claims by simulation."""

import copy
import importlib
import math

import numpy as np
import pandas as pd
import pytest

from convx import claims, config, statistics
from convx.claims import DECIDED, VERDICTS, evaluate, load_ledgers, study_facts
from convx.verdicts import correct, shaffer, verdict_of

ALL = load_ledgers()
BY_ID = {claim["id"]: claim for claim in ALL}


def claim(kind="delta", **changes):
    base = {
        "id": "toy.c",
        "paper": "toy",
        "statement": "A claim.",
        "kind": kind,
        "role": "exploratory",
        "paper_value": 1.0,
        "unit": "pp",
        "paper_spread": None,
        "spread_kind": "none",
        "paper_n": None,
        "location": "Table 1",
        "evidence": {"status": "verified", "source": "x"},
        "metric": "top1",
        "conditions": {},
        "variant": "new",
        "reference": "cnn",
        "direction": "higher",
        "margin": 0.5,
        "margin_reason": "x",
        "data": "cifar10",
        "transfer": True,
        "protocol": {},
        "pairing": "independent",
        "divergences": [],
        "check": None,
    }
    if kind == "absolute":
        base |= {"unit": "%", "reference": None, "direction": None, "paper_value": 90.0}
    if kind == "cost":
        base |= {
            "unit": "ratio",
            "direction": None,
            "paper_value": 0.75,
            "metric": "latency_ratio",
            "margin": 0.05,
        }
    return base | changes


def rows(variant, values, metric="top1", status="ok", n=10_000, method="counted", **conditions):
    unit = "%" if metric == "top1" else ""
    head = {
        "study": "s",
        "variant": variant,
        "metric": metric,
        "unit": unit,
        "n": n,
        "split": "test",
        "method": method,
        "status": status,
    }
    return [head | {"seed": seed, "value": value, "reason": ""} | conditions for seed, value in enumerate(values)]


def study(variants=("new", "cnn"), seeds=4, **changes):
    facts = {"epochs": 75, "model": "resnet20_16", "seeds": list(range(seeds))}
    base = {"name": "s", "data": {"name": "cifar10"}, "seeds": list(range(seeds)), "reduced": ""}
    return base | {"variants": {name: dict(facts) for name in variants}} | changes


def decide(one, *runs, per_image=None, exact=False, **facts):
    frame = pd.DataFrame([row for part in runs for row in part] or rows("nobody", [0.0]))
    numbers = claims.run_exact([one]) if exact else None
    result = evaluate([one], frame, per_image or {}, study(**facts), numbers)
    assert len(result) == 1 and list(result.columns) == claims.COLUMNS
    row = result.iloc[0]
    assert row["verdict"] in VERDICTS and (row["verdict"] in DECIDED or row["reason"])
    return row


TIGHT, LOOSE = [-0.1, 0.0, 0.0, 0.1], [-2.0, -1.0, 1.0, 2.0]


def around(mean, spread=TIGHT):
    return [mean + d for d in spread]


@pytest.mark.parametrize(
    ("mean", "spread", "verdict"),
    [(90.1, TIGHT, "replicated"), (92, TIGHT, "higher"), (88, TIGHT, "lower"), (91.1, LOOSE, "inconclusive")],
)
def test_absolute_claims(mean, spread, verdict):
    row = decide(claim("absolute", margin=1.0), rows("new", around(mean, spread)))
    assert row["verdict"] == verdict
    assert row["ours_mean"] == pytest.approx(mean) and row["delta"] == pytest.approx(mean - 90) and row["ours_n"] == 4
    # The paper's n is unknown: its value carries the binomial error of the test set.
    sd = np.std(around(mean, spread), ddof=1)
    inner = statistics.compare_to_paper(around(mean, spread), 90, test_images=10_000).interval(0.90)
    assert row["delta_ci90_low"] == pytest.approx(inner.low) and inner.high - inner.low > sd / 2
    assert row["minimum_detectable_effect"] > 1


def test_a_printed_spread_is_used_and_its_other_reading_reported():
    printed = {"paper_spread": 0.2, "spread_kind": "unstated", "paper_n": 4}
    row = decide(claim("absolute", **printed), rows("new", around(90.1)))
    expected = statistics.summary_difference(90.1, np.std(TIGHT, ddof=1), 4, 90, 0.2, 4)
    assert (row["delta_ci_low"], row["delta_ci_high"]) == pytest.approx((expected.low, expected.high))
    assert row["verdict"] == "replicated" and "as a standard error: inconclusive" in row["scope"]
    row = decide(claim("absolute", **printed | {"paper_spread": 0.05}), rows("new", around(90.1)))
    assert row["verdict"] == "replicated" and "either way" in row["scope"]
    stated = decide(claim("absolute", **printed | {"spread_kind": "se"}), rows("new", around(90.1)))
    assert stated["verdict"] == "inconclusive"


@pytest.mark.parametrize(
    ("changes", "facts", "words"),
    [
        ({"data": "cifar100"}, {}, "data: cifar10 (paper: cifar100)"),
        ({"protocol": {"epochs": 300}}, {}, "epochs: 75 (paper: 300)"),
        ({"protocol": {"image_size": 224}}, {}, "image size: 32 (paper: 224)"),
        ({"protocol": {"device": "V100"}}, {}, "device: the study does not say (paper: V100)"),
        (
            {"protocol": {"train_images": "all"}},
            {"data": {"name": "cifar10", "train_images": 500}},
            "train images: 500",
        ),
        ({}, {"reduced": "5 epochs"}, "reduced study: 5 epochs"),
        ({}, {"data": {"name": "cifar10", "lossy": True}}, "lossy"),
    ],
)
def test_absolute_values_need_the_papers_protocol(changes, facts, words):
    row = decide(claim("absolute", **changes), rows("new", around(90)), **facts)
    assert row["verdict"] == "not comparable" and words in row["reason"]
    assert row["ours_mean"] == pytest.approx(90) and row["protocol"] == "differs"
    same = {"model": "resnet20_16", "epochs": 75, "image_size": 32, "train_images": "all"}
    assert decide(claim("absolute", protocol=same), rows("new", around(90)))["verdict"] == "replicated"


@pytest.mark.parametrize(
    ("difference", "spread", "direction", "verdict"),
    [
        (2, TIGHT, "higher", "supported"),
        (2, TIGHT, "lower", "contradicted"),
        (-2, TIGHT, "higher", "contradicted"),
        (0.1, TIGHT, "higher", "no relevant difference"),
        (0.6, LOOSE, "higher", "inconclusive"),
        (0.1, TIGHT, "not_lower", "supported"),
        (-0.2, TIGHT, "not_lower", "supported"),
        (2, TIGHT, "not_lower", "supported"),
        (-2, TIGHT, "not_lower", "contradicted"),
        (-0.5, TIGHT, "not_lower", "inconclusive"),
        (0.0, LOOSE, "not_lower", "inconclusive"),
    ],
)
@pytest.mark.parametrize("kind", ["delta", "ordering"])
def test_orderings_and_differences(kind, difference, spread, direction, verdict):
    one = claim(kind, direction=direction)
    row = decide(one, rows("new", around(90 + difference, spread)), rows("cnn", around(90, spread)))
    assert row["verdict"] == verdict
    assert row["delta"] == pytest.approx(difference) and row["reference_mean"] == pytest.approx(90)
    expected = statistics.welch_interval(around(90 + difference, spread), around(90, spread))
    assert (row["delta_ci_low"], row["delta_ci_high"]) == pytest.approx((expected.low, expected.high))
    if verdict == "inconclusive":
        assert "interval" in row["reason"] and row["minimum_detectable_effect"] > 0.5


def test_orderings_are_decided_on_other_data_and_say_so():
    runs = rows("new", around(92)), rows("cnn", around(90))
    row = decide(claim(data="imagenet", protocol={"epochs": 300}), *runs, reduced="small")
    assert row["verdict"] == "supported" and row["study_data"] == "cifar10"
    assert all(
        w in row["scope"]
        for w in ("data: cifar10 (paper: imagenet)", "epochs: 75 (paper: 300)", "reduced study: small")
    )
    row = decide(claim(data="imagenet", transfer=False), *runs)
    assert row["verdict"] == "not comparable" and "imagenet" in row["reason"] and row["delta"] != row["delta"]


def test_seeds_pair_only_by_design():
    spread = [-3.0, -1.0, 1.0, 3.0]
    runs = rows("new", around(91, spread)), rows("cnn", around(90, [d + e for d, e in zip(spread, TIGHT)]))
    assert decide(claim(), *runs)["verdict"] == "inconclusive"
    row = decide(claim(pairing="by_design"), *runs)
    assert row["verdict"] == "supported" and "paired" in row["method"]
    other = [r | {"seed": r["seed"] + 1} for r in runs[1]]
    facts = study()
    facts["variants"]["cnn"]["seeds"] = [1, 2, 3, 4]
    frame = evaluate([claim(pairing="by_design")], pd.DataFrame([*runs[0], *other]), {}, facts)
    assert "Welch" in frame["method"][0] and frame["verdict"][0] == "inconclusive"


def test_what_was_not_measured_keeps_its_row():
    new, cnn = rows("new", around(92)), rows("cnn", around(90))
    assert decide(claim(), cnn, variants=("cnn",))["reason"] == "new is not in the study"
    assert decide(claim(), new, variants=("new",))["verdict"] == "not run"
    row = decide(claim(metric="knn_top1"), new, cnn)
    assert row["verdict"] == "not run" and "no rows of knn_top1" in row["reason"]
    row = decide(claim(), new[:2], cnn)
    assert (row["verdict"], row["reason"]) == ("incomplete", "2 of 4 seeds of new") and row["ours_n"] == 2
    failed = {
        "study": "s",
        "variant": "new",
        "seed": 3,
        "metric": "",
        "value": math.nan,
        "status": "failed",
        "reason": "the loss is NaN",
        "what": "training",
    }
    row = decide(claim(), new[:3], [failed], cnn)
    assert row["verdict"] == "failed" and row["reason"] == "new seed 3, training: the loss is NaN"
    row = decide(claim(), rows("new", [None] * 4, method="not measured: no device"), cnn)
    assert row["verdict"] == "not run" and "no device" in row["reason"]
    elsewhere = [r | {"split": "validation"} for r in rows("new", around(92))]
    assert decide(claim(), elsewhere, cnn)["verdict"] == "not run"
    assert decide(claim(), elsewhere, new, cnn)["verdict"] == "supported"
    two = rows("new", around(50), metric="fgsm_accuracy", epsilon="1/255") + rows(
        "new", around(10), metric="fgsm_accuracy", epsilon="8/255"
    )
    row = decide(claim("absolute", metric="fgsm_accuracy"), two)
    assert row["verdict"] == "not run" and "several rows" in row["reason"]
    row = decide(
        claim("absolute", metric="fgsm_accuracy", conditions={"epsilon": "1/255"}, paper_value=50.0, margin=2.0),
        two,
    )
    assert row["verdict"] == "replicated"


def test_one_seed_decides_nothing():
    one = study(seeds=1)
    for made in (claim(), claim("absolute")):
        frame = evaluate([made], pd.DataFrame(rows("new", [99.0]) + rows("cnn", [90.0])), {}, one)
        assert frame["verdict"][0] == "inconclusive" and "one run" in frame["reason"][0]
    assert frame["delta_ci_low"][0] == pytest.approx(statistics.wilson_interval(9900, 10_000).low * 100 - 90)


def test_one_run_is_all_there_is_where_nothing_was_trained():
    """The images are the only chance then; where a start was trained, its seeds are one as well."""
    n = 1000
    right = {"cnn": np.arange(n) < 900, "new": (np.arange(n) < 901) & (np.arange(n) > 0)}  # one lost, one gained
    kept = {name: {0: {"correct": array}} for name, array in right.items()}
    runs = pd.DataFrame([row for name in right for row in rows(name, [100 * right[name].mean()], n=n)])
    made = claim(direction="not_lower", pairing="by_design", margin=1.0, paper_value=0.0)
    facts = study(seeds=1)
    for epochs, start, verdict in ((0, 0, "supported"), (0, 5, "inconclusive"), (5, 0, "inconclusive")):
        facts["variants"]["cnn"] |= {"epochs": start, "start_from": None}
        facts["variants"]["new"] |= {"epochs": epochs, "start_from": "cnn"}
        row = evaluate([made], runs, kept, facts).iloc[0]
        assert row["verdict"] == verdict and ("one run" in (row["reason"] or "")) == (verdict == "inconclusive")
    facts["variants"]["new"]["epochs"] = 0
    row = evaluate([made | {"margin": 0.3}], runs, kept, facts).iloc[0]
    expected = statistics.paired_images(right["new"], right["cnn"]).interval()
    assert row["verdict"] == "inconclusive" and "does not settle it" in row["reason"] and "Tango" in row["method"]
    assert (row["delta_ci_low"], row["delta_ci_high"]) == pytest.approx((expected.low, expected.high))


def latency(median, low, high, reference="cnn", **conditions):
    where = {
        "batch": 1,
        "threads": 1,
        "dtype": "float32",
        "folded": "no",
        "device": "cpu",
        "reference": reference,
    } | conditions
    parts = zip(("median", "low", "high"), (median, low, high))
    return [r for name, v in parts for r in rows("new", [v], "latency_ratio", n=None, statistic=name, **where)]


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ((0.76, 0.74, 0.78), "replicated"),
        ((0.9, 0.88, 0.93), "higher"),
        ((0.5, 0.49, 0.52), "lower"),
        ((0.78, 0.6, 0.9), "inconclusive"),
    ],
)
def test_latency_ratios(measured, verdict):
    row = decide(claim("cost", conditions={"batch": 1}), latency(*measured), latency(2, 1.9, 2.1, batch=32))
    assert row["verdict"] == verdict and row["ours_mean"] == measured[0]
    assert (row["delta_ci_low"], row["delta_ci_high"]) == pytest.approx((measured[1] - 0.75, measured[2] - 0.75))
    ordering = claim(
        "ordering",
        unit="ratio",
        metric="latency_ratio",
        direction="lower",
        margin=0.05,
        conditions={"batch": 1},
    )
    expected = {
        "replicated": "supported",
        "higher": "supported",
        "lower": "supported",
        "inconclusive": "supported",
    }[verdict]
    assert decide(ordering, latency(*measured))["verdict"] == expected


def test_latency_needs_the_same_reference_and_takes_the_plain_condition():
    row = decide(claim("cost"), latency(0.76, 0.74, 0.78, reference="dense7"))
    assert row["verdict"] == "not run" and "reference cnn" in row["reason"]
    both = (
        latency(0.76, 0.74, 0.78),
        latency(0.3, 0.29, 0.31, folded="yes"),
        latency(0.2, 0.19, 0.21, threads=2),
    )
    row = decide(claim("cost"), *both, latency(0.1, 0.09, 0.11, batch=32), latency(0.1, 0.09, 0.11, dtype="bfloat16"))
    assert row["verdict"] == "replicated" and row["ours_mean"] == 0.76
    row = decide(claim("cost", protocol={"device": "V100"}), *both)
    assert row["verdict"] == "not comparable" and "V100" in row["reason"]


def test_energy_is_never_ranked_by_an_estimate_and_counts_have_no_spread():
    def energy(method):
        a = rows("new", [0.6], "inference_energy", method=method)
        return decide(
            claim("cost", metric="inference_energy"), a, rows("cnn", [1.0], "inference_energy", method="RAPL")
        )

    row = energy("estimate (load x TDP)")
    assert row["verdict"] == "not comparable" and "estimate" in row["reason"]
    assert energy("RAPL")["verdict"] == "inconclusive"
    runs = rows("new", [60.0] * 4, "macs", folded="no"), rows("cnn", [80.0] * 4, "macs", folded="no")
    assert decide(claim("cost", metric="macs"), *runs)["verdict"] == "replicated"


def test_training_time_counts_the_training_that_a_run_starts_from():
    facts = study()
    facts["variants"]["new"] |= {"start_from": "cnn", "start_share": 0.5}
    one = claim("ordering", metric="train_seconds", unit="ratio", direction="lower", margin=0.05)
    frame = pd.DataFrame(rows("new", around(70), "train_seconds") + rows("cnn", around(100), "train_seconds"))
    row = evaluate([one], frame, {}, facts).iloc[0]
    assert row["verdict"] == "contradicted" and row["delta"] == pytest.approx(0.2, abs=1e-3)  # 70 + 50 against 100
    facts["variants"]["new"]["start_from"] = None
    assert evaluate([one], frame, {}, facts)["verdict"][0] == "supported"


def test_images_are_resampled_with_seeds_where_they_were_kept():
    rng = np.random.default_rng(0)
    kept = {v: {s: {"correct": rng.random(400) < p} for s in range(4)} for v, p in (("new", 0.93), ("cnn", 0.90))}
    for v in kept:  # equal accuracies over seeds: only images are left as a source of doubt
        for s in range(4):
            kept[v][s]["correct"] = rng.permutation(np.arange(400) < (372 if v == "new" else 360))
    runs = rows("new", [93.0] * 4), rows("cnn", [90.0] * 4)
    sharp, honest = decide(claim(), *runs), decide(claim(), *runs, per_image=kept)
    assert sharp["delta_ci_low"] == sharp["delta_ci_high"] and "images" in honest["method"]
    two_level = statistics.bootstrap_seeds_images(
        *(np.stack([kept[v][s]["correct"] for s in range(4)]).astype(float) for v in ("new", "cnn")),
        resamples=2000,
    )
    found = honest["delta_ci_high"] - honest["delta_ci_low"]
    assert found == pytest.approx(two_level.high - two_level.low, rel=0.05) and found > 1
    kept["new"][0]["correct"] = np.ones(400, bool)  # results of other rows than the value's are not used
    assert decide(claim(), *runs, per_image=kept)["method"] == sharp["method"]


def test_exact_claims(monkeypatch):
    made = claim(
        "exact",
        variant=None,
        reference=None,
        direction=None,
        paper_value=6.28,
        margin=0.005,
        check="convx.papers.t.exact:f",
    )
    monkeypatch.setattr(importlib, "import_module", lambda name: pd.Series({"f": lambda: 6.276}))
    assert decide(made)["verdict"] == "not run" and decide(made, exact=True)["verdict"] == "exact"
    assert decide(made | {"paper_value": 6.30}, exact=True)["verdict"] == "differs"
    assert decide(made | {"check": None}, exact=True)["reason"] == "convx has no code for it yet"
    monkeypatch.setattr(importlib, "import_module", lambda name: pd.Series({"f": lambda: 1 / 0}))
    row = decide(made, exact=True)
    assert row["verdict"] == "failed" and "ZeroDivisionError" in row["reason"]


def test_exact_checks_settle_claims():
    tested = [
        "dcls.taps_t",
        "dcls.taps_t_gauss",
        "dcls.parameters_t_dcls",
        "randconv.lemma_fold",
        "tcnn.identity_layer",
    ]
    tested += ["bootstrap_vit.parameters_vit_s_cifar10", "bootstrap_vit.macs_vit_s"]
    made = [BY_ID[t] for t in tested]
    frame = evaluate(made, pd.DataFrame(rows("x", [0.0])), {}, study(), claims.run_exact(made))
    verdicts = dict(zip(frame["claim_id"], frame["verdict"]))
    assert verdicts.pop("bootstrap_vit.macs_vit_s") == "differs"  # 1.354 G against the printed 1.37 G
    assert set(verdicts.values()) == {"exact"}
    ours = dict(zip(frame["claim_id"], frame["ours_mean"]))
    assert (ours["dcls.taps_t"], ours["dcls.taps_t_gauss"]) == (34, 26)
    assert ours["bootstrap_vit.parameters_vit_s_cifar10"] == pytest.approx(6.276394)
    assert ours["dcls.parameters_t_dcls"] == pytest.approx(28.588, abs=1e-3)


@pytest.mark.slow
def test_every_exact_check_runs():
    made = [one for one in ALL if one["check"]]
    frame = evaluate(made, pd.DataFrame(rows("x", [0.0])), {}, study(), claims.run_exact(made))
    assert set(frame["verdict"]) == {"exact", "differs"} and len(frame) >= 30
    differing = set(frame.loc[frame["verdict"] == "differs", "claim_id"])
    macs = {f"bootstrap_vit.macs_{n}" for n in ("vit_s", "vit_b", "agent_s", "agent_b", "resnet50", "efficientnet_b2")}
    # Two sizes that the paper prints are those of another agent and two swapped digits (divergences of its folder).
    assert differing == macs | {f"bootstrap_vit.parameters_agent_{size}_cifar100" for size in "sb"}


def test_primary_claims_are_corrected_for_their_number():
    mean = next(m for m in np.arange(90.5, 92, 0.01) if _alone(m) < 0.045)  # decided by itself, but barely
    runs = pd.DataFrame(
        rows("new", around(mean, [-0.4, -0.2, 0.2, 0.4])) + rows("cnn", around(90, [-0.4, -0.2, 0.2, 0.4]))
    )
    made = [claim(id=f"toy.{k}", role="primary", margin=0.05) for k in range(5)]
    assert evaluate(made[:1], runs, {}, study())["verdict"][0] == "supported"
    five = evaluate(made, runs, {}, study())
    assert set(five["verdict"]) == {"inconclusive"} and "Holm" in five["reason"][0]
    assert five["holm_p"].to_numpy() == pytest.approx(np.minimum(1, 5 * five["p_difference"]))
    explored = evaluate([c | {"role": "exploratory"} for c in made], runs, {}, study())
    assert set(explored["verdict"]) == {"supported"} and explored["holm_p"].isna().all()


def _alone(mean):
    return statistics.welch(around(mean, [-0.4, -0.2, 0.2, 0.4]), around(90, [-0.4, -0.2, 0.2, 0.4])).p_value()


@pytest.mark.slow
@pytest.mark.parametrize("truths", [[0.0] * 6, [0.5] * 6, [0.0, 0.5] * 3])
def test_family_wise_error_of_primary_claims(truths):
    """2,000 studies of six primary claims: no difference, or one exactly at the margin, or a mixture.

    An error is a difference declared where there is none, or "no relevant difference" where there is one.
    """
    rng, wrong, studies = np.random.default_rng(1), 0, 2000
    for _ in range(studies):
        family = []
        for true in truths:
            contrast = statistics.welch(*(90 + d + 0.25 * rng.standard_normal(5) for d in (true, 0)))
            family.append(claim(role="primary") | verdict_of(claim(), contrast, None))
        correct(family)
        wrong += any(
            row["verdict"] in ("contradicted", "supported" if true == 0 else "no relevant difference")
            for row, true in zip(family, truths)
        )
    assert wrong / studies <= 0.06, wrong / studies


def test_correction_of_pairs_of_hypotheses():
    assert shaffer([(0.01, 0.4)]).tolist() == [[0.01, 0.4]]
    adjusted = shaffer([(0.01, 0.9), (0.02, 0.8), (0.9, 0.001)])
    assert adjusted[:, 0] == pytest.approx([0.03, 0.06, 1]) and adjusted[2, 1] == pytest.approx(0.003)
    # Both hypotheses of the first are rejected, so one fewer can be true for the second.
    assert shaffer([(0.001, 0.002), (0.03, 0.9)])[1, 0] == pytest.approx(0.03)
    assert shaffer([]).shape == (0, 2)


def test_the_real_ledgers_on_a_small_study():
    made = study(variants=("cnn", "cnn_frozen", "lc_frozen_x8", "lc_learned_x8", "lc_frozen_x128"), reduced="2 epochs")
    runs = (
        rows("cnn", around(91))
        + rows("cnn_frozen", around(70))
        + rows("lc_frozen_x8", around(90.5))
        + rows("lc_learned_x8", around(90))[:2]
    )
    frame = evaluate(ALL, pd.DataFrame(runs), {}, made)
    assert len(frame) == len(ALL) and list(frame["claim_id"]) == [c["id"] for c in ALL]
    verdicts = dict(zip(frame["claim_id"], frame["verdict"]))
    assert verdicts["randconv.frozen_costs_basic_block"] == "supported"
    assert verdicts["randconv.table1_cifar10_baseline"] == "not comparable"
    assert verdicts["randconv.crosses_learned_at_x8"] == "incomplete"
    assert verdicts["randconv.frozen_lc_matches_baseline"] == "not run"
    assert (frame.loc[~frame["verdict"].isin(DECIDED), "reason"] != "").all()
    assert np.isfinite(frame[["margin"]].to_numpy()).all()
    again = evaluate(copy.deepcopy(ALL), pd.DataFrame(runs), {}, made)
    pd.testing.assert_frame_equal(frame, again)


def test_the_facts_of_a_study_make_table_1_comparable():
    training = {
        "epochs": 75,
        "batch_size": 256,
        "optimizer": "sgd",
        "lr": 0.01,
        "weight_decay": 0.01,
        "label_smoothing": 0.1,
    }
    source = {
        "study": "t1",
        "data": {"name": "fashion_mnist", "image_size": 32},
        "host": {"name": "resnet20_16"},
        "baseline": "cnn",
        "recipes": {"train": training},
        "variants": {"cnn": None},
        "seeds": [0, 1, 2, 3],
    }
    facts = study_facts(config.load_study(source))
    one = BY_ID["randconv.table1_fashion_mnist_baseline"]
    runs = pd.DataFrame(rows("cnn", around(93.6)))
    row = evaluate([one], runs, {}, facts).iloc[0]
    assert (row["verdict"], row["protocol"]) == ("replicated", "as in the paper")
    source["recipes"]["train"] = training | {"epochs": 10}
    row = evaluate([one], runs, {}, study_facts(config.load_study(source))).iloc[0]
    assert row["verdict"] == "not comparable" and "epochs: 10 (paper: 75)" in row["reason"]
