"""What there is to serve: found in its places, known by headers, as the operator's models file would have it."""
