"""Running a plan: task bodies, executors, and the driver that commits and resumes."""
