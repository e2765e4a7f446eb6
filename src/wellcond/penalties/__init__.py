"""What is asked of a weight: penalties with a gradient, hard limits, and their exact forms."""
