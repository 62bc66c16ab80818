"""Programs to read and run; each says in its first lines how."""
