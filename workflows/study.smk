# The study: one rule per step of harness/workflow/steps.py, which defines each step's inputs, outputs and keys.

for step in STUDY:

    rule:
        name:
            step.name
        input:
            unpack(inputs_for(step)),
        output:
            outputs_for(step),
        log:
            log_for(step),
        priority: step.priority
        conda:
            "envs/cacheslide.yaml"
        threads: cores_for(step)
        params:
            config=slice_for(step),  # its part of the configuration: another value invalidates its results
        script:
            "scripts/step.py"

    describe(step.name, line_of(step))


for target, reason in absent(config):

    rule:
        name:
            target
        input:
            refused(reason),
        localrule: True

    describe(target, reason)


rule pack:
    """The run's records in one file, as in results/cpu; `snakemake results/RUN/records.tar.xz` asks for it."""
    input:
        lambda wildcards: records_of(config),
    output:
        result("records.tar.xz"),
    log:
        result("logs/pack.log"),
    conda:
        "envs/cacheslide.yaml"
    params:
        folder=lambda wildcards, output: Path(output[0]).parent.as_posix(),
        names=lambda wildcards: [
            Path(p).relative_to(result("")).as_posix() for p in records_of(config)
        ],
    shell:
        "tar --sort=name --owner=0 --group=0 --numeric-owner -cJf {output:q} -C {params.folder:q} {params.names:q} "
        "2> {log:q}"


if has_agents(config):

    rule agents:
        """All of the agents' records and their figures; figures 3 and 10 and the report join them with the study's."""
        input:
            agent_files(),
        localrule: True


if "cope" in config:

    rule cope:
        """The records of the model's CoPE adapter."""
        input:
            cope_files(),
        localrule: True
