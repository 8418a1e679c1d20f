"""Tasks of the quality benchmark: real text, fixed splits by module, and a dense model trained on each."""

from tasks.base import TASKS, Task, build_task
from tasks.hub import HUB_TASKS

__all__ = ["HUB_TASKS", "TASKS", "Task", "build_task"]
