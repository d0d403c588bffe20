# The paper's performance figures on GPUs (docs/gpu.md): config/h200.yaml, config/h200-x2.yaml, config/paper.yaml.
# One rule a stage: each ends within `stage_minutes`, and where cells are left the next call goes on.

if REPRODUCTION:

    for stage in REPRODUCTION.stages:

        rule:
            name:
                f"gpu_stage_{stage.number}"
            output:
                gpu_result(f"reproduction/{stage.file}"),
            log:
                gpu_result(f"logs/stage_{stage.number}.log"),
            conda:
                "envs/cacheslide.yaml"
            threads: all_cores
            params:
                config=REPRODUCTION_FILE,
                stage=stage.number,
                minutes=REPRODUCTION.settings.stage_minutes,
                folder=gpu_result("reproduction"),
            shell:
                "python -m harness.experiments.serving.reproduction run --config {params.config:q} "
                "--stage {params.stage:q} --minutes {params.minutes:q} --out {params.folder:q} > {log:q} 2>&1"

    rule reproduction_tables:
        """Tables and headline, with the records of the other size beside them where they exist."""
        input:
            stages=[
                gpu_result(f"reproduction/{stage.file}")
                for stage in REPRODUCTION.stages
            ],
        output:
            gpu_result("reproduction.json"),
        log:
            gpu_result("logs/reproduction.log"),
        conda:
            "envs/cacheslide.yaml"
        params:
            folders=gpu_folders(),
            beside=gpu_beside(),
        shell:
            "python -m harness.results.reproduction --records {params.folders:q} {params.beside:q} --out {output:q} "
            "> {log:q} 2>&1"

    rule reproduction:
        """Every performance figure of the run in one picture."""
        input:
            gpu_result("reproduction.json"),
        output:
            gpu_figure(),
        log:
            gpu_result("logs/reproduction_figure.log"),
        conda:
            "envs/cacheslide.yaml"
        params:
            figure="reproduction",
        script:
            "scripts/plot.py"
