"""Known failure cases, one named row each, and the outcomes of the tests marked with that name.

`pytest -m fault --fault-report FILE` writes the outcome of every test marked `@pytest.mark.fault("name")`.
"""

ROWS = {
    "separator_too_long": "text cut at a separator has more tokens than max_model_len",
    "family": "a client sends the field that joins the requests of a beam search",
    "multi_connector": "the connector runs as a child of another connector",
    "malformed_marks": "a body with malformed annotations",
    "echo_separator": "echo and logprobs of a prompt whose separators were taken out",
    "forged_record": "a stored record with a right checksum and another layout, dtype or length",
    "lying_store": "a server or a folder that answers nonsense to a look-up",
    "hostile_store": "links, special files, bad versions, slow servers, forged counters, foreign folders",
    "tenant_key": "namespace and salt that join to another tenant's key; receipts that tell about other tenants",
    "sandbox_limits": "code in the sandbox that changes files outside or passes its limits",
    "sandbox_exit": "code in the sandbox that imitates its start-up failure or nests folders",
    "shell_injection": "a configuration value that a shell would run",
    "records_kill": "records of a run that is killed at any moment, bad lines in them",
    "patch_score": "a patch with swapped signs or lost indentation",
    "parquet_brackets": "a folder whose name looks like a pattern",
    "disturbed_timing": "a timing taken beside another job",
    "snakemake_lock": "a Snakemake run that was killed",
}


def outcomes(tests: dict[str, dict[str, str]]) -> dict[str, bool]:
    """Whether each row holds: it has tests, at least one passed and none failed.

    Parameters
    ----------
    tests : dict
        Row -> test id -> "passed", "failed" or "skipped", as `--fault-report` writes it.
    """
    return {row: "passed" in tests.get(row, {}).values() and "failed" not in tests[row].values() for row in ROWS}
