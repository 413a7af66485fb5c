"""What makes a run survive the world: files, command lines, ranks, reports. A reader may skip it."""
