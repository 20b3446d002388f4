"""Starts llama-server with the planner's plan, keeps it alive and serves many models to many clients."""
