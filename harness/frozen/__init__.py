"""Regression check: fixed requests in both hosts and kernel calls, whose outcomes a refactoring must not change."""
