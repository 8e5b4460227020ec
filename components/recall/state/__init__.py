"""What Redis holds: keys and scripts, events, the stream, results, ad-hoc requests."""
