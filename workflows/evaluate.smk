# Everything that runs the model on prompts. Results are one JSON record a request, with provenance beside them.


rule select_layer:
    """The layer whose deviations choose the rows: one for all systems, chosen on validation data."""
    input:
        data=data_of("validation"),
        model=model_files,
    output:
        result("selection_layer.json"),
    log:
        log_file("selection_layer"),
    conda:
        "envs/cacheslide.yaml"
    threads: all_cores
    resources:
        exclusive=1,
    params:
        config=native(config),
    script:
        "scripts/select_layer.py"


# All systems of a data set share one process: loading torch and the model for each would cost more than the smoke
# run's questions. Priority: finish a data set, and so free its chunk caches, before the next one's are built.
rule evaluate:
    input:
        data=data("accuracy"),
        chunks=chunk_files,
        layer=result("selection_layer.json"),
        model=model_files,
    output:
        per_system("accuracy"),
    log:
        log_file("accuracy/{dataset}"),
    priority: 1
    conda:
        "envs/cacheslide.yaml"
    threads: all_cores
    resources:
        exclusive=1,
    params:
        config=native(config),
        recompute_ratio=None,  # each system recomputes what it recomputes
    script:
        "scripts/evaluate.py"


rule equal_share:
    """The same, with every system made to recompute an equal share of the reused rows."""
    input:
        data=data("accuracy"),
        chunks=chunk_files,
        layer=result("selection_layer.json"),
        model=model_files,
    output:
        per_system("equal_share"),
    log:
        log_file("equal_share/{dataset}"),
    priority: 1
    conda:
        "envs/cacheslide.yaml"
    threads: all_cores
    resources:
        exclusive=1,
    params:
        config=native(config),
        recompute_ratio=config["recompute_ratio"],
    script:
        "scripts/evaluate.py"


rule measure_latency:
    """Time to first token: the systems take turns in one process, so that drift hits all of them alike."""
    input:
        data=data("latency-{tokens}", config["latency"]["dataset"]),
        layer=result("selection_layer.json"),
        model=model_files,
    output:
        result("latency/{tokens}.jsonl"),
    log:
        log_file("latency/{tokens}"),
    conda:
        "envs/cacheslide.yaml"
    threads: all_cores
    resources:
        exclusive=1,
    params:
        config=native(config),
    script:
        "scripts/measure_latency.py"


rule measure_throughput:
    input:
        data=data("throughput", config["throughput"]["dataset"]),
        layer=result("selection_layer.json"),
        model=model_files,
    output:
        result("throughput.jsonl"),
    log:
        log_file("throughput"),
    conda:
        "envs/cacheslide.yaml"
    threads: all_cores
    resources:
        exclusive=1,
    params:
        config=native(config),
    script:
        "scripts/measure_throughput.py"


if has_cksim(config):

    rule measure_cksim:
        input:
            data=data("cksim", config["cksim"]["dataset"]),
            model=model_files,
        output:
            result("cksim.jsonl"),
        log:
            log_file("cksim"),
        conda:
            "envs/cacheslide.yaml"
        threads: all_cores
        resources:
            exclusive=1,
        params:
            config=native(config),
        script:
            "scripts/measure_cksim.py"
