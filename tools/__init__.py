"""Programs about runs: nothing here is needed to train."""
