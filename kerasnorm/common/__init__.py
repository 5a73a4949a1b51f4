"""What every part leans on: errors, results, data, progress."""
