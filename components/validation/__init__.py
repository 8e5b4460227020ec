"""Great Expectations suites and the quarantine."""
