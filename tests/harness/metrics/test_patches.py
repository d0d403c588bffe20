"""Patches are compared as patches: the same change in another notation counts, another change never does."""

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.agents.documents import DocumentReader
from harness.metrics.patches import changes, is_patch, same_patch
from harness.scoring import compared_as, score
from harness.tasks.registry import load
from tests.helpers.places import DATA

pytestmark = pytest.mark.fault("patch_score")
GOLD = """diff --git a/x.py b/x.py
index 1111111..2222222 100644
--- a/x.py
+++ b/x.py
@@ -1,4 +1,4 @@
 def f(a):
-    return a - 1
+    return a + 1

 # the end
diff --git a/pkg/y.py b/pkg/y.py
--- a/pkg/y.py
+++ b/pkg/y.py
@@ -7,3 +7,4 @@ class Y:
     def g(self):
+        self.n = 0
         return self.x
     z = 1
"""
HEADS = "diff --git a/pkg"


def hunks_first(text: str) -> str:
    one, two = text.split(HEADS)
    return HEADS + two + one


SAME = {
    "itself": lambda t: t,
    "no index line": lambda t: t.replace("index 1111111..2222222 100644\n", ""),
    "no function behind the numbers": lambda t: t.replace("@@ class Y:", "@@"),
    "other folders in front": lambda t: t.replace(" a/", " i/").replace(" b/", " w/"),
    "the files in another order": hunks_first,
    "text around it": lambda t: f"Here is the patch:\n\n{t}\nIt adds one.\n",
    "the last newline stripped": str.strip,
    "an empty line of context with its blank": lambda t: t.replace("\n\n", "\n \n"),
}
OTHER = {
    "other line numbers": lambda t: t.replace("@@ -1,4 +1,4 @@", "@@ -90,4 +90,4 @@"),
    "another line before": lambda t: t.replace("@@ -7,3 ", "@@ -8,3 "),
    "another line after": lambda t: t.replace("+7,4 @@", "+9,4 @@"),
    "no a/ and b/": lambda t: t.replace(" a/", " ").replace(" b/", " "),
    "another file above the hunks": lambda t: t.replace("--- a/x.py", "--- a/z.py"),
    "another file below git's line": lambda t: t.replace("+++ b/x.py", "+++ b/z.py"),
    "no a/": lambda t: t.replace("--- a/", "--- "),
    "no b/": lambda t: t.replace("+++ b/", "+++ "),
    "no a/ and b/ at one file": lambda t: t.replace("a/x.py", "x.py").replace("b/x.py", "x.py"),
    "signs swapped": lambda t: (
        t.translate(str.maketrans("+-", "-+")).replace("+++ a", "--- a").replace("--- b", "+++ b")
    ),
    "signs of the lines swapped": lambda t: (
        t.replace("-    return", "?    return")
        .replace("+    return", "-    return")
        .replace("?    return", "+    return")
    ),
    "indentation lost": lambda t: t.replace("+    return", "+return"),
    "indentation of context lost": lambda t: t.replace("\n     def g", "\n def g"),
    "tabs for blanks": lambda t: t.replace("+    return", "+\treturn"),
    "upper case": lambda t: t.replace("return a + 1", "Return a + 1"),
    "another operator": lambda t: t.replace("a + 1", "a * 1"),
    "punctuation lost": lambda t: t.replace("a + 1", "a 1"),
    "an article lost": lambda t: t.replace("# the end", "# end"),
    "another file": lambda t: t.replace("x.py", "z.py"),
    "one file only": lambda t: t.split(HEADS)[0],
    "a hunk that breaks off": lambda t: t[: t.index("         return")],
    "a hunk that says another length": lambda t: t.replace("+7,4", "+7,9"),
    "a blank behind a line": lambda t: t.replace("a + 1", "a + 1 "),
    "carriage returns": lambda t: t.replace("\n", "\r\n"),
    "another mode": lambda t: t.replace("--- a/x.py", "old mode 100644\nnew mode 100755\n--- a/x.py"),
    "a line added twice": lambda t: t.replace("+7,4", "+7,5").replace(
        "+        self", "+        self.n = 0\n+        self"
    ),
    "its words alone": lambda t: " ".join(t.split()),
    "nothing": lambda t: "",
    "prose": lambda t: "return a + 1",
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_change_counts_in_any_notation(name):
    assert score(SAME[name](GOLD), ["--- a/o\n+++ b/o\n@@ -1 +1 @@\n-1\n+2\n", GOLD]) == {
        "f1": 1.0,
        "em": 1.0,
        "rouge_l": 1.0,
    }


@pytest.mark.parametrize("name", OTHER)
def test_another_change_never_counts(name):
    changed = OTHER[name](GOLD)
    assert changed != GOLD
    assert set(score(changed, [GOLD]).values()) == {0.0}


def test_a_short_patch_counts_without_the_lines_of_context_that_were_stripped():
    gold = "--- a/x\n+++ b/x\n@@ -1,3 +1,3 @@\n-1\n+2\n \n \n"
    assert same_patch(gold.strip(), [gold]) == 1.0
    assert same_patch("--- a/x\n+++ b/x\n@@ -1,2 +1,2 @@\n-1\n+2\n \n", [gold]) == 0.0


@pytest.mark.parametrize(
    "kind",
    [
        "new file mode 100644\n--- /dev/null\n+++ b/n\n@@ -0,0 +1 @@\n+1\n",
        "deleted file mode 100644\n--- a/n\n+++ /dev/null\n@@ -1 +0,0 @@\n-1\n",
        "similarity index 90%\nrename from n\nrename to m\n--- a/n\n+++ b/m\n@@ -1 +1 @@\n-1\n+2\n",
        "--- a/n\n+++ b/n\n@@ -1 +1 @@\n-1\n+2\n\\ No newline at end of file\n",
        "--- a/n\n+++ b/n\n@@ -1,2 +1,2 @@\n--- x\n+++ x\n 1\n",
    ],
)
def test_files_that_come_go_and_move(kind):
    gold = f"diff --git a/n b/{'m' if 'rename' in kind else 'n'}\n{kind}"
    plain = "diff --git a/n b/n\n--- a/n\n+++ b/n\n@@ -1 +1 @@\n-1\n+2\n"
    assert same_patch(gold, [gold]) == 1.0 and same_patch(plain, [gold]) == 0.0 == same_patch(gold, [plain])


def test_a_binary_patch_equals_only_itself():
    gold = "diff --git a/n b/n\nindex 1..2 100644\nGIT binary patch\nliteral 1\nIcmZPo000310RR91\n\n"
    assert same_patch(gold, [gold]) == 1.0
    assert same_patch(gold.replace("Icm", "Idm"), [gold]) == 0.0
    assert same_patch(GOLD, [gold, GOLD]) == 1.0


BLOCK = "def f():\n    a\n    b\n    return 1\n\n"
HUNK = "@@ -{old},5 +{new},6 @@\n def f():\n     a\n     b\n+    c\n     return 1\n \n"


def applied(text: str, folder: Path) -> str | None:
    """What git makes of six equal blocks; None where the patch does not apply."""
    folder.mkdir(exist_ok=True)
    (folder / "m.py").write_text(BLOCK * 6)
    done = subprocess.run(["git", "apply", "-p1", "-"], cwd=folder, input=text, text=True, capture_output=True)
    return None if done.returncode else (folder / "m.py").read_text()


@pytest.mark.parametrize("starts", [(1,), (6,), (21,), (1, 6), (6, 21), (11, 26)])
def test_with_repeated_blocks_the_place_counts_as_it_does_for_git(starts, tmp_path):
    """Patches of the same hunks, each said for other blocks: equal exactly where git makes the same file."""

    def patch(at):
        return "--- a/m.py\n+++ b/m.py\n" + "".join(HUNK.format(old=s, new=s + n) for n, s in enumerate(at))

    gold = patch(starts)
    for others in [(s,) for s in (1, 6, 21)] if len(starts) == 1 else [(1, 6), (6, 21), (11, 26), (1, 26)]:
        same = applied(patch(others), tmp_path / "r") == applied(gold, tmp_path / "r") is not None
        assert same_patch(patch(others), [gold]) == float(same) == float(others == starts)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.text() | st.text("+-@ \nab,1dif\\").map(lambda t: GOLD[:150] + t))
def test_whatever_a_model_writes_is_a_score(text):
    assert same_patch(text, [GOLD]) in (0.0, 1.0)
    assert changes(text) is None or is_patch(text)


LINES = st.lists(st.tuples(st.sampled_from(" +-"), st.text("ab +-@\t", max_size=4)), min_size=1, max_size=6)


def patch(lines) -> str:
    old, new = (sum(sign in some for sign, _ in lines) for some in (" -", " +"))
    body = "".join(f"{sign}{text}\n" for sign, text in lines)
    return f"--- a/x\n+++ b/x\n@@ -1,{old} +1,{new} @@\n{body}"


@settings(max_examples=300, deadline=None)
@given(LINES, LINES)
def test_two_patches_are_equal_exactly_when_their_lines_are(one, two):
    assert same_patch(patch(one), [patch(one)]) == 1.0
    assert same_patch(patch(one), [patch(two)]) == float(one == two)


def test_the_agent_that_writes_a_patch_says_what_solved_means():
    example = next(iter(load("swebench", "test", path=DATA / "swebench.jsonl")))
    [gold] = example.questions[0].answers
    for text, solved in ((gold, 1.0), (OTHER["signs swapped"](gold), 0.0), (gold.replace("    ", ""), 0.0)):
        agent = DocumentReader(example, 1)
        agent.tools["answer"].run(text)
        agent.written, agent.finished = text, True
        assert (agent.score(), agent.solved_by) == (solved, "patch")
    assert compared_as(["Veldhaven"]) == "answer" and compared_as(["--- is a word"]) == "answer"
    assert all(is_patch(json.loads(line)["patch"]) for line in (DATA / "swebench.jsonl").read_text().splitlines())
