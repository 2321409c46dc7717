rule evaluate:
    input:
        recipe="results/{study}/recipes/{variant}/seed{seed}.json",
        model="results/{study}/runs/{variant}/seed{seed}/model.safetensors",
        data=plan.data(),
        corrupted=plan.corrupted(),
    output:
        "results/{study}/metrics/{variant}/seed{seed}/evaluation.json",
    log:
        "logs/{study}/evaluate/{variant}.seed{seed}.log",
    benchmark:
        "logs/{study}/evaluate/{variant}.seed{seed}.benchmark.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 1
    resources:
        gpu=plan.gpu,
        mem_mb=plan.memory,
    params:
        settings=plan.evaluate_json,
        source=plan.evaluate_source,
    shell:
        "convx evaluate {input.recipe} --model {input.model} --data {input.data} --corrupted {input.corrupted:q}"
        " --settings {params.settings:q} --source {params.source} --out {output} > {log} 2>&1"


# Latency and energy own the machine: 10000 threads are capped to what there is, so nothing runs beside them.
rule measure:
    input:
        recipe="results/{study}/recipes/{variant}/seed{seed}.json",
        model="results/{study}/runs/{variant}/seed{seed}/model.safetensors",
        reference=plan.reference,
        data=plan.data(),
    output:
        "results/{study}/metrics/{variant}/seed{seed}/cost.json",
    log:
        "logs/{study}/measure/{variant}.seed{seed}.log",
    benchmark:
        "logs/{study}/measure/{variant}.seed{seed}.benchmark.tsv"
    conda:
        "../../envs/environment.yaml"
    threads: 10000
    resources:
        gpu=plan.gpu,
        mem_mb=plan.memory,
    params:
        settings=plan.measure_json,
        source=plan.measure_source,
    shell:
        "convx measure {input.recipe} --model {input.model} --reference {input.reference:q} --data {input.data}"
        " --settings {params.settings:q} --source {params.source} --out {output} > {log} 2>&1"
