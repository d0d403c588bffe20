"""`cacheslide analyse` on recorded requests: sessions, counts, verdicts, and bad input in one line with status 2."""

import json
from pathlib import Path

import pytest

from cacheslide.analysis.counting import ModelCounter, PatternCounter, plain_parts
from cacheslide.analysis.grouping import group
from cacheslide.analysis.openai_requests import read_requests
from cacheslide.analysis.session import Message, Turn
from cacheslide.cli import main
from cacheslide.core.prompt_file import load_tokenizer

MODEL = "models/tiny-llama-12m"
SYSTEM = "You repair garden tools and answer in one line . " * 4
DOCUMENT = " ".join(f"w{i} x{i}" for i in range(100))


def chat(*contents, **more):
    roles = ["system", *["user", "assistant"] * len(contents)]
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)], **more}


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def run(capsys, *args):
    code = main(["analyse", *args])
    out = capsys.readouterr()
    return code, out.out, out.err


def sessions_of(path, rows):
    return group(*read_requests(write(path, rows)))


def test_growing_chats_are_a_prefix_caches_and_sliding_documents_are_not(capsys, tmp_path):
    growing = [chat(SYSTEM, *[DOCUMENT, "yes .", "next ?", "no ."][:n], model="m") for n in (1, 3)]
    sliding = [
        chat(SYSTEM, f"note {'n ' * t}. " + DOCUMENT, metadata={"session_id": "s", "agent": "a"}) for t in (1, 9)
    ]
    code, out, _ = run(capsys, write(tmp_path / "g.jsonl", growing))
    assert code == 0 and "A prefix cache suffices: it serves 4" in out and "1 sessions" in out
    code, out, _ = run(capsys, write(tmp_path / "s.jsonl", sliding), "--json")
    found = json.loads(out)
    turn = found["per_session"][0]["turns"][1]
    assert code == 0 and turn["order_preserving"] >= 400 and turn["new"] < 20 and turn["prefix"] < 60
    assert found["total"]["shift"]["max"] == found["total"]["shift"]["min"] == 8
    assert found["verdict"][0].startswith("Order-preserving reuse would serve 4")
    code, out, _ = run(capsys, write(tmp_path / "b.jsonl", growing + sliding))
    assert "\na: 2 requests" in out and "\nm: 2 requests" in out and "an approximation" in out
    assert "2 requests by a key, 2 by what they begin with" in out


def test_every_line_of_the_table_adds_up(capsys, tmp_path):
    rows = [chat(SYSTEM, f"{n} " + DOCUMENT + SYSTEM, user=u) for u in "ab" for n in ("one", "two or three")]
    _, out, _ = run(capsys, write(tmp_path / "r.jsonl", rows))
    shares = [float(line.split("%")[0]) for line in out.splitlines() if line.startswith("  ") and "%  " in line]
    assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.3) and min(shares[:2]) > 20


def test_a_prefix_that_sessions_share_is_counted_for_a_cache_over_all(capsys, tmp_path):
    rows = [chat(SYSTEM * 3, f"other question {n}", user=f"u{n}") for n in range(4)]
    code, out, _ = run(capsys, write(tmp_path / "r.jsonl", rows))
    assert code == 0 and "Every session has one request: a prefix cache over all of them serves 70.1 %" in out


def test_sessions_by_key_by_first_message_and_by_beginning(tmp_path):
    def ids(rows):
        return [len(s.turns) for s in sessions_of(tmp_path / "r.jsonl", rows)]

    assert ids([chat("s", "q", user="a"), chat("s", "q", user="b"), chat("s", "q2", user="a")]) == [2, 1]
    assert ids([{"body": chat("s", "q", prompt_cache_key="k")}, chat("s", "z", user="u", prompt_cache_key="k")]) == [2]
    assert ids([chat("s", "q"), chat("s", "other"), chat("s", "q", "a", "b"), chat("s", "other", "a", "b")]) == [2, 2]
    text = "a text of some length that grows from one request to the next one, and on it goes for a while yet. " * 3
    assert ids([{"prompt": text}, {"prompt": text + "more"}, {"prompt": "another" + text}]) == [2, 1]
    assert ids([{"prompt": list(range(200))}, {"prompt": list(range(300))}, {"prompt": list(range(9, 300))}]) == [2, 1]


def test_parts_tools_calls_and_several_prompts_of_a_body_are_read(tmp_path):
    parts = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "x"}}]
    calls = [{"id": "c1", "type": "function", "function": {"name": "ls", "arguments": "{}"}}]
    body = {
        "messages": [
            {"role": "user", "content": parts, "name": "eva"},
            {"role": "assistant", "content": None, "tool_calls": calls},
        ],
        "tools": [{"type": "function", "function": {"name": "ls"}}],
    }
    (first, *others), digest = read_requests(write(tmp_path / "r.jsonl", [body, {"prompt": ["one", "two"]}]))
    assert first.dropped == 1 and json.loads(first.turn.messages[1].calls) == calls and len(digest) == 64
    assert plain_parts(first.turn)[0].startswith("<|tools|>") and plain_parts(first.turn)[1] == "<|user eva|>\nlook\n"
    assert [request.turn.messages[0].content for request in others] == ["one", "two"]
    (session, *_) = group([first], digest)
    assert session.lacks == ("1 parts of messages that are no text",)


def test_counting_with_a_models_tokenizer_and_without():
    turn = Turn((Message("", DOCUMENT),))
    tokenizer = load_tokenizer(MODEL)
    counter = ModelCounter(MODEL, [turn])
    assert counter.ids(turn).tolist()[1:] == tokenizer.encode(DOCUMENT, add_special_tokens=False)
    assert counter.ids(Turn((), token_ids=(5, 6))).tolist() == [5, 6]
    headed = Turn((Message("system", "a"), Message("user", "b")))
    assert "no chat template" in ModelCounter(MODEL, [headed]).name
    pattern = PatternCounter()
    assert pattern.ids(turn).tolist() == pattern.ids(turn).tolist() and len(set(pattern.ids(turn).tolist())) > 100


def test_a_chat_template_is_used_where_it_takes_the_messages(tmp_path):
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path)
    user, system = Turn((Message("user", "brave ibex"),)), Turn((Message("system", "a"), Message("user", "b")))
    counter = ModelCounter(tmp_path, [user])
    assert "and its chat template" in counter.name
    assert counter.ids(user).tolist() == tokenizer.encode("[user] brave ibex", add_special_tokens=False)
    refused = ModelCounter(tmp_path, [user, system])
    assert "refuses them: no system" in refused.name
    assert refused.ids(user).tolist() != counter.ids(user).tolist()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read"),
        ("", "holds no requests"),
        ("\n\n", "holds no requests"),
        ("{", "line 1 is not valid JSON"),
        (json.dumps(chat("s", "q")) + "\nnot json", "line 2 is not valid JSON"),
        ("[1]", "line 1: a request is a JSON object"),
        ('{"input": "x"}', "line 1: neither messages nor prompt"),
        ('{"body": {"messages": []}}', "line 1: messages must be a list of at least one message"),
        ('{"messages": [{"content": "x"}]}', "line 1: message 1 must be an object with a role"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 1: message 1: content is text"),
        ('{"messages": [{"role": "user", "content": "x", "name": 3}]}', "line 1: message 1: name is text"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 1 holds half of a surrogate pair"),
        ('{"prompt": ""}', "line 1: a prompt is text or a list of token ids"),
        ('{"prompt": [1, -2]}', "line 1: a prompt is text or a list of token ids"),
        ("[" * 100_000, "line 1 is not valid JSON"),
        (b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, tmp_path, content, says):
    path = tmp_path / "r.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = run(capsys, str(path))
    assert code == 2 and not out and err.count("\n") == 1 and str(path) in err and says in err


def test_a_folder_without_a_tokenizer_is_one_line(capsys, tmp_path):
    code, _, err = run(capsys, write(tmp_path / "r.jsonl", [chat("s", "q")]), "--model", str(tmp_path))
    assert code == 2 and err.count("\n") == 1 and "no tokenizer in" in err


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{}"), ("tokenizer.json", "x"), ("tokenizer_config.json", "[]"), ("config.json", "[]")],
)
def test_a_damaged_tokenizer_is_one_line(capsys, tmp_path, name, content):
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / file).write_text(content if file == name else Path(MODEL, file).read_text())
    code, _, err = run(capsys, write(tmp_path / "r.jsonl", [chat("s", "q")]), "--model", str(tmp_path))
    assert code == 2 and err.count("\n") == 1 and "no tokenizer in" in err


def test_a_name_in_the_table_says_nothing_to_the_terminal(capsys, tmp_path):
    """Traffic is written by others: a model's name may hold line breaks and escape sequences."""
    rows = [chat(f"{name} {SYSTEM}", "q", model=name) for name in ("a\nall requests: 9\x1b[2J", "café", "")]
    code, out, _ = run(capsys, write(tmp_path / "r.jsonl", rows))
    assert code == 0 and "\x1b" not in out and r"'a\nall requests: 9\x1b[2J': 1 requests" in out
    assert "\ncafé: 1 requests" in out and "\n(no agent or model named): 1 requests" in out
