# One target for each slot of work, e.g. `snakemake cnn_seed0` (train and evaluate one run) and `snakemake cnn_cost`
# (its latency and energy, on a machine that is left alone). `convx queue` lists them, most decisive first.
for variant, seed in plan.runs:

    rule:
        name:
            f"{variant}_seed{seed}"
        input:
            plan.run_files(variant, seed),
        localrule: True


for variant in plan.cost_files:

    rule:
        name:
            f"{variant}_cost"
        input:
            plan.cost_files[variant],
        localrule: True
