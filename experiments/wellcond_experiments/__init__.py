"""The experiments of the paper and the benchmarks; they see only the public names of wellcond."""
