# Chunk KV caches of the turn before, which every system that reuses anything reads.


rule build_chunks:
    """One folder a data set: safetensors files in every encoding that a system reads, and index.json."""
    input:
        data=data("accuracy"),
        layer=result("selection_layer.json"),  # promotion restarts from inputs kept at this layer
        model=model_files,
    output:
        # The largest thing on disk; removed as soon as the evaluations of its data set are done.
        temp(directory(result("chunks/{dataset}"))),
    log:
        log_file("chunks/{dataset}"),
    conda:
        "envs/cacheslide.yaml"
    threads: all_cores
    resources:
        exclusive=1,
    params:
        config=native(config),
    script:
        "scripts/build_chunks.py"
