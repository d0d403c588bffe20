"""Every registered system has every member of the protocols that its parts implement."""

import pytest

from cacheslide.core.keys import Keying
from cacheslide.policies.base import Correction, Encoding
from cacheslide.policies.memory import Memory
from cacheslide.policies.registry import load_policy, policy_names

PARTS = {"correction": Correction, "encoding": Encoding, "keying": Keying, "memory": Memory}


def members(protocol: type) -> set[str]:
    """Attributes and methods of a protocol."""
    return {*protocol.__annotations__, *(name for name in vars(protocol) if not name.startswith("_"))}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", policy_names())
def test_no_part_of_a_system_lacks_a_member(name, part):
    implemented = getattr(load_policy(name), part)
    lacking = {m for m in members(PARTS[part]) if not hasattr(implemented, m)}
    assert members(PARTS[part]) and not lacking


@pytest.mark.parametrize("name", policy_names())
def test_a_system_tells_whether_it_asks(name):
    assert load_policy(name).asks is (name == "prophetkv")
