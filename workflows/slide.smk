# SLIDE's experiments and what is measured on a GPU: records of their own, apart from any configuration's run.

SLIDE = "results/slide/summary.json"


rule slide:
    """Bytes written, stalls, faults and index of the tiered store, from real I/O; about an hour on two cores."""
    output:
        SLIDE,
    log:
        "results/slide/logs/slide.log",
    conda:
        "envs/cacheslide.yaml"
    threads: all_cores
    shell:
        "python -m harness.experiments.slide.steps trace volume scan index faults orders summary > {log:q} 2>&1"


for part in "abcd":

    rule:
        name:
            f"fig12{part}"
        input:
            SLIDE,
        output:
            multiext(f"figures/slide/fig12{part}", ".svg", ".pdf", ".png"),
        log:
            f"results/slide/logs/fig12{part}.log",
        conda:
            "envs/cacheslide.yaml"
        params:
            figure=f"fig12{part}",
        script:
            "scripts/plot.py"


rule serving:
    """TTFT inside vLLM, from the committed GPU records (docs/vllm.md says how they were made)."""
    input:
        "results/h200/serving.json",
    output:
        multiext("figures/h200/serving", ".svg", ".pdf", ".png"),
    log:
        "results/h200/logs/serving.log",
    conda:
        "envs/cacheslide.yaml"
    params:
        figure="serving",
    script:
        "scripts/plot.py"
