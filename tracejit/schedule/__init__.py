"""Graph → Plan: fusion, index maps, memory. See kernel.py and plan.py for the data forms."""

from tracejit.schedule.build import schedule
from tracejit.schedule.sizes import parametrize, substitute
from tracejit.schedule.traffic import bytes_moved

__all__ = ["bytes_moved", "parametrize", "schedule", "substitute"]
