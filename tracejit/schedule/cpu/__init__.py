"""Plan → CpuPlan: what the C executor runs, before any C is printed (see lower.py, plan.py)."""
