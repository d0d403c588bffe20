"""A client of OpenAI-compatible servers: what a user of the server sees, measured from outside."""
