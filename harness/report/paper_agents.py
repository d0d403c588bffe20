"""The paper's claims about running agents, with the rules of `claims_agents.py`."""

from harness.inventory import AGENT_NAMES
from harness.report import claims_agents as rules
from harness.report.verdicts import Basis, Claim

_PAPERS = ("reflexion", "memgpt", "swe_agent")  # function calling is this study's own

PADDING = (
    Claim(
        "fig04b-agents",
        "4b, by round",
        "Padding or cutting the updated text to 1K, 2K or 3K tokens costs accuracy at equal reasoning rounds",
        "loses more than 78.1 % of F1",
        "Reflexion, windows scaled down with the prompts, against the same reuse without a window; reproduced: every "
        "window loses at least 78.1 %; partly: for some window the intervals lie apart; not reproduced: for none",
        "fig04b",
        rules.padding,
        Basis.STRESS,
        "4b",
    ),
)
QUALITY = tuple(
    Claim(
        f"fig10-{agent}",
        f"10, {name}",
        f"CacheSlide with {name}: lower TTFT and better answers than the baselines, next to no loss",
        "TTFT 2.4–3.3× below ContextCache, 1.21–2.11× below CacheBlend with 1.97–2.28× its accuracy, 1.12–2.45× "
        "below PromptCache with 1.41–3.95×",
        "TTFT on the same recorded turns, scores with each system's own outputs; a part holds when its value reaches "
        "the paper's lower end and its interval leaves out 1, or the loss is at most 3 points with its interval; a "
        "rival that scores 0 has no ratio, so that part does not hold; reproduced: all parts; not reproduced: none, or "
        "CacheSlide is slower than a rival; partly: anything between",
        "fig10",
        rules.ours_and_rivals(agent),
        Basis.STRESS,
        "10",
    )
    for agent, name in ((a, AGENT_NAMES[a]) for a in _PAPERS)
)
LOAD = (
    Claim(
        "fig11-parallel",
        "11, parallel",
        "TTFT advantage over the best other baseline grows with parallel requests (2, 4, 6)",
        "1.2× → 2.3×",
        "the rival of lowest TTFT at each number, whatever its accuracy; reproduced: at least 1.2 at 2 and 2.3 at 6 "
        "(or the number nearest to it), with intervals above 1; not reproduced: an advantage below 1 at either end, or "
        "both intervals reach 1; partly: anything between",
        "fig11",
        rules.advantage(("parallel",), 1.2, 2.3),
        Basis.STRESS,
        "11",
    ),
    Claim(
        "fig11-beam",
        "11, beams",
        "The same with beam width (2, 4, 6)",
        "1.1× → 2.1×",
        "the paper's reading, beam width = batch size, is judged; real beams over one shared prefill stand beside it; "
        "as above with 1.1 and 2.1; not reproduced: as above",
        "fig11",
        rules.advantage(("beam_batch", "beam"), 1.1, 2.1),
        Basis.STRESS,
        "11",
    ),
)
OVER_TIME = (
    Claim(
        "fig13",
        "13",
        "Higher and steadier throughput over time at batch 8",
        "+49.6 % / +45.2 % over CacheBlend / EPIC, standard deviation −77.4 / −58.6 %",
        "each of the four factors by its interval over slices; reproduced: all reach the paper's; not reproduced: a "
        "rate below a rival's, or all intervals reach 1; partly: anything between",
        "fig13",
        rules.steadier,
        Basis.STRESS,
        "13",
    ),
    Claim(
        "fig14",
        "14",
        "Correct answers a second peak near top-k 0.26 and τ 0.12",
        "peak near 0.26 / 0.12",
        "reproduced: the cell next to the paper's setting is the best, and some cell lies clearly below it; partly: "
        "its interval reaches the best value; not reproduced: it does not",
        "fig14",
        rules.peak,
        Basis.STRESS,
        "14",
    ),
    Claim(
        "turns",
        "– (our question)",
        "History is appended turn by turn, and approximation does not pile up",
        "none",
        "from turn 12 on; reproduced: the interval of CacheSlide's loss ends within 3 points for every agent; partly: "
        "some loss is within; not reproduced: none",
        "turns",
        rules.by_turn,
        Basis.STRESS,
        "",
    ),
)
