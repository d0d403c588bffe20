"""The measurements of the study: each takes a backend, examples and policies, and writes records."""
