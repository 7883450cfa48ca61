"""Read and write files safely, with locks, atomic writes and checks of model folders."""
