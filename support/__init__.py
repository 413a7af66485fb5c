"""What a run needs around its six files: safe writes, flags, processes, reports."""
