"""What every job shares: command line, progress, files that are whole or not there. No science."""
