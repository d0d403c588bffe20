"""The seed README's commands on the shipped model and data, and the client's side of an agent's turns."""

import json
import runpy
from itertools import pairwise

import pytest

pytest.importorskip("vllm")

from cacheslide.vllm.turns import Turns

pytestmark = pytest.mark.slow

MODEL, DATA = "models/tiny-llama-12m", "datasets/synthetic"


@pytest.fixture
def script(monkeypatch, capfd):
    """Runs a script's main as a command does; its status, JSON output and last line of errors."""
    monkeypatch.syspath_prepend("scripts")  # as for a script that is run by its path

    def run(name, *args):
        status = runpy.run_path(f"scripts/{name}.py")["main"](list(args))
        out = capfd.readouterr()
        return status, out.out, out.err

    return run


def test_turns_lay_pieces_where_the_receipts_end_them():
    talk = Turns([1, 2])
    ids, annotations = talk.prompt([9, 9, 9], [5, 6])
    assert ids == [1, 2, 9, 9, 9, 5, 6] and annotations == {"segments": [[0, 2]], "history": 5}
    talk.answered([7, 8])  # 8 has no KV yet
    ids, annotations = talk.prompt([9], [4], policy="epic")
    assert ids == [1, 2, 9, 5, 6, 7, 8, 4]
    assert annotations == {"segments": [[0, 2], [3, 6]], "history": 6, "policy": "epic"}
    talk.answered([])
    talk.add([3, 3])
    ids, annotations = talk.prompt([], [4])
    assert ids == [1, 2, 5, 6, 7, 8, 4, 3, 3, 4]
    assert annotations["segments"] == [[0, 2], [2, 5], [5, 7], [7, 9]] and annotations["history"] == 9


def test_what_is_missing_is_one_line(script, monkeypatch):
    status, out, err = script("run_cacheslide", "--model", MODEL, "--dataset", "trivia")
    assert (status, out) == (2, "") and "unknown data set 'trivia'" in err and err.count("\n") == 1
    wrong = ("--model", MODEL, "--data", f"{DATA}/none.jsonl")
    status, _, err = script("run_agent", *wrong)
    assert status == 2 and "no data at" in err
    wrong = ("--model", MODEL, "--data", f"{DATA}/hotpotqa-deep-test.jsonl", "--enable_cacheslide", "--system", "magic")
    status, _, err = script("run_cacheslide", *wrong, "--max_examples", "1")
    assert status == 2 and "unknown system 'magic'" in err
    with pytest.raises(SystemExit):
        script("run_agent", "--model", MODEL, "--agent", "react_style")


@pytest.mark.parametrize("name", ["hotpotqa-deep-test.jsonl", "rows.jsonl", "rows.json"])
def test_a_file_that_holds_no_rows_is_one_line(script, tmp_path, name):
    (tmp_path / name).write_text("[" * 100_000)
    for run, more in (("run_cacheslide", ()), ("run_agent", ("--dataset", "hotpot_qa", "--agent", "reflexion"))):
        status, out, err = script(run, "--model", MODEL, "--data", str(tmp_path / name), *more)
        assert (status, out) == (2, "") and "not valid JSON (nested too deeply)" in err and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["max_examples", "max_new_tokens", "chunk_size", "suffix_len", "max_turns"])
@pytest.mark.parametrize("count", ["-5", "0", "many", "²"])
def test_a_count_that_is_none_is_one_line(script, capfd, flag, count):
    run = "run_agent" if flag == "max_turns" else "run_cacheslide"
    with pytest.raises(SystemExit) as left:
        script(run, "--model", MODEL, f"--{flag}", count)
    said = capfd.readouterr().err.splitlines()[-1]
    assert left.value.code == 2 and said.endswith(f"--{flag}: an integer of at least 1 is expected, not {count!r}")


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("vllm_environment")
@pytest.mark.parametrize("reuse", [True, False])
def test_a_data_set_is_answered_with_and_without_reuse(script, tmp_path, reuse):
    args = f"""--model {MODEL} --data {DATA}/hotpotqa-deep-test.jsonl --dataset hotpot_qa --split validation
        --max_examples 1 --max_new_tokens 4 --chunk_size 128 --suffix_len 16 --gpu_memory_utilization 0.5
        --max_model_len 2048 --dtype float32 --output {tmp_path}/out/result.json"""
    status, out, _ = script("run_cacheslide", *args.split(), *(["--enable_cacheslide"] if reuse else []))
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert status == 0 and '"f1"' not in out
    records, found = result["records"], result["summary"]
    assert found["questions"] == len(records) == 8 and len({r["example"] for r in records}) == 1
    assert found["f1"] > 0.9  # the shipped model knows this task
    assert all(0 < r["ttft_s"] <= r["seconds"] for r in records)
    assert all((r["receipt"] is not None) is reuse for r in records)
    if reuse:
        assert found["reused_share"] > 0.3 and found["fallbacks"] == 0
        assert result["arguments"]["suffix_len"] == 16


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.usefixtures("vllm_environment")
@pytest.mark.parametrize("system", ["cacheslide", "cacheslide_first_turn"])
def test_an_agent_reuses_what_it_retrieved_and_said(script, system):
    args = f"""--agent swe_style --model {MODEL} --dataset swe_bench --data {DATA}/swebench-sparse-test.jsonl
        --max_examples 1 --max_turns 4 --max_new_tokens 6 --chunk_size 128 --max_model_len 2048 --dtype float32
        --enable_cacheslide --system {system}"""
    status, out, _ = script("run_agent", *args.split())
    result = json.loads(out[out.index("{\n") :])
    turns = result["records"]
    assert status == 0 and [t["turn"] for t in turns] == [0, 1, 2, 3]
    assert len({name for t in turns for name in t["retrieved"]}) == sum(len(t["retrieved"]) for t in turns) >= 3
    for before, now in pairwise(turns):
        assert now["receipt"]["chunks_hit"] > before["receipt"]["chunks_hit"] or not before["turn"]
        assert now["receipt"]["tokens_reused"] > 0 and now["prompt_tokens"] > before["prompt_tokens"]
    retained = [t["receipt"]["history"] for t in turns]
    assert {k["from"] for k in retained} == ({"encode"} if system == "cacheslide" else {"blocks"})
    assert "f1" in turns[-1] and result["summary"]["questions"] == 1 and len(result["summary"]["ttft_s_by_turn"]) == 4
