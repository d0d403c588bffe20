# SLIDE's experiments: separate records, apart from any configuration's run.

SLIDE = "results/slide/summary.json"
SLIDE_MODEL = "models/tiny-llama-12m"


rule slide:
    """Bytes written, stalls, faults and index of the tiered store, from real I/O; about an hour on two cores."""
    input:
        model=folder_files(SLIDE_MODEL, "the model of SLIDE's traces", SLIDE),
        orders=ancient("results/slide/orders_h200.json"),  # measured on that GPU, part of the summary
    output:
        SLIDE,
    log:
        "results/slide/logs/slide.log",
    conda:
        "envs/cacheslide.yaml"
    threads: all_cores
    params:
        model=SLIDE_MODEL,
    shell:
        "python -m harness.experiments.slide.steps trace volume scan index faults orders summary "
        "--model {params.model:q} > {log:q} 2>&1"


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

    describe(f"fig12{part}", figure_line(f"fig12{part}"))
