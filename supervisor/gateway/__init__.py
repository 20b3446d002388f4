"""The HTTP side: what llama-server answers passed through, Ollama's API over it, what operators ask, the status."""
