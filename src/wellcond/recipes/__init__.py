"""What acts, where a file stores parts: codes and scales, a direction and lengths, a mask."""
