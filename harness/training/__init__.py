"""Training of the small model that answers the synthetic tasks."""
