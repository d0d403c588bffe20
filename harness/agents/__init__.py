"""Agents as real loops: template, model output, tool call, next turn. See docs/agents.md."""
