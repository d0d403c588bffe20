"""The cells of a reproduction in stages of a few minutes, each one engine or server, with estimated seconds.

Estimates lean to the long side: a stage must end within its minutes on a machine that has never run it. They rest on
`recompute_8k_s` and `start_first_s`; times of reuse are taken proportional to the tokens computed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from cacheslide.policies.base import ReusePolicy
from harness.experiments.serving.arms import Arm
from harness.experiments.serving.engine_ttft import PREFIX_CACHE
from harness.experiments.serving.reproduction.cells import IDEAL, RECOMPUTE, Cell, cells, grid_systems
from harness.experiments.serving.reproduction.settings import Settings
from harness.systems import VANILLA, policy_of

LEAST = 4  # repeats that a long cell is shortened to before its arms are split
SCRATCH_GIB = 10.0  # activations, prefetched rows and encoding beside vLLM's own budget (docs/vllm.md)
ROOM_GIB = 8.0  # activations and CUDA graphs within vLLM's budget
FREE = 0.95  # of the memory
REST_S = 2.0  # in which power at rest is taken, with the engine or server loaded
REQUEST_S, LAP_S, DECODE_S = 0.03, 0.4, 0.01  # around every request; a turn's reading; a token of a batch


@dataclass(frozen=True)
class Stage:
    """Cells that one engine, or the servers of one store device, measure in one call."""

    number: int
    name: str
    cells: tuple[Cell, ...]
    seconds: float  # beyond the start

    @property
    def file(self) -> str:
        """Name of its record file."""
        return f"{self.number:02}-{self.name}.jsonl"


@dataclass(frozen=True)
class Plan:
    """All stages, and what is left out with the reason."""

    settings: Settings
    stages: tuple[Stage, ...]
    left_out: dict[str, str]

    def seconds(self, stage: Stage, first: bool = False) -> float:
        """A stage's seconds with its starts; the first start on a machine compiles."""
        starts = len({c.device or c.arms[0] for c in stage.cells}) if stage.cells[0].kind == "server" else 1
        start = self.settings.start_first_s if first else self.settings.start_s
        return stage.seconds + start + (starts - 1) * self.settings.start_s


def plan(settings: Settings) -> Plan:
    """The plan: cells that fit, in stages that end in time even where they begin with a machine's first start."""
    wanted, left_out = cells(settings)
    limit = 60 * settings.stage_minutes
    fitting = []
    for cell in wanted:
        if why := too_large(settings, cell):
            left_out[cell.id] = why
        else:
            fitting += shortened(settings, cell, limit - settings.start_first_s)
    stages: list[Stage] = []
    for kind in dict.fromkeys(map(_engine, fitting)):
        open_cells: list[Cell] = []
        for cell in (c for c in fitting if _engine(c) == kind):
            if open_cells and _total(settings, [*open_cells, cell]) > limit:
                stages.append(_stage(settings, len(stages) + 1, open_cells))
                open_cells = []
            open_cells.append(cell)
        stages.append(_stage(settings, len(stages) + 1, open_cells))
    return Plan(settings, tuple(stages), left_out)


def _engine(cell: Cell) -> tuple[str, bool, bool]:
    """Cells of equal keys may share an engine, or a stage of servers."""
    kind = "engine" if cell.kind in ("ttft", "energy") else cell.kind
    return kind, cell.prefix_caching, cell.device is None


def _stage(settings: Settings, number: int, own: Sequence[Cell]) -> Stage:
    kind, cached, _ = _engine(own[0])
    name = {"engine": "engine" if cached else "engine-uncached"}.get(kind, kind)
    return Stage(number, name, tuple(own), sum(cell_seconds(settings, c) for c in own))


def _total(settings: Settings, own: Sequence[Cell]) -> float:
    return Plan(settings, (), {}).seconds(_stage(settings, 0, own), first=True)


def too_large(settings: Settings, cell: Cell) -> str:
    """Why a cell is not measured; empty if it is."""
    if settings.longest and cell.tokens > settings.longest:
        return f"prompts of at most {settings.longest} tokens in this study"
    if settings.most_requests and cell.batch > settings.most_requests:
        return f"at most {settings.most_requests} requests at once in this study"
    need = settings.weight_gib + kv_gib(settings, cell) + ROOM_GIB + store_gib(settings, cell) + SCRATCH_GIB
    if need > FREE * settings.gpu_gib:
        return f"does not fit: {need:.0f} GiB needed of {settings.gpu_gib:.0f} on each GPU"
    return ""


def kv_gib(settings: Settings, cell: Cell) -> float:
    """vLLM's paged KV of a cell's requests at once, a quarter more for what its prefix cache holds."""
    answer = settings.output_tokens if cell.kind == "server" else 64
    return 1.25 * cell.batch * (cell.tokens + answer) * settings.token_gib


def store_gib(settings: Settings, cell: Cell) -> float:
    """Chunk KV of a cell on each GPU: every recipe's, and a server's for every client; a tenth more."""
    if (cell.device is None and cell.kind == "server") or settings.store_device == "cpu":
        return 0.0
    policies = policies_of(settings, cell)
    copies = len({p.recipe for p in policies}) * (cell.batch if cell.kind == "server" else 1)
    inputs = max((len(p.probe_layers) for p in policies), default=0) / (2 * settings.layers)  # about a K or V each
    return 1.1 * cell.tokens * cell.reused * settings.token_gib * (copies + 4 * inputs)


def memory_share(settings: Settings, own: Sequence[Cell]) -> float:
    """vLLM's `gpu_memory_utilization` for cells that share an engine or a server."""
    room = settings.weight_gib + max(kv_gib(settings, cell) for cell in own) + ROOM_GIB
    return round(min(0.92, room / settings.gpu_gib), 3)


def store_room(settings: Settings, own: Sequence[Cell]) -> float:
    """The connector's `store_gib` for such cells."""
    return round((max(store_gib(settings, cell) for cell in own) or 16.0) + 1, 1)


def policies_of(settings: Settings, cell: Cell) -> list[ReusePolicy]:
    """The policies of a cell's arms at their ratios."""
    grid = grid_systems(settings) if cell.kind == "grid" else {}
    out = []
    for name in cell.arms:
        if name in (RECOMPUTE, PREFIX_CACHE, IDEAL) or name in VANILLA:
            continue
        arm = Arm.parse(name)
        policy = grid.get(arm.system) or policy_of(arm.system)
        out.append(policy if arm.ratio is None else policy.at_ratio(arm.ratio))
    return out


def recompute_s(settings: Settings, tokens: int) -> float:
    """Seconds of an exact prefill: by tokens, and a tenth of 8k's by their square (measured: 4k to 32k at 7B)."""
    eighths = tokens / 8192
    return settings.recompute_8k_s * eighths * (0.905 + 0.095 * eighths)


def share(settings: Settings, policy: ReusePolicy, reused: float) -> float:
    """Part of recompute's time that a request under `policy` is taken to need."""
    rule = policy.correction
    ratio = rule.total_ratio if rule.total_ratio is not None else 0.1
    layers = 0 if rule.selection_layer is None else (rule.selection_layer + 1) / settings.layers
    rows = (1 - reused) + ratio * reused
    return min(1.3, 0.05 + 1.4 * (layers + (1 - layers) * rows))


def cell_seconds(settings: Settings, cell: Cell) -> float:
    """Seconds of a cell: filling the store, then its turns."""
    once, policies = recompute_s(settings, cell.tokens), policies_of(settings, cell)
    recipes = len({p.recipe for p in policies})
    if cell.kind == "server":
        reuse = share(settings, policies[0], cell.reused) if policies else 1.0
        one = (once * reuse + REQUEST_S) * cell.batch + settings.output_tokens * DECODE_S
        return 3 * once * cell.batch + (server_turns(settings, cell) + settings.warmups) * one + 2.0
    fill = 2 * recipes * once + 0.3 * len(policies) * once
    parts = [share(settings, p, cell.reused) for p in policies]
    parts += [
        {RECOMPUTE: 1.0, PREFIX_CACHE: 1.0, IDEAL: 0.6}[a] for a in cell.arms if a in (RECOMPUTE, PREFIX_CACHE, IDEAL)
    ]
    turn = sum(part * once * cell.batch + REQUEST_S * cell.batch for part in parts) + LAP_S
    if cell.kind == "energy":
        return fill + settings.warmups * turn + cell.repeats * len(parts) * (settings.energy_s + max(parts) * once)
    return fill + (settings.warmups + cell.repeats) * turn


def _turns_more(settings: Settings, cell: Cell) -> int:
    """A single client gets more turns, so that its percentiles rest on as many requests."""
    return max(1, min(4, max(settings.clients) // cell.batch))


def server_turns(settings: Settings, cell: Cell) -> int:
    """Timed turns a client in a server's cell."""
    return settings.turns * _turns_more(settings, cell)


def shortened(settings: Settings, cell: Cell, limit: float) -> Iterable[Cell]:
    """A cell with fewer repeats, or in parts with recompute in each, so that every one ends within `limit` seconds."""
    if cell.kind != "server" and cell.batch > 1:
        cell = replace(cell, repeats=max(min(cell.repeats, LEAST), cell.repeats // 2))
    while cell.repeats > LEAST and cell_seconds(settings, cell) > limit:
        cell = replace(cell, repeats=cell.repeats - 1)
    arms = [a for a in cell.arms if a != RECOMPUTE]
    out = [cell]
    for parts in range(1, len(arms) + 1):
        size = ceil(len(arms) / parts)
        groups = [arms[i : i + size] for i in range(0, len(arms), size)]
        if cell.kind != "server":
            groups = [[RECOMPUTE, *group] for group in groups]
        out = [replace(cell, arms=tuple(group), part=number) for number, group in enumerate(groups)]
        if all(cell_seconds(settings, c) <= limit for c in out):
            return out
    return out
