"""Synthetic tasks of the agents, in the words of harness.tasks.synthetic; names, values and bug sites by split."""

from harness.agents.tasks.chat import chat_tasks
from harness.agents.tasks.fixes import fix_tasks
from harness.agents.tasks.functions import function_tasks
from harness.agents.tasks.qa import qa_tasks

__all__ = ["chat_tasks", "fix_tasks", "function_tasks", "qa_tasks"]
