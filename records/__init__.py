"""Record folders, and the tools that make, check and score them."""
