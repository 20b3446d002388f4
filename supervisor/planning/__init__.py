"""Planning for the service: a process of its own, which looks at the machine, reads headers and searches.

``process`` is our end of it, ``worker`` the other, ``messages`` what they say. ``model_request`` is what is asked of
the planner for a model, ``placing`` puts it beside the runners that are there, on the machine that ``planned_machine``
leaves it; ``header_details`` are only to be shown.
"""
