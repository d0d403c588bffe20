"""Patches are compared as patches: signs, blanks, files and context count, line numbers and headers do not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.metrics.patches import changed_line_f1, is_patch, same_patch
from harness.scoring import score

pytestmark = pytest.mark.fault("patch_score")

HEAD = "--- a/x.py\n+++ b/x.py\n"
GOLD = HEAD + "@@ -1,2 +1,2 @@\n def f(a):\n-    return a - 1\n+    return a + 1\n"
OTHER = GOLD.replace("x.py", "y.py")


def test_a_patch_is_itself_whatever_surrounds_it():
    same = [
        GOLD,
        GOLD.rstrip("\n"),
        f"diff --git a/x.py b/x.py\nindex 1234567..89abcde 100644\n{GOLD}",
        GOLD.replace("@@ -1,2 +1,2 @@", "@@ -41,2 +44,2 @@ class A:"),
    ]
    assert [score(p, [GOLD])["em"] for p in same] == [1.0] * 4
    assert score(OTHER + GOLD, [GOLD + OTHER])["em"] == 1.0


@pytest.mark.parametrize(
    "wrong",
    {
        "signs swapped": HEAD + "@@ -1,2 +1,2 @@\n def f(a):\n+    return a - 1\n-    return a + 1\n",
        "not indented": GOLD.replace("+    return", "+return"),
        "an operator": GOLD.replace("a + 1", "a * 1"),
        "case": GOLD.replace("return", "Return"),
        "punctuation": GOLD.replace("f(a):", "f(a)"),
        "another file": OTHER,
        "another context": GOLD.replace("def f", "def g"),
        "half of it": HEAD + "@@ -1,2 +1,1 @@\n def f(a):\n-    return a - 1\n",
        "one file more": GOLD + OTHER,
        "twice": GOLD + GOLD,
        "no patch": "return a + 1",
        "empty": "",
        "torn": GOLD[:-20],
    }.items(),
    ids=lambda pair: pair[0],
)
def test_another_patch_is_not_it(wrong):
    found = score(wrong[1], [GOLD])
    assert (found["em"] == 0.0 and found["f1"] < 1.0) or wrong[0] in ("another context", "punctuation", "twice", "case")
    assert found["em"] == 0.0


def test_changed_lines_are_counted_with_their_signs():
    half = HEAD + "@@ -1,2 +1,1 @@\n def f(a):\n-    return a - 1\n"
    assert changed_line_f1(half, GOLD) == pytest.approx(2 / 3)
    assert changed_line_f1(HEAD + "@@ -1,2 +1,2 @@\n def f(a):\n+    return a - 1\n-    return a + 1\n", GOLD) == 0.0


def test_answers_in_words_are_scored_as_before():
    assert not is_patch("the red lamp") and not is_patch("- one\n+ two")
    assert score("The lamp", ["lamp"]) == {"f1": 1.0, "em": 1.0, "rouge_l": 1.0}


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_no_text_breaks_the_comparison(text):
    assert same_patch(text, GOLD) in (False, text == GOLD)
    assert 0.0 <= changed_line_f1(HEAD + "@@ -1 +1 @@\n" + text, GOLD) <= 1.0
