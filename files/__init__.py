"""Read and write files safely: locks, atomic writes, checks of model folders."""
