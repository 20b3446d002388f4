"""Models on disk as Ollama lays them out: read in place, pulled from registries, created, copied, deleted."""
