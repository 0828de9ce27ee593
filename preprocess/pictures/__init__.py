"""From a file of a source to crops: read, decode, cut."""
