"""Ollama's API over the same runners: requests become llama-server's, answers become Ollama's again."""
