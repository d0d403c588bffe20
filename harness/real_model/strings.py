"""Strings to compare two tokenizers on: words, digits, code, runs of white space, many scripts, mixed."""

import random

_WORDS = "the cache of an agent keeps what it has read Zürich naïve coöperate don't I'm e.g. U.S. CO2 3rd x² ﬁne ＡＢＣ"
_CODE = (
    "def f(x):\n    return x[::-1]",
    "for (int i = 0; i < n; ++i) {\n\t\ta[i] += 1;\n}",
    'print(f"{a!r:>10}")',
    "<table><tr><td>1</td></tr></table>",
    "SELECT * FROM t WHERE a >= 0x1F;",
    "git diff --stat HEAD~2 | grep -v '^#'",
    "https://example.org/a_b?c=%20&d=1#e",
    "\\frac{a}{b} $\\alpha_{ij}$",
    "<start_of_turn>user\n",
    "<bos>",
    "<0x41>",
    "<unused7>",
)
_SPACE = (" ", "\n", "\t", "\r", "\r\n", "\u00a0", "\u3000", "\u200b", "▁")
# First and last code points of scripts, symbols, emoji and the private use area.
_RANGES = (
    (0x00, 0x1F), (0x21, 0x7E), (0xA1, 0x17F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA),
    (0x620, 0x64A), (0x900, 0x97F), (0xE01, 0xE3A), (0x1100, 0x11FF), (0x2010, 0x205E), (0x2190, 0x22FF),
    (0x3041, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xFE00, 0xFE0F), (0x1D400, 0x1D7FF),
    (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF),
)  # fmt: skip


def make_strings(count: int, seed: int) -> list[str]:
    """`count` strings, the same for the same seed; some are empty or a single character."""
    g = random.Random(seed)
    return ["".join(_piece(g) for _ in range(g.randint(0, 12))) for _ in range(count)]


def _piece(g: random.Random) -> str:
    kind = g.randrange(7)
    if kind == 0:
        return " ".join(g.choices(_WORDS.split(" "), k=g.randint(1, 12)))
    if kind == 1:
        return "".join(g.choices("0123456789.,-+eE ", k=g.randint(1, 12)))
    if kind == 2:
        return g.choice(_CODE)
    if kind == 3:
        return g.choice(_SPACE) * g.choice((1, 1, 2, 3, 7, 31, 32, 40))
    if kind == 4:
        return "".join(chr(g.randint(*g.choice(_RANGES))) for _ in range(g.randint(1, 8)))
    if kind == 5:
        first, last = g.choice(_RANGES)
        return "".join(chr(g.randint(first, last)) for _ in range(g.randint(1, 20)))
    return g.choice(_WORDS.split(" ")).upper() + g.choice(("", " ", ".", "?!", "…"))
