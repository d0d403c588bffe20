"""The workflow's steps for agents: each measures one section of `agents:` into one record file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from baselines.window_padding import pad
from cacheslide.core.keys import NoKeying
from cacheslide.errors import ConfigError
from cacheslide.policies.top_deviation import Swap, TopDeviation
from harness.agents.registry import entry
from harness.agents.sandbox import missing
from harness.agents.trace import prompt_digest, read_episodes, sha256, write_episodes
from harness.backends.reference import ReferenceBackend
from harness.experiments.agents.load import measure_load, measure_series
from harness.experiments.agents.replay import Variant, record, replay_variants
from harness.experiments.study.steps import settings_of
from harness.results.provenance import config_hash, machine
from harness.results.records import RecordWriter
from harness.systems import resolve

Config = Mapping[str, Any]
SECTIONS = ("replay", "windows", "turns", "load", "series", "grid")


def agents_backend(config: Config, threads: int) -> ReferenceBackend:
    """Backend with the agents' model, which may differ from the study's."""
    torch.set_num_threads(threads)
    return ReferenceBackend(config["agents"]["model"], config["dtype"], config["device"])


def variants_of(config: Config, section: str) -> list[Variant]:
    """The variants that a section compares, from its settings."""
    agents = config["agents"]
    own = agents[section]
    policies = resolve(own.get("systems") or agents["systems"], layer=agents["layer"])
    plain = [Variant(p.name, p.title, p) for p in policies]
    if section == "windows":
        return plain + [v for w in own["windows"] for v in _padded(w)]
    if section == "turns":
        retained = resolve(own["retained"], layer=agents["layer"])
        return plain + [
            Variant(f"{p.name}@{k}", f"{p.title}, limit {k}", p, k) for p in retained for k in own["limits"]
        ]
    if section == "grid":
        [policy] = resolve(["cacheslide"], layer=agents["layer"])
        return [
            Variant(
                f"{recompute_ratio}@{tau}",
                policy.title,
                replace(policy, correction=_rule(policy, recompute_ratio, tau, own["every"])),
            )
            for recompute_ratio in own["recompute_ratios"]
            for tau in own["taus"]
        ]
    return plain


def _rule(policy, recompute_ratio: float, tau: float, every: int) -> TopDeviation:
    return replace(policy.correction, recompute_ratio=recompute_ratio, swap=Swap(tau, every), promote=())


def _padded(window: int) -> list[Variant]:
    """Window padding with reuse in place, and the same prompts computed in full, to measure the cost of padding."""
    [policy] = resolve(["window_padding"])
    reused = replace(policy, transform=partial(pad, window=window))
    full = replace(reused, name="window_recompute", keying=NoKeying())
    return [
        Variant(f"window@{window}", f"window of {window} tokens", reused),
        Variant(f"window_recompute@{window}", f"window of {window} tokens, recomputed", full),
    ]


def step_traces(config: Config, output: str) -> None:
    """Record the oracle's episodes of every agent under `agents.traces`; an agent without a sandbox is left out."""
    found, left_out = [], []
    for agent, wanted in config["agents"]["traces"].items():
        _, episodes = record(agent, seed=config["seed"], **wanted)
        found += episodes
        if not episodes:
            left_out.append(agent)
    if not found:
        raise ConfigError(f"agents.traces: nothing could be recorded: {missing()}")
    if left_out:
        print(f"agents: left out {', '.join(left_out)}: {missing()}")
    write_episodes(Path(output), found, {"seed": config["seed"], "left_out": left_out, "teacher": "oracle"})


def step_agents(config: Config, section: str, output: str, threads: int, traces: str | None = None) -> None:
    """Measure one section; `traces` is the file of `step_traces`, for the section `replay`."""
    if section not in SECTIONS:
        raise ConfigError(f"unknown section {section!r} of agents (known: {', '.join(SECTIONS)})")
    own, seed = config["agents"][section], config["seed"]
    backend, variants = agents_backend(config, threads), variants_of(config, section)
    settings = settings_of(config)
    tasks, episodes = _work(config, section, traces)
    prompts = sha256("".join(prompt_digest(s.segments) for e in episodes for s in e.steps))
    identity = {"config_hash": config_hash(dict(config)), "data_hash": prompts, "measured_on": machine()}
    about = {"run": config["run"], "section": section, "model": config["agents"]["model"], **own}
    names = {"order": [v.name for v in variants], "titles": {v.name: v.title for v in variants}}
    writer = RecordWriter(output, identity | about | names)
    if section == "load":
        shape = {k: own[k] for k in ("parallel", "widths", "repeats")}
        measure_load(backend, variants, tasks, episodes, writer, settings, seed, **shape)
    elif section == "series":
        shape = {k: own[k] for k in ("concurrent", "slices")}
        measure_series(backend, variants, tasks, episodes, writer, settings, seed, **shape)
    else:
        by_id = {t.id: t for t in tasks} if section == "replay" and own["own"] else None
        replay_variants(backend, variants, episodes, writer, settings, seed, by_id, progress=f"agents, {section}")
    writer.finish()


def _work(config: Config, section: str, traces: str | None) -> tuple[list[Any], Sequence[Any]]:
    """Tasks and the recorded episodes on them."""
    own, seed = config["agents"][section], config["seed"]
    if section != "replay":
        return _joined([record(agent, seed=seed, **wanted) for agent, wanted in own["tasks"].items()])
    episodes = read_episodes(Path(traces))
    limit = own["episodes"]
    some = [e for a in config["agents"]["traces"] for e in [x for x in episodes if x.agent == a][:limit]]
    tasks = []
    for agent, wanted in config["agents"]["traces"].items():
        tasks += entry(agent).tasks("test", seed, **wanted)
    return tasks, some


def _joined(parts: Sequence[tuple[list, list]]) -> tuple[list, list]:
    return [t for tasks, _ in parts for t in tasks], [e for _, episodes in parts for e in episodes]
