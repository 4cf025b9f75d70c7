"""What a root needs besides runs: plans, upkeep, erasure, schedules, clusters, metrics."""
