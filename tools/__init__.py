"""Programs around a run."""
