"""A client of OpenAI-compatible servers, which measures them from outside."""
