"""Self-supervised runs in a study: neighbours, probes, what an evaluation reports, the declared arms, and digits for real."""

import copy
import json
import time

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_recipe
from test_sere_training import SMALL, recipe
from test_training import fit
from torch import nn

from convx import config, objectives
from convx.claims import load_ledgers
from convx.data.multicrop import crop, random_rectangles
from convx.evaluate import EvaluationData, accuracy, attacks
from convx.evaluate.payload import decode, unpack
from convx.evaluate.probes import linear_probe
from convx.evaluate.run import evaluate_run
from convx.layers.neighbours import Neighbours, encoded
from convx.layers.self_relation import spatial_relation
from convx.models import create_model
from convx.papers.sere import analysis
from convx.seeds import generator
from convx.source import source_digest

STUDY = REPOSITORY / "config" / "cifar10_sere.yaml"
QUIET = SMALL | {"head_batch_norm": True}  # does not collapse in an epoch
QUICK = REPOSITORY / "config" / "config.yaml"


@pytest.fixture(autouse=True)
def fixed_draws():
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------------------------- neighbours


def test_neighbours_vote_by_similarity():
    bank, labels = torch.randn(40, 6), torch.arange(40) % 3
    voters = Neighbours(nn.Identity(), bank, labels, 3, k=7, temperature=0.07)
    x = torch.randn(5, 6)
    similar = nn.functional.cosine_similarity(x[:, None], bank[None], dim=2)
    for place in range(5):
        votes = torch.zeros(3)
        for at in similar[place].argsort(descending=True)[:7]:
            votes[labels[at]] += torch.exp(similar[place, at] / 0.07)
        torch.testing.assert_close(voters.votes(x)[place], votes / votes.sum(), rtol=1e-4, atol=1e-6)
    logits = voters(x)
    assert torch.equal(logits.argmax(1), voters.votes(x).argmax(1))
    torch.testing.assert_close(logits.exp().sum(1), torch.ones(5))


def test_neighbours_are_perfect_on_copies_and_at_chance_on_random_labels():
    bank, labels = torch.randn(2000, 32), torch.randint(0, 10, (2000,))
    copies = Neighbours(nn.Identity(), bank.repeat(20, 1), labels.repeat(20), 10)
    assert (copies.votes(3 * bank[:200]).argmax(1) == labels[:200]).all()  # lengths do not matter
    others = Neighbours(nn.Identity(), bank, labels, 10).votes(torch.randn(2000, 32)).argmax(1)
    assert (others == torch.randint(0, 10, (2000,))).float().mean().item() == pytest.approx(0.1, abs=0.03)
    with pytest.raises(ValueError, match="k=20 neighbours of a bank of 3 features"):
        Neighbours(nn.Identity(), bank[:3], labels[:3], 10)


def test_a_large_bank_is_searched_in_parts(monkeypatch):
    bank, labels, x = torch.randn(100, 8), torch.arange(100) % 4, torch.randn(9, 8)
    whole = Neighbours(nn.Identity(), bank, labels, 4, k=20).votes(x)
    monkeypatch.setattr("convx.layers.neighbours.CHUNK", 17)  # parts smaller than k, and a last one of 15
    torch.testing.assert_close(Neighbours(nn.Identity(), bank, labels, 4, k=20).votes(x), whole)


def test_an_encoder_can_be_attacked_through_its_neighbours():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 8))
    images = np.random.default_rng(0).integers(0, 256, (60, 4, 4, 1), dtype=np.uint8)
    labels = images.mean((1, 2, 3)) > 128
    data = EvaluationData.from_arrays(images, labels.astype(int), [0.5], [0.25])
    voters = Neighbours(encoder, encoded(encoder, (x for x, _ in data.batches())), data.labels, 2, k=5)
    clean = accuracy.run(voters, data).rows[0]
    assert clean["method"].startswith("weighted votes of the 5 nearest training images (T = 0.07)")
    hit = attacks.run(voters, data, {"epsilons": [1, 60]}).rows
    assert hit[1]["value"] < hit[0]["value"] <= clean["value"]


def test_linear_probe_separates_what_is_separable_and_chooses_on_training_features():
    stream = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(5, 12, generator=stream)
    labels, wanted = torch.arange(300) % 5, torch.arange(100) % 5
    train = centres[labels] + torch.randn(300, 12, generator=stream)
    test = centres[wanted] + torch.randn(100, 12, generator=stream)
    found, penalty = linear_probe(train, labels, test, 5)
    assert (found == wanted).float().mean() > 0.97
    scaled, same = linear_probe(1000 * train + 7, labels, 1000 * test + 7, 5)  # standardised first
    assert penalty == same and (scaled == found).float().mean() > 0.99
    from sklearn.linear_model import LogisticRegression

    mean, deviation = train.mean(0), train.std(0)
    oracle = LogisticRegression(C=1 / (penalty * 300), tol=1e-8, max_iter=2000)
    oracle.fit(((train - mean) / deviation).numpy(), labels.numpy())
    expected = oracle.predict(((test - mean) / deviation).numpy())
    assert (found.numpy() == expected).mean() > 0.99
    noise, _ = linear_probe(torch.randn(300, 12), labels, torch.randn(500, 12), 5)
    assert (noise == torch.arange(500) % 5).float().mean().item() == pytest.approx(0.2, abs=0.07)
    with pytest.raises(ValueError, match="at least 20 training features, not 5"):
        linear_probe(train[:5], labels[:5], test, 5)


# ------------------------------------------------------------------------------------------------ relations and composites


def test_agreement_is_total_for_equal_views_and_less_for_others():
    maps = torch.randn(12, 8, 6, 6)
    rectangles = torch.tensor([4.0, 4.0, 20.0, 20.0]).expand(2, 12, 4)
    flips = torch.zeros(2, 12, dtype=torch.bool)
    found = analysis.agreement(maps, maps, rectangles, flips, 2, 6, (0.5, 0.1))
    assert found["spatial", "matched"] == pytest.approx(0, abs=1e-5)
    assert found["channel", "matched"] == pytest.approx(0, abs=1e-5)
    assert found["agreement", "matched"] == 100
    assert found["spatial", "unmatched"] > 0.05 and found["channel", "unmatched"] > 0.05
    assert found["agreement", "unmatched"] < 15  # of 35 others, one is right by chance
    mirrored = flips.clone()
    mirrored[1] = True
    found = analysis.agreement(maps, maps.flip(3), rectangles, mirrored, 2, 6, (0.5, 0.1))
    assert found["agreement", "matched"] > 98  # the second view was mirrored after it was cut; ties may turn


def test_agreement_finds_the_same_points_of_crops_that_differ():
    """Maps that are crops of one picture of features agree where they overlap; grids that were not aligned would not."""
    picture = nn.functional.interpolate(torch.rand(16, 8, 6, 6), size=48, mode="bicubic")
    rectangles = random_rectangles(2, 16, (48, 48), (0.5, 0.9), generator(0, "x"))
    flips = torch.rand(2, 16, generator=generator(0, "y")) < 0.5
    views = crop(picture.clamp(0, 1), rectangles, flips, 24, "bilinear")
    found = analysis.agreement(*views, rectangles, flips, 2, 6, (0.5, 0.1))
    assert found["spatial", "matched"] < 0.05 * found["spatial", "unmatched"]
    assert found["agreement", "matched"] > found["agreement", "unmatched"] + 30
    shuffled = analysis.agreement(*views, rectangles, ~flips, 2, 6, (0.5, 0.1))  # both wrong: mirrored twice
    wrong = analysis.agreement(*views, rectangles, torch.stack([flips[0], ~flips[1]]), 2, 6, (0.5, 0.1))
    assert wrong["spatial", "matched"] > 3 * found["spatial", "matched"]
    assert shuffled["spatial", "matched"] > found["spatial", "matched"]


def test_divergence_is_the_mean_of_both_directions():
    a, b = (torch.log_softmax(torch.randn(4, 7, dtype=torch.float64), -1) for _ in range(2))
    kl = [nn.functional.kl_div(y, x, log_target=True, reduction="none").sum(-1) for x, y in ((a, b), (b, a))]
    torch.testing.assert_close(analysis.divergence(a, b, 1.0), (kl[0] + kl[1]) / 2)
    relation = spatial_relation(torch.rand(1, 4, 3, 3), 1)[0, 0]
    best = analysis.strongest(relation)
    for i in range(9):
        others = [float(relation[i, j]) if j != i else -1.0 for j in range(9)]
        assert best[i] == int(np.argmax(others))


def test_composites_put_each_image_where_its_label_is():
    images = torch.arange(9).view(9, 1, 1, 1).expand(9, 1, 4, 4)  # the ninth is left over
    pictures, quarters = analysis.composites(images, torch.arange(9))
    assert pictures.shape == (2, 1, 8, 8)
    labels = analysis.token_labels(quarters, (8, 8))  # a token a pixel
    assert torch.equal(labels, pictures[:, 0])
    assert quarters.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


# ------------------------------------------------------------------------------------------------------------- evaluation


def evaluated(made, digits, settings=None):
    trainer = fit(made, digits, digits / "progress")
    return trainer, evaluate_run(trainer.exported(), made | {"paper": "sere"}, digits, None, settings or {}, "cpu")


def of(rows, metric, **conditions):
    found = [r for r in rows if r["metric"] == metric and conditions.items() <= r["conditions"].items()]
    assert len(found) == 1, (metric, conditions, len(found))
    return found[0]


def test_an_evaluation_of_an_encoder_says_how_it_was_decided(digits):
    trainer, result = evaluated(recipe(QUIET, epochs=1), digits, {"attacks": {"epsilons": [4], "images": 20}})
    rows = result.rows
    top1, knn = of(rows, "top1"), of(rows, "knn_top1")
    assert top1["value"] == knn["value"] and "nearest training images" in top1["method"]
    assert not [r for r in rows if r["metric"] in ("train_top1", "generalisation_gap")]  # each is its own neighbour
    assert of(rows, "parameters")["value"] == sum(p.numel() for p in trainer.exported().parameters())
    assert of(rows, "fgsm_accuracy")["value"] <= 100
    for metric in ("knn_top1_untrained", "knn_top1_pixels", "linear_top1", "token_top1"):
        found = of(rows, metric)
        assert 0 < found["value"] <= 100 and found["unit"] == "%" and found["split"] == "test"
    assert of(rows, "knn_top1_untrained")["value"] == pytest.approx(
        _accuracy_of(trainer.recipe, digits), abs=1e-6
    )  # the encoder of the recipe's seed
    for encoder in ("trained", "untrained"):
        for relation in ("spatial", "channel"):
            matched, unmatched = (
                of(rows, "relation_divergence", encoder=encoder, relation=relation, pair=pair)["value"]
                for pair in ("matched", "unmatched")
            )
            assert 0 < matched < unmatched
    assert of(rows, "precondition")["conditions"] == {"name": "beats_untrained"}
    correct = decode(result.per_image["linear_correct"])
    assert 100 * correct.mean() == pytest.approx(of(rows, "linear_top1")["value"])
    assert unpack(result.arrays["attention"]).shape == (4, 3, 4, 4)
    assert unpack(result.arrays["pictures"]).shape == (4, 32, 32, 1)
    assert len(json.dumps(result.rows)) < 40_000
    again = evaluate_run(trainer.exported(), trainer.recipe | {"paper": "sere"}, digits, None, {}, "cpu")
    kept = [r for r in rows if r["metric"] not in ("fgsm_accuracy", "peak_rss")]
    assert kept == [r for r in again.rows if r["metric"] != "peak_rss"]


def _accuracy_of(made, digits):
    """Return the accuracy of the encoder before training by the evaluators' own way."""
    still = made | {"training": made["training"] | {"epochs": 0}}
    trainer = fit(still, digits, digits / "progress")
    rows = evaluate_run(trainer.exported(), still | {"paper": None}, digits, None, {}, "cpu").rows
    return of(rows, "top1")["value"]


def test_labels_change_nothing_but_the_history_of_neighbours(digits):
    """Training never sees a label: other ones give the same losses and weights."""
    states = []
    for shift in (0, 3):
        from convx.training import Trainer

        trainer = Trainer(recipe(epochs=1), digits)
        trainer.objective.train()
        for step, images, labels, rng in trainer.batches.epoch(0):
            trainer.step = step
            trainer.train_step(images, (labels + shift) % 10, rng)
        states.append(trainer.objective.state_dict())
    assert all(torch.equal(a, states[1][name]) for name, a in states[0].items())


def test_supervised_runs_are_decided_by_their_logits():
    assert objectives.classifier(nn.Identity(), make_recipe(), None) is None
    images = np.zeros((4, 4, 4, 1), dtype=np.uint8)
    data = EvaluationData.from_arrays(images, [0, 1, 2, 3], [0.5], [0.5])
    rows = accuracy.run(nn.Sequential(nn.Flatten(), nn.Linear(16, 10)), data).rows
    assert rows[0]["method"] == "argmax of the logits, float32"


# ------------------------------------------------------------------------------------------------------------ declarations


def test_arms_differ_in_the_two_weights_alone():
    study = config.load_study(STUDY)
    recipes = {name: config.resolve(study, name, 0) for name in ("sere", "dino", "dino_spatial", "dino_channel")}
    weights = {}
    for name, made in recipes.items():
        rest = copy.deepcopy(made["objective"])
        weights[name] = rest.pop("spatial_weight"), rest.pop("channel_weight")
        assert rest == {k: v for k, v in recipes["sere"]["objective"].items() if not k.endswith("l_weight")}
        for key in ("model", "training", "surgery", "data", "start"):
            assert made[key] == recipes["sere"][key]
    assert weights == {"sere": (0.2, 0.5), "dino": (0.0, 0.0), "dino_spatial": (0.2, 0.0), "dino_channel": (0.0, 0.5)}
    assert recipes["sere"]["objective"]["instance_weight"] == 1.65
    encoder = create_model(recipes["sere"]["model"]["name"], **{"in_channels": 3, "image_size": 32}
                           | recipes["sere"]["model"]["settings"])  # fmt: skip
    assert encoder.patch_embed.num_patches == 64 and len(encoder.blocks) == 9 and encoder.embed_dim == 192


def test_the_ledger_asks_for_variants_and_metrics_that_exist():
    declared = config.declared_variants()
    claims = [claim for claim in load_ledgers() if claim["paper"] == "sere"]
    for claim in claims:
        for name in filter(None, (claim["variant"], claim["reference"])):
            assert declared[name]["paper"] == "sere"
        if claim["role"] == "primary":
            assert (claim["variant"], claim["reference"]) == ("sere", "dino")
            assert claim["metric"] in ("knn_top1", "linear_top1") and claim["pairing"] == "by_design"
        assert claim["metric"] != "top1", claim["id"]  # that of our encoders is by neighbours
    assert sum(claim["role"] == "primary" for claim in claims) == 2


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"name": "self_relatoin"}, "variants.sere.objective.name: 'self_relatoin' is unknown"),
        ({"name": "self_relation", "alpha": 1}, "variants.sere.objective.alpha: unknown setting"),
        ({"name": "self_relation", "spatial_weight": -1}, "variants.sere.objective.spatial_weight: -1 is out of range"),
    ],
)
def test_a_wrong_objective_stops_the_study(objective, message):
    study = config.read_yaml(STUDY)
    study["variants"]["sere"] = {"objective": objective}
    with pytest.raises(config.ConfigError, match=message):
        config.load_study(study, "study")


def test_an_edit_of_the_views_reruns_self_supervised_runs_alone(monkeypatch):
    from convx import source

    study = config.load_study(STUDY)
    runs = {"sere": config.resolve(study, "sere", 0), "cnn": make_recipe()}
    before = {(name, verb): source_digest(verb, r) for name, r in runs.items() for verb in ("train", "evaluate")}
    for edited in ("data/colour.py", "data/multicrop.py", "layers/vit_tokens.py", "layers/channel_loss.py"):
        original = source._file_digest
        monkeypatch.setattr(source, "_file_digest", lambda f, e=edited, o=original: "edited" if f == e else o(f))
        for (name, verb), digest in before.items():
            assert (source_digest(verb, runs[name]) != digest) == (name == "sere"), (edited, name, verb)
        monkeypatch.setattr(source, "_file_digest", original)


# ------------------------------------------------------------------------------------------------------------- digits


@pytest.mark.slow
def test_digits_are_learned_without_labels(tmp_path):
    """The quick study's run of SERE: neighbours right for 90 %, 30 points above the encoder before training.

    For 50 epochs: the study's 36 end at 90 % itself, where another processor's bits may end below.
    """
    from convx.data import prepare

    study = config.load_study(QUICK)
    prepare(study["data"], tmp_path / "data", mirrors=[], progress=False)
    made = config.resolve(study, "sere", 0)
    made["training"]["epochs"] = 50
    begin = time.process_time()
    trainer = fit(made, tmp_path / "data", tmp_path / "progress")
    print(f"{time.process_time() - begin:.0f} s of processor time")
    rows = evaluate_run(trainer.exported(), made, tmp_path / "data", None, {}, "cpu").rows
    trained, untrained = of(rows, "knn_top1")["value"], of(rows, "knn_top1_untrained")["value"]
    assert trained >= 90 and trained >= untrained + 30
    assert of(rows, "linear_top1")["value"] >= 90
    assert of(rows, "knn_top1_pixels")["value"] > 97  # digits are easy
    assert of(rows, "precondition")["value"] == 1
    assert trainer.history[-1]["knn_top1"] > 85
