"""What proves the product and is imported by no command: the architecture check, mutations, raw loops, GPU trials."""
