"""What a process runs on: the other processes, the mesh, compiled programs."""
