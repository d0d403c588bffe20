"""Names of the previous version, accepted from old clients and records and given to old clients, for one version.

`REQUEST`, `SERVER`, `CONFIGURATION`, `CONFIGURED_AGENTS` and `SERVING` rename keys of a request's annotations, of a
server's options and of the study's configurations; `RECEIPT` those of receipts, records and counters; `RECORD` those of
records alone; `TENSOR` tensors of an adapter's files.
"""

from collections.abc import Mapping
from typing import Any

REQUEST = {"share": "recompute_ratio"}
SERVER = {"rows_per_step": "tokens_per_step"}
CONFIGURATION = {"topk": "recompute_ratio"}
CONFIGURED_AGENTS = {"turns": {"kept": "retained"}, "grid": {"shares": "recompute_ratios"}}
SERVING = {"shares": "recompute_ratios"}
RECEIPT = {
    "rows": "tokens",
    "rows_reused": "tokens_reused",
    "rows_recomputed": "tokens_recomputed",
    "rows_per_layer": "tokens_per_layer",
    "rows_prefix_cached": "tokens_prefix_cached",
    "row_layer_share": "compute_fraction",
}
RECORD = {
    "share": "recompute_ratio",
    "shares": "recompute_ratios",
    "masses": "slot_offsets",
    "live_mass_std_by_layer": "live_offset_std_by_layer",
    "stock": "vanilla",
    "nothing_kept": "nothing_retained",
    "kept_on_model": "retained_on_model",
    "kept_on_cpu": "retained_on_cpu",
    "ratio_to_stock": "ratio_to_row_attention",
    "cope_decode_vs_stock": "cope_decode_vs_row_attention",
}
TENSOR = {"masses": "slot_offsets"}
_ALL = RECEIPT | RECORD
# Names that are ambiguous are changed only beside one of these keys.
_BESIDE = {
    "rows": {"rows_reused", "rows_recomputed", "tokens_reused", "tokens_recomputed"},
    "stock": {"plugin"},
    "share": {"layer", "tau", "head_dim", "system"},
    "shares": {"taus", "warmups"},
}


def options(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The options under today's names; ValueError if one is given under both its names."""
    for old, new in names.items():
        if old in given and new in given:
            raise ValueError(f"{old} is the old name of {new}: give one of them")
    return {names.get(name, name): value for name, value in given.items()}


def receipt_for_all(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """A receipt that clients of the previous version can read too: old names beside today's."""
    return {old: receipt[new] for old, new in RECEIPT.items() if new in receipt} | dict(receipt)


def record(value: Any) -> Any:
    """A record, or part of one, under today's names; an old name beside its new one is dropped.

    "rows" is changed only beside other counts of a receipt, and "stock" only beside the engine with the plugin.
    """
    if isinstance(value, list):
        return [record(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    out = {}
    for name, inner in value.items():
        beside = _BESIDE.get(name)
        new = _ALL.get(name) if beside is None or beside & value.keys() else None
        if new is None:
            out[name] = record(inner)
        elif new not in value:
            out[new] = record(inner)
    return out
