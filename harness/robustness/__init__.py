"""Campaigns of hostile inputs: what was tried, how much of it, and what broke."""
