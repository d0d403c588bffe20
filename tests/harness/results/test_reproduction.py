"""Tables and headline of the GPU reproduction, from made records of the whole plans at 7B and 70B."""

import json

import pytest

from cacheslide.errors import DataError
from harness.results import reproduction
from harness.results.divergence_of import kl_of, kl_rows
from harness.results.reproduction import HEADLINE, headline, read_stages, summarise, tabulated
from tests.helpers.made_reproduction import make_records, settings, short_plan, speed
from tests.helpers.places import ROOT
from tests.helpers.readings import BUSY

REAL, CONFIRM = (ROOT / f"results/real/{name}.json" for name in ("summary", "confirm"))
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    names = ("h200", "h200-x2")
    return [make_records(root / n, short_plan(n)) for n in names]


@pytest.fixture(scope="module")
def made(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    claims, frontier = out / "claims.json", out / "frontier.json"
    claims.write_text(
        json.dumps({"counts": {"reproduced": 1, "partly": 9, "not reproduced": 3, "not testable here": 2}})
    )
    rows = [
        {"setting": n, "f1": {"value": v}} for n, v in (("recompute", 0.8), ("mixed, two thirds remembered, 15 %", 0.6))
    ]
    frontier.write_text(json.dumps({"rows": rows}))
    return summarise(folders, REAL, CONFIRM, frontier, claims)


def test_the_headline_has_the_numbers_of_the_records(made):
    numbers = made["headline"]
    assert tuple(numbers) == HEADLINE and None not in numbers.values() and not made["missing"]
    ours = 1 / speed("cacheslide_mixed", 0.9)
    for key in ("ttft_ratio_8k_7b", "ttft_ratio_16k_7b", "ttft_ratio_8k_70b", "mean_ttft_ratio_batch8",
                "joules_per_request_ratio_8k"):  # fmt: skip
        assert numbers[key] == pytest.approx(ours), key
    assert numbers["systems_timed_7b"] == 6 and numbers["claims_not_testable"] == 2
    rate = {r["system"]: r for r in made["runs"][0]["servers"] if r["clients"] == 8}
    ratio = rate["cacheslide_mixed"]["requests_per_second"] / rate["vllm"]["requests_per_second"]
    assert numbers["correct_requests_ratio_batch8"] == pytest.approx(ratio * 0.75)


def test_rows_have_percentiles_energy_pages_and_rate(made):
    run = made["runs"][0]
    row = next(r for r in run["ttft"] if r["system"] == "epic" and r["batch"] == 8)
    each = 8192 / 40_000 * speed("epic", 0.9)
    assert row["requests_ms"]["median"]["value"] == pytest.approx(1e3 * each * 4.5, rel=0.05)
    assert row["requests_ms"]["p99"]["value"] > row["requests_ms"]["p95"]["value"] > row["requests_ms"]["mean"]["value"]
    assert row["gpu"]["sm_mhz"] == [1900, 1950, 1980] and row["gpu"]["memory_gib"] == 40
    energy = {r["system"]: r for r in run["energy"]}
    alone = 8192 / 40_000
    assert energy["recompute"]["joules"]["value"] == pytest.approx(500 * alone, rel=0.02)
    assert energy["recompute"]["joules_above_idle"]["value"] == pytest.approx(420 * alone, rel=0.02)
    server = next(r for r in run["servers"] if (r["system"], r["clients"]) == ("epic", 8))
    assert server["pages_gib"] == pytest.approx(0.1 * 16000 * 128 / 2**20) and server["chunk_gib"] == 8
    assert sum(server["rate"]["per_second"]) <= 16 and server["ttft_p99"]["value"] >= server["ttft_mean"]["value"]
    assert server["tpot_mean"]["value"] == pytest.approx(0.25) and server["ttft_ratio"]["value"] < 1
    assert server["joules_per_request"] == pytest.approx(1200 / 16)
    assert {r["kind"] for r in run["ttft"]} == {"ttft", "grid"} and not run["missing_cells"]
    assert "kvcomm" in run["left_out"]


def test_rivals_count_at_settings_with_at_most_twice_our_divergence(made):
    [at_8k] = [r for r in made["runs"][0]["rivals"]["summary"] if r["tokens"] == 8192]
    kl = kl_rows(*(json.loads(p.read_text()) for p in (REAL, CONFIRM)))
    ours = kl_of("cacheslide_mixed", kl)
    assert ours["rule"] == "Mixed, two thirds remembered 15 %" and ours["measured_in"].endswith("confirm.json")
    close = at_8k["rivals_within_kl"]
    assert "context_cache" in close and not {"epic", "cacheblend", "naive_reuse"} & set(close)
    assert all(kl_of(name, kl)["value"] <= 2 * ours["value"] for name in close)
    ratio = at_8k["fastest_rival_over_ours"]["value"]
    assert ratio == pytest.approx(min(speed(n, 0.9) for n in close) / speed("cacheslide_mixed", 0.9))
    assert made["headline"]["ttft_over_best_rival_8k"] == ratio
    one, other = at_8k["equal_compute"]["compute_fraction"]
    assert abs(one - other) <= 0.05


def test_divergence_is_of_the_same_rule_at_about_the_same_ratio():
    rows = {"CacheBlend, by K 15 % at layer 1": {"value": 1}, "First tokens 10 %": {"value": 2}, "EPIC 8": {"value": 3}}
    assert kl_of("cacheblend", rows)["value"] == 1  # its own 18 %
    assert kl_of("cacheblend@0.3", rows) is None and kl_of("cacheslide_first@0.1", rows)["value"] == 2
    assert (
        kl_of("epic_8", rows)["value"] == 3 and kl_of("epic_8@0.1", rows) is None and kl_of("recompute", rows) is None
    )


def test_what_was_not_measured_is_null_with_the_reason(folders):
    only = tabulated(folders[1], {})
    numbers, missing = headline([only], {}, None)
    assert numbers["ttft_ratio_8k_70b"] and numbers["ttft_ratio_8k_7b"] is None and numbers["claims_partly"] is None
    assert missing["claims_partly"].startswith("no claims table") and set(missing) == {
        key for key, value in numbers.items() if value is None
    }


def test_disturbed_turns_give_no_ratio_and_missing_cells_are_named(tmp_path):
    own = settings(tmp_path, dtype="bfloat16", base={"tokens": 8192, "batch": 1, "reused": 0.9}, tokens=[8192])
    folder = make_records(tmp_path / "records", own, BUSY)
    stage = sorted(folder.glob("*.jsonl"))[-1]
    stage.unlink()
    run = tabulated(folder, {})
    assert run["missing_cells"] and not any("recompute_over_ttft" in r for r in run["ttft"])
    assert headline([run], {}, None)[0]["ttft_ratio_8k_7b"] is None
    assert all(r["fastest_rival_over_ours"] is None for r in run["rivals"]["summary"])


def test_unfinished_stages_are_read_and_a_folder_without_any_is_an_error(tmp_path, folders):
    with pytest.raises(DataError, match="holds no stage"):
        read_stages(tmp_path)
    whole = sorted(folders[1].glob("*.jsonl"))[0]
    (tmp_path / f".{whole.name}.part").write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:3]))
    assert len(read_stages(tmp_path)) == 1
    other = sorted(folders[0].glob("*.jsonl"))[1]
    (tmp_path / other.name).write_bytes(other.read_bytes())
    with pytest.raises(DataError, match="different settings"):
        read_stages(tmp_path)


def test_one_command_writes_the_file(tmp_path, folders, capsys):
    given = ["--real", str(REAL), "--confirm", str(CONFIRM), "--out", str(tmp_path / "r.json")]
    reproduction.main(["--records", str(folders[1]), *given])
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "r.json").read_text())["headline"]
