"""What was learned: summaries, comparisons, plots and figures."""
