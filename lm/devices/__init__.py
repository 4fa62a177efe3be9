"""Where computation happens: meshes, processes, preemption."""
