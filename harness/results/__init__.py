"""Results: a versioned record schema, provenance, statistics, and the summary that figures and report use."""
