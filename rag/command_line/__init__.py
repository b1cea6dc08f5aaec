"""How a script reads its flags, reports mistakes and ends."""
