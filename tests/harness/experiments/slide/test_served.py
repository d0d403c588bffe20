"""Bytes that a server writes by eviction policy, in small: the workload is what it says, and a server runs it."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest

from cacheslide.errors import ConfigError
from harness.experiments.slide import served

MODEL = "models/tiny-llama-12m"


def test_turns_grow_by_their_history_and_the_last_one_releases_it():
    load = replace(served.CONDITIONS["main"], agents=2, episodes=2, turns=3)
    rounds = list(served.episodes(load, 1280))
    assert [len(r) for r in rounds] == [6, 6]
    assert [r.prompt for r in rounds[0]] == [r.prompt for r in next(served.episodes(load, 1280))]  # for every policy
    for requests in rounds:
        turns = [r for r in requests if r.id == "agent 0"]
        asked = [r.params["cacheslide"] for r in turns]
        assert [len(a["segments"]) for a in asked] == [1, 2, 3]
        assert [a.get("release", False) for a in asked] == [False, False, True] and "history" not in asked[-1]
        for before, after in pairwise(turns):
            start = before.params["cacheslide"]["history"]
            first, end = after.params["cacheslide"]["segments"][-1]
            assert after.prompt[first:end] == before.prompt[start:] and end - first == load.history
    documents = {tuple(r.prompt[slice(*r.params["cacheslide"]["segments"][0])]) for r in (*rounds[0], *rounds[1])}
    assert len(documents) == 2 and all(len(d) == load.document for d in documents)
    assert load.tokens_in_use == 2 * (768 + 2 * 128)
    unended = list(served.episodes(replace(load, releases=False), 1280))
    assert not any("release" in r.params["cacheslide"] for r in unended[0])


def test_a_condition_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="choose main"):
        served.main(["--conditions", "nothing"])


@pytest.mark.vllm
@pytest.mark.slow
def test_a_server_under_pressure_writes_less_clean_first(tmp_path):
    pytest.importorskip("vllm")
    out = tmp_path / "served.json"
    served.main(
        ["--small", "--conditions", "main", "--out", str(out), "--work", str(tmp_path / "work"), "--model", MODEL]
    )
    record = json.loads(out.read_text())
    main = record["conditions"]["main"]
    lru, clean_first = (main["runs"][policy]["server"] for policy in served.POLICIES)
    assert main["same_answers"] and main["all_chunks_came_back"]
    assert lru["evicted_bytes.dirty"] > clean_first.get("evicted_bytes.dirty", 0)
    assert lru["store_chunks.file"] > 0 and clean_first["evictions.clean"] > 0
    assert max(main["runs"]["lru"]["generations"]) == 3  # corrected history was reused
    assert main["runs"]["lru"]["io"]["wchar"] > main["runs"]["clean-first"]["io"]["wchar"]
    assert record["served_lru_over_clean_first_bytes"] is not None
