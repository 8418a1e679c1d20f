"""Tasks of the quality benchmark: real text, fixed splits by module, and a dense model trained on each."""

from tasks.base import TASKS, Task, build_task

__all__ = ["TASKS", "Task", "build_task"]
