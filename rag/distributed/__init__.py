"""How the processes of a job meet: ranks, a Ray cluster, the launch."""
