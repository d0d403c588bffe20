# Tables, figures and the report. They read results only: each can be made again without running the model.


rule summarize:
    input:
        accuracy=records("accuracy")
        + expand(cope_records(), dataset=config["datasets"]),
        equal_share=records("equal_share"),
        latency=latency_records(),
        throughput=result("throughput.jsonl"),
        cksim=result("cksim.jsonl") if has_cksim(config) else [],
        cksim_cope=cope_file("cksim_cope.jsonl"),
        agents=agent_records(),
        prompts=result("prompts.json"),
        prompts_cope=cope_file("prompts_cope.json"),
        layer=result("selection_layer.json"),
    output:
        result("summary.json"),
    log:
        log_file("summary"),
    conda:
        "envs/cacheslide.yaml"
    params:
        config=config,
    script:
        "scripts/summarize.py"


rule fig03:
    """How much of a prompt is reusable."""
    input:
        result(FIGURES["fig03"]),
    output:
        figure("fig03"),
    log:
        log_file("figures/fig03"),
    conda:
        "envs/cacheslide.yaml"
    params:
        figure="fig03",
    script:
        "scripts/plot.py"


if has_cksim(config):

    rule fig04a:
        """KV similarity against position shift."""
        input:
            result(FIGURES["fig04a"]),
            cope=cope_file("cksim_cope.jsonl"),  # the figure looks for it beside the first
        output:
            figure("fig04a"),
        log:
            log_file("figures/fig04a"),
        conda:
            "envs/cacheslide.yaml"
        params:
            figure="fig04a",
        script:
            "scripts/plot.py"


rule fig05:
    """How far a fixed segment moves."""
    input:
        result(FIGURES["fig05"]),
        cope=cope_file("prompts_cope.json"),
    output:
        figure("fig05"),
    log:
        log_file("figures/fig05"),
    conda:
        "envs/cacheslide.yaml"
    params:
        figure="fig05",
    script:
        "scripts/plot.py"


rule fig10:
    """Accuracy against time to first token."""
    input:
        result(FIGURES["fig10"]),
    output:
        figure("fig10"),
    log:
        log_file("figures/fig10"),
    conda:
        "envs/cacheslide.yaml"
    params:
        figure="fig10",
    script:
        "scripts/plot.py"


rule throughput:
    """Throughput and correct answers a second, by batch."""
    input:
        result(FIGURES["throughput"]),
    output:
        figure("throughput"),
    log:
        log_file("figures/throughput"),
    conda:
        "envs/cacheslide.yaml"
    params:
        figure="throughput",
    script:
        "scripts/plot.py"


rule report:
    """One HTML file that needs nothing beside it: claims, figures, conditions, how to rerun each."""
    input:
        summary=result("summary.json"),
        figures=[path for name in figures_of(config) for path in figure(name)],
    output:
        result("report.html"),
    log:
        log_file("report"),
    conda:
        "envs/cacheslide.yaml"
    params:
        config=config,
        figures=figures_of(config),
    script:
        "scripts/report.py"
