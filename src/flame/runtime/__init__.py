"""What every job shares: command line, progress, files that are complete or absent. No science."""
