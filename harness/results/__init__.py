"""Results: one versioned record schema, provenance, statistics, and the summary that figures read."""
