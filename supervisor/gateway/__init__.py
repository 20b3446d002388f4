"""The HTTP side: OpenAI's API passed through to the runners, and the status endpoints."""
