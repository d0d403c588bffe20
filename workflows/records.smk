# Tables and figures from committed records that were measured apart from a configuration's run. results/README.md
# describes the GPU's records and their origin.

H200 = "results/h200"
AGENTS = "results/agents"


rule:
    """TTFT inside vLLM; the headline uses the later records."""
    name:
        "h200-tables"
    input:
        records=expand(
            "{folder}/{name}.jsonl.xz",
            folder=H200,
            name=[
                "plugin_overhead",
                "ttft_mistral7b_alone",
                "ttft_llama70b",
                "ttft_mistral7b",
            ],
        ),
        kernels=f"{H200}/kernels_row.json",
    output:
        f"{H200}/serving.json",
    log:
        f"{H200}/logs/tables.log",
    conda:
        "envs/cacheslide.yaml"
    shell:
        "python -m harness.results.serving --records {input.records:q} --kernels {input.kernels:q} --out {output:q} "
        "> {log:q} 2>&1"


rule serving:
    """TTFT inside vLLM."""
    input:
        f"{H200}/serving.json",
    output:
        multiext("figures/h200/serving", ".svg", ".pdf", ".png"),
    log:
        f"{H200}/logs/serving.log",
    conda:
        "envs/cacheslide.yaml"
    params:
        figure="serving",
    script:
        "scripts/plot.py"


rule:
    """Every system on the ledger task: F1 lost against compute (docs/ledger.md)."""
    name:
        "ledger-frontier"
    input:
        "results/benchmark/frontier.json",
    output:
        multiext("figures/benchmark/frontier", ".svg", ".pdf", ".png"),
    log:
        "results/benchmark/logs/frontier.log",
    conda:
        "envs/cacheslide.yaml"
    params:
        figure="frontier",
    script:
        "scripts/plot.py"


rule unpack_agents:
    """The agents' episodes, in a separate folder: an unfinished run has its episodes in the parent folder."""
    input:
        f"{AGENTS}/records.tar.xz",
    output:
        temp(f"{AGENTS}/unpacked/episodes.jsonl"),
    log:
        f"{AGENTS}/logs/unpack.log",
    conda:
        "envs/cacheslide.yaml"
    params:
        folder=lambda wildcards, output: Path(output[0]).parent.as_posix(),
    shell:
        "tar -xJmf {input:q} -C {params.folder:q} 2> {log:q}"


rule:
    """Success of the agents under every system; the summary still names the measuring machine."""
    name:
        "agents-tables"
    input:
        episodes=f"{AGENTS}/unpacked/episodes.jsonl",
        layer=f"{AGENTS}/selection_layer.json",
    output:
        update(f"{AGENTS}/summary.json"),
    log:
        f"{AGENTS}/logs/tables.log",
    conda:
        "envs/cacheslide.yaml"
    params:
        folder=lambda wildcards, output: Path(output[0]).parent.as_posix(),
    shell:
        "python -m harness.experiments.agents.success --out {params.folder:q} --records {input.episodes:q} "
        "> {log:q} 2>&1"
