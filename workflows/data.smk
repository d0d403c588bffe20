# Prompts and questions, from the shipped generators or from data on disk.


rule generate_data:
    input:
        tokenizer=tokenizer_files,
    output:
        data("{part}"),
    log:
        log_file("data/{part}/{dataset}"),
    conda:
        "envs/cacheslide.yaml"
    params:
        spec=spec_of,
        seed=config["seed"],
        model=model_name,
    script:
        "scripts/generate_data.py"


rule measure_prompts:
    """How much of each prompt is reusable and how far its fixed segments move (figures 3 and 5)."""
    input:
        data=data_of("accuracy"),
        traces=agent_traces(),
        tokenizer=tokenizer_files,
    output:
        result("prompts.json"),
    log:
        log_file("prompts"),
    conda:
        "envs/cacheslide.yaml"
    params:
        config=config,
    script:
        "scripts/measure_prompts.py"
