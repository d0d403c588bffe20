"""The paper's claims that this study tests, in the paper's order; their rules are in the claims_* modules."""

from harness.report import claims, claims_cope, claims_real, claims_sessions
from harness.report.paper_agents import LOAD, OVER_TIME, PADDING, QUALITY
from harness.report.paper_slide import SLIDE, WRITES
from harness.report.paper_speed import HEADLINE, OTHER_MODELS, THIS_MODEL
from harness.report.verdicts import Basis, Claim

CLAIMS = (
    Claim(
        "fig03",
        "3",
        "Much of an agent's prompt is reusable, and how much varies",
        "share by agent, with its variance (a drawing; no number is quoted here)",
        "none: our prompts and tasks are generated, so their share is our choice; it helps to read the other numbers",
        "fig03",
        claims.reusable_share,
        Basis.STRESS,
        "3",
    ),
    Claim(
        "fig04a-rope",
        "4a",
        "RoPE: CKSim of a segment's keys falls when its position shifts by 1000 tokens",
        "falls by more than 90 %",
        "position only; reproduced: a fall of at least 90 %; partly: a smaller one whose interval lies above CoPE's "
        "28 %; not reproduced: one that reaches it",
        "fig04a",
        claims.stale_rope,
        Basis.STRESS,
        "4a",
    ),
    Claim(
        "fig04a-cope",
        "4a",
        "CoPE: the same fall is small, and smaller than under RoPE",
        "falls by 28 %",
        "a fall of at most 28 % behind a real prefix, and CKSim above that of re-rotated RoPE keys on the same "
        "prompts; reproduced: both with their intervals; partly: both by value; not reproduced: either fails",
        "fig04a",
        claims_cope.fall,
        Basis.STRESS,
        "4a",
    ),
    Claim(
        "fig04a-isotropic",
        "4a (our prediction)",
        "Stale RoPE keys of isotropic content, base 10,000, keep 0.16 to 0.28 at shift 1000",
        "none; it contradicts “more than 90 %”",
        "reproduced: value in 0.16–0.28; partly: only the interval touches it; not reproduced: neither",
        "fig04a",
        claims.predicted_stale,
        Basis.STRESS,
        "",
    ),
    Claim(
        "fig04a-delta",
        "4a (our prediction)",
        "Re-rotated RoPE keys do not depend on position at all",
        "none",
        "reproduced: CKSim of at least 0.9999 at every shift and layer when the segment does not see the prefix; not "
        "reproduced: a lower one",
        "fig04a",
        claims.delta_exact,
        Basis.STRESS,
        "",
    ),
    Claim(
        "fig04b",
        "4b",
        "Padding or cutting the updated segment to a fixed window costs accuracy",
        "loses more than 78.1 % of F1",
        "against the same reuse without padding; reproduced: a relative loss of at least 78.1 % on every mix; "
        "partly: on some mix the intervals lie apart; not reproduced: on none",
        "results/{run}/summary.json",
        claims.window_padding,
        Basis.STRESS,
        "4b",
    ),
    *PADDING,
    Claim(
        "rpdc-over-pic",
        "3, 4 (RPDC)",
        "Reuse that keeps the order of fixed text (RPDC) stays closer to recompute than chunks encoded alone (PIC)",
        "the design's premise; no number is quoted here",
        "a real model on real text, KL to recompute, paired, nothing recomputed; reproduced: an interval below 1 in "
        "every setting; partly: in some; not reproduced: in none",
        "real",
        claims_real.rpdc_over_pic,
        Basis.REAL,
        "",
    ),
    Claim(
        "fig05-rope",
        "5",
        "RoPE: the position index of fixed segments shifts from turn to turn",
        "shift grows with the updated text (a drawing; no number is quoted here)",
        "recorded sessions, text that recurs in order behind the shared prefix; reproduced: most of it moved, with its "
        "interval over sessions, in every group; partly: in some; not reproduced: in none. Generated prompts move by "
        "construction and give no verdict",
        "results/real/sessions.json",
        claims_sessions.shifted_positions,
        Basis.SESSIONS,
        "5",
    ),
    Claim(
        "fig05-cope",
        "5",
        "CoPE: the shift is smaller",
        "a drawing; no number is quoted here",
        "indices that can move, those below p_max - 1; reproduced: on every data set they move by less than the tokens "
        "do, intervals apart; partly: on some, or only the values; not reproduced: on none",
        "fig05",
        claims_cope.smaller_shift,
        Basis.STRESS,
        "5",
    ),
    *THIS_MODEL,
    *QUALITY,
    *OTHER_MODELS,
    *LOAD,
    *SLIDE,
    *OVER_TIME,
    *HEADLINE,
    *WRITES,
)
