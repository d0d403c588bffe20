"""The report's sentences, all derived from summary.json; none presumes a result."""

from typing import Any

from harness.report.words import interval, number, percent, points
from harness.results.headline import LENGTH, TIE_POINTS
from harness.results.runs import OURS

Summary = dict[str, Any]

CAPTIONS = {
    "fig03": (
        "Figure 3. Share of each prompt's tokens that lie in fixed segments, the only ones that can be reused. "
        "A dot is a prompt; diamond and bar are mean and standard deviation. The prompts are this repository's own."
    ),
    "fig04a": (
        "Figure 4a. CKSim, the mean over heads of the cosine between cached and recomputed keys of one segment, after "
        "the segment moved. Left, the segment does not attend to what was put before it, so only the position encoding "
        "differs: the paper's protocol. Right, it does. Lines are means over layers and prompts with 95 % intervals, "
        "bands reach from the smallest to the largest layer. The paper's numbers and our own prediction stand at the "
        "right edge. With a CoPE adapter a third panel shows what CacheSlide reuses: the segment cached in the chain "
        "behind the system prompt, met again behind system prompt and updated text. Only there a slot lies between two "
        "fixed segments, so only there CCPE can differ from CoPE."
    ),
    "fig05": (
        "Figure 5. Distance between the position at which a cached key is rotated and the position of its row in this "
        "turn, against how far the fixed segments moved since the turn before. Systems that re-rotate keys, or that "
        "keep segments in place (slots, padding), are at 0; chunks encoded alone and left there are as far off as "
        "their place in the prompt. A point is a prompt, averaged over its fixed segments. Under CoPE the position "
        "index is contextual: at which position a fixed row behind the updated slot sees the last row in front of it, "
        "at most p_max - 1, in this turn against the one before, over rows, heads and layers."
    ),
    "fig10": (
        "Figure 10. Accuracy against cost. Above, the accuracy prompts of each mix against the share of row-layers "
        "computed, which does not depend on the machine. Below, the timed prompts: F1 and TTFT of the same requests. "
        "The dashed line is the Pareto front, thin lines are 95 % intervals over prompts. A system is timed here only "
        "if it reused rows in every request and its answers were scored. On the CoPE model accuracy is measured, not "
        "time: its attention here is the plain reference (docs/cope.md has the kernel's times)."
    ),
    "fig04b": (
        "Figure 4b. F1 of the model's calls by reasoning round, with every updated segment padded or cut to a window, "
        "against none. Solid lines reuse KV in place, dashed ones compute the padded prompt in full: their distance is "
        "what reuse costs, the rest is what padding and cutting cost. Recorded Reflexion episodes, the same for all."
    ),
    "fig11": (
        "Figure 11. TTFT with n agents at once, with a beam search of width n that shares one prefill and branches the "
        "KV of its beams, and with n copies of a request in one packed run (the paper's beam width = batch size). "
        "Recorded MemGPT turns; the in-process engine packs whatever waits, and encoding new chunks delays whoever "
        "waits."
    ),
    "fig13": (
        "Figure 13. Requests completed in every second by agents in a closed loop, and mean and standard deviation "
        "over seconds. Systems take turns in slices of equal work."
    ),
    "fig14": (
        "Figure 14. Correct calls a second over the share of reused tokens that is recomputed and the threshold at "
        "which a recomputed token counts as converged and gives its place to the next."
    ),
    "turns": (
        "Accuracy by turn. Left, right calls on recorded turns whose history grows: every system from exact chunks. "
        "Right, calls from turn 12 on when chunks are copied from corrected KV for k generations and then encoded "
        "exactly, against all row-layers computed, for serving and for encoding."
    ),
    "real": (
        "Divergence against compute on a real model and real text: KL of the next-token distribution to recompute's "
        "over the answer's tokens, against the share of row-layers computed."
    ),
    "fig03_real": (
        "Figure 3 from recorded agents: tokens of a prompt by kind, turn by turn, and how far text reused in order "
        "moved. These sessions are what could be had, not a sample (docs/real.md)."
    ),
    "throughput": (
        "Throughput in a closed loop by number of concurrent requests: all requests, and correctly answered ones. "
        "Bars are 95 % intervals over the loop's rounds. The reference backend serves in rounds, so its numbers are "
        "not the throughput of a serving engine; vLLM batches continuously, and a round is then as many answers in a "
        "row as there are clients."
    ),
}


def opening(summary: Summary, counted: str = "") -> list[str]:
    """The opening paragraph, one string per sentence; `counted` is the sentence with the counts by verdict."""
    return [*headline_lines(summary), _scope(summary), *filter(None, [counted])]


def headline_lines(summary: Summary) -> list[str]:
    """The headline, one sentence a line: accuracy, time to first token, and what could not be given."""
    return [*_accuracy(summary), *_speed(summary), *_missing(summary)]


def requirements(summary: Summary) -> list[dict[str, Any]]:
    """Requirements set before the run: the task separates the systems, and the method holds."""
    head = summary["headline"]

    def row(text: str, key: str, shown: str, met: bool | None) -> dict[str, Any]:
        verdict = "not run" if met is None else "met" if met else "not met"
        return {"text": text, "measured": shown, "verdict": verdict, "reason": summary["headline_missing"].get(key, "")}

    f1, naive, ours = (head[k] for k in ("recompute_f1", "naive_reuse_loss_points", "cacheslide_loss_points"))
    return [
        row("Recompute answers with F1 of at least 0.90 on every mix", "recompute_f1", number(f1, 3), _met(f1, 0.90)),
        row(
            "Naive reuse loses at least 20 points on every mix",
            "naive_reuse_loss_points",
            number(naive, 1),
            _met(naive, 20.0),
        ),
        row(
            "CacheSlide at 26 % of the reused rows is within 3 points of recompute on every mix",
            "cacheslide_loss_points",
            number(ours, 1),
            None if ours is None else ours <= 3.0,
        ),
    ]


def _met(value: float | None, least: float) -> bool | None:
    return None if value is None else value >= least


def _accuracy(summary: Summary) -> list[str]:
    head, notes, titles = summary["headline"], summary["headline_notes"], summary["titles"]
    out = []
    if head["recompute_f1"] is not None:
        n = notes["recompute_f1"]
        out.append(
            f"Full recompute answers with a mean F1 of {number(head['recompute_f1'], 3)} on the mix it finds harder "
            f"({n['mix']}; {n['n']} prompts, {n['values']} questions)."
        )
    if (naive := head["naive_reuse_loss_points"]) is not None:
        n = notes["naive_reuse_loss_points"]
        out.append(
            f"Reusing the turn before without correction {points(naive)} on the mix where it is hurt less "
            f"({n['mix']}, 95 % {interval(n, _one)})."
        )
    if (ours := head["cacheslide_loss_points"]) is not None:
        n = notes["cacheslide_loss_points"]
        within = "within" if ours <= 3.0 else "outside"
        out.append(
            f"CacheSlide, recomputing 26 % of the reused rows, {points(ours)} on its worse mix ({n['mix']}, 95 % "
            f"{interval(n, _one)}), {within} the 3 points that this study asks for."
        )
    if (best := head["best_policy_loss_points"]) is not None:
        n = notes["best_policy_loss_points"]
        share = f"computes {percent(head['best_policy_row_share'])} of all row-layers"
        if n["system"] == OURS:
            out.append(f"No other CacheSlide policy is better by more than {TIE_POINTS} points; CacheSlide {share}.")
        else:
            name = titles.get(n["system"], n["system"])
            out.append(f"The best CacheSlide policy here, “{name}”, {points(best)} on its worse mix and {share}.")
    return out


def _speed(summary: Summary) -> list[str]:
    rows = [r for r in summary["latency"] if r["system"] == OURS and r["ttft_ratio"]]
    if not rows:
        return []
    row = next((r for r in rows if r["tokens"] == LENGTH), rows[-1])
    ratio, ideal = row["ttft_ratio"], row["compute_fraction"]
    faster = "shorter" if ratio["high"] is not None and ratio["high"] < 1 else "not clearly shorter"
    return [
        f"At {row['tokens']:,} tokens CacheSlide's time to first token is {faster} than recompute's: "
        f"{number(ratio['value'])} of it (95 % {interval(ratio)}, {ratio['n']} prompts), where computing nothing but "
        f"its rows would give {number(ideal)}; on these prompts its F1 is {number(row['f1']['value'], 3)}."
    ]


def _missing(summary: Summary) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for key, reason in summary["headline_missing"].items():
        reasons.setdefault(reason, []).append(key)
    return [f"Not given: {', '.join(keys)} ({reason})." for reason, keys in reasons.items()]


def _scope(summary: Summary) -> str:
    where = {"cpu": "a CPU", "cuda": "a GPU"}.get(summary["conditions"]["device"], "this device")
    on_vllm = summary["conditions"].get("config", {}).get("backend") == "vllm"
    agents = summary["conditions"].get("config", {}).get("agents") if summary.get("agents") else None
    apart = [f"those about agents are of {agents['model']}"] if agents else []
    apart += (
        ["those of figure 12 and of SSD writes are from runs of their own (results/slide)"]
        if "slide" in summary
        else []
    )
    apart += ["figure 5's under RoPE are of recorded sessions (results/real)"] if "sessions" in summary else []
    others = f"; {', '.join(apart)}" if apart else ""
    how = "inside vLLM" if on_vllm else "in plain PyTorch without a serving engine"
    return (
        f"Numbers are of {summary['conditions']['model']} with this repository's prompts on {where}, {how}{others}. "
        "None is of the paper's models on its A100: absolute times are not comparable with the paper's, and ratios "
        "only as far as the same work is saved."
    )


def _one(x: float) -> str:
    return number(x, 1)
