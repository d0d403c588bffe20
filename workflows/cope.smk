# What is measured on the model's CoPE adapter; nothing without the section `cope`. Files of its own, so that it extends
# a run that was measured without.

if "cope" in config:

    rule evaluate_cope:
        """The systems of `cope.systems` answer on the CoPE model."""
        input:
            data=data("accuracy"),
            layer=result("selection_layer.json"),
            model=model_files,
            adapter=adapter_files,
        output:
            cope_records(),
        log:
            log_file("accuracy/{dataset}-cope"),
        conda:
            "envs/cacheslide.yaml"
        threads: all_cores
        resources:
            exclusive=1,
        params:
            config=config,
        script:
            "scripts/evaluate_cope.py"

    rule measure_cksim_cope:
        """CKSim against shift on the CoPE model, and of both models in the chain of fixed chunks."""
        input:
            data=data("cksim", config["cksim"]["dataset"]),
            model=model_files,
            adapter=adapter_files,
        output:
            result("cksim_cope.jsonl"),
        log:
            log_file("cksim_cope"),
        conda:
            "envs/cacheslide.yaml"
        threads: all_cores
        resources:
            exclusive=1,
        params:
            config=config,
        script:
            "scripts/measure_cksim_cope.py"

    rule measure_prompts_cope:
        """How far position indices move from turn to turn on the CoPE model (figure 5)."""
        input:
            data=data_of("accuracy"),
            model=model_files,
            adapter=adapter_files,
        output:
            result("prompts_cope.json"),
        log:
            log_file("prompts_cope"),
        conda:
            "envs/cacheslide.yaml"
        threads: all_cores
        resources:
            exclusive=1,
        params:
            config=config,
        script:
            "scripts/measure_prompts_cope.py"
