"""What a run needs before it runs: what its compiled programs do, and what chips can do."""
