"""Turns this machine, or one that the user names, into ``planner.types``. Absent libraries mean absent devices."""
