"""What to run next: what is missing, what it costs, which claims it decides, in which order."""

import itertools
import json

import pytest
import yaml
from house import TINY, House
from made_up import STUDY, build

from convx import cli, config, pace, queue
from convx.manifest import read_json, write_json
from convx.slots import GRADIENT, Slot, Slots

TWO = {"cnn": None, "cnn_frozen": None, "lc_frozen_x8": None}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a function that writes a study file and, unless nothing ran, its results, in a folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def make(run: bool = True, missing=(), failed=(), **changes) -> str:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
        if run:
            build(tmp_path / "results", images=60, missing=missing, failed=failed, **changes)
        return "study.yaml"

    return make


def ask(file: str) -> dict:
    return queue.queue([file], False, 30, "resources/data", "resources/paces")[0]


def targets(entry: dict) -> list[str]:
    return [slot["target"] for group in entry["groups"] for slot in group["slots"]]


# -------------------------------------------------------------------------------------------------------------- what is missing


def test_before_the_first_run_everything_is_missing(place):
    entry = ask(place(run=False))
    assert (entry["runs"], entry["runs_done"]) == (18, 0)
    runs = {f"{v}_seed{s}" for v in STUDY["variants"] for s in range(3)}
    assert set(targets(entry)) == runs | {f"{v}_cost" for v in STUDY["variants"]} | {"results/made_up/exact.json"}
    assert len(targets(entry)) == entry["slots"] == 25
    assert entry["core_hours_left"] is None  # no pace is known, and none is made up
    commands = [slot["command"] for group in entry["groups"] for slot in group["slots"]]
    assert "snakemake tcnn_seed1 --cores 1 --configfile study.yaml" in commands


def test_starts_come_before_what_starts_from_them(place):
    order = targets(ask(place(run=False)))
    for variant, seed in itertools.product(("tcnn", "cnn_finetuned"), range(3)):
        assert order.index(f"cnn_seed{seed}") < order.index(f"{variant}_seed{seed}")
    assert order.index("cnn_seed0") < order.index("tcnn_cost") and order.index("tcnn_seed0") < order.index("tcnn_cost")


def test_a_finished_study_has_nothing_left_but_the_checks(place):
    entry = ask(place())
    assert targets(entry) == ["results/made_up/exact.json"] and entry["runs_done"] == 18
    write_json("results/made_up/exact.json", {})
    entry = ask("study.yaml")
    assert entry["slots"] == 0 and entry["groups"] == [] and "0 slots are missing" in queue.text(entry)


def test_a_cut_off_study_lacks_what_it_lacks(place):
    entry = ask(place(missing=[("cnn_frozen", 2)], variants=TWO))
    claims = entry["claims"]
    # All seeds or nothing: with 2 of 3 the claim is open still, and one slot closes it.
    assert claims["randconv.frozen_costs_basic_block"] == {"slots": 1, "core_hours": None}
    assert "randconv.crosses_learned_at_x8" not in claims  # lc_learned_x8 is not in this study
    group = next(g for g in entry["groups"] if any(s["target"] == "cnn_frozen_seed2" for s in g["slots"]))
    assert "randconv.frozen_costs_basic_block" in [claim["id"] for claim in group["claims"]]


def test_a_failed_run_is_told_with_the_way_out(place):
    entry = ask(place(failed=[("tcnn", 1)]))
    slot = next(s for g in entry["groups"] for s in g["slots"] if s["target"] == "tcnn_seed1")
    assert (
        slot["state"] == "failed"
        and "not finite in epoch 2" in slot["note"]
        and "convx retry results/made_up tcnn" in slot["note"]
    )
    assert "tcnn.top1_gain_controlled" in entry["claims"]


def test_a_run_of_another_recipe_does_not_count(place):
    place(variants=TWO)
    study = STUDY | {"variants": TWO | {"cnn_frozen": {"training": {"lr": 0.01}}}}
    with open("study.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(study, file)
    entry = ask("study.yaml")
    states = {s["target"]: s["state"] for g in entry["groups"] for s in g["slots"]}
    assert {t: s for t, s in states.items() if "seed" in t} == {f"cnn_frozen_seed{k}": "other recipe" for k in range(3)}
    assert states["cnn_frozen_cost"] == "other recipe"


def test_weights_that_are_elsewhere_are_counted(place):
    place(missing=[("tcnn", 0)])
    slots = Slots("study.yaml")
    slot = slots.run_slot("tcnn", 0)
    assert (
        slot.after == ["cnn_seed0"] and slot.note == "cnn seed 0 is trained again: its weights are not on this machine"
    )
    paces = {v: {"train_seconds_per_image": 0.01, "forward_seconds_per_image": 0.001} for v in ("cnn", "tcnn")}
    slots.price(slot, paces)
    alone = slots.training_seconds(slots.plan.recipe("tcnn", 0), paces["tcnn"]) + slots.evaluation_seconds(
        paces["tcnn"]
    )
    again = slots.training_seconds(slots.plan.recipe("cnn", 0), paces["cnn"])
    assert slot.core_seconds == pytest.approx(alone + again)
    weights = slots.folder / "runs" / "cnn" / "seed0" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    slot = slots.run_slot("tcnn", 0)
    slots.price(slot, paces)
    assert slot.after == [] and slot.note == "" and slot.core_seconds == pytest.approx(alone)


def test_a_trained_run_costs_its_evaluation_alone(place):
    place(variants=TWO)
    slots = Slots("study.yaml")
    (slots.folder / "metrics" / "cnn" / "seed1" / "evaluation.json").unlink()
    assert slots.run_slot("cnn", 1).state == "missing"  # without weights there is nothing to evaluate
    weights = slots.folder / "runs" / "cnn" / "seed1" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    slot = slots.run_slot("cnn", 1)
    paces = {"cnn": {"train_seconds_per_image": 0.01, "forward_seconds_per_image": 0.001}}
    slots.price(slot, paces)
    assert slot.state == "trained" and slot.core_seconds == pytest.approx(slots.evaluation_seconds(paces["cnn"]))


def test_a_changed_number_of_seeds_is_a_warning(place):
    place(variants=TWO)
    (study := STUDY | {"variants": TWO, "seeds": [0, 1, 2, 3]})
    with open("study.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(study, file)
    entry = ask("study.yaml")
    assert (
        entry["warnings"][0]
        == "cnn has 4 seeds and had 3 when runs of it were made: their number is fixed before the first"
    )
    assert "warning: cnn has 4 seeds" in queue.text(entry)


# ------------------------------------------------------------------------------------------------------------------------ costs


def test_costs_are_those_of_every_image(place):
    file = place(
        run=False,
        data={"name": "cifar10", "validation": 5000, "test_images": 2000},
        recipes={"train": {"epochs": 10}, "finetune": {"epochs": 2}},
        evaluate={
            "corruption": {"protocol": "cifar_c", "severities": [1, 3], "images": 100},
            "attacks": {"epsilons": [1, 2], "pgd_steps": 5, "images": 50},
        },
    )
    slots = Slots(file)
    speed = {"train_seconds_per_image": 1e-3, "forward_seconds_per_image": 1e-4}
    assert slots.images() == {"train": 45_000, "validation": 5_000, "test": 2_000}
    trained = slots.training_seconds(slots.plan.recipe("cnn", 0), speed)
    assert trained == pytest.approx(45_000 * 10 * 1e-3 + 5_000 * 11 * 1e-4)
    passes = 2_000 + 10_000 + 15 * 2 * 100 + 50 * (GRADIENT + 2 * (1 + 5 * GRADIENT + 1))
    assert slots.evaluation_seconds(speed) == pytest.approx(passes * 1e-4)


def test_the_pace_of_a_recipe_is_measured_once(place, monkeypatch):
    file = place(
        run=False, variants={"cnn": None, "cnn_frozen": None, "slow": {"base": "cnn", "training": {"lr": 0.001}}}
    )
    said = []
    entry = queue.queue([file], True, 4, "resources/data", "paces", said.append)[0]
    assert said == [
        "made_up: timing cnn (1 of 3)",
        "made_up: timing cnn_frozen (2 of 3)",
    ]  # a learning rate has no pace of its own
    found = entry["paces"]
    assert found["slow"] == found["cnn"] and found["cnn"]["steps"] == 4 and found["cnn"]["clock"] == "processor"
    assert 0 < found["cnn"]["forward_seconds_per_image"] < found["cnn"]["train_seconds_per_image"] < 1
    hours = [slot["core_seconds"] for group in entry["groups"] for slot in group["slots"]]
    assert all(h > 0 for h in hours) and entry["core_hours_left"] == pytest.approx(sum(hours) / 3600)
    monkeypatch.setattr(pace, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert (
        queue.queue([file], True, 4, "resources/data", "paces", said.append)[0]["core_hours_left"]
        == entry["core_hours_left"]
    )
    assert queue.queue([file], False, 4, "resources/data", "paces")[0]["core_hours_left"] == entry["core_hours_left"]


def test_a_pace_belongs_to_what_decides_it():
    study = config.load_study(STUDY)
    base = config.resolve(study, "cnn", 0)
    same = [config.resolve(study, "cnn", 1), base | {"training": base["training"] | {"lr": 9.0, "epochs": 99}}]
    assert {pace.key(recipe) for recipe in same} == {pace.key(base)}
    changes = [
        {"batch_size": 16},
        {"precision": "bf16"},
        {"channels_last": False},
        {"threads": 2},
        {"crop_padding": 4},
        {"ema": 0.9},
    ]
    others = [base | {"training": base["training"] | change} for change in changes]
    others += [config.resolve(study, name, 0) for name in ("lc_frozen_x8", "tcnn")]
    assert len({pace.key(recipe) for recipe in [base, *others]}) == 1 + len(others)


# ------------------------------------------------------------------------------------------------------------------------ claims


def claim(name: str, *needed: str, role: str = "exploratory") -> dict:
    return {"id": name, "role": role, "targets": set(needed)}


def slot(target: str, seconds: float | None = 3600.0, after=()) -> Slot:
    variant, _, seed = target.partition("_seed")
    return Slot("s", "run", variant, int(seed), "missing", target, f"snakemake {target}", list(after), seconds)


def test_most_claims_a_core_hour_come_first():
    slots = [slot("a_seed0", 100), slot("b_seed0", 10), slot("c_seed0", 1000), slot("d_seed0", 5)]
    claims = [
        claim("one", "a_seed0"),
        claim("two", "b_seed0"),
        claim("three", "a_seed0", "b_seed0"),
        claim("four", "c_seed0"),
    ]
    groups = queue.ordered(slots, claims)
    assert [[s.target for s in g["slots"]] for g in groups] == [["b_seed0"], ["a_seed0"], ["c_seed0"], ["d_seed0"]]
    assert [[c["id"] for c in g["claims"]] for g in groups] == [["two"], ["one", "three"], ["four"], []]
    assert groups[1]["claims_per_core_hour"] == pytest.approx(2 * 3600 / 100)


def test_the_first_group_is_the_best_of_all_claims_groups():
    """Against a search through every claim's group, on drawn costs and needs."""
    import random

    for trial in range(40):
        draw = random.Random(trial)
        slots = [slot(f"v{k}_seed0", draw.uniform(1, 100)) for k in range(6)]
        names = [s.target for s in slots]
        claims = [claim(f"c{k}", *draw.sample(names, draw.randint(1, 3))) for k in range(5)]
        cost = {s.target: s.core_seconds for s in slots}

        def rate(needed, claims=claims, cost=cost):
            return sum(c["targets"] <= needed for c in claims) / sum(cost[t] for t in needed)

        groups = queue.ordered(slots, claims)
        assert rate({s.target for s in groups[0]["slots"]}) == pytest.approx(max(rate(c["targets"]) for c in claims))
        listed = [s.target for g in groups for s in g["slots"]]
        assert sorted(listed) == sorted(names)  # every slot once
        assert sorted(c["id"] for g in groups for c in g["claims"]) == sorted(c["id"] for c in claims)
        done = set()
        for group in groups:
            done |= {s.target for s in group["slots"]}
            for entry in group["claims"]:
                assert next(c for c in claims if c["id"] == entry["id"])["targets"] <= done


def test_a_primary_claim_comes_first_among_equals_and_seeds_stay_together():
    slots = [slot(f"{v}_seed{s}", 60) for v in ("a", "b", "c", "d") for s in (0, 1)]
    pair = [f"{v}_seed{s}" for v in ("a", "b") for s in (0, 1)], [f"{v}_seed{s}" for v in ("c", "d") for s in (0, 1)]
    groups = queue.ordered(slots, [claim("x", *pair[0]), claim("y", *pair[1], role="primary")])
    assert [c["id"] for g in groups for c in g["claims"]] == ["y", "x"]
    assert [s.target for s in groups[0]["slots"]] == ["c_seed0", "d_seed0", "c_seed1", "d_seed1"]


def test_what_is_not_known_is_not_priced():
    groups = queue.ordered([slot("a_seed0", None)], [claim("x", "a_seed0")])
    assert groups[0]["core_seconds"] is None and groups[0]["claims_per_core_hour"] is None


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("randconv.table1_cifar10_baseline", {}, "data: digits"),
        ("randconv.delta_cifar10_frozen_baseline", {"variants": {"cnn": None, "lc_frozen_x128": None}}, "data: digits"),
        ("randconv.frozen_costs_basic_block", {}, None),
        ("randconv.frozen_costs_basic_block", {"seeds": [0]}, "one seed decides nothing"),
        ("tcnn.corruption_gain_controlled", {}, None),
        ("tcnn.corruption_gain_controlled", {"evaluate": {}}, "evaluate.corruption is left out"),
        (
            "randconv.fgsm_above_baseline_x128",
            {"variants": {"cnn": None, "lc_frozen_x128": None}},
            "evaluate.attacks is left out",
        ),
        ("dcls.top1_gain", {}, "dcls_bilinear is not in the study"),
        ("randconv.lemma_fold", {}, None),
    ],
)
def test_claims_that_no_run_of_a_study_decides(name, changes, reason):
    from convx.evidence import study_facts
    from convx.ledger import load_ledgers

    study = config.load_study(STUDY | changes)
    found = next(c for c in load_ledgers() if c["id"] == name)
    why = queue.why_not(found, study, study_facts(study), queue.written_metrics())
    assert why is None if reason is None else reason in why


def test_what_the_queue_promises_is_what_the_tables_decide(place):
    """A finished study leaves open only what the queue never promised: the promise is kept by the verdicts themselves."""
    promised = set(ask(place(run=False))["claims"])
    folder = build("results", images=60)
    from convx.queue import OPEN
    from convx.report.results import Results

    frame = Results(folder).replication.set_index("claim_id")
    measured = frame[frame["claim_kind"] != "exact"]
    decided = set(measured.index[~measured["verdict"].isin([*OPEN, "not comparable"])])
    assert decided and decided <= promised
    accuracies = ("top1", "mean_corruption_accuracy")
    runs_only = {name for name in promised & set(measured.index) if measured.loc[name, "metric"] in accuracies}
    assert runs_only <= decided and len(runs_only) > 4


# ---------------------------------------------------------------------------------------------------------------------- the verb


def test_the_verb(place, capsys):
    file = place(missing=[("cnn_frozen", 2)], variants=TWO)
    assert cli.main(["queue", file, "--no-timing", "--out", "queue.json"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("made_up: 8 of 9 runs are in, 2 slots are missing.")
    assert "1 slot, for " in text and ": randconv.frozen_costs_basic_block (primary)" in text
    assert "snakemake cnn_frozen_seed2 --cores 1 --configfile study.yaml" in text
    kept = read_json("queue.json")
    assert kept["studies"]["made_up"]["claims"]["randconv.frozen_costs_basic_block"]["slots"] == 1
    assert cli.main(["queue", file, "--no-timing", "--json"]) == 0
    entry = json.loads(capsys.readouterr().out)[0]
    assert any("is not in the study" in reason for reason in entry["undecidable"])
    assert cli.main(["queue", "nothing.yaml"]) == 2
    assert capsys.readouterr().err == "convx: nothing.yaml: there is no such file\n"


@pytest.mark.slow
def test_the_workflow_knows_every_target(tmp_path):
    house = House.build(tmp_path / "house", TINY)
    assert {rule for rule, _ in house.planned("lc_frozen_x8_seed0")} >= {"train", "evaluate", "lc_frozen_x8_seed0"}
    assert ("train", "cnn") not in house.planned("lc_frozen_x8_seed0")
    planned = house.planned("tcnn_cost")
    assert ("measure", "tcnn") in planned and ("evaluate", "tcnn") not in planned
    wrong = house.snakemake("--dry-run", "cnn_seed7")
    assert wrong.returncode and "cnn_seed7" in wrong.stdout
