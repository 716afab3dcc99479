"""Running a plan's tasks in worker processes: on this machine, on each of its devices, or on a Dask cluster."""
