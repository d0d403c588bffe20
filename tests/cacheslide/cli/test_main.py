"""The `cacheslide` command: answers, and bad input in one line with status 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cacheslide.cli import main
from tests.helpers.commands import MODEL, NOTES, run, write


def test_systems_are_listed_with_their_choices(capsys):
    code, out, _ = run(capsys, "systems")
    assert code == 0
    assert "cacheslide " in out and "FixedChainKeying" in out and "EdgeTokens" in out


@pytest.mark.slow
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_seen_enough_is_no_error(buffered):
    """`cacheslide systems | head -1`, with the pipe closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *([] if buffered else ["-u"]), "-m", "cacheslide.cli", "systems"]
    with os.fdopen(writer, "wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and not done.stderr


def test_run_answers_from_a_store_on_disk(capsys, tmp_path):
    before, now = write(tmp_path / "b.json", NOTES + " more text here ."), write(tmp_path / "n.json", NOTES)
    args = ("--prompt", now, "--store", str(tmp_path / "s"), "--max-new-tokens", "3", "--share", "0.5", "--layer", "2")
    code, out, _ = run(capsys, "run", MODEL, "--previous", before, *args, "--json")
    first = json.loads(out)
    assert code == 0 and first["receipt"]["chunks_hit"] == 2 and first["receipt"]["tokens_reused"] > 0
    assert first["ttft_ms"] > 0 and first["recompute"]["ttft_ms"] > 0
    assert first["recompute"]["receipt"]["tokens_reused"] == 0
    code, out, _ = run(capsys, "run", MODEL, *args, "--json", "--no-compare")  # finds the chunks of the first process
    second = json.loads(out)
    assert second["recompute"] is None
    assert [second[k] for k in ("text", "receipt")] == [first[k] for k in ("text", "receipt")]


def test_run_shows_the_answer_its_time_and_its_compute_beside_recompute(capsys, tmp_path):
    before, now = write(tmp_path / "b.json", NOTES + " more text here ."), write(tmp_path / "n.json", NOTES)
    args = ("run", MODEL, "--prompt", now, "--max-new-tokens", "3")
    _, out, _ = run(capsys, *args, "--previous", before, "--json")
    expected = json.loads(out)
    code, out, _ = run(capsys, *args, "--previous", before)
    answer, empty, own, beside, reused = out.splitlines()[:5]
    receipt = expected["receipt"]
    assert code == 0 and not empty and answer == expected["text"].strip() and answer
    shown = re.fullmatch(r"cacheslide_mixed  TTFT +[\d.]+ ms  compute +([\d.]+) %", own)
    assert float(shown[1]) == pytest.approx(100 * receipt["compute_fraction"], abs=0.06) and float(shown[1]) < 100
    assert re.fullmatch(r"recompute         TTFT +[\d.]+ ms  compute 100.0 %", beside)
    assert reused.startswith(f"reused {receipt['tokens_reused']} of {receipt['tokens']} tokens (2 of 2 chunks")
    for more, last in (((), "nothing reused: no chunk of this prompt is in the store"), (("--no-compare",), "nothing")):
        code, out, _ = run(capsys, *args, *more)
        assert code == 0 and last in out and ("recompute  " in out) == (not more)
    code, out, _ = run(capsys, *args, "--system", "recompute")
    assert code == 0 and out.count("TTFT") == 1 and "reused" not in out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ('{"segments": [{"text": "a"}]}', "role"),
        ('{"segments": [{"role": "reuse"}]}', "text or token_ids"),
        ('{"segments": []}', "empty"),
        ('{"segments": [{"role": "keep", "text": "a"}]}', "segment 0: role must be"),
        (
            '{"segments": [{"role": "reuse", "token_ids": [1]}, {"role": "reuse", "token_ids": [-1]}]}',
            "segment 1: token ids",
        ),
        ('{"segments": [{"role": "reuse", "token_ids": 3}]}', "a list of integers"),
        ('{"segments": ["text"]}', "segment 0 must be an object"),
        ('{"segs": []}', '{"segments": [...]} is expected'),
        ("[1]", '{"segments": [...]} is expected'),
        ("\xff", "not valid JSON"),
    ],
)
def test_a_bad_prompt_file_is_one_line(capsys, tmp_path, content, said):
    (tmp_path / "p.json").write_text(content, encoding="latin-1")
    code, out, err = run(capsys, "run", MODEL, "--prompt", str(tmp_path / "p.json"))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and said in err


def test_missing_files_and_unknown_systems(capsys, tmp_path):
    prompt = write(tmp_path / "p.json", NOTES)
    for args, said in [
        ((str(tmp_path), "--prompt", prompt), "config.json is missing"),
        ((MODEL, "--prompt", str(tmp_path / "none.json")), "cannot read"),
        ((MODEL, "--prompt", prompt, "--system", "magic"), "unknown system 'magic'"),
        ((MODEL, "--prompt", prompt, "--share", "1.5"), "recompute_ratio must lie in"),
        ((MODEL, "--prompt", prompt, "--chunk-size", "0"), "chunk_size"),
        ((MODEL, "--prompt", prompt, "--device", "abacus"), "device 'abacus' cannot be used"),
        (
            (MODEL, "--prompt", prompt, "--system", "cacheslide", "--layer", "8"),
            "selects at layer 8, but the model has layers 0 to 7",
        ),
        ((MODEL, "--prompt", prompt, "--store", prompt), "cannot use"),
    ]:
        code, _, err = run(capsys, "run", *args)
        assert code == 2 and said in err and err.count("\n") == 1, err


def test_a_checkpoint_without_a_tokenizer_and_a_negative_count_say_so(capsys, tmp_path):
    prompt = write(tmp_path / "p.json", NOTES)
    for file in Path(MODEL).iterdir():
        if not file.name.startswith("tokenizer"):
            (tmp_path / file.name).symlink_to(file.resolve())
    code, _, err = run(capsys, "run", str(tmp_path), "--prompt", prompt)
    assert code == 2 and "no tokenizer in" in err and err.count("\n") == 1, err
    with pytest.raises(SystemExit, match="2"):
        main(["run", MODEL, "--prompt", prompt, "--max-new-tokens", "-5"])
    assert "at least 0 is expected, not '-5'" in capsys.readouterr().err


@pytest.mark.slow
def test_serve_hands_the_process_over_to_vllm(capsys, monkeypatch):
    pytest.importorskip("vllm")
    became = []
    monkeypatch.setattr(os, "execv", lambda path, line: became.append((path, line)))
    code, _, _ = run(
        capsys, "serve", MODEL, "--policy", "epic", "--store-gib", "0.5", "--port", "8123", "--block-size=64"
    )
    [(path, line)] = became
    assert code is None and path == line[0] == sys.executable
    assert line[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", MODEL]
    transfer = json.loads(line[line.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector"] == "CacheSlideConnector" and transfer["kv_role"] == "kv_both"
    assert (transfer["kv_connector_extra_config"]["policy"], line[-3:]) == (
        "epic",
        ["--port", "8123", "--block-size=64"],
    )
    for wrong, said in (("--chunk-size=0", "chunk_size must be"), ("--policy=magic", "unknown system 'magic'")):
        code, _, err = run(capsys, "serve", MODEL, wrong)
        assert code == 2 and said in err and err.count("\n") == 1
    assert len(became) == 1


def test_serve_says_what_it_needs(capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--help"])
    assert stop.value.code == 0 and "--tokens-per-step" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "serve" in capsys.readouterr().out
    monkeypatch.setattr("cacheslide.cli.serve.find_spec", lambda name: None)
    code, _, err = run(capsys, "serve", MODEL)
    assert code == 2 and "serving needs vLLM" in err


@pytest.mark.slow
def test_the_other_commands_do_without_vllm():
    script = "import sys; from cacheslide.cli import main; main(['systems']); sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0
