"""The campaigns of hostile bodies try what they say, and notice what they look for."""

import json

import pytest

pytest.importorskip("vllm")

from cacheslide.vllm.frontend import separators
from cacheslide.vllm.scheduler import planner as planning
from harness.robustness import bodies
from harness.robustness.http_bodies import Attack, Client

pytestmark = pytest.mark.slow


@pytest.fixture
def trial():
    return bodies.Trial(seed=5)


def tried(trial, number: int) -> dict[str, int]:
    for _ in range(number):
        trial.one()
    return trial.counts


@pytest.mark.fault("malformed_marks")
def test_bodies_are_refused_or_planned(trial):
    counts = tried(trial, 2000)
    assert counts["bodies_tried"] == 2000 == counts["refused"] + counts["planned"], trial.examples
    assert counts["refused"] > 600 and counts["planned"] > 200 and len(trial.owners) > 100
    assert not counts["non_400"] + counts["wrong_plans"] + counts["slow_bodies"], trial.examples


def test_an_exception_that_is_no_refusal_is_counted(trial, monkeypatch):
    def broken(*args):
        raise TypeError("unhashable")

    monkeypatch.setattr(separators, "_roles", broken)
    assert tried(trial, 600)["non_400"] > 5 and "TypeError: unhashable" in trial.examples[0]


def test_a_plan_of_other_tokens_or_another_tenant_is_counted(trial, monkeypatch):
    monkeypatch.setattr(planning, "tenant_of", lambda *parts: "\0".join(parts))
    counts = tried(trial, 3000)
    assert counts["wrong_plans"] > 0 and "has a chunk of" in trial.examples[0]
    trial = bodies.Trial(seed=6)
    monkeypatch.setattr(bodies.Trial, "_planned", _of_more_tokens(bodies.Trial._planned))
    assert tried(trial, 600)["wrong_plans"] > 5


def _of_more_tokens(plain):
    def planned(self, request, params, asked, salt):
        plan = self.planner.plan

        def longer(sent):
            tracked = plan(sent)
            if tracked is not None:
                tracked.rows += 1
            return tracked

        self.planner.plan = longer
        try:
            return plain(self, request, params, asked, salt)
        finally:
            self.planner.plan = plan

    return planned


def test_a_slow_check_is_counted(trial, monkeypatch):
    monkeypatch.setattr(bodies, "SLOW", (0.0, 0.0))
    assert tried(trial, 20)["slow_bodies"] > 10


def test_an_attack_reaches_every_endpoint_and_kind_of_body():
    attack = Attack(3)
    sent = [attack.body() for _ in range(600)]
    assert len({path for path, _ in sent}) == 8
    parsed = []
    for _, raw in sent:
        try:
            parsed.append(json.loads(raw))
        except (ValueError, RecursionError):
            continue
    assert 30 < len(sent) - len(parsed) < 300 or len(parsed) > 500
    for key in ("stream", "use_beam_search", "cacheslide", "extra_body", "vllm_xargs", "cache_salt"):
        assert any(isinstance(body, dict) and key in body for body in parsed), key
    assert [Attack(3).body() for _ in range(1)] == sent[:1]  # the same seed sends the same


def test_no_answer_is_no_status():
    assert Client(1).send("/health", None) == (0, b"")
