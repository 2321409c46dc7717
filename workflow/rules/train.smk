localrules:
    recipe,


rule recipe:
    output:
        "results/{study}/recipes/{variant}/seed{seed}.json",
    log:
        "logs/{study}/recipes/{variant}.seed{seed}.log",
    conda:
        "../../envs/environment.yaml"
    threads: 1
    params:
        recipe=plan.recipe_json,
    shell:
        "convx recipe {params.recipe:q} --out {output} > {log} 2>&1"


rule train:
    input:
        recipe="results/{study}/recipes/{variant}/seed{seed}.json",
        data=plan.data(),
        start=plan.start,
        teacher=plan.teacher,
    output:
        model="results/{study}/runs/{variant}/seed{seed}/model.safetensors",
        checkpoints=directory("results/{study}/runs/{variant}/seed{seed}/checkpoints"),
        history="results/{study}/histories/{variant}/seed{seed}.csv",
        metrics="results/{study}/metrics/{variant}/seed{seed}/training.json",
    log:
        "logs/{study}/train/{variant}.seed{seed}.log",
    benchmark:
        "logs/{study}/train/{variant}.seed{seed}.benchmark.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: plan.threads
    resources:
        gpu=plan.gpu,
        mem_mb=plan.memory,
        processes=1,
        nodes=1,
    params:
        source=plan.train_source,
        carbon=plan.carbon_json,
    shell:
        "convx train {input.recipe} --data {input.data} --start {input.start:q} --teacher {input.teacher:q}"
        " --source {params.source} --carbon {params.carbon:q} --out {output.model}"
        " --processes {resources.processes} --nodes {resources.nodes} > {log} 2>&1"
