"""What makes a run survive the world: files, flags, ranks, reports. A reader may skip it."""
