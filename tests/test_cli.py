"""The `cacheslide` command: answers, and bad input in one line with status 2."""

import json

import pytest

from cacheslide.cli import main

MODEL = "models/tiny-llama-12m"
NOTES = "\nSession notes\n amber falcon is copper seven . silver otter is bone ten ."
DOCUMENT = "\nGarden report\n brave ibex follows amber falcon . the painter found the new door ."


def write(path, notes, question="\nQuestion: what is brave ibex ?\nAnswer:"):
    segments = [
        {"role": "reuse", "text": "Answer each question with the value that the name stands for ."},
        {"role": "recompute", "text": notes},
        {"role": "reuse", "text": DOCUMENT, "name": "document"},
        {"role": "recompute", "text": question},
    ]
    path.write_text(json.dumps({"segments": segments}))
    return str(path)


def run(capsys, *args):
    code = main(list(args))
    out = capsys.readouterr()
    return code, out.out, out.err


def test_systems_are_listed_with_their_choices(capsys):
    code, out, _ = run(capsys, "systems")
    assert code == 0
    assert "cacheslide " in out and "FixedChainKeying" in out and "EdgeRows" in out


def test_run_answers_from_a_store_on_disk(capsys, tmp_path):
    before, now = write(tmp_path / "b.json", NOTES + " more text here ."), write(tmp_path / "n.json", NOTES)
    args = ("--prompt", now, "--store", str(tmp_path / "s"), "--max-new-tokens", "3", "--share", "0.5", "--layer", "2")
    code, out, _ = run(capsys, "run", MODEL, "--previous", before, *args)
    first = json.loads(out)
    assert code == 0 and first["receipt"]["chunks_hit"] == 2 and first["receipt"]["rows_reused"] > 0
    code, out, _ = run(capsys, "run", MODEL, *args)  # the second process finds the chunks of the first
    assert json.loads(out) == first


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ('{"segments": [{"text": "a"}]}', "role"),
        ('{"segments": [{"role": "reuse"}]}', "text or token_ids"),
        ('{"segments": []}', "empty"),
        ('{"segments": [{"role": "keep", "text": "a"}]}', "role must be"),
    ],
)
def test_a_bad_prompt_file_is_one_line(capsys, tmp_path, content, said):
    (tmp_path / "p.json").write_text(content)
    code, out, err = run(capsys, "run", MODEL, "--prompt", str(tmp_path / "p.json"))
    assert (code, out) == (2, "")
    assert err.count("\n") == 1 and said in err


def test_missing_files_and_unknown_systems(capsys, tmp_path):
    prompt = write(tmp_path / "p.json", NOTES)
    for args, said in [
        ((str(tmp_path), "--prompt", prompt), "config.json is missing"),
        ((MODEL, "--prompt", str(tmp_path / "none.json")), "cannot read"),
        ((MODEL, "--prompt", prompt, "--system", "magic"), "unknown system 'magic'"),
        ((MODEL, "--prompt", prompt, "--share", "1.5"), "share must lie in"),
        ((MODEL, "--prompt", prompt, "--chunk-size", "0"), "chunk_size"),
    ]:
        code, _, err = run(capsys, "run", *args)
        assert code == 2 and said in err and err.count("\n") == 1, err
