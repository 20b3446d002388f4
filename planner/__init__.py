"""What fits where: from a GGUF header and the devices to a plan that llama-server can be started with."""
