"""What a run needs and took: traces, plans, reports, and what is computed once per prompt."""
