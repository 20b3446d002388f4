"""Settings: one table, two doors (a typed one for the service, a light one for ``planner explain``), one renderer."""
