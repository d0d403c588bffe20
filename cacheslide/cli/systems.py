"""`cacheslide systems`: the registered reuse systems with their four parts."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Set the command `systems`, which has no options."""
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from cacheslide.policies.registry import load_policy, policy_names

    for name in policy_names():
        policy = load_policy(name)
        parts = (policy.keying, policy.kind, policy.placement, policy.correction)
        print(f"{name:24} {policy.title}\n{'':24} {' · '.join(map(str, parts))}")
    return 0
