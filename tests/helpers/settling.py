"""Waits until chunks have their scores."""


def settle(served) -> None:
    """Step until nothing waits to be retained."""
    while served.core.scheduler.has_requests() or served.scheduler.retention.pending:
        served.core.step_fn()
