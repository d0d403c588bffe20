# Tables and figures of what was measured apart from a configuration's run, from committed records. What a GPU has
# measured, and how it comes here, results/README.md says.

H200 = "results/h200"
AGENTS = "results/agents"


rule:
    """TTFT inside vLLM; of the records, later ones win the headline."""
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


rule unpack_agents:
    """The agents' episodes, in a folder of their own: a run that goes on has its episodes one above."""
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
    """Success of the agents under every system; the summary goes on naming the machine that measured."""
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
