"""What DAG files share; none of these modules defines a pipeline of its own."""
