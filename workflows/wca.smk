# The sweep of WCA's open points: separate records, apart from any configuration's run.

WCA = "results/wca/summary.json"


rule measure_wca:
    """Every reading of the paper's open points on the shipped models; resumes, half an hour on two idle cores."""
    input:
        wca_inputs,
    output:
        WCA,
    log:
        "results/wca/logs/wca.log",
    conda:
        "envs/cacheslide.yaml"
    threads: all_cores
    params:
        given=wca_options,
    shell:
        "python -m harness.experiments.wca.sweep {params.given:q} --jobs {threads} --out results/wca > {log:q} 2>&1"


rule wca:
    """F1 by hop depth against row-layers computed."""
    input:
        WCA,
    output:
        multiext("figures/wca/wca", ".svg", ".pdf", ".png"),
    log:
        "results/wca/logs/figure.log",
    conda:
        "envs/cacheslide.yaml"
    params:
        figure="wca",
    script:
        "scripts/plot.py"
