"""What makes it a service of its machine: one at a time, its socket, its log, systemd, the files of its operator."""
