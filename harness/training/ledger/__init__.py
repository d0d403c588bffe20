"""Training of the deep, thin model that answers the ledger task."""
