localrules:
    study,
    tables,
    figures_drawn,
    page,


rule study:
    output:
        "results/{study}/study.json",
    log:
        "logs/{study}/study.log",
    conda:
        "../../envs/environment.yaml"
    params:
        study=plan.study_json,
    shell:
        "convx study {params.study:q} --out {output} > {log} 2>&1"


rule exact:
    output:
        "results/{study}/exact.json",
    log:
        "logs/{study}/exact.log",
    benchmark:
        "logs/{study}/exact.benchmark.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    params:
        source=plan.exact_source,
    shell:
        "convx exact --out {output} > {log} 2>&1"


rule tables:
    input:
        study=f"results/{plan.name}/study.json",
        metrics=plan.table_inputs(workflow),
    output:
        f"results/{plan.name}/tables/runs.csv",
        report(
            f"results/{plan.name}/tables/comparison.csv",
            caption="../report/comparison.rst",
            category="Tables",
            labels={"table": "comparison", "rows": "one a variant"},
        ),
        f"results/{plan.name}/tables/comparison.md",
        report(
            f"results/{plan.name}/tables/replication.csv",
            caption="../report/replication.rst",
            category="Tables",
            labels={"table": "replication", "rows": "one a claim"},
        ),
        f"results/{plan.name}/tables/replication.md",
        f"results/{plan.name}/manifest.json",
    log:
        f"logs/{plan.name}/tables.log",
    conda:
        "../../envs/environment.yaml"
    params:
        source=plan.report_source,
    shell:
        "convx tables $(dirname {input.study}) > {log} 2>&1"


rule figures_drawn:
    input:
        runs=f"results/{plan.name}/tables/runs.csv",
        claims=f"results/{plan.name}/tables/replication.csv",
    output:
        report(
            directory(f"results/{plan.name}/figures"),
            patterns=["{figure}.svg"],
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
    log:
        f"logs/{plan.name}/figures.log",
    conda:
        "../../envs/environment.yaml"
    params:
        source=plan.report_source,
    shell:
        "convx figures $(dirname $(dirname {input.runs})) > {log} 2>&1"


rule page:
    input:
        claims=f"results/{plan.name}/tables/replication.csv",
        figures=f"results/{plan.name}/figures",
    output:
        report(
            f"results/{plan.name}/report/index.html",
            caption="../report/page.rst",
            category="Summary",
            labels={"page": "what was claimed, what was found"},
        ),
    log:
        f"logs/{plan.name}/page.log",
    conda:
        "../../envs/environment.yaml"
    params:
        source=plan.report_source,
    shell:
        "convx page $(dirname {input.figures}) > {log} 2>&1"


rule report:
    input:
        f"results/{plan.name}/report/index.html",
