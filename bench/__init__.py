"""Load, workloads, topologies, reports."""
