"""What a run reports: counts -> tables -> Parquet, pages and comparisons. Every mean is derived from the counts."""
