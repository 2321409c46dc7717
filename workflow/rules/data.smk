rule data:
    output:
        f"resources/data/{plan.data_key}/meta.json",
    log:
        f"logs/{plan.name}/data.log",
    benchmark:
        f"logs/{plan.name}/data.benchmark.tsv"
    retries: 2
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        mem_mb=3000,
    params:
        settings=plan.data_json,
        mirrors=plan.mirrors,
        source=plan.data_source,
    shell:
        "convx data {params.settings:q} --mirrors {params.mirrors:q} --out {output} > {log} 2>&1"


rule corrupt:
    input:
        plan.data(),
    output:
        f"resources/corrupted/{plan.data_key}/{plan.corruption_key}/meta.json",
    log:
        f"logs/{plan.name}/corrupt.log",
    benchmark:
        f"logs/{plan.name}/corrupt.benchmark.tsv"
    # First, while all cores are free: later a job of many threads would wait until no training runs beside it.
    priority: 10
    retries: 2
    conda:
        "../../envs/environment.yaml"
    threads: 24
    resources:
        mem_mb=3000,
    params:
        settings=plan.corruption_json,
        source=plan.corrupt_source,
    shell:
        "convx corrupt {params.settings:q} --data {input} --out {output} --workers {threads} > {log} 2>&1"
