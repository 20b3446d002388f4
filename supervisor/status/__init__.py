"""What the service tells of itself: JSON, Prometheus, a page. Everything is rendered from one ``Snapshot``."""
