"""What to run next: the missing slots of studies, most decisive first. No torch.

A claim needs all the seeds of its variants, which the study fixed before its first run; a part of them decides nothing. So
the unit of choice is the group of slots that completes a claim: of all open claims the one whose missing slots, with all other
claims that they complete, give most verdicts a core-hour comes first, then the same again among what is left. What completes
no claim comes last. A verdict is not a favour: `inconclusive` counts as one, since more runs of this study change it no more.
"""

import re
from dataclasses import asdict
from pathlib import Path

from convx.checks import PACKAGE
from convx.evidence import ONCE, differences
from convx.report.words import listed
from convx.slots import Slot, Slots, slot_name

MEASURED = (*ONCE, "latency", "throughput", "inference_carbon")  # by the cost measurement
OPEN = ("not run", "incomplete", "failed")  # verdicts that further runs change
SINGLE = (*MEASURED, "parameters", "trainable_parameters", "stored_bytes", "macs")  # that one run settles
NEEDED = {"mean_corruption_accuracy": "corruption", "fgsm_accuracy": "attacks", "pgd_accuracy": "attacks"}
SHOWN = 8  # claims of a group, in the text; all are in the JSON
WITHOUT_PACE = 3600.0  # core-seconds of a run whose pace is not known, to order by


def written_metrics() -> set[str]:
    """Return every quoted word in the code that evaluates: no metric has a name that is not among them."""
    files = [PACKAGE / "steps.py", *(PACKAGE / "evaluate").glob("*.py"), *(PACKAGE / "papers").rglob("*.py")]
    files += (PACKAGE / "objectives").rglob("*.py")
    return {word for file in files for word in re.findall(r"[\"'](\w+)[\"']", file.read_text(encoding="utf-8"))}


def why_not(claim: dict, study: dict, facts: dict, metrics: set[str]) -> str | None:
    """Return why no run of a study can give a claim a verdict, or None where its runs can."""
    if claim["kind"] == "exact":
        return None if claim["check"] else "no code for it yet"
    for variant in filter(None, (claim["variant"], claim["reference"])):
        if variant not in facts["variants"]:
            return f"{variant} is not in the study"
    differs = differences(claim, facts)
    other_data = claim["data"] not in ("any", facts["data"]["name"])
    if (claim["kind"] in ("absolute", "cost") and differs) or (not claim["transfer"] and other_data):
        return "; ".join(differs)
    metric = claim["metric"]
    if metric not in metrics:
        return f"nothing measures {metric}"
    if (part := NEEDED.get(metric)) and not study["evaluate"][part]:
        return f"evaluate.{part} is left out"
    if metric in ("latency_ratio", "latency", "throughput") and not study["evaluate"]["latency"]:
        return "evaluate.latency is left out"
    if metric == "latency_ratio" and claim["reference"] != study["baseline"]:
        return f"latency is paired with {study['baseline']}"
    if metric in ("inference_energy", "inference_carbon") and not study["evaluate"]["energy"]:
        return "evaluate.energy is left out"
    if metric not in SINGLE and any(len(facts["variants"][v]["seeds"]) < 2 for v in _variants(claim)):
        return "one seed decides nothing"
    return None


def _variants(claim: dict) -> list[str]:
    return [variant for variant in (claim["variant"], claim["reference"]) if variant]


def needs(claim: dict, slots: Slots) -> set[str]:
    """Return the targets that a claim rests on, finished or not."""
    if claim["kind"] == "exact":
        return {f"results/{slots.name}/exact.json"}
    if claim["metric"] in MEASURED:
        variants = [claim["variant"]] if claim["metric"] == "latency_ratio" else _variants(claim)
        return {f"{variant}_cost" for variant in variants}
    seeds = {
        variant: slots.plan.study["variants"][variant].get("seeds") or slots.study["seeds"]
        for variant in _variants(claim)
    }
    return {slot_name(variant, seed) for variant, own in seeds.items() for seed in own}


def claims_of(slots: Slots) -> tuple[list[dict], dict[str, list[str]]]:
    """Return the open claims that runs of a study can settle, each with its ``targets``, and {reason: claims} of the rest."""
    from convx.claims import load_ledgers, study_facts
    from convx.report.results import Results

    facts, metrics, ledgers = study_facts(slots.study), written_metrics(), load_ledgers()
    results = Results(slots.folder, slots.study)
    verdicts = {}
    if results.records or results.exact:
        verdicts = dict(zip(results.replication["claim_id"], results.replication["verdict"]))
    found, rest = [], {}
    for claim in ledgers:
        reason = why_not(claim, slots.study, facts, metrics)
        verdict = verdicts.get(claim["id"], "not run")
        if reason is None and verdict in OPEN:
            found.append(claim | {"targets": needs(claim, slots)})
        elif reason is not None:
            rest.setdefault(reason, []).append(claim["id"])
    return found, rest


def ordered(slots: list[Slot], claims: list[dict]) -> list[dict]:
    """Return groups {slots, claims, core_seconds, per_core_hour} in the order in which to run them.

    Each group completes its claims, given the groups before it; the last one may complete none. Within a group the slots go
    seed by seed, so that variants are compared on equal seeds if it is cut off, and a start comes before what needs it.
    """
    left = {slot.target: slot for slot in slots}
    open_claims = [claim | {"targets": _closure(claim["targets"], left)} for claim in claims]
    open_claims = [claim for claim in open_claims if claim["targets"]]
    groups = []
    while open_claims:
        best = None
        for claim in open_claims:
            targets = {target for target in claim["targets"] if target in left}
            complete = [other for other in open_claims if {t for t in other["targets"] if t in left} <= targets]
            seconds = sum(_seconds(left[target]) for target in targets)
            primary = sum(other["role"] == "primary" for other in complete)
            rank = (len(complete) / max(seconds, 1e-9), primary, len(complete))
            if best is None or rank > best[0]:
                best = (rank, targets, complete, seconds)
        _, targets, complete, seconds = best
        groups.append(_group([left.pop(target) for target in list(left) if target in targets], complete, seconds))
        done = {claim["id"] for claim in complete}
        open_claims = [claim for claim in open_claims if claim["id"] not in done]
    if left:
        groups.append(_group(list(left.values()), [], sum(map(_seconds, left.values()))))
    return groups


def _closure(targets: set[str], left: dict[str, Slot]) -> set[str]:
    """Return the unfinished ones of some targets and of what they need first."""
    found, queue = set(), [target for target in targets if target in left]
    while queue:
        target = queue.pop()
        if target not in found:
            found.add(target)
            queue += [first for first in left[target].after if first in left]
    return found


def _seconds(slot: Slot) -> float:
    return WITHOUT_PACE if slot.core_seconds is None else slot.core_seconds


def _group(slots: list[Slot], claims: list[dict], seconds: float) -> dict:
    place = {slot.target: number for number, slot in enumerate(slots)}

    def depth(slot: Slot) -> int:
        starts = [slots[place[first]] for first in slot.after if first in place]
        return 1 + max(map(depth, starts)) if starts else 0

    kinds = {"exact": 0, "run": 1, "cost": 2}
    slots = sorted(slots, key=lambda s: (kinds[s.kind], -1 if s.seed is None else s.seed, depth(s), place[s.target]))
    names = [{"id": claim["id"], "role": claim["role"]} for claim in claims]
    known = all(slot.core_seconds is not None for slot in slots)
    return {
        "slots": slots,
        "claims": names,
        "core_seconds": seconds if known else None,
        "claims_per_core_hour": 3600 * len(claims) / seconds if known and seconds else None,
    }


# ------------------------------------------------------------------------------------------------------------------- the verb


def queue(files: list[str], timing: bool, steps: int, data_root: str, paces: str, progress=print) -> list[dict]:
    """Return one entry a study: runs, what is missing in order, costs, and the claims that cannot be decided there."""
    return [_one(Slots(file), timing, steps, data_root, paces, progress) for file in files]


def _one(slots: Slots, timing: bool, steps: int, data_root: str, folder: str, progress) -> dict:
    missing = slots.all()
    found = _paces(slots, missing, timing, steps, data_root, folder, progress)
    for slot in missing:
        slots.price(slot, found)
    claims, rest = claims_of(slots)
    groups = ordered(missing, claims)
    hours = [slot.core_seconds / 3600 for slot in missing if slot.core_seconds is not None]
    machine = next((pace for pace in found.values() if pace and "reason" not in pace), None)
    return {
        "study": slots.name,
        "file": slots.file,
        "runs": len(slots.plan.runs),
        "runs_done": len(slots.plan.runs) - sum(slot.kind == "run" for slot in missing),
        "seeds": {variant: len(own["seeds"]) for variant, own in _facts(slots)["variants"].items()},
        "slots": len(missing),
        "core_hours_left": sum(hours) if len(hours) == len(missing) else None,
        "core_hours_known": sum(hours),
        "machine": machine and {key: machine[key] for key in ("machine", "device", "clock")},
        "paces": {name: pace for name, pace in found.items() if pace},
        "warnings": seed_changes(slots),
        "groups": [group | {"slots": [asdict(slot) for slot in group["slots"]]} for group in groups],
        "claims": _open(claims, missing),
        "undecidable": rest,
    }


def costs(entries: list[dict]) -> dict:
    """Return what `convx results` keeps of the answer: what each open claim still needs, and what that costs on this machine."""
    machine = next((entry["machine"] for entry in entries if entry["machine"]), None)
    studies = {
        entry["study"]: {key: entry[key] for key in ("file", "core_hours_left", "slots", "claims")} for entry in entries
    }
    return {"machine": machine and machine["machine"], "studies": studies}


def _open(claims: list[dict], missing: list[Slot]) -> dict[str, dict]:
    """Return {claim: the number of slots that it still needs, and their core-hours or None}."""
    left, found = {slot.target: slot for slot in missing}, {}
    for claim in claims:
        own = [left[target] for target in _closure(claim["targets"], left)]
        known = all(slot.core_seconds is not None for slot in own)
        hours = round(sum(slot.core_seconds for slot in own) / 3600, 3) if known else None
        found[claim["id"]] = {"slots": len(own), "core_hours": hours}
    return found


def _facts(slots: Slots) -> dict:
    from convx.evidence import study_facts

    return study_facts(slots.study)


def seed_changes(slots: Slots) -> list[str]:
    """Return a line for each variant whose number of seeds is not that of the study its runs were made under."""
    from convx import config
    from convx.manifest import read_json

    file = slots.folder / "study.json"
    if not file.exists():
        return []
    before, lines = read_json(file), []
    for variant in slots.study["variants"]:
        if variant not in before["variants"] or not any((slots.folder / "metrics" / variant).glob("seed*/*.json")):
            continue
        old, new = len(config.seeds(before, variant)), len(config.seeds(slots.study, variant))
        if old != new:
            lines.append(
                f"{variant} has {new} seeds and had {old} when runs of it were made: their number is fixed before the first"
            )
    return lines


def _paces(slots: Slots, missing: list[Slot], timing: bool, steps: int, data_root: str, folder: str, progress) -> dict:
    """Return {variant: seconds of an image} for what is missing and what it needs again; timed where it is not known yet."""
    from convx import config, pace

    wanted = dict.fromkeys(slot.variant for slot in missing if slot.kind != "exact")
    wanted |= dict.fromkeys(start for name in list(wanted) if (start := slots.start(name)))
    if missing and slots.plan.measures_cost:
        wanted |= {slots.study["baseline"]: None}
    found, prepared = {}, Path(data_root) / slots.plan.data_key
    for number, variant in enumerate(wanted, 1):
        recipe = slots.plan.recipe(variant, config.seeds(slots.study, variant)[0])
        if timing:
            if not (prepared / "meta.json").exists():
                from convx.data import prepare

                prepare(slots.study["data"], prepared, mirrors=slots.study["mirror"])
            if pace.kept(recipe, folder) is None:
                progress(f"{slots.name}: timing {variant} ({number} of {len(wanted)})")
            found[variant] = pace.pace(recipe, prepared, slots.study["evaluate"]["batch_size"], folder, steps)
        else:
            found[variant] = pace.kept(recipe, folder)
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def text(entry: dict) -> str:
    """Return the queue of one study for people."""
    lines = [
        f"{entry['study']}: {entry['runs_done']} of {entry['runs']} runs are in, {entry['slots']} slots are missing."
    ]
    lines += [f"warning: {line}" for line in entry["warnings"]]
    if entry["slots"]:
        hours, known = entry["core_hours_left"], entry["core_hours_known"]
        if hours is not None:
            lines[0] += f" {hours:.1f} core-hours are left"
        else:
            lines[0] += (
                f" At least {known:.1f} core-hours are left, not every pace is known"
                if known
                else " Their cost is not known"
            )
        machine = entry["machine"]
        lines[0] += f" on {machine['machine']}, {machine['device']}." if machine else " (no timing)."
    for number, group in enumerate(entry["groups"], 1):
        names = [name["id"] + (" (primary)" if name["role"] == "primary" else "") for name in group["claims"]]
        head = f"{number}. {_count(len(group['slots']), 'slot')}"
        if group["core_seconds"] is not None:
            head += f", {group['core_seconds'] / 3600:.2f} core-hours"
        head += f", for {_count(len(names), 'claim')}" if names else ", complete no claim"
        if names and group["claims_per_core_hour"] is not None:
            head += f", {group['claims_per_core_hour']:.2g} a core-hour"
        names.sort(key=lambda name: not name.endswith("(primary)"))
        lines += ["", head + (": " + listed(names, SHOWN) if names else "")]
        for slot in group["slots"]:
            cost = "   ?  " if slot["core_seconds"] is None else f"{slot['core_seconds'] / 3600:6.2f}"
            about = "; ".join(filter(None, ["" if slot["state"] == "missing" else slot["state"], slot["note"]]))
            lines.append(f"   {cost} h  {slot['command']}" + (f"  # {about}" if about else ""))
    count = sum(map(len, entry["undecidable"].values()))
    if count:
        lines += [
            "",
            f"{count} claims of the ledgers get no verdict from this study, whatever is run (--json says why).",
        ]
    return "\n".join(lines) + "\n"
