# convx: data -> training -> evaluation -> verdicts. The rules are in workflow/; this file lets `snakemake` run from here.
include: "workflow/Snakefile"


rule default:
    default_target: True
    input:
        rules.all.input,
