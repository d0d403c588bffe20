"""The paper's claims about time and answers (figure 10, the abstract), with the rules of `claims_speed.py`."""

from harness.report import claims_cope
from harness.report import claims_speed as rules
from harness.report.verdicts import Basis, Claim, not_run

_SLOWER = "not reproduced where CacheSlide is slower than the rival"
_FACTOR = (
    "a part holds when its value reaches the paper's lower end and its interval leaves out 1; reproduced: both parts "
    f"hold; {_SLOWER} or both intervals reach 1; partly: anything between"
)
_APPROXIMATE = f"TTFT at the longest timed length, F1 on the mix with the smaller ratio; {_FACTOR}"
_ONE_FACTOR = (
    "reproduced: the value reaches the paper's lower end and the interval leaves out {no_effect}; "
    "partly: only the latter; not reproduced: neither"
)

THIS_MODEL = (
    Claim(
        "fig10-contextcache",
        "10, this model",
        "CacheSlide against ContextCache: lower TTFT, negligible accuracy loss",
        "TTFT 2.4–3.3× below",
        f"TTFT at the longest timed length; a loss of at most 3 points with its interval on the worse mix; {_FACTOR}",
        "fig10",
        rules.against_exact,
        Basis.STRESS,
        "10",
    ),
    Claim(
        "fig10-cacheblend-stale",
        "10, this model",
        "CacheSlide against CacheBlend with stale positions, as in the paper",
        "TTFT 1.21–2.11× below, 1.97–2.28× its accuracy",
        f"the re-rotated form is timed where this one was not; {_APPROXIMATE}",
        "fig10",
        rules.against_approximate("cacheblend_stale", 1.21, 1.97, twin="cacheblend"),
        Basis.STRESS,
        "10",
    ),
    Claim(
        "fig10-cacheblend",
        "10, this model",
        "The same against CacheBlend with re-rotated keys, its fairer form",
        "not in the paper; judged by the same numbers",
        _APPROXIMATE,
        "fig10",
        rules.against_approximate("cacheblend", 1.21, 1.97),
        Basis.STRESS,
        "",
    ),
    Claim(
        "fig10-promptcache",
        "10, this model",
        "CacheSlide against PromptCache",
        "TTFT 1.12–2.45× below, 1.41–3.95× its accuracy",
        _APPROXIMATE,
        "fig10",
        rules.against_approximate("prompt_cache", 1.12, 1.41),
        Basis.STRESS,
        "10",
    ),
)
OTHER_MODELS = (
    Claim(
        "fig10-cope",
        "10, this model",
        "CacheSlide on a CoPE model: negligible accuracy loss",
        "CoPE is the paper's own setting",
        "against recompute on the native model, worse mix; reproduced: a loss of at most 3 points with its interval; "
        "partly: the value alone; not reproduced: a larger one",
        "fig10",
        claims_cope.keeps_accuracy,
        Basis.STRESS,
        "10",
    ),
    Claim(
        "fig10-mistral",
        "10, Mistral-7B",
        "The same on Mistral-7B",
        "as above",
        "none yet",
        "",
        not_run(
            "its weights are not part of this repository; config/checkpoint.yaml runs it where they are. TTFT of its "
            "shape, with random weights: results/h200"
        ),
        Basis.NOTHING,
        "10",
    ),
    Claim(
        "fig10-llama",
        "10, Llama-3-70B",
        "The same on Llama-3-70B",
        "as above",
        "none yet",
        "",
        not_run(
            "its weights are not part of this repository, and it needs two large GPUs. TTFT of its shape, with random "
            "weights: results/h200"
        ),
        Basis.NOTHING,
        "10",
    ),
    Claim(
        "fig10-mpt",
        "10, MPT-30B",
        "The same on MPT-30B",
        "as above",
        "none yet",
        "",
        not_run("an ALiBi model, which this engine does not serve"),
        Basis.NOTHING,
        "10",
    ),
)
HEADLINE = (
    Claim(
        "headline-latency",
        "abstract",
        "Latency goes down",
        "3.11–4.3×",
        "against recompute, which favours the claim most, at the longest timed length; "
        + _ONE_FACTOR.format(no_effect="1"),
        "fig10",
        rules.headline_latency,
        Basis.STRESS,
        "latency",
    ),
    Claim(
        "headline-throughput",
        "abstract",
        "Throughput goes up",
        "3.5–5.8×",
        "requests a second against recompute at the largest batch served in at least 5 rounds, beside ContextCache, "
        "which reuses the system prompt alone and is the control; not judged without either; "
        + _ONE_FACTOR.format(no_effect="1 and what the control's interval reaches"),
        "throughput",
        rules.headline_throughput,
        Basis.STRESS,
        "throughput",
    ),
)
