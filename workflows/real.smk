# The study on a real pretrained model and real text (docs/real.md). Its configuration is a separate file,
# `--config real=FILE`; its records are apart from any configuration's run. Nothing is timed, so shards run at once.

REAL = "results/real/summary.json"
REAL_SLICE = "results/real/slice.json"
REAL_CONFIRM = "results/real/confirm.json"

for stage in ("layers", "frontier", "histories", "replay", "confirm"):

    rule:
        name:
            f"real_{stage}"
        input:
            files=real_inputs(stage, REAL_CONFIRM if stage == "confirm" else REAL),
            best=[] if stage == "layers" else "results/real/best.json",
        output:
            f"results/real/records/{stage}-{{shard}}.jsonl",
        log:
            f"results/real/logs/{stage}-{{shard}}.log",
        wildcard_constraints:
            shard="[0-9]+of[0-9]+",
        conda:
            "envs/cacheslide.yaml"
        threads: real_threads
        params:
            stage=stage,
            given=real_given(stage),
            plan=real_plan,  # a changed configuration invalidates the records
        shell:
            # No script: its modification time would invalidate hours of records.
            "python -m harness.experiments.real.study {params.stage:q} {params.given:q} --threads {threads} "
            "--out results/real/records > {log:q} 2>&1"

    describe(
        f"real_{stage}", f"Records of the stage {stage} on a real model, in shards."
    )


rule real_best:
    """Each rule's selection layer, from the validation part."""
    input:
        real_records("layers"),
    output:
        "results/real/best.json",
    log:
        "results/real/logs/best.log",
    conda:
        "envs/cacheslide.yaml"
    shell:
        "python -m harness.results.real layers results/real/records --out {output:q} > {log:q} 2>&1"


rule real_summary:
    """Tables of the study on a real model."""
    input:
        real_records("frontier"),
        real_records("histories"),
        real_records("replay"),
    output:
        REAL,
    log:
        "results/real/logs/summary.log",
    conda:
        "envs/cacheslide.yaml"
    shell:
        "python -m harness.results.real summary results/real/records --out {output:q} > {log:q} 2>&1"


rule real_sessions:
    """Tokens of recorded agent sessions by kind; reads a tokenizer, no weights."""
    input:
        real_inputs("sessions", "results/real/sessions.json"),
    output:
        "results/real/sessions.json",
    log:
        "results/real/logs/sessions.log",
    conda:
        "envs/cacheslide.yaml"
    params:
        given=real_sessions_given,
    shell:
        "python -m harness.experiments.real.sessions {params.given:q} --out {output:q} > {log:q} 2>&1"


for drawn, source in (("real", REAL), ("fig03_real", "results/real/sessions.json")):

    rule:
        name:
            "draw_real" if drawn == "real" else drawn
        input:
            source,
        output:
            multiext(f"figures/real/{drawn}", ".svg", ".pdf", ".png"),
        log:
            f"results/real/logs/{drawn}.log",
        conda:
            "envs/cacheslide.yaml"
        params:
            figure=drawn,
        script:
            "scripts/plot.py"

    describe("draw_real" if drawn == "real" else drawn, figure_line(drawn))


rule real:
    """Divergence against compute on the real model, and recorded agents."""
    input:
        multiext("figures/real/real", ".svg", ".pdf", ".png"),
        multiext("figures/real/fig03_real", ".svg", ".pdf", ".png"),
    localrule: True


rule:
    """Rules on other prompts, at the layers chosen before."""
    name:
        "real-confirm"
    input:
        real_records("confirm"),
    output:
        REAL_CONFIRM,
    log:
        "results/real/logs/confirm-tables.log",
    conda:
        "envs/cacheslide.yaml"
    shell:
        "python -m harness.results.real_confirm results/real/records --out {output:q} 2> {log:q}"


rule real_slice_records:
    """Four arms on 16 prompts of about 1,300 tokens: 20 minutes on two free cores."""
    input:
        files=real_inputs("slice", REAL_SLICE),
    output:
        "results/real/slice/slice-0of1.jsonl",
    log:
        "results/real/logs/slice.log",
    conda:
        "envs/cacheslide.yaml"
    threads: all_cores
    params:
        given=real_given("slice"),
        plan=real_plan,
    shell:
        "python -m harness.experiments.real.study slice {params.given:q} --prompts 8 --settings matter --lengths 1000 "
        "--threads {threads} --out results/real/slice > {log:q} 2>&1"


rule:
    """Tables of the slice of the study on a real model."""
    name:
        "real-slice"
    input:
        "results/real/slice/slice-0of1.jsonl",
    output:
        REAL_SLICE,
    log:
        "results/real/logs/slice-tables.log",
    conda:
        "envs/cacheslide.yaml"
    shell:
        "python -m harness.results.real_slice results/real/slice --out {output:q} 2> {log:q}"
